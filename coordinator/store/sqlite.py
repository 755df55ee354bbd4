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

from coordinator.store.base import Beat, Claimed, StoreError, Want
from coordinator.store.needs import NO_LIMIT_GB
from coordinator.store.sql import SqlStore, in_turn
from coordinator.store.sqlite_file import connect, cure, migrate, take_file, translated
from coordinator.store.sqlite_schema import CLOCK

Row = sqlite3.Row


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
        return self._all(
            "SELECT seq, priority, vt FROM jobs WHERE state = 'queued' AND model = :model AND needs = :needs"
            f" AND kind IN ({', '.join(':' + name for name in kinds)})"
            " AND run_after_ms <= :now AND (deadline_at_ms = 0 OR deadline_at_ms > :now)"
            f" AND vram_gb_estimate <= :vram{but} ORDER BY priority DESC, vt, seq LIMIT :limit",
            model=want.model,
            needs=needs,
            vram=NO_LIMIT_GB if want.vram_gb is None else want.vram_gb,
            but=json.dumps(want.but),
            limit=want.limit,
            now=now,
            **kinds,
        )

    def _gauges(self) -> dict[str, float]:
        log = Path(f"{self._path}-wal")
        return {"bytes": self._path.stat().st_size, "log_bytes": log.stat().st_size if log.exists() else 0}

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
