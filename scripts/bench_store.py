"""The store's part of scripts/bench: claims and completions per second on both databases, in the same run.

A job is claimed, accepted and completed, each step in batches and, but for the accept, with a synced commit. Claims,
accepts and completions go on beside each other, one at a time of each, as a gateway under load does it. The floor is
the same three row changes in bare SQL of that database, in the same order, without any meaning.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import queue
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from coordinator.records import Submission
from coordinator.store import SqliteStore
from coordinator.store.base import Done, Held, Outcome, Want
from coordinator.store.sql import SqlStore

JOBS = int(os.environ.get("BULKHEAD_BENCH_JOBS", "12000"))
BAR = 15_000
BATCHES = (64, 256)  # the larger is what a gateway writes together at most
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


Step = Callable[[Any], Any]


def claims(store: SqlStore, batch: int) -> Iterator[Any]:
    """What is claimed, batch by batch, until nothing is left."""
    while claimed := store.claim([Want("chat", ("llm",), batch)]):
        yield [Held(record.id, record.attempt, "w") for record, _ in claimed]


def accepted(store: SqlStore) -> Step:
    """Accept a batch. Raises when an offer was not accepted."""

    def accept(held: list[Held]) -> list[Held]:
        if not all(store.accept_many(held)):
            raise SystemExit("an offer was not accepted")
        return held

    return accept


def completed(store: SqlStore) -> Step:
    """Complete a batch. Raises when a completion was not stored."""

    def complete(held: list[Held]) -> None:
        done = [Done(one.job, one.attempt, one.worker, OUTCOME) for one in held]
        if any(ending.verdict != "stored" for ending in store.complete_many(done)):
            raise SystemExit("a completion was not stored")

    return complete


def in_a_row(first: Iterator[Any], *steps: Step) -> tuple[float, float]:
    """Run the steps beside each other, a thread each, batches going from one to the next, as a gateway does it.

    Returns jobs per second, and this process's CPU per job in µs.
    """
    ways: list[queue.Queue[Any]] = [queue.Queue() for _ in steps]
    failed: list[BaseException] = []

    def source() -> None:
        for batch in first:
            ways[0].put(batch)

    def stage(number: int) -> None:
        while (batch := ways[number].get()) is not None:
            made = steps[number](batch)
            if number + 1 < len(steps):
                ways[number + 1].put(made)

    def run(work: Callable[[], None], out: int) -> None:
        try:
            work()
        except BaseException as error:
            failed.append(error)
        finally:
            if out < len(ways):
                ways[out].put(None)

    works = [source, *(partial(stage, number) for number in range(len(steps)))]
    group = [threading.Thread(target=run, args=(work, number)) for number, work in enumerate(works)]
    began, cpu = time.perf_counter(), time.process_time()
    for thread in group:
        thread.start()
    for thread in group:
        thread.join()
    if failed:
        raise failed[0]
    return JOBS / (time.perf_counter() - began), (time.process_time() - cpu) * 1e6 / JOBS


def row(name: str, floor: tuple[float, float], ours: tuple[float, float], beside: tuple[str, str]) -> dict[str, Any]:
    """A job is a claim and a completion, so twice its rate is what the bar counts; `beside` is said at the ends."""
    return {
        "what": f"claim + accept + complete, {name} (bar: {BAR:,} claims and completions a second)",
        "floor": f"bare SQL {2 * floor[0]:,.0f}/s, {floor[1]:.0f} µs CPU/job{beside[0]}",
        "ours": f"{2 * ours[0]:,.0f}/s, {ours[1]:.0f} µs CPU/job{beside[1]}",
        "ratio": round(floor[0] / ours[0], 2),
    }


def on_sqlite(folder: Path, batch: int) -> dict[str, Any]:
    bare = sqlite3.connect(folder / "bare.sqlite", isolation_level=None, check_same_thread=False)
    for pragma in ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL", *_TABLE):
        bare.execute(pragma)
    bare.execute("BEGIN")
    bare.executemany("INSERT INTO bare VALUES (?, 'queued', ?, NULL)", [(n, "x" * 200) for n in range(JOBS)])
    bare.execute("COMMIT")

    turn = threading.Lock()

    def change(step: str, first: int) -> int:
        with turn:
            bare.execute("BEGIN IMMEDIATE")
            for n in range(first, min(first + batch, JOBS)):
                bare.execute(f"UPDATE bare SET {step} WHERE n = ? RETURNING *", (n,)).fetchall()
            bare.execute("COMMIT")
        return first

    store = SqliteStore(folder / "jobs.sqlite")
    try:
        fill(store)
        one, *others = (partial(change, step) for step in _STEPS)
        floors = in_a_row((one(first) for first in range(0, JOBS, batch)), *others)
        ours = in_a_row(claims(store, batch), accepted(store), completed(store))
        return row(f"batches of {batch}, SQLite", floors, ours, ("", ""))
    finally:
        store.close()
        bare.close()


def server_cpu(postmaster: int) -> Callable[[], float]:
    """CPU seconds of the database's processes so far, those that have ended included."""
    server, seen = psutil.Process(postmaster), dict[int, float]()

    def used() -> float:
        for process in [server, *server.children()]:
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                seen[process.pid] = times.user + times.system
        return sum(seen.values())

    return used


def on_postgres(batch: int) -> dict[str, Any]:
    import psycopg

    from coordinator.store.postgres import PostgresStore
    from coordinator.testing_postgres import postgres_server

    with postgres_server(durable=True) as server, server.space() as url:
        with psycopg.connect(url, autocommit=True) as admin:
            used = server_cpu(psutil.Process(admin.info.backend_pid).ppid())
            for statement in _TABLE:
                admin.execute(statement)
            admin.execute(
                "INSERT INTO bare SELECT n, 'queued', repeat('x', 200), NULL FROM generate_series(0, %s) AS n", (JOBS,)
            )
            before = used()
            pool = {step: psycopg.connect(url, autocommit=True) for step in _STEPS}

            def change(step: str, first: int) -> int:
                statement = f"UPDATE bare SET {step} WHERE n >= %s AND n < %s RETURNING *"
                pool[step].execute(statement.encode(), (first, min(first + batch, JOBS))).fetchall()
                return first

            one, *others = (partial(change, step) for step in _STEPS)
            bare = in_a_row((one(first) for first in range(0, JOBS, batch)), *others)
            spent = [(used() - before) * 1e6 / JOBS]
            for connection in pool.values():
                connection.close()
            store = PostgresStore(url)
            try:
                fill(store)
                admin.execute("CHECKPOINT")
                before = used()
                ours = in_a_row(claims(store, batch), accepted(store), completed(store))
                spent.append((used() - before) * 1e6 / JOBS)
            finally:
                store.close()
        said = (f", server {spent[0]:.0f}", f", server {spent[1]:.0f}")
        return row(f"batches of {batch}, PostgreSQL", bare, ours, said)


def bench_store() -> list[dict[str, Any]]:
    """Rows of both databases; PostgreSQL's only where it is installed."""
    rows = []
    for batch in BATCHES:
        with tempfile.TemporaryDirectory() as name:
            rows.append(on_sqlite(Path(name), batch))
    if importlib.util.find_spec("psycopg_pool") is None:
        print("SKIPPED: psycopg is not installed (extra: postgres)", file=sys.stderr)
        return rows
    from coordinator.testing_postgres import why_not

    if reason := why_not():
        print(f"SKIPPED: {reason}", file=sys.stderr)
        return rows
    return [*rows, *(on_postgres(batch) for batch in BATCHES)]


if __name__ == "__main__":
    for one in bench_store():
        print(f"| {one['what']} | {one['floor']} | {one['ours']} | {one['ratio']} |")
