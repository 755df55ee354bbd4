"""The HTTP client of the studio dialect: small JSON, inputs in, multipart out. httpx is imported at the first use."""

from __future__ import annotations

import ssl
from typing import TypeVar

import msgspec

from protocol.framing import UNDECODABLE
from supervisor.link.causes import unreachable
from supervisor.link.web import MAX_ANSWER_BYTES, Web

TIMEOUT_S = 60.0
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
        except UNDECODABLE as error:
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
            request = client.build_request(method, url, headers=headers, content=content)
            response, told = await self.ask(request, most=MAX_ANSWER_BYTES, within_s=self._timeout_s)
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as error:
            if isinstance(error, httpx.ConnectError):
                raise Trouble(unreachable("the studio", error)) from None
            raise Trouble(f"the studio cannot be reached: {type(error).__name__}: {error}".rstrip(": ")) from None
        if told is None:
            most = MAX_ANSWER_BYTES // 2**20
            raise Trouble(f"the studio's answer is compressed, has more than {most} MiB, or does not end")
        return response.status_code, Answer(told, response.headers.get("retry-after", ""))
