"""The store's part of scripts/bench: claims and completions per second on both databases, in the same run.

A job is claimed, accepted and completed, each step in batches and with a synced commit, as a gateway under load does
it. The floor is the same three row changes in bare SQL of that database, without any meaning.
"""

from __future__ import annotations

import importlib.util
import os
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from coordinator.records import Submission
from coordinator.store import SqliteStore
from coordinator.store.base import Done, Held, Outcome, Want
from coordinator.store.sql import SqlStore

JOBS = int(os.environ.get("BULKHEAD_BENCH_JOBS", "6000"))
BATCH = 64
CONNECTIONS = 4
ASKED = Submission(kind="llm", model="chat", params=b"\x80" * 200)
OUTCOME = Outcome(b"\x80" * 300, (), {"completion_tokens": 3.0})
_STEPS = ("state = 'offered'", "state = 'running'", "state = 'done', result = '{}'".format("x" * 300))
_TABLE = (
    "CREATE TABLE bare (n INTEGER PRIMARY KEY, state TEXT NOT NULL, params TEXT NOT NULL, result TEXT)",
    "CREATE INDEX bare_waiting ON bare (n) WHERE state = 'queued'",
)


def fill(store: SqlStore) -> None:
    """Queue JOBS jobs in one transaction."""
    with store._transaction() as now:
        for n in range(JOBS):
            store._insert(f"job_{n}", ASKED, now)


def work_off(store: SqlStore) -> None:
    """Claim, accept and complete until nothing is left. Raises when a step was not taken."""
    while claimed := store.claim([Want("chat", ("llm",), BATCH)]):
        held = [Held(record.id, record.attempt, "w") for record, _ in claimed]
        if not all(store.accept_many(held)):
            raise SystemExit("an offer was not accepted")
        done = [Done(one.job, one.attempt, one.worker, OUTCOME) for one in held]
        if any(ending.verdict != "stored" for ending in store.complete_many(done)):
            raise SystemExit("a completion was not stored")


def together(work: Callable[[], None], threads: int) -> tuple[float, float]:
    """Jobs per second, and this process's CPU per job in µs."""
    group = [threading.Thread(target=work) for _ in range(threads)]
    began, cpu = time.perf_counter(), time.process_time()
    for thread in group:
        thread.start()
    for thread in group:
        thread.join()
    return JOBS / (time.perf_counter() - began), (time.process_time() - cpu) * 1e6 / JOBS


def row(name: str, floor: tuple[float, float], ours: tuple[float, float]) -> dict[str, Any]:
    return {
        "what": f"claim + accept + complete, batches of {BATCH}, {name}",
        "floor": f"bare SQL {floor[0]:,.0f}/s, {floor[1]:.0f} µs CPU/job",
        "ours": f"{ours[0]:,.0f}/s, {ours[1]:.0f} µs CPU/job",
        "ratio": round(floor[0] / ours[0], 2),
    }


def on_sqlite(folder: Path) -> dict[str, Any]:
    bare = sqlite3.connect(folder / "bare.sqlite", isolation_level=None, check_same_thread=False)
    for pragma in ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL", *_TABLE):
        bare.execute(pragma)
    bare.execute("BEGIN")
    bare.executemany("INSERT INTO bare VALUES (?, 'queued', ?, NULL)", [(n, "x" * 200) for n in range(JOBS)])
    bare.execute("COMMIT")

    def floor() -> None:
        for first in range(0, JOBS, BATCH):
            for step in _STEPS:
                bare.execute("BEGIN IMMEDIATE")
                for n in range(first, min(first + BATCH, JOBS)):
                    bare.execute(f"UPDATE bare SET {step} WHERE n = ? RETURNING *", (n,)).fetchall()
                bare.execute("COMMIT")

    store = SqliteStore(folder / "jobs.sqlite")
    try:
        fill(store)
        return row("SQLite", together(floor, 1), together(lambda: work_off(store), 1))
    finally:
        store.close()
        bare.close()


def on_postgres() -> dict[str, Any]:
    import psycopg

    from coordinator.store.postgres import PostgresStore
    from coordinator.testing_postgres import postgres_server

    with postgres_server(durable=True) as server, server.space() as url:
        with psycopg.connect(url, autocommit=True) as admin:
            for statement in _TABLE:
                admin.execute(statement)
            admin.execute(
                "INSERT INTO bare SELECT n, 'queued', repeat('x', 200), NULL FROM generate_series(0, %s) AS n", (JOBS,)
            )
        shares = iter(range(CONNECTIONS))

        def floor() -> None:
            share = next(shares)
            with psycopg.connect(url, autocommit=True) as mine:
                for first in range(share * BATCH, JOBS, CONNECTIONS * BATCH):
                    for step in _STEPS:
                        statement = f"UPDATE bare SET {step} WHERE n >= %s AND n < %s RETURNING *"
                        mine.execute(statement, (first, min(first + BATCH, JOBS))).fetchall()

        bare = together(floor, CONNECTIONS)
        store = PostgresStore(url, connections=CONNECTIONS)
        try:
            fill(store)
            return row(f"PostgreSQL, {CONNECTIONS} connections", bare, together(lambda: work_off(store), CONNECTIONS))
        finally:
            store.close()


def bench_store() -> list[dict[str, Any]]:
    """Rows of both databases; PostgreSQL's only where it is installed."""
    with tempfile.TemporaryDirectory() as name:
        rows = [on_sqlite(Path(name))]
    if importlib.util.find_spec("psycopg_pool") is None:
        print("SKIPPED: psycopg is not installed (extra: postgres)", file=sys.stderr)
        return rows
    from coordinator.testing_postgres import why_not

    if reason := why_not():
        print(f"SKIPPED: {reason}", file=sys.stderr)
        return rows
    return [*rows, on_postgres()]


if __name__ == "__main__":
    for one in bench_store():
        print(f"| {one['what']} | {one['floor']} | {one['ours']} | {one['ratio']} |")
