"""Simulated workers for many replicas, in one process, and what the whole crowd has seen: real sockets, no engines.

A worker keeps what it holds over any end of its session, and says so in its next hello, at whichever replica answers.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import random

import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import WebSocketException
from websockets.typing import Subprotocol

from protocol import link_wire as wire
from protocol.link_session import Attempt, LinkProtocolError, LinkSession, Role, Session
from protocol.revision import LINK_SUBPROTOCOL, LINK_WIRE
from tests.chaos.replicas_rig import Cluster

MODEL = "chat"
BEAT_S = 2.0
Key = tuple[str, int]


def word(n: int) -> str:
    """The n-th token of every answer."""
    return f"w{n} "


def answer(count: int) -> str:
    """What a job of so many tokens says."""
    return "".join(word(n) for n in range(count))


@dataclasses.dataclass
class Work:
    """One attempt that a worker holds."""

    key: Key
    count: int
    made: int = 0
    acknowledged: int = 0  # chunks that the coordinator has
    sent: int = 0  # in this session
    started: bool = False
    cancelled: bool = False
    ended: bool = False  # in this session it was said
    task: asyncio.Task[None] | None = None


@dataclasses.dataclass
class Ledger:
    """What the crowd has seen.

    Attributes:
        stored: job -> attempts whose success was acknowledged.
        whole: streams that came whole; resumed: those whose client had to come back.
        submitted: idempotency keys of those who come back for their answer.
        cancelling: those of them who have asked to cancel their job.
        left: jobs of clients without a key that left in the middle.
        stayed: jobs of those that stayed and were answered -> tokens.
        answers: idempotency key -> (job, state).
        seats: job -> where its workers were while they had it.
    """

    stored: collections.defaultdict[str, set[int]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(set)
    )
    seats: collections.defaultdict[str, set[str]] = dataclasses.field(
        default_factory=lambda: collections.defaultdict(set)
    )
    fenced: int = 0
    sessions: int = 0
    resent: int = 0
    whole: int = 0
    resumed: int = 0
    submitted: set[str] = dataclasses.field(default_factory=set)
    cancelling: set[str] = dataclasses.field(default_factory=set)
    left: set[str] = dataclasses.field(default_factory=set)
    stayed: dict[str, int] = dataclasses.field(default_factory=dict)
    answers: dict[str, tuple[str, str]] = dataclasses.field(default_factory=dict)
    faults: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    wrong: list[str] = dataclasses.field(default_factory=list)


class SimWorker:
    """One worker with two slots; `run` until cancelled."""

    def __init__(self, name: str, cluster: Cluster, ledger: Ledger, dice: random.Random, pace_s: float) -> None:
        self.name = name
        self._cluster, self._ledger, self._dice, self._pace_s = cluster, ledger, dice, pace_s
        self._held: dict[Key, Work] = {}
        self._session: LinkSession | None = None
        self._socket: ClientConnection | None = None
        self._seat = ""  # the URL of the replica it is at

    async def run(self) -> None:
        """Connect to any replica, again and again."""
        pause = 0.1
        while True:
            with contextlib.suppress(OSError, TimeoutError, WebSocketException, EOFError):
                await self._connected(self._dice.choice(self._cluster.urls or ["http://127.0.0.1:9"]))
                pause = 0.1
            await asyncio.sleep(pause * self._dice.uniform(0.5, 1.0))
            pause = min(1.0, pause * 1.5)

    async def _connected(self, url: str) -> None:
        async with connect(
            url.replace("http", "ws", 1) + "/v1/worker",
            subprotocols=[Subprotocol(LINK_SUBPROTOCOL)],
            additional_headers={"authorization": f"Bearer {self._cluster.worker_token}"},
            compression=None,
            proxy=None,
            open_timeout=3.0,
            close_timeout=0.5,
            ping_interval=None,
            max_size=wire.MAX_MESSAGE_BYTES,
        ) as socket:
            self._ledger.sessions += 1
            self._seat = url
            session = LinkSession(Role.WORKER)
            offers = (wire.ModelOffer(name=MODEL, kinds=("llm",), engine="fake", slots=2, resident=True),)
            held = tuple(wire.Held(*work.key, work.started) for work in self._held.values())
            for work in self._held.values():
                work.ended, work.sent = False, work.acknowledged
                self._ledger.seats[work.key[0]].add(url)
            hello = wire.Hello(
                worker=self.name,
                low=LINK_WIRE.low,
                high=LINK_WIRE.high,
                capabilities=wire.Capabilities(models=offers),
                held=held,
            )
            session.sending(hello)
            await socket.send(wire.encode(hello))
            await self._take(session, await _heard(socket, 5.0))
            self._session, self._socket = session, socket
            beats = asyncio.create_task(self._beat())
            try:
                for work in list(self._held.values()):
                    await self._catch_up(work)
                while True:
                    # A replica that is stopped answers no heartbeat: its worker goes elsewhere.
                    await self._take(session, await _heard(socket, 2 * BEAT_S))
            finally:
                beats.cancel()
                self._session = self._socket = None

    async def _beat(self) -> None:
        n = 0
        while True:
            await asyncio.sleep(BEAT_S)
            n += 1
            await self._say(wire.Heartbeat(n=n))

    async def _say(self, body: wire.Body, job: str = "", attempt: int = 0) -> bool:
        """Say something now, if there is somebody to say it to."""
        session, socket = self._session, self._socket
        if session is None or socket is None or session.state is Session.CLOSED:
            return False  # nobody, or one who has just said goodbye
        try:
            session.sending(body, job, attempt)
        except LinkProtocolError as error:
            self._ledger.wrong.append(f"{self.name}: {error}")
            return False
        with contextlib.suppress(OSError, WebSocketException):
            await socket.send(wire.encode(body, job, attempt))
            return True
        return False

    async def _take(self, session: LinkSession, data: str | bytes) -> None:
        assert isinstance(data, bytes)
        envelope = wire.decode_envelope(data)
        body = wire.decode_body(envelope, wire.DOWN)
        session.received(body, envelope.job, envelope.attempt)
        key = (envelope.job, envelope.attempt)
        work = self._held.get(key)
        match body:
            case wire.Offer():
                params = msgspec.msgpack.decode(body.params)
                work = self._held[key] = Work(key, int(params["messages"][-1]["content"]))
                self._ledger.seats[key[0]].add(self._seat)
                await self._say(wire.Accept(), *key)
                work.task = asyncio.create_task(self._work(work))
            case wire.ChunkAck() if work is not None:
                work.acknowledged = max(work.acknowledged, body.seq + 1)
            case wire.Cancel() if work is not None:
                work.cancelled = True
            case wire.Ack() if work is not None:
                del self._held[key]
                work.cancelled = True
                if body.verdict == "fenced":
                    self._ledger.fenced += 1
                elif work.ended:
                    self._ledger.stored[key[0]].add(key[1])

    async def _work(self, work: Work) -> None:
        while work.made < work.count and not work.cancelled:
            await asyncio.sleep(self._pace_s * self._dice.uniform(0.5, 1.5))
            work.started = True
            work.made += 1
            await self._catch_up(work)
        work.made, work.started = max(work.made, 0), True
        await self._catch_up(work, done=True)

    async def _catch_up(self, work: Work, *, done: bool = False) -> None:
        """Say all that was not said in this session: the start, what was not acknowledged, the end."""
        session = self._session
        if session is None or work.ended or work.key not in self._held or not work.started:
            return
        if session.attempt(*work.key) is Attempt.ACCEPTED and not await self._say(wire.Started(), *work.key):
            return
        while work.sent < work.made and self._session is session and work.key in self._held:
            seq = work.sent
            work.sent += 1
            self._ledger.resent += seq < work.acknowledged
            data = msgspec.msgpack.encode({"delta": {"content": word(seq)}})
            if not await self._say(wire.Chunk(seq=seq, data=msgspec.Raw(data)), *work.key):
                return
        finished = work.made == work.count or work.cancelled
        if finished and (done or (work.task is not None and work.task.done())) and work.key in self._held:
            if work.ended or self._session is not session:
                return
            work.ended = True
            result = msgspec.Raw(msgspec.msgpack.encode({"content": answer(work.made)}))
            await self._say(wire.Complete(result=result, usage={"completion_tokens": float(work.made)}), *work.key)


async def _heard(socket: ClientConnection, patience_s: float) -> str | bytes:
    """The next message; not by `wait_for`, which in Python 3.11 may swallow a cancellation. Raises TimeoutError."""
    async with asyncio.timeout(patience_s):
        return await socket.recv()
