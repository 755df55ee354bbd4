"""HTTP with clients of the control API: bounded, one request a connection, streams for those who go on reading.

Theory of operation. Whoever listens (server.py: the owner's socket; loopback.py: the page) says who is a stranger and
what a request must not carry; everything else is the same for both and is here. Clients are hostile by accident at
most, and still bounded: requests have a bounded size and must come within `PATIENCE_S`, at most `MOST` connections are
open at once and at most `MOST_STREAMS` of them are streams, and every piece that is sent must be taken within
`PATIENCE_S`. A client that fails any of it loses its own connection and nothing else.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Generic, TypeVar

import h11
import trio

from supervisor.control.exchange import API, Answer, Refused, Request, Response, Stream, error
from supervisor.version import version

log = logging.getLogger(__name__)

MOST = 48  # connections at once
MOST_STREAMS = 16  # of them, those that stay
PATIENCE_S = 5.0  # for a whole request, and for the client to take a piece of the answer
HEARD_S = 0.2  # for one who is refused to get its request off its chest: else it sees a broken pipe, not the reason
MAX_HEAD_BYTES = 16 * 1024
MAX_BODY_BYTES = 64 * 1024

StreamT = TypeVar("StreamT", bound=trio.abc.HalfCloseableStream)


class Conversations(Generic[StreamT]):
    """See the module.

    Args:
        answer: from request to answer; may take its time.
        stranger: a refusal for a peer who has no business here, before anything is read.
        check: raises `Refused` for a request that must not be answered.
        headers: besides the usual ones, on every answer.
    """

    def __init__(
        self,
        answer: Callable[[Request], Awaitable[Answer]],
        *,
        stranger: Callable[[StreamT], Response | None] = lambda _stream: None,
        check: Callable[[Request], None] = lambda _request: None,
        headers: Mapping[str, str] = {},
    ) -> None:
        self._answer, self._stranger, self._check = answer, stranger, check
        self._headers = dict(headers)
        self._open = self._streams = 0

    async def serve(self, listeners: list[trio.SocketListener]) -> None:
        """Accept until cancelled. A process without descriptors left pauses instead of ending."""
        await trio.serve_listeners(self._connected, listeners)

    async def _connected(self, stream: StreamT) -> None:
        """One connection; whatever happens on it stays there."""
        self._open += 1
        try:
            await self._converse(stream)
        except (trio.BrokenResourceError, trio.ClosedResourceError, h11.LocalProtocolError):
            pass  # it has left
        except Exception:
            log.exception("a request to the control API failed")
        finally:
            self._open -= 1
            with trio.CancelScope() as now:
                now.cancel()  # close at once: nobody is waited for
                await stream.aclose()

    async def _converse(self, stream: StreamT) -> None:
        wire = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD_BYTES)
        refusal = self._stranger(stream)
        if refusal is None and self._open > MOST:
            refusal = error(503, f"{MOST} connections are open already.")
            refusal = refusal._replace(headers={"retry-after": "1"})
        if refusal is not None:
            with trio.move_on_after(HEARD_S):
                await stream.receive_some(MAX_HEAD_BYTES)
            await self._send(stream, wire, refusal)
            return
        found: Answer | Request | None = error(408, f"The request did not come within {PATIENCE_S:g} s.")
        with trio.move_on_after(PATIENCE_S):
            found = await self._heard(stream, wire)
        if isinstance(found, Request):
            found = await self._answered(found)
        if isinstance(found, Stream):
            await self._go_on(stream, wire, found)
        elif found is not None:
            await self._send(stream, wire, found)

    async def _heard(self, stream: StreamT, wire: h11.Connection) -> Request | Response | None:
        """One request, or a refusal of it; None when the client left without one."""
        try:
            request = await _read(stream, wire)
            if request is not None:
                self._check(request)
        except Refused as refusal:
            return error(refusal.status, str(refusal), **refusal.more)
        except h11.RemoteProtocolError as problem:
            return error(problem.error_status_hint, f"This is no HTTP request: {problem}.")
        return request

    async def _answered(self, request: Request) -> Answer:
        try:
            return await self._answer(request)
        except Exception:
            log.exception("%s %s failed", request.method, request.path)
            return error(500, "A mistake of ours; the supervisor's log has it.")

    async def _go_on(self, stream: StreamT, wire: h11.Connection, answer: Stream) -> None:
        """Send pieces until there are no more or the client leaves."""
        if self._streams >= MOST_STREAMS:
            await self._send(stream, wire, error(503, f"{MOST_STREAMS} streams are open already."))
            return
        self._streams += 1
        parts = answer.parts
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(_left, stream, nursery.cancel_scope)
                await _push(stream, self._head(wire, 200, answer.kind, {}))
                async for part in parts:
                    await _push(stream, wire.send(h11.Data(data=part)) or b"")
                await _push(stream, wire.send(h11.EndOfMessage()) or b"")
                nursery.cancel_scope.cancel()
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # it has left
        finally:
            self._streams -= 1
            if (close := getattr(parts, "aclose", None)) is not None:
                with trio.CancelScope(shield=True), contextlib.suppress(Exception):
                    await close()

    def _head(self, wire: h11.Connection, status: int, kind: str, more: Mapping[str, str]) -> bytes:
        headers = {
            "content-type": kind,
            "cache-control": "no-store",
            "x-content-type-options": "nosniff",
            "x-bulkhead-version": version(),
            "x-bulkhead-api": str(API),
            "connection": "close",
            **self._headers,
            **more,
        }
        if wire.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            return wire.send(h11.Response(status_code=status, headers=list(headers.items()))) or b""
        # The request was no HTTP, and h11 has given this connection up.
        lines = [f"HTTP/1.1 {status} Refused", *(f"{name}: {value}" for name, value in headers.items())]
        return "\r\n".join([*lines, "", ""]).encode()

    async def _send(self, stream: StreamT, wire: h11.Connection, response: Response) -> None:
        """Send the answer; a client that does not take it is dropped after `PATIENCE_S`."""
        length = {"content-length": str(len(response.body))}
        data = self._head(wire, response.status, response.kind, {**length, **response.headers})
        if wire.our_state is h11.SEND_BODY:
            with contextlib.suppress(h11.LocalProtocolError):  # the answer to HEAD has no body
                data += wire.send(h11.Data(data=response.body)) or b""
                data += wire.send(h11.EndOfMessage()) or b""
        else:
            data += response.body
        with trio.move_on_after(PATIENCE_S):
            await stream.send_all(data)
            await stream.send_eof()


async def _push(stream: trio.abc.SendStream, data: bytes) -> None:
    with trio.move_on_after(PATIENCE_S) as patience:
        await stream.send_all(data)
    if patience.cancelled_caught:
        raise trio.BrokenResourceError("the client does not read")


async def _left(stream: trio.abc.ReceiveStream, scope: trio.CancelScope) -> None:
    """Cancel `scope` when the client closes. What else it sends is thrown away: it has asked its one question."""
    with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        while await stream.receive_some(4096):
            pass
    scope.cancel()


async def _read(stream: trio.abc.ReceiveStream, wire: h11.Connection) -> Request | None:
    head: h11.Request | None = None
    body = bytearray()
    while True:
        event = wire.next_event()
        if event is h11.NEED_DATA:
            wire.receive_data(bytes(await stream.receive_some(16 * 1024)))
        elif isinstance(event, h11.Request):
            head = event
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > MAX_BODY_BYTES:
                raise Refused(413, f"The body exceeds {MAX_BODY_BYTES} bytes.")
        elif isinstance(event, h11.EndOfMessage) and head is not None:
            headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in head.headers}
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            return Request(head.method.decode(), head.target.decode("latin-1"), bytes(body), kind, headers)
        else:
            return None  # it closed the connection
