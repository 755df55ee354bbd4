"""The HTTP client of the studio dialect: small JSON, inputs in, multipart out. httpx is imported at the first use."""

from __future__ import annotations

import importlib
import ssl
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import trio

if TYPE_CHECKING:
    import httpx

TIMEOUT_S = 60.0
MAX_ANSWER_BYTES = 2**20
_Type = TypeVar("_Type")


class Trouble(Exception):
    """A request that came to nothing and may be tried again; `retry_after_s` is what the server asked for."""

    def __init__(self, sentence: str, retry_after_s: float | None = None) -> None:
        super().__init__(sentence)
        self.retry_after_s = retry_after_s


class Answer:
    """What came back."""

    def __init__(self, body: bytes, retry_after: str = "") -> None:
        self.body = body
        self.retry_after_s = float(retry_after) if retry_after.isdecimal() else None

    def read(self, type_: type[_Type]) -> _Type:
        """As this struct. Raises Trouble."""
        try:
            return msgspec.json.decode(self.body, type=type_)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise Trouble(f"the studio's answer cannot be read: {error}") from None


class Http:
    """An async context manager. Tokens go to the studio's own origin, redirects are followed without them."""

    def __init__(self, tls: ssl.SSLContext | None = None, timeout_s: float = TIMEOUT_S) -> None:
        self._tls, self._timeout_s = tls, timeout_s
        self._client: httpx.AsyncClient | None = None
        self._opening = trio.Lock()

    async def __aenter__(self) -> Http:
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
                    timeout=self._timeout_s,
                    trust_env=False,  # a proxy of the environment must not stand before a studio on loopback
                    follow_redirects=False,
                )
            return self._client

    async def json(self, method: str, url: str, *, token: str = "", body: object = None) -> tuple[int, Answer]:
        """Send JSON, if there is any, and return the status and the answer. Raises Trouble: there was none."""
        client = await self.client()
        import httpx

        headers = {"Authorization": f"Bearer {token}"} if token else {}
        content = None if body is None else msgspec.json.encode(body)
        if content is not None:
            headers["Content-Type"] = "application/json"
        try:
            with trio.fail_after(self._timeout_s):
                response = await client.request(method, url, headers=headers, content=content)
        except (httpx.HTTPError, httpx.StreamError, trio.TooSlowError) as error:
            raise Trouble(f"the studio cannot be reached: {type(error).__name__}: {error}".rstrip(": ")) from None
        if len(response.content) > MAX_ANSWER_BYTES:
            raise Trouble(f"the studio's answer has {len(response.content)} bytes")
        return response.status_code, Answer(response.content, response.headers.get("retry-after", ""))
