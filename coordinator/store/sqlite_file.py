"""The file of the SQLite store: its lock, its connections, its schema, and the words for its troubles."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

from coordinator.store.base import StoreBusy, StoreError, StoreTooNew
from coordinator.store.sqlite_schema import MIGRATIONS
from protocol.faults import refuse

_BUSY_MS = 5000
_LEAST_ROOM_BYTES = 2**20


@contextlib.contextmanager
def translated(path: Path) -> Iterator[None]:
    """The one place where SQLite's exceptions become ours."""
    try:
        yield
    except sqlite3.Error as error:
        if _no_room(path, error):
            raise refuse("storage_full", "The coordinator's disk is full; try again when there is room.") from None
        raise StoreError(f"{path}: {error}") from error


def _no_room(path: Path, error: sqlite3.Error) -> bool:
    """Whether the disk is full: where the index of the journal cannot grow, SQLite calls that an I/O error."""
    match getattr(error, "sqlite_errorcode", 0) & 0xFF:
        case sqlite3.SQLITE_FULL:
            return True
        case sqlite3.SQLITE_IOERR:
            return _full(path)
    return False


def _full(path: Path) -> bool:
    try:
        return shutil.disk_usage(path.parent).free < _LEAST_ROOM_BYTES
    except OSError:  # the folder is gone, too
        return False


def take_file(path: Path) -> int:
    """Lock the store for this process; the lock lives beside it, because SQLite uses the file's own locks."""
    try:
        lock = os.open(f"{path}.lock", os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError(f"{path} cannot be opened as a job store: {error.strerror}.") from None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(os.open(path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600))
    except OSError as error:
        os.close(lock)
        if error.errno in (errno.EAGAIN, errno.EACCES) and error.filename is None:
            raise StoreBusy(f"{path} is in use by another coordinator; stop that one first.") from None
        raise StoreError(f"{path} cannot be opened as a job store: {error.strerror}.") from None
    return lock


def cure(path: Path, error: sqlite3.Error) -> str:
    """What to do about a file that cannot be opened; only a broken one may be given up, it holds people's jobs."""
    if getattr(error, "sqlite_errorcode", 0) & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return "Move it away to start empty."
    if _full(path):
        return "The disk is full: make room and start again."
    return "Look at the disk, and at the rights of the folder."


def connect(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=_BUSY_MS / 1000)
    connection.row_factory = sqlite3.Row
    # What is deleted is overwritten: prompts of tenants that keep none must not be found in the file's free space.
    pragmas = ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON", "temp_store = MEMORY")
    # The journal goes into the file every 16 MiB: each time costs two more syncs, and pages that changed again go once.
    for pragma in (*pragmas, "secure_delete = ON", "wal_autocheckpoint = 4000"):
        _patiently(connection, f"PRAGMA {pragma}")
    return connection


def _patiently(connection: sqlite3.Connection, statement: str) -> None:
    """Where several open a new file at once, SQLite refuses the change to WAL without waiting; so we wait."""
    end = time.monotonic() + _BUSY_MS / 1000
    while True:
        try:
            connection.execute(statement)
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > end:
                raise
        time.sleep(0.01)


def migrate(connection: sqlite3.Connection, path: Path) -> None:
    """Bring the schema up to date, one transaction per step."""
    version = int(connection.execute("PRAGMA user_version").fetchone()[0])
    if version > len(MIGRATIONS):
        raise StoreTooNew(
            f"{path} was written by a later version (schema {version}, this program knows {len(MIGRATIONS)}); "
            "install that version again or move the file away."
        )
    for number, script in enumerate(MIGRATIONS[version:], version + 1):
        # executescript would commit first and run without one; so the whole step is one script.
        connection.executescript(f"BEGIN IMMEDIATE; {script}; PRAGMA user_version = {number}; COMMIT;")
