"""One effect per job, whatever interleaves: eight threads over one database, and the ledger by SQL afterwards."""

from __future__ import annotations

import random
import sqlite3
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from coordinator.records import Submission
from coordinator.store import SqliteStore, Store
from coordinator.store.base import SILENT_MS, Outcome, Want
from protocol.faults import Fault

CRASH = Fault("engine_crashed", "The engine crashed.")
CANCEL = Fault("cancelled", "The client left.")
JOBS, STEPS, THREADS = 30, 120, 8
_LEDGER = """
    SELECT count(*) AS submitted,
        sum(CASE WHEN state IN ('succeeded', 'failed', 'cancelled') AND finished_ms IS NOT NULL THEN 1 ELSE 0 END)
            AS ended,
        sum(CASE WHEN state = 'queued' AND finished_ms IS NULL THEN 1 ELSE 0 END) AS queued,
        sum(CASE WHEN state IN ('offered', 'running') AND finished_ms IS NULL
            AND {live} THEN 1 ELSE 0 END) AS held
    FROM jobs
"""
_LIVE = f"gateway IN (SELECT id FROM gateways WHERE beat_ms > now_ms() - {SILENT_MS})"


class Chaos:
    """Threads that claim, accept, complete, fail, adopt, release, cancel and expire the same jobs at random."""

    def __init__(self, stores: list[Store], seed: int) -> None:
        self.stores, self.seed = stores, seed
        self.wins: list[tuple[str, str]] = []
        self.usage: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.errors: list[BaseException] = []
        self.jobs = [f"job_{n}" for n in range(JOBS)]
        for n, name in enumerate(self.jobs):
            deadline_ms = 0 if n % 3 else 600_000
            wanted = Submission(kind="llm", model="chat", params=b"\x80", tenant=f"t{n % 2}", deadline_ms=deadline_ms)
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
                claimed = store.claim([Want("chat", ("llm",), dice.randint(1, 4))])
                mine += [(record.id, record.attempt) for record, _ in claimed]
            elif step < 0.28:
                name = dice.choice(self.jobs)
                if (cancelled := store.cancel(name, f"t{int(name[4:]) % 2}", CANCEL)) and cancelled.won:
                    self.wins.append((name, "cancelled"))
            elif step < 0.30:
                store.shift_clock(dice.choice([0, 300, 3000]))
                self.wins += [(record.id, "failed") for record in store.expire(1000)]
            elif step < 0.32:
                store.beat()
            elif mine:
                self._end_one(dice, store, worker, *dice.choice(mine))

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


@pytest.mark.parametrize("seed", range(4))
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
        assert counts["ended"] == len(chaos.wins)
    finally:
        for store in stores:
            store.close()


def judge(chaos: Chaos, store: Store) -> None:
    effects = Counter(job for job, _ in chaos.wins)
    assert effects
    assert max(effects.values()) == 1
    states = dict(chaos.wins)
    for job in chaos.jobs:
        record = store.get(job)
        assert record is not None
        assert record.ended == (job in states)
        assert not record.ended or record.state == states[job]
        assert chaos.usage[job] == (1 if record.usage else 0)
        assert record.tries <= record.max_attempts


def _of_sqlite(path: Path) -> dict[str, Any]:
    connection = sqlite3.connect(path)
    connection.row_factory = sqlite3.Row
    try:
        return dict(connection.execute(_LEDGER.format(live="gateway = ''")).fetchone())
    finally:
        connection.close()


def _of_postgres(url: str) -> dict[str, Any]:
    import psycopg
    from psycopg.rows import dict_row

    with psycopg.connect(url, row_factory=dict_row) as connection:
        row = connection.execute(_LEDGER.format(live=_LIVE)).fetchone()
        assert row is not None
        return row
