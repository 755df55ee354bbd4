"""Three replicas, a crowd of workers and clients, and everything that breaks: no job is lost, none has two effects.

The short run has every fault once. `scripts/soak coordinator` is the long one: more of everything, again and again.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import random
import signal
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

psycopg = pytest.importorskip("psycopg", reason="psycopg is not installed (extra: postgres)")

from coordinator.testing_postgres import PostgresServer, why_not  # noqa: E402
from tests.chaos.replicas_clients import OUTAGE_S, SimClient  # noqa: E402
from tests.chaos.replicas_crowd import Ledger, SimWorker  # noqa: E402
from tests.chaos.replicas_proxy import PeerProxy, PostgresProxy  # noqa: E402
from tests.chaos.replicas_rig import Cluster  # noqa: E402
from tests.chaos.replicas_standby import Pair  # noqa: E402

SEED = int(os.environ.get("BULKHEAD_COORDINATOR_SEED", "1"))
JOBS = int(os.environ.get("BULKHEAD_COORDINATOR_JOBS", "0"))
AWAY_S = OUTAGE_S
REPLICAS = 3
OK = "succeeded"
STEP_MS = 30_000
SETTLE_S = 120.0
log = logging.getLogger(__name__)


Fault = Callable[[], Awaitable[None]]


class Size(NamedTuple):
    """How much of everything; `calm_s` is between two faults, `spell_s` is how long a bad network lasts, `stops_s` how
    long a replica is stopped, in turns."""

    workers: int
    clients: int
    jobs: int
    rounds: int
    tokens: int
    pace_s: float
    calm_s: float
    spell_s: float
    stops_s: tuple[float, ...]


SHORT = Size(20, 10, jobs=120, rounds=1, tokens=30, pace_s=0.03, calm_s=0.5, spell_s=2.0, stops_s=(AWAY_S,))
LONG = Size(200, 60, jobs=JOBS, rounds=10_000, tokens=20, pace_s=0.05, calm_s=1.0, spell_s=4.0, stops_s=(60.0, AWAY_S))


class Faults:
    """What is done to the cluster, one after the other."""

    def __init__(
        self, client: SimClient, cluster: Cluster, pair: Pair, proxies: list[PostgresProxy], size: Size, seed: int
    ) -> None:
        self._client, self._cluster, self._pair, self._proxies = client, cluster, pair, proxies
        self._dice, self._spell_s, self._stops_s = random.Random(seed), size.spell_s, itertools.cycle(size.stops_s)
        self._tokens = int(1.5 * AWAY_S / size.pace_s)  # of a stream that is longer than an outage
        self._report: Any = None
        self.done: list[str] = []

    def all_of_them(self) -> list[Fault]:
        """In an order by the dice. In the short run a crash of the database and its recovery are in its outage."""
        faults: list[Fault] = [self.kill, self.freeze, self.roll, self.outage, self.forget_commits, self.slow_network]
        faults += [self.cut_peers, self.step_clock, self.read_for_long]
        if JOBS:
            faults += [self.restart_database, self.lose_peers]
        if self._pair.standby is not None:
            faults.append(self.fail_over)
        self._dice.shuffle(faults)
        return faults

    async def fail_over(self) -> None:
        """The primary is killed for good; its synchronous standby is promoted."""
        await asyncio.to_thread(self._pair.fail_over)

    async def kill(self) -> None:
        """kill -9 of a replica, and a new one after a while."""
        one = self._dice.choice(self._cluster.replicas)
        await one.end(signal.SIGKILL)
        await asyncio.sleep(1.0)
        await one.start()

    async def freeze(self) -> None:
        """A replica is stopped for longer than the others wait, and goes on as if nothing had been."""
        one = self._dice.choice(self._cluster.replicas)
        one.signal(signal.SIGSTOP)
        await asyncio.sleep(next(self._stops_s))
        one.signal(signal.SIGCONT)

    async def roll(self) -> None:
        """A rolling upgrade of one replica: it is drained, ends by itself, and a new one takes its place."""
        one = self._dice.choice(self._cluster.replicas)
        code = await one.end(signal.SIGTERM)
        assert code == 0, f"a drained replica ended with {code}"
        await one.start()

    async def restart_database(self) -> None:
        """The database crashes and recovers."""
        await asyncio.to_thread(self._pair.now.stop, signal.SIGQUIT)
        await asyncio.to_thread(self._pair.now.start)

    async def outage(self) -> None:
        """The database is away for longer than the others wait for a beat, and a replica is started as it comes back.

        Whose stream goes on at a replica that lived through it notices nothing.
        """
        one = self._dice.choice(self._cluster.replicas)
        living = [other for other in self._cluster.replicas if other is not one]
        begun = [asyncio.Event() for _ in living]
        staying = [
            self._client.stay_at(replica, "outage", self._tokens, event)
            for replica, event in zip(living, begun, strict=True)
        ]
        async with asyncio.TaskGroup() as tasks:
            for stay in staying:
                tasks.create_task(stay)
            for event in begun:
                await event.wait()
            await asyncio.to_thread(self._pair.now.stop, signal.SIGQUIT)
            await one.end(signal.SIGKILL)
            await asyncio.sleep(AWAY_S)
            again = tasks.create_task(one.start_again())
            await asyncio.to_thread(self._pair.now.start)
            await again

    async def step_clock(self) -> None:
        """The database's clock, which is the only one that counts, is set; all replicas are as silent by that."""
        with psycopg.connect(self._pair.now.url, autocommit=True) as admin:
            admin.execute("UPDATE clock SET shift_ms = shift_ms + %s", (self._dice.choice((STEP_MS, -STEP_MS)),))

    async def read_for_long(self) -> None:
        """Somebody's report, through all that follows: a snapshot is held, so no row that dies meanwhile is cleared."""
        self.close()
        self._report = psycopg.connect(self._pair.now.url)
        self._report.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        self._report.execute("SELECT count(*) FROM jobs")

    def close(self) -> None:
        """End what is still going on."""
        if self._report is not None:
            self._report.close()
            self._report = None

    async def cut_peers(self) -> None:
        """No replica reaches another one, and all reach the database: their links break, and are refused."""
        await asyncio.gather(*(proxy.cut(self._spell_s) for proxy in self._cluster.proxies))

    async def lose_peers(self) -> None:
        """The same, but nobody is told: what is sent comes late, or the link is given up."""
        await asyncio.gather(*(proxy.stall(AWAY_S) for proxy in self._cluster.proxies))

    async def forget_commits(self) -> None:
        """Commits whose answer is lost, together with the connection."""
        for proxy in self._proxies:
            proxy.forget = 10
        await asyncio.sleep(self._spell_s)
        for proxy in self._proxies:
            proxy.forget = 0

    async def slow_network(self) -> None:
        """50 ms and 2 % loss between the replicas and the database."""
        for proxy in self._proxies:
            proxy.delay_s, proxy.loss = 0.05, 0.02
        await asyncio.sleep(self._spell_s)
        for proxy in self._proxies:
            proxy.delay_s = proxy.loss = 0.0


def rows(server: PostgresServer) -> list[tuple[str, str, str, int, int, float]]:
    """(key, job, state, attempt, crowd's tokens, tokens used) of every row."""
    with psycopg.connect(server.url) as connection:
        found = connection.execute("SELECT idempotency_key, id, state, attempt, params, usage FROM jobs").fetchall()
    return [
        (
            key,
            job,
            state,
            attempt,
            int(msgspec.msgpack.decode(params)["messages"][-1]["content"]),
            (msgspec.msgpack.decode(usage) if usage else {}).get("completion_tokens", 0.0),
        )
        for key, job, state, attempt, params, usage in found
    ]


def judge(server: PostgresServer, ledger: Ledger) -> Counter[str]:
    """The ledger check: every job terminal, one effect each, and what clients saw agrees with the rows.

    Returns how many jobs ended how.
    """
    found = rows(server)
    assert not ledger.wrong, ledger.wrong[:10]
    assert ledger.left <= {job for _, job, *_ in found}
    assert ledger.stayed == {job: count for _, job, state, _, count, _ in found if job in ledger.stayed and state == OK}
    keyed = [row for row in found if row[0]]
    assert {row[0] for row in keyed} == ledger.submitted
    assert len(keyed) == len(ledger.submitted)
    for key, job, state, attempt, count, used in found:
        assert state in ("succeeded", "failed") or (state == "cancelled" and (not key or key in ledger.cancelling)), job
        if key:
            assert ledger.answers[key] == (job, state), key
        if state == OK:
            assert used == count, (job, used, count)
            # An acknowledgement may be lost with its connection; then the worker never heard of its effect.
            assert ledger.stored[job] <= {attempt}, (job, attempt, ledger.stored[job])
    ends = Counter(row[2] for row in found)
    assert ends["failed"] <= len(found) // 4, f"{ends['failed']} of {len(found)} jobs lost their worker for good"
    return ends


async def settled(server: PostgresServer) -> None:
    """Wait for the end of all jobs."""
    end = time.monotonic() + SETTLE_S
    while True:
        with psycopg.connect(server.url) as connection:
            row = connection.execute("SELECT count(*) FROM jobs WHERE finished_ms IS NULL").fetchone()
        assert row is not None
        if not row[0]:
            return
        assert time.monotonic() < end, f"{row[0]} jobs have not ended"
        await asyncio.sleep(0.2)


async def storm(folder: Path, pair: Pair, size: Size, seed: int) -> tuple[Ledger, Faults, float]:
    """Run the crowd and the faults to their ends."""
    ledger = Ledger()
    began = time.monotonic()
    async with AsyncExitStack() as stack:
        proxies = [
            await stack.enter_async_context(PostgresProxy(server.folder / ".s.PGSQL.5432", seed + n))
            for n, server in enumerate(pair.servers)
        ]
        hosts = ",".join(f"127.0.0.1:{proxy.port}" for proxy in proxies)
        store = f"postgresql://bulkhead@{hosts}/postgres?sslmode=disable"
        doors = [await stack.enter_async_context(PeerProxy()) for _ in range(REPLICAS)]
        async with Cluster(folder, store, doors) as cluster:
            calm = asyncio.Event()

            def more() -> bool:
                return not calm.is_set() or len(ledger.submitted) < size.jobs

            workers = [
                SimWorker(f"w{n}", cluster, ledger, random.Random(seed * 1000 + n), size.pace_s)
                for n in range(size.workers)
            ]
            crowd = [asyncio.create_task(worker.run()) for worker in workers]
            clients = [
                SimClient(f"c{n}", cluster, ledger, random.Random(seed * 2000 + n), size.tokens)
                for n in range(size.clients)
            ]
            faults = Faults(clients[0], cluster, pair, proxies, size, seed)
            asking = [asyncio.create_task(client.run(more)) for client in clients]
            try:
                for _ in range(size.rounds):
                    for fault in faults.all_of_them():
                        await asyncio.sleep(size.calm_s)
                        name = getattr(fault, "__name__", "")
                        log.info("%5.1f s, %d jobs: %s", time.monotonic() - began, len(ledger.submitted), name)
                        await fault()
                        faults.done.append(name)
                    if len(ledger.submitted) >= size.jobs:
                        break
                calm.set()
                await asyncio.gather(*asking)
                await settled(pair.now)
            finally:
                faults.close()
                for task in (*asking, *crowd):
                    task.cancel()
                await asyncio.gather(*asking, *crowd, return_exceptions=True)
            faults.done.append(f"{sum(proxy.forgotten for proxy in proxies)} commits forgotten")
            faults.done.append(f"{sum(proxy.cuts for proxy in doors)} links between replicas cut")
    return ledger, faults, time.monotonic() - began


def test_no_job_is_lost_and_none_has_two_effects(tmp_path: Path) -> None:
    """The seed decides the order of the faults and every choice; `BULKHEAD_COORDINATOR_SEED` repeats it."""
    if reason := why_not():
        pytest.skip(reason)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    log.info("seed %d", SEED)
    pair = Pair()
    try:
        if JOBS:
            pair.add_standby()
        ledger, faults, took = asyncio.run(storm(tmp_path, pair, LONG if JOBS else SHORT, SEED))
        ends = judge(pair.now, ledger)
    finally:
        pair.remove()
    log.info(
        "seed %d: %d jobs (%s) in %.0f s through %s; %d streams whole, %d resumed, %d without a key, %d sessions, "
        "%d fenced, %s",
        SEED,
        sum(ends.values()),
        ", ".join(f"{count} {state}" for state, count in sorted(ends.items())),
        took,
        ", ".join(faults.done),
        ledger.whole,
        ledger.resumed,
        len(ledger.stayed),
        ledger.sessions,
        ledger.fenced,
        dict(ledger.faults),
    )
