"""The supervisor's one database: an SQLite file in the state folder, written by one task, never on the event loop.

Theory of operation. `write` queues a function that changes rows and waits until what it changed is durable. One task
takes everything that is queued and runs it in one transaction, in a thread: under load many claims share one fsync.
`synchronous=FULL` with a write-ahead log means that a transaction which has returned survives the power being cut:
SQLite syncs the log before it returns. A transaction that fails (the disk is full) is rolled back as a whole and its
members are tried again one by one, so that one that is too large fails alone.

The order that whoever keeps files beside rows has to follow: write the file, fsync the file, fsync its folder, then
`write` the row that names it; and the other way round when it goes: first the row, then the file.

Everything is spoken in SQL text on a connection without implicit transactions, so that tests can hand in a connection
whose file system loses power (apsw with a VFS of its own) instead of the standard library's.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import trio

from supervisor.errors import SupervisorError

log = logging.getLogger(__name__)

# Schema versions, oldest first: what brings a file from version n to n + 1. Never changed, only added to.
MIGRATIONS: tuple[tuple[str, ...], ...] = (
    (
        """
        CREATE TABLE claims (
            job TEXT NOT NULL,
            attempt INTEGER NOT NULL,
            offer BLOB NOT NULL,
            taken_ms INTEGER NOT NULL,
            streamed INTEGER NOT NULL DEFAULT 0,
            done BLOB,
            fault BLOB,
            bytes INTEGER NOT NULL DEFAULT 0,
            PRIMARY KEY (job, attempt)
        ) WITHOUT ROWID
        """,
    ),
)
BUSY_MS = 5000
_Value = TypeVar("_Value")


class Connection(Protocol):
    """What is asked of a connection; `sqlite3` and `apsw` both have it. No implicit transactions."""

    def execute(self, sql: str, parameters: Sequence[Any] = ..., /) -> Iterable[tuple[Any, ...]]:
        """Run one statement."""

    def close(self) -> None:
        """Close it."""


class StoreProblem(Exception):
    """A write did not become durable; nothing of it is there.

    Attributes:
        full: the disk is full, so that the same write may succeed later.
    """

    def __init__(self, sentence: str, *, full: bool) -> None:
        super().__init__(sentence)
        self.full = full


class _Write:
    """One queued write; `error` is set when it failed."""

    def __init__(self, change: Callable[[Connection], Any]) -> None:
        self.change = change
        self.value: Any = None
        self.error: Exception | None = None
        self.over = trio.Event()


class Store:
    """See the module. Made by `open_store`.

    Attributes:
        problem: why the last write failed; "" when it did not.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._queue: list[_Write] = []
        self._bell = trio.Event()
        self._closing = False
        self.problem = ""

    async def write(self, change: Callable[[Connection], _Value]) -> _Value:
        """Run `change` in a transaction and return what it returned, when it is durable.

        Args:
            change: runs in a thread, within a transaction that others share; it must not commit.

        Raises:
            StoreProblem: it is not durable.

        Cancellation: nobody waits any more; the write happens all the same.
        """
        write = _Write(change)
        self._queue.append(write)
        self._bell.set()
        await write.over.wait()
        if write.error is not None:
            raise write.error
        value: _Value = write.value
        return value

    async def run(self) -> None:
        """The one writer. Runs until `close`; what is queued by then is written first."""
        while self._queue or not self._closing:
            if not self._queue:
                await self._bell.wait()
                self._bell = trio.Event()
                continue
            batch, self._queue = self._queue, []
            with trio.CancelScope(shield=True):  # a transaction cannot be half cancelled
                await trio.to_thread.run_sync(self._commit, batch)
            self.problem = next((str(write.error) for write in batch if write.error), "")
            for write in batch:
                write.over.set()

    def close(self) -> None:
        """Let `run` end after what is queued."""
        self._closing = True
        self._bell.set()

    def _commit(self, batch: list[_Write]) -> None:
        try:
            self._transaction(batch)
        except Exception as error:
            if len(batch) == 1:
                batch[0].error = _problem(error)
                return
            for write in batch:
                self._commit([write])

    def _transaction(self, batch: list[_Write]) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            for write in batch:
                write.value = write.change(self._connection)
            self._connection.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(Exception):  # SQLite has rolled back by itself when the disk was full
                self._connection.execute("ROLLBACK")
            raise


def _problem(error: Exception) -> StoreProblem:
    full = "full" in str(error) or "disk I/O" in str(error)
    return StoreProblem(f"The worker's records cannot be written: {error}.", full=full)


def connect(path: Path) -> Connection:
    """A connection of the standard library, for any thread."""
    return sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=BUSY_MS / 1000)


def prepare(connection: Connection) -> None:
    """Bring the file to today's schema.

    Raises:
        SupervisorError: it belongs to a newer version, or is damaged, or cannot be written.
    """
    try:
        list(connection.execute("PRAGMA locking_mode = EXCLUSIVE"))  # nobody else's: no shared memory beside it
        list(connection.execute("PRAGMA journal_mode = WAL"))
        list(connection.execute("PRAGMA synchronous = FULL"))
        (found,) = next(iter(connection.execute("PRAGMA user_version")))
        if found > len(MIGRATIONS):
            raise SupervisorError(
                f"The worker's records have version {found} and this supervisor knows {len(MIGRATIONS)}; "
                "install the newer one again, or name another [worker] state_dir."
            )
        for number, statements in enumerate(MIGRATIONS[found:], found + 1):
            connection.execute("BEGIN IMMEDIATE")
            for statement in statements:
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {number}")
            connection.execute("COMMIT")
    except SupervisorError:
        raise
    except Exception as error:
        raise SupervisorError(f"The worker's records cannot be opened: {error}.") from None


@contextlib.asynccontextmanager
async def open_store(path: Path, connect: Callable[[Path], Connection] = connect) -> AsyncIterator[Store]:
    """The store at `path`, for as long as the block lasts; what was queued is written before it ends.

    Raises:
        SupervisorError: it cannot be used.
        OSError: it cannot be made.
    """

    def opened() -> Connection:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))  # results are nobody else's to read
        made = connect(path)
        try:
            prepare(made)
        except BaseException:
            made.close()
            raise
        return made

    connection = await trio.to_thread.run_sync(opened)
    store = Store(connection)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_shielded, store)
            try:
                yield store
            finally:
                store.close()
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(connection.close)


async def _shielded(store: Store) -> None:
    """Its end is `close`: a cancelled supervisor still writes what became of its jobs."""
    with trio.CancelScope(shield=True):
        await store.run()
