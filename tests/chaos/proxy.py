"""A proxy that does to a connection what networks do, by seeded dice: for the link and for files over HTTP alike.

It knows just enough of HTTP and WebSocket to act on whole messages. The dice of connection n come from (seed, n), so
the same seed rolls the same numbers; which message meets which number depends on the timing of both programs.
"""

from __future__ import annotations

import collections
import contextlib
import math
import random
import struct
from collections.abc import AsyncIterator
from typing import NamedTuple

import msgspec
import trio

from protocol import link_wire

PIECE_BYTES = 2**16
HEAD_BYTES = 2**16
COMMIT_S = 0.15  # for the peer to have done what it was told, before its answer is lost
NOT_MSGPACK = 0xC1  # the one byte that no msgpack value begins with
RESERVED_BITS = 0x70
_COMMITS = ("accept", "started", "complete", "fail")


class Odds(NamedTuple):
    """How likely each deed is, for each message of the link and each piece of an HTTP connection.

    Attributes:
        cut: both connections end at once.
        tear: the same, in the middle of this message.
        stall: from now on everything is swallowed and nothing forwarded, for `stall_s`; then a cut.
        delay: this message waits for up to `delay_s`.
        double: a whole WebSocket message comes twice.
        corrupt: a byte is another one. On the link it is one that makes the frame or the envelope unreadable (TCP and
            TLS let no other through); of an HTTP body it is any byte. With `opaque` it is any byte of anything.
        forget: what was said is done by the peer, and its answer is lost together with the connection.
    """

    cut: float = 0.0
    tear: float = 0.0
    stall: float = 0.0
    delay: float = 0.0
    double: float = 0.0
    corrupt: float = 0.0
    forget: float = 0.0
    stall_s: float = 2.5
    delay_s: float = 0.3


CALM = Odds()


class _Over(Exception):
    """Both connections end."""


class Proxy:
    """Forwards connections to one port of loopback.

    Args:
        port: where the coordinator listens.
        opaque: what goes through is not looked into (TLS).

    Attributes:
        odds: may be changed at any time; `CALM` forwards everything.
        deeds: (deed, "link" or "http") -> how often.
    """

    def __init__(self, port: int, seed: int, odds: Odds, *, opaque: bool = False) -> None:
        self.port, self.odds = 0, odds
        self.deeds: collections.Counter[tuple[str, str]] = collections.Counter()
        self._target, self._seed, self._opaque = port, seed, opaque
        self._connections = 0

    def total(self) -> int:
        """How much was done to connections, delays left out."""
        return sum(count for (deed, _), count in self.deeds.items() if deed != "delay")

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until cancelled."""
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.port = listeners[0].socket.getsockname()[1]
        async with trio.open_nursery() as nursery:
            await nursery.start(trio.serve_listeners, self._serve, listeners)
            task_status.started()

    async def _serve(self, client: trio.SocketStream) -> None:
        self._connections += 1
        dice = random.Random(self._seed * 1_000_003 + self._connections)
        try:
            server = await trio.open_tcp_stream("127.0.0.1", self._target)
        except OSError:
            await trio.aclose_forcefully(client)
            return
        road = _Road(self, client, server, dice, self._opaque)
        with contextlib.suppress(_Over, trio.BrokenResourceError, trio.ClosedResourceError):
            try:
                await road.run()
            except BaseExceptionGroup as group:
                rest = group.split((_Over, trio.BrokenResourceError, trio.ClosedResourceError))[1]
                if rest is not None:
                    raise rest from None
            finally:
                client.socket.close()  # at once, also when cancelled: closing a stream would be a checkpoint
                server.socket.close()


class _Road:
    """Two connections that are one."""

    def __init__(
        self, proxy: Proxy, client: trio.SocketStream, server: trio.SocketStream, dice: random.Random, opaque: bool
    ) -> None:
        self._proxy, self._client, self._server = proxy, client, server
        self._dice, self._opaque = dice, opaque
        self._link = trio.Event()  # it turned out to be the link
        self._known = trio.Event()
        self._mute = False
        self._kind = "http"

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pump, self._client, self._server, True)
            nursery.start_soon(self._pump, self._server, self._client, False)

    async def _pump(self, source: trio.SocketStream, target: trio.SocketStream, up: bool) -> None:
        """One direction, until it ends; then both end."""
        buffer = bytearray()
        if not self._opaque:
            head = await _head(source, buffer)
            if up and head.startswith(b"GET ") and b"/v1/worker " in head.partition(b"\r\n")[0]:
                self._kind = "link"
            self._known.set()
            await self._forward(target, head, up, head=True)
        await self._known_kind()
        units = _frames(source, buffer) if self._kind == "link" else _pieces(source, buffer)
        async with contextlib.aclosing(units) as each:
            async for unit in each:
                await self._forward(target, unit, up)
        raise _Over

    async def _known_kind(self) -> None:
        if not self._opaque:
            await self._known.wait()

    async def _forward(self, target: trio.SocketStream, unit: bytes, up: bool, head: bool = False) -> None:
        odds, dice = self._proxy.odds, self._dice
        if self._mute:
            return
        if self._rolled("delay", odds.delay):
            await trio.sleep(dice.uniform(0, odds.delay_s))
        if self._rolled("cut", odds.cut):
            raise _Over
        if self._rolled("tear", odds.tear):
            await target.send_all(unit[: dice.randrange(len(unit))])
            raise _Over
        if self._rolled("stall", odds.stall):
            self._mute = True
            await trio.sleep(odds.stall_s)
            raise _Over
        if not head and self._rolled("corrupt", odds.corrupt):
            unit = self._corrupted(unit, up)
        if self._forgettable(unit, up) and self._rolled("forget", odds.forget):
            self._mute = True
            if up:
                await target.send_all(unit)
                await trio.sleep(COMMIT_S)
            raise _Over
        await target.send_all(unit)
        if self._kind == "link" and not head and self._rolled("double", odds.double):
            await target.send_all(unit)

    def _rolled(self, deed: str, chance: float) -> bool:
        # Rolled also when the chance is nil, so that other odds leave the other dice alone.
        done = self._dice.random() < chance
        if done and not self._mute:
            self._proxy.deeds[deed, self._kind] += 1
        return done and not self._mute

    def _forgettable(self, unit: bytes, up: bool) -> bool:
        """An answer to what was committed, or what the peer is going to commit."""
        if self._opaque:
            return False
        if self._kind == "http":
            return not up and unit.startswith(b"HTTP/1.1 2")
        return up and _tag(unit) in _COMMITS

    def _corrupted(self, unit: bytes, up: bool) -> bytes:
        data = bytearray(unit)
        if self._opaque:
            data[self._dice.randrange(len(data))] ^= 1 << self._dice.randrange(8)
        elif self._kind == "http":
            if b"HTTP/1.1" not in unit:
                data[self._dice.randrange(len(data))] ^= 1 << self._dice.randrange(8)
        elif self._dice.random() < 0.5:
            data[0] ^= RESERVED_BITS
        elif (at := _payload_at(unit)) < len(data):
            data[at] = NOT_MSGPACK ^ (data[at - 4] if unit[1] & 0x80 else 0)
        return bytes(data)


async def _more(source: trio.SocketStream, buffer: bytearray) -> bool:
    data = await source.receive_some(PIECE_BYTES)
    buffer += data
    return bool(data)


async def _head(source: trio.SocketStream, buffer: bytearray) -> bytes:
    """The first head of an HTTP connection."""
    while (end := buffer.find(b"\r\n\r\n")) < 0:
        if len(buffer) > HEAD_BYTES or not await _more(source, buffer):
            raise _Over
    head = bytes(buffer[: end + 4])
    del buffer[: end + 4]
    return head


async def _pieces(source: trio.SocketStream, buffer: bytearray) -> AsyncIterator[bytes]:
    """Whatever comes, as it comes."""
    while buffer or await _more(source, buffer):
        piece = bytes(buffer)
        buffer.clear()
        yield piece


async def _frames(source: trio.SocketStream, buffer: bytearray) -> AsyncIterator[bytes]:
    """Whole WebSocket frames."""
    while True:
        while (size := _frame_bytes(buffer)) > len(buffer):
            if not await _more(source, buffer):
                return
        frame = bytes(buffer[: int(size)])
        del buffer[: int(size)]
        yield frame


def _payload_at(frame: bytes | bytearray) -> int:
    length = frame[1] & 0x7F
    return 2 + {126: 2, 127: 8}.get(length, 0) + (4 if frame[1] & 0x80 else 0)


def _frame_bytes(data: bytearray) -> float:
    """Size of the frame that begins here; infinite when that is not known yet."""
    if len(data) < 2 or len(data) < (at := _payload_at(data)):
        return math.inf
    length = data[1] & 0x7F
    if length >= 126:
        (length,) = struct.unpack_from(">H" if length == 126 else ">Q", data, 2)
    return at + length


def _tag(frame: bytes) -> str:
    """What kind of message of ours a frame has; "" when it is none."""
    if frame[0] & 0x0F != 2:
        return ""
    at = _payload_at(frame)
    payload = frame[at:]
    if frame[1] & 0x80:
        mask = frame[at - 4 : at]
        payload = bytes(byte ^ mask[index % 4] for index, byte in enumerate(payload[:64])) + b""
        # The envelope begins with its tag: the first 64 bytes tell it.
        for tag in _COMMITS:
            if payload[1:].startswith(b"\xa1t" + msgspec.msgpack.encode(tag)):
                return tag
        return ""
    with contextlib.suppress(link_wire.EnvelopeError):
        return link_wire.decode_envelope(payload).t
    return ""
