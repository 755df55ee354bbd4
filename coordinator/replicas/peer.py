"""The way to one other replica: a connection that is made again for ever, and a bounded buffer before it.

Handing a frame over never waits. A peer that is away, or reads slowly, fills its buffer; then what it can find out
from the database (all of it) is dropped and counted, and it is told nothing of that job until it has caught up: it
sees a gap in the numbers, and the end of the stream brings the rest.
"""

from __future__ import annotations

import contextlib
import logging
import random
import ssl
from collections import deque
from collections.abc import Callable, Iterable, Iterator

import anyio
import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus, InvalidURI, WebSocketException

from coordinator.replicas import frames

log = logging.getLogger(__name__)

GATHER_S = 0.015  # tokens of this long go together; the first one of a stream does not wait
MAX_FRAMES = 16_384
MAX_BYTES = 16 * 2**20
OPEN_S = 3.0
PING_S = 3.0  # a peer that is stopped is found out within twice this
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0


class Caller(msgspec.Struct, frozen=True):
    """Who calls, and with what.

    Attributes:
        name: of this replica, as in `gateways`.
        secret: that all replicas share.
        tls: for `wss`; None believes the system's authorities.
    """

    name: str
    secret: str
    tls: ssl.SSLContext | None = None


class Peer:
    """See the module. `run` keeps the connection; everything is called on the event loop.

    Args:
        name: of the other replica.
        url: its door, ws:// or wss://.
        caller: who we are.
        first: what it is told first, on every new connection.

    Attributes:
        connected: whether frames reach it now.
        dropped: frames that found no place.
    """

    def __init__(self, name: str, url: str, caller: Caller, first: Callable[[], Iterable[frames.Frame]]) -> None:
        self.name, self.url = name, url
        self.connected = False
        self.dropped = 0
        self.scope = anyio.CancelScope()
        self._last: ClientConnection | None = None
        self._waiting: set[Callable[[], None]] = set()
        self._caller, self._first = caller, first
        self._frames: deque[bytes] = deque()
        self._bytes = 0
        self._some, self._urgent = anyio.Event(), anyio.Event()

    def push(self, frame: frames.Frame, *, urgent: bool = False) -> bool:
        """Hand a frame over; an urgent one goes at once. False when it was dropped. Never waits."""
        data = frames.encode(frame)
        if len(self._frames) >= MAX_FRAMES or self._bytes + len(data) > MAX_BYTES:
            self.dropped += 1
            return False
        self._frames.append(data)
        self._bytes += len(data)
        self._some.set()
        if urgent:
            self._urgent.set()
        return True

    async def run(self) -> None:
        """Keep the connection until cancelled; a refusal or a break is logged once and tried again."""
        pause, said = FIRST_PAUSE_S, ""
        with self.scope:
            while True:
                began = anyio.current_time()
                why = ""
                try:
                    async with self._connect() as connection:
                        self._last = connection
                        await self._write(connection)
                        why = "it ended the connection"
                except (OSError, TimeoutError, WebSocketException, EOFError, ValueError) as error:
                    # What another replica advertises may be anything; it must not end this one.
                    why = _why(error)
                finally:
                    self.connected = False
                if why != said:
                    log.warning("Replica %s at %s is not reached, it is tried again: %s", self.name, self.url, why)
                    said = why
                pause = FIRST_PAUSE_S if anyio.current_time() - began > LONGEST_PAUSE_S else pause
                await anyio.sleep(pause * random.uniform(0.5, 1.0))
                pause = min(LONGEST_PAUSE_S, pause * 2)

    def cut(self) -> None:
        """Drop a connection whose other side has not taken leave in time, or is gone; `run` must have been ended.

        What waits for the other side is ended, too.
        """
        for end in list(self._waiting):
            end()
        if self._last is not None:
            self._last.transport.abort()

    @contextlib.contextmanager
    def while_there(self, end: Callable[[], None]) -> Iterator[None]:
        """The block waits for the other replica; `end`, which must not wait, is called when that one is gone."""
        self._waiting.add(end)
        try:
            yield
        finally:
            self._waiting.discard(end)

    def _connect(self) -> connect:
        return connect(
            self.url + frames.PATH,
            additional_headers={
                "authorization": f"Bearer {self._caller.secret}",
                frames.FROM: self._caller.name,
                frames.TO: self.name,
            },
            compression=None,
            ssl=(self._caller.tls or True) if self.url.startswith("wss:") else None,
            proxy=None,
            open_timeout=OPEN_S,
            ping_interval=PING_S,
            ping_timeout=PING_S,
            close_timeout=1.0,
            max_size=1024,  # it has nothing to say on this connection
        )

    async def _write(self, connection: ClientConnection) -> None:
        """Send until the connection ends."""
        await connection.send(frames.message([frames.encode(frame) for frame in self._first()]))
        self.connected = True
        log.info("Replica %s is reached at %s", self.name, self.url)
        async with anyio.create_task_group() as group:
            group.start_soon(self._send, connection)
            await connection.wait_closed()
            group.cancel_scope.cancel()

    async def _send(self, connection: ClientConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            while True:
                await self._some.wait()
                while self._frames:
                    await connection.send(frames.message(self._gathered()))
                self._some, self._urgent = anyio.Event(), anyio.Event()
                with anyio.move_on_after(GATHER_S):
                    await self._urgent.wait()

    def _gathered(self) -> list[bytes]:
        """What goes out in one message."""
        taken = [self._frames.popleft()]
        size = len(taken[0])
        while self._frames and size + len(self._frames[0]) <= frames.MAX_BATCH_BYTES and len(taken) < 2**16 - 1:
            size += len(self._frames[0])
            taken.append(self._frames.popleft())
        self._bytes -= size
        return taken


def _why(error: BaseException) -> str:
    """One sentence for the log."""
    if isinstance(error, InvalidStatus):
        body = bytes(error.response.body or b"")[:300].decode("utf-8", "replace")
        return f"it refuses with {error.response.status_code}: {body}"
    if isinstance(error, InvalidURI | InvalidHandshake):
        return f"it is no replica's door: {error}"
    return str(error) or type(error).__name__
