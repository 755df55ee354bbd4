"""The one way to an HTTP client, and to an answer that is bounded whatever the server does.

httpx costs 0.3 s of import, so it is imported in a thread, at the first use. Nobody is believed about what comes: an
answer has a size and a time, nothing is unpacked (a kilobyte may unpack to a gigabyte, and that at one blow), and no
cookie is kept.
"""

from __future__ import annotations

import http.cookiejar
import importlib
import ssl
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import trio

if TYPE_CHECKING:
    import httpx

MAX_ANSWER_BYTES = 2**20
# From the last byte that went out to the end of the answer: a coordinator may read 2 GiB from its store meanwhile.
ANSWER_S = 120.0


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
                    headers={"Accept-Encoding": "identity"},
                    cookies=http.cookiejar.CookieJar(http.cookiejar.DefaultCookiePolicy(allowed_domains=())),
                )
            return self._client

    async def ask(
        self,
        request: httpx.Request,
        *,
        most: int = MAX_ANSWER_BYTES,
        within_s: float = ANSWER_S,
        patience: trio.CancelScope | None = None,
    ) -> tuple[httpx.Response, bytes | None]:
        """Send what was built with `client`, and read the answer.

        Args:
            within_s: for the whole; whoever sends a file moves the deadline of `patience` while it goes out.

        Returns:
            The response, and its body: None when that is longer than `most`, compressed, or does not end in time.

        Raises:
            httpx.RequestError, httpx.StreamError: there was no answer.
        """
        client = await self.client()
        import httpx

        from supervisor.link.pieces import Held

        if isinstance(request.stream, httpx.ByteStream):  # a generator, which nobody closes when the sending breaks off
            request.stream = Held(request.content, lambda _count: None)
        response: httpx.Response | None = None
        body: bytes | None = None
        patience = patience or trio.CancelScope()
        patience.deadline = trio.current_time() + within_s
        with patience:
            response = await client.send(request, stream=True)
            try:
                body = await _body(response, most)
            finally:
                with trio.CancelScope(shield=True), trio.move_on_after(1):
                    await response.aclose()
        if response is None:
            raise httpx.ReadTimeout(f"no answer in time ({within_s:g} s)", request=request)
        return response, body


class Moving:
    """Tells `moved` of bytes of a request that go out, and gives its answer new patience with each."""

    def __init__(self, moved: Callable[[int], None], patience: trio.CancelScope | None = None) -> None:
        self._moved, self.patience = moved, patience or trio.CancelScope()

    def __call__(self, count: int) -> None:
        self.patience.deadline = trio.current_time() + ANSWER_S
        self._moved(count)


def is_packed(response: httpx.Response) -> bool:
    """Whether a body is compressed, which nobody asked for."""
    return response.headers.get("content-encoding", "identity").strip().lower() not in ("identity", "")


async def _body(response: httpx.Response, most: int) -> bytes | None:
    if is_packed(response):
        return None
    pieces, size = [], 0
    # httpx iterates by generators within generators, which only end well from inside: so no `break`, no error and no
    # cancellation may happen between two pieces.
    with trio.CancelScope() as enough:
        async for piece in response.aiter_raw(2**18):
            size += len(piece)
            if size > most:
                enough.cancel()
            else:
                pieces.append(piece)
    return None if size > most else b"".join(pieces)
