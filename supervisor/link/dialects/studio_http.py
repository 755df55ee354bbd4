"""The HTTP client of the studio dialect: small JSON, inputs in, multipart out. httpx is imported at the first use."""

from __future__ import annotations

import ssl
from typing import TypeVar

import msgspec
import trio

from supervisor.link.causes import unreachable
from supervisor.link.web import Web

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


class Http(Web):
    """An async context manager. Tokens go to the studio's own origin, redirects are followed without them."""

    def __init__(self, tls: ssl.SSLContext | None = None, timeout_s: float = TIMEOUT_S) -> None:
        super().__init__(tls, timeout_s)
        self._timeout_s = timeout_s

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
            if isinstance(error, httpx.ConnectError):
                raise Trouble(unreachable("the studio", error)) from None
            raise Trouble(f"the studio cannot be reached: {type(error).__name__}: {error}".rstrip(": ")) from None
        if len(response.content) > MAX_ANSWER_BYTES:
            raise Trouble(f"the studio's answer has {len(response.content)} bytes")
        return response.status_code, Answer(response.content, response.headers.get("retry-after", ""))
