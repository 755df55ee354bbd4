"""One effect per job, whatever interleaves: eight threads over one database, and the ledger by SQL afterwards.

BULKHEAD_INTERLEAVINGS=200 runs that many seeds per database instead of the few of the suite; a seed that fails is
in the name of its test. BULKHEAD_INTERLEAVING_FIRST is the first of them.
"""

from __future__ import annotations

import contextlib
import os
import random
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from coordinator.records import Submission
from coordinator.store import SqliteStore, Store
from coordinator.store.base import Outcome, Want
from protocol.faults import Fault, FaultError

CRASH = Fault("engine_crashed", "The engine crashed.")
CANCEL = Fault("cancelled", "The client left.")
JOBS, STEPS, THREADS = 30, 120, 8
TRUSTED = {"trusted": "true"}
FIRST, SEEDS = (
    int(os.environ.get("BULKHEAD_INTERLEAVING_FIRST", "0")),
    int(os.environ.get("BULKHEAD_INTERLEAVINGS", "4")),
)
_LEDGER = """
    SELECT count(*) AS submitted,
        sum(CASE WHEN state IN ('succeeded', 'failed', 'cancelled') AND finished_ms IS NOT NULL THEN 1 ELSE 0 END)
            AS ended,
        sum(CASE WHEN state = 'queued' AND finished_ms IS NULL THEN 1 ELSE 0 END) AS queued,
        sum(CASE WHEN state IN ('offered', 'running') AND finished_ms IS NULL
            AND {live} THEN 1 ELSE 0 END) AS held
    FROM jobs
"""
# Attempts that were written down and are open again, that ended twice, or whose number was never given out.
_ODD = """
    SELECT count(*) AS odd FROM attempts JOIN jobs ON jobs.id = attempts.job
    WHERE attempts.n > jobs.attempt OR (attempts.n = jobs.attempt AND jobs.state IN ('offered', 'running', 'succeeded'))
"""
# Both have said that they live just before the rows are looked at, however long ago that is on a slow machine.
_LIVE = "gateway IN (SELECT id FROM gateways WHERE beat_ms > now_ms() - 600000)"


class Chaos:
    """Threads that claim, accept, complete, fail, adopt, release, cancel, expire and retry the same jobs at random.

    A job that failed may be tried again, and then ends once more: it has one end more than it had retries.
    """

    def __init__(self, stores: list[Store], seed: int) -> None:
        self.stores, self.seed = stores, seed
        self.wins: list[tuple[str, str]] = []
        self.usage: Counter[str] = Counter()
        self.retried: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.errors: list[BaseException] = []
        self.jobs = [f"job_{n}" for n in range(JOBS)]
        for n, name in enumerate(self.jobs):
            deadline_ms = 0 if n % 3 else 600_000
            wanted = Submission(kind="llm", model="chat", params=b"\x80", tenant=f"t{n % 2}", deadline_ms=deadline_ms)
            if n % 5 == 0:  # every other claimer may have it
                wanted = msgspec.structs.replace(wanted, labels=TRUSTED, vram_gb_estimate=8.0)
            stores[0].insert(name, wanted)

    def run(self) -> None:
        """All threads, to their ends."""
        threads = [threading.Thread(target=self._guarded, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive()

    def _guarded(self, number: int) -> None:
        try:
            self._work(number)
        except BaseException as error:
            self.errors.append(error)

    def _work(self, number: int) -> None:
        dice = random.Random(self.seed * 100 + number)
        store = self.stores[number % len(self.stores)]
        mine: list[tuple[str, int]] = []
        worker = f"w{number % 3}"  # some workers are several threads: sessions that overlap
        for _ in range(STEPS):
            step = dice.random()
            if step < 0.25:
                mine += self._claim(dice, store, number)
            elif step < 0.28:
                name = dice.choice(self.jobs)
                if (cancelled := store.cancel(name, f"t{int(name[4:]) % 2}", CANCEL)) and cancelled.won:
                    self.wins.append((name, "cancelled"))
            elif step < 0.30:
                store.shift_clock(dice.choice([0, 300, 3000]))
                self.wins += [(record.id, "failed") for record in store.expire(1000)]
            elif step < 0.32:
                store.beat()
            elif step < 0.34:
                with contextlib.suppress(FaultError):  # conflict: it has not failed
                    if store.retry(name := dice.choice(self.jobs), None) is not None:
                        with self.lock:
                            self.retried[name] += 1
            elif mine:
                self._end_one(dice, store, worker, *dice.choice(mine))

    def _claim(self, dice: random.Random, store: Store, number: int) -> list[tuple[str, int]]:
        """Half of the claimers are plain: what asks for more must never come to them."""
        fit = frozenset(TRUSTED.items()) if number % 2 else frozenset()
        want = Want("chat", ("llm",), dice.randint(1, 4), fit, None if number % 2 else 7.5)
        claimed = [record for record, _ in store.claim([want])]
        assert all(want.takes(record) for record in claimed)
        return [(record.id, record.attempt) for record in claimed]

    def _end_one(self, dice: random.Random, store: Store, worker: str, job: str, attempt: int) -> None:
        step = dice.random()
        if step < 0.3:
            store.accept(job, attempt, worker)
        elif step < 0.4:
            store.release(job, attempt)
        elif step < 0.5:
            store.adopt(job, attempt, worker)
        elif step < 0.55:
            store.mark_streamed(job, attempt, worker)
        elif step < 0.8:
            ending = store.complete(job, attempt, worker, Outcome(b"\x80", (), {"images": 1.0}))
            if ending.verdict in ("stored", "late"):
                with self.lock:
                    self.usage[job] += 1
            if ending.verdict == "stored":
                self.wins.append((job, "succeeded"))
        else:
            ending = store.fail(job, attempt, worker, CRASH)
            if ending.verdict == "stored" and not ending.requeued:
                self.wins.append((job, "failed"))


@pytest.mark.parametrize("seed", range(FIRST, FIRST + SEEDS))
@pytest.mark.parametrize("kind", ["sqlite", "postgres"])
def test_a_job_has_at_most_one_effect(kind: str, seed: int, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    """Each call says whether it won; at most one may have per job, and the rows must agree with the winners.

    Over PostgreSQL the threads belong to two coordinators.
    """
    ledger: Callable[[], dict[str, Any]]
    stores: list[Store]
    if kind == "sqlite":
        stores, ledger = [SqliteStore(tmp_path / "jobs.sqlite")], lambda: _of_sqlite(tmp_path / "jobs.sqlite")
    else:
        url = request.getfixturevalue("space")
        from coordinator.store.postgres import PostgresStore

        stores, ledger = [PostgresStore(url), PostgresStore(url)], lambda: _of_postgres(url)
    try:
        chaos = Chaos(stores, seed)
        chaos.run()
        assert not chaos.errors, chaos.errors
        judge(chaos, stores[0])
        for store in stores:
            store.beat()
        counts = ledger()
        assert counts["submitted"] == JOBS
        assert counts["submitted"] == counts["ended"] + counts["queued"] + counts["held"]
        assert counts["ended"] == len(chaos.wins) - chaos.retried.total()
        assert counts["odd"] == 0
    finally:
        for store in stores:
            store.close()


def judge(chaos: Chaos, store: Store) -> None:
    """Each end that a call said it made, against the row: one effect, and a failure per retry before it."""
    ends: dict[str, list[str]] = {job: [] for job in chaos.jobs}
    for job, state in chaos.wins:
        ends[job].append(state)
    assert any(ends.values())
    for job in chaos.jobs:
        record = store.get(job)
        assert record is not None
        assert len(ends[job]) - chaos.retried[job] == int(record.ended), "at most one end that lasts"
        effects = [state for state in ends[job] if state != "failed"]
        assert len(effects) <= 1, "a job that was done or cancelled never ended again"
        assert not effects or record.state == effects[0]
        assert not record.ended or record.state in ends[job]
        assert chaos.usage[job] == (1 if record.usage else 0)
        assert record.tries <= record.max_attempts
        numbers = [one.n for one in store.attempts_of(record)]
        assert numbers == sorted(set(numbers))


def _of_sqlite(path: Path) -> dict[str, Any]:
    connection = sqlite3.connect(path)
    connection.row_factory = sqlite3.Row
    try:
        counts = dict(connection.execute(_LEDGER.format(live="gateway = ''")).fetchone())
        return {**counts, **connection.execute(_ODD).fetchone()}
    finally:
        connection.close()


def _of_postgres(url: str) -> dict[str, Any]:
    import psycopg
    from psycopg.rows import dict_row

    with psycopg.connect(url, row_factory=dict_row) as connection:
        row, odd = connection.execute(_LEDGER.format(live=_LIVE)).fetchone(), connection.execute(_ODD).fetchone()
        assert row is not None
        assert odd is not None
        return {**row, **odd}
