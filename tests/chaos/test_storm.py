"""A coordinator that comes back meets its workers one after the other: 500 of them, on a virtual clock and for real.

No bin of one second may hold more than three times the mean over the window that the jitter opens. The real sockets
are for `scripts/soak link`: they need 500 connections and a minute.
"""

from __future__ import annotations

import collections
import logging
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio

from protocol import link_wire as wire
from protocol.revision import LINK_WIRE
from supervisor.link.reconnect import FIRST_S, LAST_S, Backoff, keep_link
from supervisor.link.session import Address, SessionEnd, Why, converse
from tests.chaos.world import until

SEED = int(os.environ.get("BULKHEAD_CHAOS_SEED", "1"))
WORKERS = 500
OUTAGE_S = 20.0  # of the real coordinator
LONG = "BULKHEAD_CHAOS_JOBS" in os.environ
log = logging.getLogger(__name__)


def window_s(outage_s: float) -> float:
    """How wide the jitter of the pause is that a worker is in after so long: half of the pause, at least one second."""
    pause_s, passed_s = FIRST_S, 0.0
    while passed_s + 0.75 * pause_s < outage_s and pause_s < LAST_S:
        passed_s += 0.75 * pause_s
        pause_s *= 2
    return max(1.0, pause_s / 2)


def fullest(times: Sequence[float]) -> int:
    """The most that any bin of one second holds, wherever it begins."""
    ordered, most, first = sorted(times), 0, 0
    for last, time in enumerate(ordered):
        while ordered[first] <= time - 1.0:
            first += 1
        most = max(most, last - first + 1)
    return most


class Coordinator:
    """Takes everybody at once, unless it is away."""

    def __init__(self) -> None:
        self.away = trio.Event()
        self.arrivals: list[float] = []
        self.here = trio.Event()
        self.tries: collections.Counter[int] = collections.Counter()

    async def converse(self) -> SessionEnd:
        self.tries[int(trio.current_time())] += 1
        if self.away.is_set():
            return SessionEnd(Why.LOST, "refused")
        since = trio.current_time()
        self.arrivals.append(since)
        if len(self.arrivals) == WORKERS:
            self.here.set()
        await self.away.wait()
        return SessionEnd(Why.LOST, "gone", trio.current_time() - since)

    def leave(self) -> None:
        self.away.set()
        self.arrivals.clear()
        self.here = trio.Event()

    def come_back(self) -> None:
        self.away = trio.Event()


@pytest.mark.parametrize("outage_s", [10.0, 60.0, 200.0])
async def test_a_restart_is_no_storm(outage_s: float, autojump_clock: object, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.ERROR, "supervisor.link.reconnect")
    dice = random.Random(SEED)
    coordinator = Coordinator()
    async with trio.open_nursery() as nursery:
        for _ in range(WORKERS):
            nursery.start_soon(keep_link, coordinator.converse, Backoff(chance=dice.random))
        await coordinator.here.wait()
        await trio.sleep(3600)
        coordinator.leave()
        await trio.sleep(outage_s)
        coordinator.come_back()
        await coordinator.here.wait()
        nursery.cancel_scope.cancel()
    mean = WORKERS / window_s(outage_s)
    assert fullest(coordinator.arrivals) <= 3 * mean, f"seed {SEED}: {fullest(coordinator.arrivals)} against {mean:.0f}"
    # Nor while nobody is there: a load balancer in front of it is somebody.
    steady = [count for second, count in sorted(coordinator.tries.items()) if second > 3600 + 2 * LAST_S]
    assert not steady or max(steady) <= 3 * WORKERS / (LAST_S / 2)


# ---- real sockets -----------------------------------------------------------------------------------------------


class Idle:
    """A worker that serves nothing. Notes when it is welcomed."""

    running = 0

    def __init__(self, name: str, welcomed: list[float]) -> None:
        self._name, self._welcomed = name, welcomed

    def hello(self) -> wire.Hello:
        return wire.Hello(worker=self._name, low=LINK_WIRE.low, high=LINK_WIRE.high)

    def opened(self, _post: object) -> None:
        self._welcomed.append(trio.current_time())

    def heard(self, _body: wire.Body, _job: str, _attempt: int) -> None: ...

    def broken_offer(self, _job: str, _attempt: int, _reason: str) -> None: ...

    def closed(self) -> None: ...

    def holds(self, _job: str, _attempt: int) -> bool:
        return False

    def leave(self, _job: str, _attempt: int) -> bool:
        return False

    def heartbeat(self, n: int) -> wire.Heartbeat:
        return wire.Heartbeat(n=n)


def serve(folder: Path, listen: str) -> subprocess.Popen[bytes]:
    argv = [sys.executable, "-m", "coordinator", "serve", "--listen", listen, "--state", str(folder / "desk")]
    with (folder / "log").open("wb") as out:
        return subprocess.Popen(argv, stdout=out, stderr=out)


@pytest.mark.slow
@pytest.mark.skipif(not LONG, reason="500 real sockets are for scripts/soak link")
async def test_500_real_workers_come_back_to_a_coordinator_that_was_killed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, "supervisor")
    welcomed: list[float] = []

    def address() -> str:
        return (tmp_path / "log").read_text(errors="replace").partition("Serving http://")[2].partition("/")[0]

    process = serve(tmp_path, "127.0.0.1:0")
    try:
        await until(lambda: "/v1 with" in (tmp_path / "log").read_text(), "it serves")
        where = address()
        token = (tmp_path / "desk/worker.token").read_text().strip()
        async with trio.open_nursery() as nursery:
            for number in range(WORKERS):
                side = Idle(f"w{number}", welcomed)
                to = Address(url=f"ws://{where}", token=token)
                nursery.start_soon(keep_link, lambda side=side, to=to: converse(to, side), Backoff())
            await until(lambda: len(welcomed) >= WORKERS, "all are there", 120)
            welcomed.clear()
            killed = trio.current_time()
            process.kill()
            process.wait(10)
            await trio.sleep(OUTAGE_S)
            process = serve(tmp_path, where)
            await until(lambda: len(welcomed) >= WORKERS, "all are there again", 180)
            nursery.cancel_scope.cancel()
    finally:
        process.kill()
        process.wait(10)
    first, last = min(welcomed) - killed, max(welcomed) - killed
    mean = WORKERS / window_s(OUTAGE_S)
    log.info(
        "%d came back %.1f to %.1f s after the kill, at most %d in a second", WORKERS, first, last, fullest(welcomed)
    )
    assert fullest(welcomed) <= 3 * mean
