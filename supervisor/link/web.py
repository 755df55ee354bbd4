"""The one way to an HTTP client: httpx costs 0.3 s of import, so it is imported in a thread, at the first use."""

from __future__ import annotations

import importlib
import ssl
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import trio

if TYPE_CHECKING:
    import httpx


class Web:
    """An async context manager around a client that is opened when it is first asked for.

    Args:
        tls: None means the system's trust.
        timeout_s: longest without a byte, in either direction.
    """

    def __init__(self, tls: ssl.SSLContext | None, timeout_s: float) -> None:
        self._tls, self._without_a_byte_s = tls, timeout_s
        self._client: httpx.AsyncClient | None = None
        self._opening = trio.Lock()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._client is not None:
            with trio.CancelScope(shield=True), trio.move_on_after(1):
                await self._client.aclose()

    async def client(self) -> httpx.AsyncClient:
        """The client; opened at the first call."""
        async with self._opening:
            if self._client is None:
                module: Any = await trio.to_thread.run_sync(importlib.import_module, "httpx")
                self._client = module.AsyncClient(
                    verify=self._tls if self._tls is not None else True,
                    timeout=self._without_a_byte_s,
                    trust_env=False,  # a proxy of the environment must not stand before a coordinator on loopback
                    follow_redirects=False,
                )
            return self._client
