"""Hostile output of engines, made from a seed: garbage, broken frames, and legal frames at the wrong time.

Shipped with the tests and used by the benchmark and the soak: what a seed makes is the same everywhere.
"""

from __future__ import annotations

import dataclasses
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import trio

from protocol import engine_wire as wire
from protocol.faults import Fault
from supervisor.host.fake import Died, FakeChild, FakeEngines, fake_means, greet_and_load
from supervisor.host.host import Host, open_host
from supervisor.host.work import Done, EngineSpec, Failed, ModelSpec, RunRequest
from supervisor.settings import LimitsTable, RestartTable

RUNS = 6  # in flight all the time
PATIENCE = 200  # minutes of virtual time until a run must succeed again
# Quarantines come late and are short, so that most of the time something is said.
LIMITS = LimitsTable(
    start_s=5,
    load_s=5,
    first_output_s=2,
    stall_s=2,
    cancel_grace_s=0.5,
    term_grace_s=0.5,
    restart=RestartTable(first_pause_s=0.01, longest_pause_s=0.05, quarantine_after=50, reprobe_s=1),
)
_pack = msgspec.msgpack.encode


@dataclasses.dataclass
class Tally:
    """What a storm was made of: frames, lives of engines, and how runs ended ("done" or a fault code)."""

    frames: int = 0
    lives: int = 0
    ends: dict[str, int] = dataclasses.field(default_factory=dict)


def frames(chance: random.Random, runs: int = 8) -> Iterator[bytes]:
    """Frames without end. About nine in ten are well-formed, so that an engine gets to say more than one."""
    while True:
        make = chance.choice(_LEGAL) if chance.random() < 0.9 else chance.choice(_BROKEN)
        yield make(chance, runs)


def _frame(header: bytes) -> bytes:
    return struct.pack(">I", len(header)) + header


def _message(message: wire.Up) -> bytes:
    return b"".join(bytes(part) for part in wire.encode(message))


def _words(chance: random.Random) -> str:
    return chance.choice(["", "x", "ü" * 40, "\x00\x1b[2J", "a" * chance.randrange(5000)])


def _anything(chance: random.Random, depth: int = 0) -> object:
    if depth > 3:
        return None
    return chance.choice(
        [
            None,
            True,
            chance.randrange(-(2**63), 2**64),
            chance.random() * 10 ** chance.randrange(300),
            _words(chance),
            chance.randbytes(chance.randrange(64)),
            [_anything(chance, depth + 1) for _ in range(chance.randrange(4))],
            {_words(chance)[:20]: _anything(chance, depth + 1) for _ in range(chance.randrange(4))},
        ]
    )


def _run(chance: random.Random, runs: int) -> int:
    return chance.choice([0, 1, runs, chance.randrange(1, runs + 2), 2**32 - 1])


_LEGAL: list[Callable[[random.Random, int], bytes]] = [
    lambda c, n: _message(wire.Log(level=c.choice(["info", "error", "nonsense"]), message=_words(c))),
    lambda c, n: _message(wire.Pong(n=c.randrange(2**31))),
    lambda c, n: _message(wire.Stats(rss_bytes=c.randrange(2**50), extra={_words(c)[:20]: c.random()})),
    lambda c, n: _message(wire.Progress(run=_run(c, n), n=c.randrange(2**40), phase=_words(c)[:50], text=_words(c))),
    lambda c, n: _message(wire.Started(run=_run(c, n))),
    lambda c, n: _message(wire.Chunk(run=_run(c, n), seq=c.randrange(3), data=wire.pack(_anything(c)))),
    lambda c, n: _message(wire.Result(run=_run(c, n), body=wire.pack(_anything(c)), usage={_words(c)[:9]: 1.0})),
    lambda c, n: _message(
        wire.Result(run=_run(c, n), body=wire.pack({}), files=(wire.OutputFile("../x", "a/b", -1, "no"),))
    ),
    lambda c, n: _message(wire.RunFault(run=_run(c, n), fault=Fault(_words(c)[:30], _words(c), retryable=True))),
    lambda c, n: _message(wire.Valid(run=_run(c, n))),
]
_BROKEN: list[Callable[[random.Random, int], bytes]] = [
    lambda c, n: c.randbytes(c.randrange(1, 200)),
    lambda c, n: _frame(c.randbytes(c.randrange(1, 200))),
    lambda c, n: _frame(_pack(_anything(c))),
    lambda c, n: struct.pack(">I", c.choice([0, 2**24 - 1, 2**24, 2**31, 2**32 - 1])) + c.randbytes(40),
    lambda c, n: _frame(_pack({"t": c.choice(["result", "chunk", "ready", "hello", "nope", 7]), "run": _anything(c)})),
    lambda c, n: _frame(_pack({"t": "result", "run": 1, "blobs": [c.choice([-1, 2**31, 2**63, 2**26 + 1, "x"])] * 3})),
    lambda c, n: _frame(_pack({"t": "log", "level": "info", "message": "x", "blobs": [4]})) + b"abcd",
    lambda c, n: _frame(b"\x81" * c.choice([10, 5000, 100_000])),
    lambda c, n: _frame(b"\x91" * c.choice([10, 5000, 100_000])),
    lambda c, n: b'{"t": "pong", "n": ' + str(c.randrange(10**30)).encode() + b"}\n",
    lambda c, n: b'{"t": "log"' + b"x" * c.randrange(2000),
    lambda c, n: _flipped(_message(wire.Progress(run=_run(c, n), n=c.randrange(2**40))), c),
    lambda c, n: _message(wire.Hello(engine="again", kinds=(), low=1, high=1, pid=1)),
    lambda c, n: _message(wire.Ready(device="cpu", slots=c.choice([0, -5, 2**31]))),
]


def _flipped(data: bytes, chance: random.Random) -> bytes:
    changed = bytearray(data)
    changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed[: chance.randrange(1, len(changed) + 1)])


async def storm(seed: int, count: int, folder: Path, limits: LimitsTable = LIMITS) -> Tally:
    """Let fake engines say `count` hostile frames to a real host, with runs in flight all the time.

    For a virtual clock (`trio.testing.MockClock(autojump_threshold=0)`). Afterwards the engine behaves, and one run
    has to succeed. What escapes from the host is raised.
    """
    tally = Tally()
    chance = random.Random(seed)

    async def script(child: FakeChild) -> None:
        fakes.children.clear()  # tens of thousands of them would be the test's memory, not the host's
        await greet_and_load(child, slots=RUNS)
        if tally.frames >= count:
            await _behave(child)
        tally.lives += 1
        making = frames(chance, RUNS)
        while child.exit is None and tally.frames < count:
            batch = [next(making) for _ in range(chance.randrange(1, 40))]
            tally.frames += len(batch)
            child.send_bytes(b"".join(batch))
            await trio.sleep(0.01)
        raise Died(code=1)

    async def ask(host: Host) -> None:
        while tally.frames < count:
            end = await host.run(_request(stream=chance.random() < 0.5), lambda _event: None)
            code = end.fault.code if isinstance(end, Failed) else "done"
            tally.ends[code] = tally.ends.get(code, 0) + 1
            await trio.sleep(30.0 if code == "quarantined" else 0.01)

    fakes = FakeEngines(script)
    means = fake_means(fakes, jitter=chance.random)
    spec = ModelSpec(name="m", engine=EngineSpec(name="fake", module="none", python="none"), model=wire.Model(name="m"))
    async with open_host([spec], limits, folder, means=means) as host:
        async with trio.open_nursery() as nursery:
            for _ in range(RUNS):
                nursery.start_soon(ask, host)
        for _ in range(PATIENCE):
            if isinstance(await host.run(_request(stream=False), lambda _event: None), Done):
                return tally
            await trio.sleep(60)
    raise AssertionError(f"seed {seed}: no run succeeded after the storm")


async def _behave(child: FakeChild) -> None:
    async for message in child.inbox:
        if isinstance(message, wire.Run):
            child.send(wire.Started(run=message.run))
            child.send(wire.Result(run=message.run, body=wire.pack({"content": "well"})))
        elif isinstance(message, wire.Ping):
            child.send(wire.Pong(n=message.n))
        elif isinstance(message, wire.Shutdown):
            return


def _request(*, stream: bool) -> RunRequest:
    params = _pack({"prompt": "x"})
    return RunRequest(model="m", kind="llm", params=params, folder=Path("/nowhere"), stream=stream, deadline_s=5.0)
