"""The store in one SQLite file: one writer connection, one reader connection, WAL, `synchronous=FULL`.

Functions block for a commit (about 0.2 ms on an SSD), so callers on an event loop run them in a worker thread.
A transaction cannot be half-cancelled that way. What the statements mean is in `sql`.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from coordinator.store.base import Beat, Claimed, Done, Ending, Held, StoreError, Want
from coordinator.store.needs import NO_LIMIT_GB
from coordinator.store.rows import LATER, Row, record, succeeded
from coordinator.store.sql import SqlStore, in_turn, once_each
from coordinator.store.sql_usage import APPEND_ONE
from coordinator.store.sqlite_file import connect, cure, migrate, take_file, translated
from coordinator.store.sqlite_schema import CLOCK

_pack = msgspec.msgpack.encode
_ACCEPT = """
    UPDATE jobs SET state = 'running', worker = held.worker, tries = tries + 1, started_ms = :now
    FROM (SELECT value ->> 0 AS id, value ->> 1 AS attempt, value ->> 2 AS worker FROM json_each(:held)) AS held
    WHERE jobs.id = held.id AND jobs.attempt = held.attempt AND state = 'offered'
    RETURNING id, attempt, worker
"""
_RUNNING = "SELECT * FROM jobs WHERE id IN (SELECT value FROM json_each(:ids)) AND state = 'running'"
_SUCCEED = (
    "UPDATE jobs SET state = 'succeeded', result = ?, files = ?, usage = ?, finished_ms = ?, fault = NULL WHERE seq = ?"
)


class Named:
    """Rows as dicts: sqlite3.Row looks a name up by going through all columns, and a job has forty of them."""

    def __init__(self) -> None:
        self._columns: Any = None
        self._names: list[str] = []

    def __call__(self, cursor: sqlite3.Cursor, values: tuple[Any, ...]) -> dict[str, Any]:
        """One row; called by one thread at a time, as its connection is."""
        if cursor.description is not self._columns:  # the same object for all rows of a statement
            self._columns = cursor.description
            self._names = [column[0] for column in self._columns]
        return dict(zip(self._names, values, strict=True))


class SqliteStore(SqlStore):
    """`Store` over one file, created with mode 0600 because prompts lie in it.

    Raises:
        StoreBusy: another process has it open.
        StoreTooNew: its schema is newer than this program's.
        StoreError: it cannot be opened.
    """

    CLOCK = CLOCK
    SETTLE = "PRAGMA wal_checkpoint(TRUNCATE)"

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock_file = take_file(path)
        self._writing, self._reading = threading.Lock(), threading.Lock()
        try:
            self._writer, self._reader = connect(path), connect(path)
            with self._writing:
                migrate(self._writer, path)
            self._reader.execute("PRAGMA query_only = ON")
            self._writer.row_factory, self._reader.row_factory = Named(), Named()
        except sqlite3.Error as error:
            os.close(self._lock_file)
            raise StoreError(f"{path} cannot be opened as a job store: {error}. {cure(path, error)}") from None
        except StoreError:
            os.close(self._lock_file)
            raise

    def close(self) -> None:
        """Release the store; later calls raise StoreError. Calling it again does nothing."""
        with self._writing, self._reading:
            if self._lock_file < 0:
                return
            self._writer.close()
            self._reader.close()
            os.close(self._lock_file)
            self._lock_file = -1

    def beat(self) -> Beat:
        """Nobody else has this file, so nobody needs to be told; an idle coordinator writes nothing."""
        return Beat()

    def listen(self, ring: Callable[[], None]) -> None:
        """Nobody else writes to this file, so `ring` is never called."""

    def _claim(self, wants: Sequence[Want], now: int) -> list[Claimed]:
        """One writer, so what was looked at is still so when it is changed."""
        self._ripen(now, sum(want.limit for want in wants))
        claimed: list[Row] = []
        lines: dict[str, list[str]] = {}
        for want in wants:
            fitting = self._lines_for(want, lines)
            due = [row for needs in fitting for row in self._due(want, needs, now)]
            if len(fitting) > 1:
                due = sorted(due, key=lambda row: (-row["priority"], row["vt"], row["seq"]))[: want.limit]
            if due:
                claimed += self._all(
                    "UPDATE jobs SET state = 'offered', attempt = attempt + 1, worker = '', gateway = :me "
                    "WHERE seq IN (SELECT value FROM json_each(:due)) RETURNING *",
                    me=self.gateway,
                    due=json.dumps([row["seq"] for row in due]),
                )
        return in_turn(claimed, now)

    def _due(self, want: Want, needs: str, now: int) -> Sequence[Row]:
        kinds = {f"kind{n}": kind for n, kind in enumerate(want.kinds)}
        but = " AND id NOT IN (SELECT value FROM json_each(:but))" if want.but else ""
        if want.waited_ms:
            but += " AND (created_ms <= :now - :waited OR created_ms > :now + :waited)"
        return self._all(
            "SELECT seq, priority, vt FROM jobs WHERE state = 'queued' AND model = :model AND needs = :needs"
            f" AND kind IN ({', '.join(':' + name for name in kinds)})"
            " AND run_after_ms <= :now AND (deadline_at_ms = 0 OR deadline_at_ms > :now)"
            f" AND vt < {LATER} AND vram_gb_estimate <= :vram{but} ORDER BY priority DESC, vt, seq LIMIT :limit",
            model=want.model,
            needs=needs,
            vram=NO_LIMIT_GB if want.vram_gb is None else want.vram_gb,
            but=json.dumps(want.but),
            waited=want.waited_ms,
            limit=want.limit,
            now=now,
            **kinds,
        )

    def _gauges(self) -> dict[str, float]:
        log = Path(f"{self._path}-wal")
        return {"bytes": self._path.stat().st_size, "log_bytes": log.stat().st_size if log.exists() else 0}

    def _accept_all(self, held: Sequence[Held], now: int) -> list[bool]:
        rows = self._all(_ACCEPT, now=now, held=json.dumps([(one.job, one.attempt, one.worker) for one in held]))
        return once_each(held, rows)

    def _complete_all(self, done: Sequence[Done], now: int) -> list[Ending]:
        """Look at all rows at once, and change all that are as they should be; the others are judged one by one.

        Between the look and the change nobody else writes: a transaction here has the file for itself.
        """
        if len(done) == 1:
            return super()._complete_all(done, now)
        found = self._all(_RUNNING, ids=json.dumps([one.job for one in done]))
        running = {(row["id"], row["attempt"], row["worker"]): row for row in found}
        changes: list[tuple[bytes, bytes, bytes, int, int]] = []
        stored: dict[int, Ending] = {}
        for number, one in enumerate(done):
            row = running.pop((one.job, one.attempt, one.worker), None)  # said twice, it is stored once
            if row is not None:
                out = one.outcome
                changes.append((out.result, _pack(out.files), _pack(out.usage), now, row["seq"]))
                ended = record(row)
                stored[number] = Ending("stored", succeeded(ended, out, now))
        self._writer.executemany(_SUCCEED, changes)
        self._count([ending.record for ending in stored.values() if ending.record is not None], now)
        return [stored.get(number) or self._complete(one, now) for number, one in enumerate(done)]

    def _append_usage(self, rows: Sequence[dict[str, Any]]) -> None:
        self._writer.executemany(APPEND_ONE, rows)

    @contextlib.contextmanager
    def _transaction(self, *, synced: bool = True) -> Iterator[int]:
        with self._writing, translated(self._path):
            if self._lock_file < 0:
                raise StoreError("The job store is closed.")
            self._writer.execute(f"PRAGMA synchronous = {'FULL' if synced else 'NORMAL'}")
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield int(self._writer.execute(f"SELECT {CLOCK} AS now").fetchone()["now"])
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    def _all(self, sql: str, **names: Any) -> Sequence[Row]:
        return self._writer.execute(sql, names).fetchall()

    def _read(self, sql: str, **names: Any) -> Sequence[Row]:
        with self._reading, translated(self._path):
            if self._lock_file < 0:
                raise StoreError("The job store is closed.")
            return self._reader.execute(sql, names).fetchall()
