"""What is asked and answered over the control API, whichever way it comes: requests, responses, streams, refusals."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import msgspec

API = 1
JSON = "application/json"
EVENTS = "text/event-stream"
# A comment on a quiet stream, so that whoever reads knows that we live.
KEEP_ALIVE = b": alive\n\n"
KEEP_ALIVE_S = 15.0


class Request(NamedTuple):
    """One request.

    Attributes:
        target: as it came, with its query.
        kind: content type in lower case, without parameters.
        headers: by lower-case name; of repeated ones the last.
        params: what the braces of the route's pattern stand for, decoded.
    """

    method: str
    target: str
    body: bytes = b""
    kind: str = ""
    headers: Mapping[str, str] = {}
    params: Mapping[str, str] = {}

    @property
    def path(self) -> str:
        """Without the query."""
        return self.target.partition("?")[0]

    @property
    def query(self) -> dict[str, str]:
        """By name; of repeated ones the last."""
        return dict(parse_qsl(self.target.partition("?")[2], keep_blank_values=True, max_num_fields=50))


class Response(NamedTuple):
    """One response; `headers` are those besides the usual ones."""

    status: int
    body: bytes
    kind: str = JSON
    headers: Mapping[str, str] = {}


class Stream(NamedTuple):
    """A response that goes on for as long as the client reads: `parts` yields ready pieces of the body.

    The iterator is closed when the client leaves or the supervisor ends. A client that does not take a piece in time
    loses its connection.
    """

    parts: AsyncIterator[bytes]
    kind: str = EVENTS


Answer = Response | Stream
# A handler: at once, or later when it has to wait for something.
Handler = Callable[[Request, Any], Answer | Awaitable[Answer]]


class Refused(Exception):
    """The request is answered with `status` and this sentence.

    Args:
        more: further members of the error object.
    """

    def __init__(self, status: int, sentence: str, **more: object) -> None:
        super().__init__(sentence)
        self.status, self.more = status, more


def error(status: int, sentence: str, **more: object) -> Response:
    """An answer that says what is wrong."""
    return reply({"error": {"message": sentence, **more}}, status)


def reply(value: object, status: int = 200, **headers: str) -> Response:
    """An answer in JSON; keywords become headers, with `_` for `-`."""
    names = {name.replace("_", "-"): text for name, text in headers.items()}
    return Response(status, msgspec.json.encode(value) + b"\n", JSON, names)


def body(request: Request, type_: type[Any]) -> Any:
    """The body of a request.

    Raises:
        Refused: it is no JSON, or not of this type.
    """
    if request.body and request.kind != JSON:
        raise Refused(415, f"The body must be {JSON}, not {request.kind[:100] or 'of an unnamed type'}.")
    try:
        return msgspec.json.decode(request.body or b"{}", type=type_)
    except (msgspec.MsgspecError, UnicodeDecodeError) as problem:
        raise Refused(400, f"The body is wrong: {problem}.") from None


def query(request: Request, type_: type[Any]) -> Any:
    """The query of a request, as a struct whose fields are all optional.

    Raises:
        Refused: a name that there is not, or a value that is not of its type.
    """
    try:
        return msgspec.convert(request.query, type_, strict=False)
    except (msgspec.ValidationError, ValueError) as problem:
        raise Refused(400, f"The query is wrong: {problem}.") from None


def event(name: str, data: object, number: int | None = None) -> bytes:
    """One server-sent event; its data is one line of JSON."""
    head = b"" if number is None else b"id: %d\n" % number
    return head + b"event: " + name.encode() + b"\ndata: " + msgspec.json.encode(data) + b"\n\n"
