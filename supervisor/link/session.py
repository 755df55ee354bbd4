"""One connected span with the coordinator, from TCP to its end as data.

Theory of operation. `connect_s` covers name, TCP, TLS, upgrade, hello and welcome as a whole: a peer that stalls
in any of them is left. Then three loops share the span: the reader, which hands what it hears to the side; the
writer, which sends what `post` was given; and the heart, which beats. Every beat is answered, so silence
for three beats means that the connection is dead, whatever TCP thinks; the reader then leaves, and takes the other
two with it. A peer that talks and answers no beat is left after six. After a sleep of the machine the connection is
most often gone, and nobody has told us: it is asked at once, and has one beat to answer. `LinkSession` judges every
message in both directions before it counts.
"""

from __future__ import annotations

import enum
import logging
import ssl
import urllib.parse
from collections.abc import Callable
from typing import Protocol

import msgspec
import trio
from trio_websocket import (
    CloseReason,
    ConnectionClosed,
    ConnectionRejected,
    HandshakeError,
    WebSocketConnection,
)

from protocol import link_wire as wire
from protocol.ids import MAX_ID_BYTES
from protocol.link_session import LinkProtocolError, LinkSession, Role
from protocol.revision import LINK_SUBPROTOCOL, LINK_WIRE
from supervisor.link.causes import beside, broken_words, closed_words, first, rejected_words
from supervisor.link.turns import Turns
from supervisor.link.upgrade import Stream, open_stream, upgrade
from supervisor.observe.paced import QUOTED_CHARS, Paced
from supervisor.suspend import Clocks, SleepWatch

log = logging.getLogger(__name__)

SILENT_BEATS = 3
UNANSWERED_BEATS = 6  # by a peer that is not silent: it may have much to do before it comes to them
MIN_HEARTBEAT_S, MAX_HEARTBEAT_S = 0.1, 300.0
SLEEP_LOOK_S = 1.0
MAX_WAITING = 10_000  # messages besides those of streams; who lets more wait does not read, whatever it says itself
CLOSE_GOING_AWAY = 1001
CLOSE_PATIENCE_S = 0.25  # for the closing handshake with a peer that may be gone

Post = Callable[[wire.Body, str, int], None]


class Address(msgspec.Struct, frozen=True, kw_only=True):
    """Where the coordinator is and what opens its door.

    Attributes:
        url: ws:// or wss:// address, with or without a path prefix.
        token: bearer token of this worker; never logged.
        connect_s: deadline over the whole way to `welcome`.
        tls: context for wss://; None means the system's trust.
    """

    url: str
    token: str
    connect_s: float = 15.0
    tls: ssl.SSLContext | None = None

    @property
    def worker_url(self) -> str:
        """Address of the WebSocket route."""
        base = self.url.rstrip("/")
        return base if base.endswith("/v1/worker") else base + "/v1/worker"

    @property
    def http_url(self) -> str:
        """What relative URLs of files belong to; ends with a slash."""
        return "http" + self.worker_url.removesuffix("v1/worker").removeprefix("ws")

    def __repr__(self) -> str:
        return f"Address({self.url!r})"


class Why(enum.Enum):
    """Why a session ended."""

    LOST = "lost"  # network, silence, a coordinator that stops
    PROTOCOL = "protocol"  # one of the two broke the rules of the link
    REFUSED = "refused"  # authentication, revoked
    DUPLICATE = "duplicate"  # a newer session of the same worker id
    DELETED = "deleted"
    REVISION = "revision"


_FINAL = frozenset({Why.REFUSED, Why.DUPLICATE, Why.DELETED, Why.REVISION})
_BY_CLOSE_CODE = {
    wire.CLOSE_AUTH: Why.REFUSED,
    wire.CLOSE_PROTOCOL: Why.PROTOCOL,
    wire.CLOSE_DUPLICATE: Why.DUPLICATE,
    wire.CLOSE_DELETED: Why.DELETED,
    wire.CLOSE_REVISION: Why.REVISION,
}
_BY_ERROR_CODE = {
    "auth_failed": Why.REFUSED,
    "protocol_violation": Why.PROTOCOL,
    "duplicate_worker": Why.DUPLICATE,
    "worker_deleted": Why.DELETED,
    "bad_revision": Why.REVISION,
}


class SessionEnd(msgspec.Struct, frozen=True):
    """How a session ended. `lasted_s` counts from welcome; 0 when there was none.

    Attributes:
        sent_on: the coordinator goes, and said so (1001): where it is one of several, another one takes us.
    """

    why: Why
    sentence: str
    lasted_s: float = 0.0
    sent_on: bool = False

    @property
    def final(self) -> bool:
        """Whether trying again is pointless."""
        return self.why in _FINAL


class Side(Protocol):
    """Whom a session speaks for. Nothing here may block."""

    def hello(self) -> wire.Hello:
        """The first message."""

    def opened(self, post: Post) -> None:
        """Welcome came; `post` sends until `closed`."""

    def heard(self, body: wire.Body, job: str, attempt: int) -> None:
        """A legal message came."""

    def broken_offer(self, job: str, attempt: int, reason: str) -> None:
        """An offer came whose body cannot be read: it has to be declined."""

    def closed(self) -> None:
        """The session is over; `post` must not be used any more."""

    def holds(self, job: str, attempt: int) -> bool:
        """Whether this attempt is known here already."""

    def leave(self, job: str, attempt: int) -> bool:
        """Nobody will ask for the result of this attempt before the worker ends: what is kept of it is delivered after
        the next start. False where nothing is kept, and nothing was done."""

    @property
    def running(self) -> int:
        """Attempts that have not ended."""

    def heartbeat(self, n: int) -> wire.Heartbeat:
        """The next one."""


class _Over(Exception):
    """Carries the end of the session out of the loops."""

    def __init__(self, why: Why, sentence: str, *, sent_on: bool = False) -> None:
        super().__init__(sentence)
        self.why = why
        self.sentence = sentence
        self.sent_on = sent_on


async def converse(address: Address, side: Side, clocks: Clocks | None = None) -> SessionEnd:
    """Connect, greet and talk until the session ends; never raises for what the network or the peer does.

    Args:
        address: where to.
        side: for whom.
        clocks: by which a sleep of the machine is noticed; the system's unless told.

    Cancellation: the connection is closed properly, within `CLOSE_PATIENCE_S`.
    """
    span = _Span(address, side, clocks)
    try:
        async with trio.open_nursery() as nursery:
            await span.talk(nursery)
            nursery.cancel_scope.cancel()
    except BaseExceptionGroup as group:
        over = _translated(group)
        if over is None:
            raise beside(group, _KNOWN) from None
        return SessionEnd(over.why, over.sentence, span.lasted_s, over.sent_on)
    raise AssertionError("a session ends by raising")  # pragma: no cover


class _Span:
    def __init__(self, address: Address, side: Side, clocks: Clocks | None) -> None:
        self._address = address
        self._side = side
        self._clocks = clocks
        self._session = LinkSession(Role.WORKER)
        self._waiting = Turns()
        self._bell = trio.Event()
        self._mistake: LinkProtocolError | None = None
        self._beat_s = 5.0
        self._beats = self._answered = 0
        self._patience = trio.CancelScope()
        self._closing = False
        self._sleepy = False  # it slept since we last heard anything
        self._opened_at: float | None = None
        self._stream: Stream | None = None
        self._odd = Paced(log, "messages that meant nothing")

    @property
    def lasted_s(self) -> float:
        return 0.0 if self._opened_at is None else trio.current_time() - self._opened_at

    async def talk(self, nursery: trio.Nursery) -> None:
        """The whole span; ends by raising."""
        socket: WebSocketConnection | None = None
        try:
            with trio.move_on_after(self._address.connect_s) as connecting:
                socket = await self._connect(nursery)
                await self._greet(socket)
            if connecting.cancelled_caught or socket is None:
                raise _Over(Why.LOST, f"{self._address.url} did not welcome us in {self._address.connect_s:g} s")
            self._opened_at = trio.current_time()
            self._side.opened(self.post)
            nursery.start_soon(self._write, socket)
            nursery.start_soon(self._keep_beating)
            nursery.start_soon(SleepWatch(self._slept, clocks=self._clocks, interval_s=SLEEP_LOOK_S).run)
            await self._read(socket)
        finally:
            self._closing = True
            self._odd.flush()
            if self._opened_at is not None:
                self._side.closed()
            if socket is not None:
                await self._close(socket)
            if self._stream is not None:  # a stalled upgrade leaves no socket to close it by
                await trio.aclose_forcefully(self._stream)

    async def _connect(self, nursery: trio.Nursery) -> WebSocketConnection:
        parts = urllib.parse.urlsplit(self._address.worker_url)
        self._stream = await open_stream(parts, self._address.tls)
        token = self._address.token.encode()
        socket = await upgrade(nursery, self._stream, parts, LINK_SUBPROTOCOL, [(b"Authorization", b"Bearer " + token)])
        if socket is None:
            raise _Over(Why.LOST, f"{self._address.url} closed the connection during the upgrade")
        if socket.closed is not None:
            raise _closed(socket.closed)
        if socket.subprotocol != LINK_SUBPROTOCOL:
            await self._close(socket)
            raise _Over(Why.REVISION, f"{self._address.url} does not speak {LINK_SUBPROTOCOL}")
        return socket

    async def _greet(self, socket: WebSocketConnection) -> None:
        hello = self._side.hello()
        self._session.sending(hello)
        await socket.send_message(wire.encode(hello))
        while True:
            envelope = await self._receive(socket)
            try:
                body = wire.decode_body(envelope, wire.DOWN)
            except wire.BodyError as error:
                raise _Over(Why.PROTOCOL, f"the coordinator's greeting cannot be read: {error}") from None
            self._session.received(body, envelope.job, envelope.attempt)
            if isinstance(body, wire.Error):
                raise _Over(_BY_ERROR_CODE.get(body.code, Why.LOST), _said(body))
            if isinstance(body, wire.Welcome):
                break
        if not LINK_WIRE.low <= body.revision <= LINK_WIRE.high:
            raise _Over(Why.REVISION, f"the coordinator chose link revision {body.revision}, which is not ours")
        self._beat_s = min(max(body.heartbeat_ms / 1000, MIN_HEARTBEAT_S), MAX_HEARTBEAT_S)
        log.info("connected to %s", self._address.url, extra={"session": body.session[:MAX_ID_BYTES]})

    # ---- the three loops

    def post(self, body: wire.Body, job: str = "", attempt: int = 0) -> None:
        """Queue a message; it is judged now, so that what was posted in order is legal in order.

        One that is illegal is a mistake of ours: it costs this session, and not whoever posts.
        """
        try:
            self._session.sending(body, job, attempt)
        except LinkProtocolError as error:
            self._mistake = self._mistake or error
        else:
            self._waiting.put(body, job, attempt)
        self._bell.set()

    async def _write(self, socket: WebSocketConnection) -> None:
        try:
            while True:
                if self._mistake is not None:
                    raise self._mistake
                while self._waiting:
                    await socket.send_message(wire.encode(*self._waiting.take()))
                await self._bell.wait()
                self._bell = trio.Event()
        except ConnectionClosed:
            pass  # the reader learns the reason, and it leaves for both

    async def _keep_beating(self) -> None:
        while True:
            await trio.sleep(self._beat_s)
            if self._closing:
                return  # it would only hide why
            if self._beats - self._answered >= UNANSWERED_BEATS:
                raise _Over(Why.LOST, f"{self._address.url} did not answer the last {UNANSWERED_BEATS} heartbeats")
            self._beat()

    def _beat(self) -> None:
        self._beats += 1
        self.post(self._side.heartbeat(self._beats))

    def _slept(self, seconds: float) -> None:
        """The machine did; whatever was left of our patience was meant for a peer that heard us all the while."""
        if self._closing:
            return
        log.info("the machine slept for %.0f s; is the coordinator still there?", seconds)
        self._beat()
        self._sleepy = True
        self._patience.deadline = min(self._patience.deadline, trio.current_time() + self._beat_s)

    async def _read(self, socket: WebSocketConnection) -> None:
        while True:
            self._sleepy = False
            with trio.move_on_after(self._beat_s * SILENT_BEATS) as self._patience:
                envelope = await self._receive(socket)
            if self._patience.cancelled_caught:
                how = "after the machine slept" if self._sleepy else f"for {self._beat_s * SILENT_BEATS:g} s"
                raise _Over(Why.LOST, f"{self._address.url} was silent {how}")
            self._hear(envelope)
            if self._waiting.plain > MAX_WAITING:
                raise _Over(Why.LOST, f"{self._address.url} does not read what it is answered")

    async def _receive(self, socket: WebSocketConnection) -> wire.Envelope:
        message = await socket.get_message()
        if isinstance(message, str):
            raise _Over(Why.PROTOCOL, "the coordinator sent a text message on a binary link")
        try:
            return wire.decode_envelope(message)
        except wire.EnvelopeError as error:
            raise _Over(Why.PROTOCOL, f"the coordinator sent what is not a message: {error}") from None

    def _hear(self, envelope: wire.Envelope) -> None:
        job, attempt = envelope.job, envelope.attempt
        if envelope.t == "offer" and self._side.holds(job, attempt):
            about = {"job": job, "attempt": attempt}
            self._odd.say(logging.WARNING, "offered again what is held already", extra=about)
            return
        try:
            body = wire.decode_body(envelope, wire.DOWN)
        except wire.BodyError as error:
            self._broken(envelope, str(error))
            return
        self._session.received(body, job, attempt)
        if isinstance(body, wire.Error):
            raise _Over(_BY_ERROR_CODE.get(body.code, Why.LOST), _said(body))
        if isinstance(body, wire.HeartbeatAck):
            self._answered = max(self._answered, body.n)
        if isinstance(body, wire.Ack):  # what still waits here for it is not wanted any more
            self._waiting.drop(job, attempt)
        self._side.heard(body, job, attempt)

    def _broken(self, envelope: wire.Envelope, reason: str) -> None:
        """A body that cannot be read costs that one job, not the session."""
        about = {"job": envelope.job[:MAX_ID_BYTES], "attempt": envelope.attempt}
        self._odd.say(logging.WARNING, "ignored: %s", reason[:QUOTED_CHARS], extra=about)
        if envelope.t == "offer":
            empty = wire.Offer(kind="", model="", params=msgspec.Raw(b"\x80"))
            self._session.received(empty, envelope.job, envelope.attempt)
            self._side.broken_offer(envelope.job, envelope.attempt, reason)

    async def _close(self, socket: WebSocketConnection) -> None:
        with trio.CancelScope(shield=True), trio.move_on_after(CLOSE_PATIENCE_S):
            await socket.aclose()


# ---- endings --------------------------------------------------------------------------------------------------


def _said(body: wire.Error) -> str:
    return f"the coordinator ended the session: {(body.message or body.code)[:QUOTED_CHARS]}"


def _closed(reason: CloseReason | None) -> _Over:
    if reason is None:
        return _Over(Why.LOST, "the connection was closed")
    why = _BY_CLOSE_CODE.get(reason.code, Why.LOST)
    return _Over(why, closed_words(reason), sent_on=reason.code == CLOSE_GOING_AWAY)


def _rejected(error: ConnectionRejected) -> _Over:
    return _Over(Why.REFUSED if error.status_code in (401, 403) else Why.LOST, rejected_words("coordinator", error))


_KNOWN = (
    *(_Over, LinkProtocolError, ConnectionClosed, HandshakeError, OSError),
    *(trio.BrokenResourceError, trio.ClosedResourceError),
)


def _translated(group: BaseExceptionGroup[BaseException]) -> _Over | None:
    """The one place where foreign errors become our ending; None when something else went wrong too."""
    if group.split(_KNOWN)[1] is not None:
        return None
    if over := first(group, _Over):
        return over
    if rejected := first(group, ConnectionRejected):
        return _rejected(rejected)
    if illegal := first(group, LinkProtocolError):
        if illegal.ours:
            log.error("we broke the rules of the link: %s", illegal)
        return _Over(Why.PROTOCOL, f"the session broke: {illegal}")
    if closed := first(group, ConnectionClosed):
        return _closed(closed.reason)
    return _Over(Why.LOST, broken_words("the coordinator", group))
