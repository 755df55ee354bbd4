"""The HTTP client of the GOLIAT dialect: every request bounded in time and size, every trouble of one kind."""

from __future__ import annotations

import ssl
import urllib.parse
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import trio

from protocol.framing import UNDECODABLE
from supervisor.link.causes import unreachable
from supervisor.link.web import ANSWER_S, Web

if TYPE_CHECKING:
    import httpx

REQUEST_S = 10.0
IDLE_S = 30.0  # without a byte
CONFIG_S = 30.0
MAX_REPLY_BYTES = 32 * 2**20  # a study lists its assignments with all their configs
MAX_CONFIG_BYTES = 16 * 2**20
LONGEST_RETRY_AFTER_S = 600.0
_AGAIN = (408, 425, 429)


class Trouble(Exception):
    """A request that came to nothing.

    Attributes:
        status: of the answer; 0 when there was none.
        again: the same request may succeed later.
        away: nobody sensible answered: no connection, a failing server, words that are not the dashboard's.
        retry_after_s: what the dashboard asked for.
    """

    def __init__(self, sentence: str, *, status: int = 0, again: bool = True, retry_after_s: float = 0.0) -> None:
        super().__init__(sentence)
        self.status, self.again, self.retry_after_s = status, again, retry_after_s

    @property
    def away(self) -> bool:
        """See the class."""
        return self.again and self.status not in _AGAIN


class Http(Web):
    """An async context manager. There is no authentication: nothing that is secret may be sent.

    Args:
        base: URL of the dashboard, with or without a path.
    """

    def __init__(self, base: str, tls: ssl.SSLContext | None = None, request_s: float = REQUEST_S) -> None:
        self._base = base.rstrip("/") + "/"
        super().__init__(tls, IDLE_S)
        self._request_s = request_s

    def url(self, path: str) -> str:
        """An address below the dashboard's; one with a scheme stays as it is."""
        return path if urllib.parse.urlsplit(path).scheme else self._base + path.lstrip("/")

    async def json(self, method: str, path: str, *, body: object = None, query: Mapping[str, str] | None = None) -> Any:
        """Send JSON, if there is any, and return the answer's. Raises Trouble."""
        content = None if body is None else msgspec.json.encode(body)
        headers = {} if content is None else {"Content-Type": "application/json"}
        where = self.url(path) + (f"?{urllib.parse.urlencode(query)}" if query else "")
        client = await self.client()
        request = client.build_request(method, where, headers=headers, content=content)
        return self.answer(await self._sent(request, MAX_REPLY_BYTES, self._request_s))

    async def config(self, url: str) -> bytes:
        """Download a config file. Raises Trouble: also when it is larger than `MAX_CONFIG_BYTES`."""
        client = await self.client()
        import httpx

        try:
            request = client.build_request("GET", self.url(url))
        except (httpx.InvalidURL, ValueError) as error:
            raise Trouble(f"the address of its config is none: {error}", again=False) from None
        if request.url.scheme not in ("http", "https") or not request.url.host:
            raise Trouble("the address of its config is neither http nor https", again=False)
        return await self._sent(request, MAX_CONFIG_BYTES, CONFIG_S)

    async def send(self, request: httpx.Request, patience: trio.CancelScope) -> Any:
        """Send what was built with `client`, whose body moves the deadline of `patience`. Raises Trouble."""
        return self.answer(await self._sent(request, MAX_REPLY_BYTES, ANSWER_S, patience))

    async def _sent(
        self, request: httpx.Request, most: int, within_s: float, patience: trio.CancelScope | None = None
    ) -> bytes:
        import httpx

        patience = patience or trio.CancelScope()
        try:
            response, body = await self.ask(request, most=most, within_s=within_s, patience=patience)
        except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as error:
            if isinstance(error, httpx.ConnectError):
                raise Trouble(unreachable("the dashboard", error)) from None
            raise Trouble(f"the dashboard cannot be reached: {type(error).__name__}: {error}".rstrip(": ")) from None
        if not response.is_success:
            raise _refusal(response, body or b"")
        if body is None and patience.cancelled_caught:
            raise Trouble("there was no whole answer in time")  # that it stalls says nothing of what was asked
        if body is None:
            problem = f"the answer is compressed, or has more than {most // 2**20} MiB"
            raise Trouble(problem, status=response.status_code, again=False)
        return body

    def answer(self, body: bytes) -> Any:
        """The JSON of a good answer. Raises Trouble: it is none, or says that nothing was done."""
        try:
            answer = msgspec.json.decode(body)
        except UNDECODABLE as error:
            raise Trouble(f"the dashboard's answer cannot be read: {error}") from None
        if isinstance(answer, Mapping) and answer.get("success") is False:
            raise Trouble(f"the dashboard says that it failed{_reason(answer)}")
        return answer


def _refusal(response: httpx.Response, body: bytes) -> Trouble:
    status = response.status_code
    try:
        told = _reason(msgspec.json.decode(body))
    except UNDECODABLE:
        told = ""
    after = response.headers.get("retry-after", "")
    return Trouble(
        f"the dashboard answered HTTP {status}{told}",
        status=status,
        again=status >= 500 or status in _AGAIN,
        retry_after_s=min(float(after), LONGEST_RETRY_AFTER_S) if after.isascii() and after.isdecimal() else 0.0,
    )


def _reason(answer: object) -> str:
    if not isinstance(answer, Mapping):
        return ""
    words = [str(answer[name])[:200] for name in ("code", "error", "details") if answer.get(name)]
    return f": {', '.join(words)}" if words else ""
