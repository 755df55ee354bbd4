"""The register in a SQLite file: one connection that writes, one that reads, and other processes beside us."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from coordinator.register.base import Register
from coordinator.register.schema import MIGRATIONS, SQLITE, statements
from coordinator.store.base import StoreError, StoreTooNew
from coordinator.store.rows import Row
from coordinator.store.sqlite_file import connect, cure, translated


def make_private(path: Path) -> None:
    """Make the file, readable by its owner alone, unless it is there. Raises OSError.

    One that is there is not opened: closing it would take away the locks that this process has on it (POSIX locks go
    with any descriptor), and another process that ends would remove the log that we read from.
    """
    with contextlib.suppress(FileExistsError):
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))


class SqliteRegister(Register):
    """`Register` over one file, made when it is missing.

    Raises:
        StoreTooNew: a later version wrote it.
        StoreError: it cannot be opened; the sentence says what to do.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writing, self._reading = threading.Lock(), threading.Lock()
        self._open: list[sqlite3.Connection] = []
        try:
            make_private(path)
            for _ in range(2):
                self._open.append(connect(path))
            self._writer, self._reader = self._open
            self._migrate()
            self._reader.execute("PRAGMA query_only = ON")
        except (sqlite3.Error, OSError) as error:
            self.close()
            advice = cure(path, error) if isinstance(error, sqlite3.Error) else "Look at the rights of the folder."
            if "empty" in advice:
                advice = "Restore it from a backup; or move it away, and make all keys anew."
            raise StoreError(f"{path} cannot be opened as the register of keys: {error}. {advice}") from None
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the file."""
        with self._writing, self._reading:
            while self._open:
                self._open.pop().close()

    def _migrate(self) -> None:
        self._writer.execute("BEGIN IMMEDIATE")
        try:
            version = int(self._writer.execute("PRAGMA user_version").fetchone()[0])
            if version > len(MIGRATIONS):
                raise StoreTooNew(
                    f"{self._path} was written by a later version (schema {version}, this program knows "
                    f"{len(MIGRATIONS)}); install that version again."
                )
            for number in range(version + 1, len(MIGRATIONS) + 1):
                for statement in statements(number, SQLITE):
                    self._writer.execute(statement)
                self._writer.execute(f"PRAGMA user_version = {number}")
            self._writer.execute("COMMIT")
        except BaseException:
            if self._writer.in_transaction:
                self._writer.execute("ROLLBACK")
            raise

    @contextlib.contextmanager
    def _transaction(self, *, synced: bool = True) -> Iterator[int]:
        with self._writing, translated(self._path):
            self._check_open()
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield time.time_ns() // 1_000_000
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    def _all(self, sql: str, **names: Any) -> Sequence[Row]:
        return self._writer.execute(sql, names).fetchall()

    def _read(self, sql: str, **names: Any) -> Sequence[Row]:
        with self._reading, translated(self._path):
            self._check_open()
            return self._reader.execute(sql, names).fetchall()

    def _check_open(self) -> None:
        if not self._open:
            raise StoreError("The register of keys is closed.")
