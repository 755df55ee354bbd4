"""One connected span with a studio, from TCP to its end as data.

Theory of operation. As in `supervisor.link.session`: one deadline over connect as a whole; nothing but `hello` before
welcome; then a reader, a writer and a heart share the span and end as one. Each heartbeat is answered, so a socket on
which nothing is read for four beats is dead, whatever TCP and WebSocket pings think. After a sleep of the machine the
server is asked at once, and has one beat to answer.
"""

from __future__ import annotations

import collections
import datetime
import logging
import ssl
import urllib.parse
from typing import NamedTuple

import msgspec
import trio
from msgspec import UNSET
from trio_websocket import (
    CloseReason,
    ConnectionClosed,
    ConnectionRejected,
    HandshakeError,
    WebSocketConnection,
)

from supervisor.link.causes import beside, broken_words, closed_words, first, rejected_words
from supervisor.link.dialects import studio_frames as frames
from supervisor.link.dialects.studio_claims import Claims
from supervisor.link.session import SessionEnd, Side, Why
from supervisor.link.upgrade import Stream, open_stream, upgrade
from supervisor.observe.paced import QUOTED_CHARS, Paced
from supervisor.suspend import Clocks, SleepWatch

log = logging.getLogger(__name__)

INBOX_FRAMES = 64
MAX_WAITING = 256  # frames; beyond it lines of the log are dropped, the rest is bounded by one job at a time
MAX_UNREAD = 4 * MAX_WAITING  # frames; whoever lets more wait does not read
SKEW_S = 5.0
SLEEP_LOOK_S = 1.0


class Pace(msgspec.Struct, frozen=True, kw_only=True):
    """How fast a session goes, in seconds; tests go faster.

    Attributes:
        beat_s: between heartbeats.
        soonest_s: between heartbeats when what is announced has changed.
        silent_s: without a frame, after which the connection is dead.
        connect_s: TCP, TLS, upgrade and welcome as a whole.
        tick_s: of the claims' own clock.
        close_s: for the closing handshake.
    """

    beat_s: float = 5.0
    soonest_s: float = 1.0
    silent_s: float = 20.0
    connect_s: float = 15.0
    tick_s: float = 0.5
    close_s: float = 0.25


class Door(NamedTuple):
    """Where and as whom a session is opened. `base` is {B}."""

    base: str
    worker_id: str
    token: str
    tls: ssl.SSLContext | None

    @property
    def url(self) -> str:
        """Of the socket."""
        return f"ws{self.base.removeprefix('http')}/workers/{urllib.parse.quote(self.worker_id, safe='')}/connect"


_BY_CLOSE_CODE = {
    frames.CLOSE_AUTH: Why.REFUSED,
    frames.CLOSE_PROTOCOL: Why.PROTOCOL,
    frames.CLOSE_DUPLICATE: Why.DUPLICATE,
    frames.CLOSE_DELETED: Why.DELETED,
}
_BY_ERROR_CODE = {
    "auth_failed": Why.REFUSED,
    "protocol_violation": Why.PROTOCOL,
    "duplicate_worker": Why.DUPLICATE,
    "worker_deleted": Why.DELETED,
}


class _Over(Exception):
    """Carries the end of the session out of the loops. `theirs`: the server says that we broke its rules."""

    def __init__(self, why: Why, sentence: str, *, theirs: bool = False) -> None:
        super().__init__(sentence)
        self.why, self.sentence, self.theirs = why, sentence, theirs


async def converse(door: Door, claims: Claims, side: Side, pace: Pace, clocks: Clocks | None = None) -> SessionEnd:
    """Connect, greet and talk until the session ends; never raises for what the network or the peer does.

    Args:
        clocks: by which a sleep of the machine is noticed; the system's unless told.

    Cancellation: the connection is closed properly, within `close_s`.
    """
    span = _Span(door, claims, side, pace, clocks)
    try:
        async with trio.open_nursery() as nursery:
            await span.talk(nursery)
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        over = _translated(group, door.base)
        if over is None:
            raise beside(group, _KNOWN) from None
        claims.finish(over.theirs)
        return SessionEnd(over.why, over.sentence, span.lasted_s)
    finally:
        claims.finish(False)
    raise AssertionError("a session ends by raising")  # pragma: no cover


class _Span:
    def __init__(self, door: Door, claims: Claims, side: Side, pace: Pace, clocks: Clocks | None) -> None:
        self._door, self._claims, self._side, self._pace, self._clocks = door, claims, side, pace, clocks
        self._patience = trio.CancelScope()
        self._sleepy = False  # it slept since we last heard anything
        self._waiting: collections.deque[frames.Up] = collections.deque()
        self._bell = trio.Event()
        self._changed = trio.Event()
        self._opened_at: float | None = None
        self._stream: Stream | None = None
        self._odd = Paced(log, "frames that meant nothing")

    @property
    def lasted_s(self) -> float:
        return 0.0 if self._opened_at is None else trio.current_time() - self._opened_at

    async def talk(self, nursery: trio.Nursery) -> None:
        """The whole span; ends by raising."""
        socket: WebSocketConnection | None = None
        try:
            with trio.move_on_after(self._pace.connect_s) as connecting:
                socket = await self._connect(nursery)
                hello = self._side.hello()
                greeting = frames.Hello(auth_token=self._door.token, capabilities=self._claims.greeting(hello))
                await socket.send_message(frames.encode(greeting))
                await self._welcomed(socket)
            if connecting.cancelled_caught or socket is None:
                raise _Over(Why.LOST, f"{self._door.base} did not welcome us in {self._pace.connect_s:g} s")
            self._opened_at = trio.current_time()
            self._claims.on_change = self._changed_now
            self._claims.begin(self._side, self._put, hello)
            nursery.start_soon(self._write, socket)
            nursery.start_soon(self._beat)
            nursery.start_soon(self._tick)
            nursery.start_soon(SleepWatch(self._slept, clocks=self._clocks, interval_s=SLEEP_LOOK_S).run)
            await self._read(socket)
        finally:
            self._odd.flush()
            self._claims.on_change = lambda: None
            if socket is not None:
                with trio.CancelScope(shield=True), trio.move_on_after(self._pace.close_s):
                    await socket.aclose()
            if self._stream is not None:  # a stalled upgrade leaves no socket to close it by
                await trio.aclose_forcefully(self._stream)

    async def _connect(self, nursery: trio.Nursery) -> WebSocketConnection:
        parts = urllib.parse.urlsplit(self._door.url)
        self._stream = await open_stream(parts, self._door.tls)
        socket = await upgrade(
            nursery,
            self._stream,
            parts,
            frames.SUBPROTOCOL,
            [(b"Authorization", b"Bearer " + self._door.token.encode())],
            max_message_bytes=frames.MAX_FRAME_BYTES,
            inbox=INBOX_FRAMES,
        )
        if socket is None:
            raise _Over(Why.LOST, f"{self._door.base} closed the connection during the upgrade")
        if socket.closed is not None:
            raise _closed(socket.closed)
        if socket.subprotocol != frames.SUBPROTOCOL:
            raise _Over(Why.REVISION, f"{self._door.base} does not speak {frames.SUBPROTOCOL}")
        return socket

    async def _welcomed(self, socket: WebSocketConnection) -> None:
        while True:
            frame = await self._receive(socket)
            if isinstance(frame, frames.Welcome):
                break
            if frame is not None:
                self._odd.say(logging.WARNING, "the studio sent something before its welcome")
        as_whom = (frame.worker_id or self._door.worker_id)[:QUOTED_CHARS]
        log.info("welcomed by %s as %s", self._door.base, as_whom)
        if skew_s := _skew_s(frame.server_time, datetime.datetime.now(datetime.UTC)):
            log.warning("the studio's clock and ours differ by %.0f s", skew_s)

    # ---- the loops

    def _put(self, frame: frames.Up) -> None:
        if isinstance(frame, frames.LogBatch) and len(self._waiting) >= MAX_WAITING:
            return
        self._waiting.append(frame)
        self._bell.set()

    async def _write(self, socket: WebSocketConnection) -> None:
        try:
            while True:
                while self._waiting:
                    await socket.send_message(frames.encode(self._waiting.popleft()))
                await self._bell.wait()
                self._bell = trio.Event()
        except ConnectionClosed:
            pass  # the reader learns the reason, and it leaves for both

    def _changed_now(self) -> None:
        self._changed.set()

    async def _beat(self) -> None:
        last = None
        while True:
            await trio.sleep(self._pace.soonest_s)
            with trio.move_on_after(max(0.0, self._pace.beat_s - self._pace.soonest_s)) as rest:
                while True:
                    await self._changed.wait()
                    self._changed = trio.Event()
                    if self._claims.capabilities != last:
                        rest.cancel()
                        await trio.lowlevel.checkpoint()
            last = self._claims.capabilities
            self._put_beat(last)

    def _put_beat(self, capabilities: frames.Capabilities) -> None:
        self._put(frames.Heartbeat(capabilities=capabilities, current_job_id=self._claims.current_job or UNSET))

    def _slept(self, seconds: float) -> None:
        """The machine did; whatever was left of our patience was meant for a server that heard us all the while."""
        log.info("the machine slept for %.0f s; is the studio still there?", seconds)
        self._put_beat(self._claims.capabilities)
        self._sleepy = True
        self._patience.deadline = min(self._patience.deadline, trio.current_time() + self._pace.beat_s)

    async def _tick(self) -> None:
        while True:
            await trio.sleep(self._pace.tick_s)
            if why := self._claims.tick():
                raise _Over(Why.LOST, why)

    async def _read(self, socket: WebSocketConnection) -> None:
        while True:
            self._sleepy = False
            with trio.move_on_after(self._pace.silent_s) as self._patience:
                frame = await self._receive(socket)
            if self._patience.cancelled_caught:
                how = "after the machine slept" if self._sleepy else f"for {self._pace.silent_s:g} s"
                raise _Over(Why.LOST, f"{self._door.base} was silent {how}")
            if frame is not None:
                self._claims.hear(frame)
            if len(self._waiting) > MAX_UNREAD:
                raise _Over(Why.LOST, f"{self._door.base} does not read what it is answered")

    async def _receive(self, socket: WebSocketConnection) -> frames.Down | None:
        """The next frame; None for one that means nothing to us."""
        message = await socket.get_message()
        if not isinstance(message, str):
            raise _Over(Why.PROTOCOL, "the studio sent a binary frame on a link of text")
        try:
            frame = frames.read(message)
        except frames.Unreadable as problem:
            self._odd.say(logging.WARNING, "ignored: %s", str(problem)[:QUOTED_CHARS])
            return None
        if isinstance(frame, frames.Error):
            why = _BY_ERROR_CODE.get(frame.code, Why.LOST)
            said = f"the studio ended the session: {frame.code}{f': {frame.message}' if frame.message else ''}"
            said = said[:QUOTED_CHARS]
            raise _Over(why, said, theirs=why is Why.PROTOCOL)
        return frame


def _skew_s(server_time: str, now: datetime.datetime) -> float:
    """How far the clocks are apart, when that is worth a word; 0 else."""
    try:
        told = datetime.datetime.fromisoformat(server_time)
    except ValueError:
        return 0.0
    if told.tzinfo is None:
        told = told.replace(tzinfo=datetime.UTC)
    skew_s = abs((told - now).total_seconds())
    return skew_s if skew_s >= SKEW_S else 0.0


# ---- endings ------------------------------------------------------------------------------------------------


def _closed(reason: CloseReason | None) -> _Over:
    if reason is None:
        return _Over(Why.LOST, "the connection was closed")
    why = _BY_CLOSE_CODE.get(reason.code, Why.LOST)
    return _Over(why, closed_words(reason), theirs=why is Why.PROTOCOL)


def _rejected(error: ConnectionRejected) -> _Over:
    return _Over(Why.REFUSED if error.status_code in (401, 403) else Why.LOST, rejected_words("studio", error))


_KNOWN = (_Over, ConnectionClosed, HandshakeError, OSError, trio.BrokenResourceError, trio.ClosedResourceError)


def _translated(group: BaseExceptionGroup[BaseException], base: str) -> _Over | None:
    """The one place where foreign errors become our ending; None when something else went wrong too."""
    if group.split(_KNOWN)[1] is not None:
        return None
    if over := first(group, _Over):
        return over
    if rejected := first(group, ConnectionRejected):
        return _rejected(rejected)
    if closed := first(group, ConnectionClosed):
        return _closed(closed.reason)
    return _Over(Why.LOST, broken_words(base, group))
