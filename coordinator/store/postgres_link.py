"""Connections to PostgreSQL: a pool, transactions whose end is never in doubt, and the words for its troubles.

A connection that breaks before COMMIT was sent has changed nothing: the transaction is begun again on another one.
When it breaks after that, the database is asked what became of the transaction, by its number. So a caller learns
that a step was taken, or that it was not; only a database that stays away, or that was replaced by another in
between, leaves it open, and then the caller is told so.
"""

from __future__ import annotations

import contextlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import psycopg
from psycopg import errors, sql
from psycopg.conninfo import conninfo_to_dict, make_conninfo
from psycopg.rows import dict_row
from psycopg_pool import ConnectionPool, PoolClosed, PoolTimeout, TooManyRequests

from coordinator.store.base import StoreAway, StoreError
from protocol.faults import Fault, FaultError, refuse

log = logging.getLogger(__name__)

T = TypeVar("T")
Connection = psycopg.Connection[dict[str, Any]]

PATIENCE_S = 4.0  # how long a step is begun again; a client that waits longer is better told to come back
CONNECTION_S = 2.0  # how long a step waits for a free connection
RETRY_PAUSE_S = 0.05
RETRY_HINT_S = 2
CONNECT: dict[str, Any] = {
    "connect_timeout": 3,
    "application_name": "bulkhead",
    "target_session_attrs": "read-write",  # of several hosts, the one that takes writes
    "keepalives_idle": 5,
    "keepalives_interval": 2,
    "keepalives_count": 3,
    "tcp_user_timeout": 10_000,
}
# The last one bounds what a coordinator that was stopped in the middle of a transaction holds up.
BOUNDS_MS = {"statement_timeout": 15_000, "lock_timeout": 5_000, "idle_in_transaction_session_timeout": 10_000}
_ASK_FATE = "SELECT pg_xact_status(%s::xid8) AS fate, pg_postmaster_start_time()::text AS born"
_ARRAY = re.compile(r"(?<!:):([a-z_]+)(?=::[a-z]+\[\])")  # in binary: as text, each element would be quoted
_NAME = re.compile(r"(?<!:):([a-z_][a-z_0-9]*)")
# The server ended the statement or the connection, or takes no writes (any more): nothing of the transaction stays.
_UNDONE = (
    errors.SerializationFailure,
    errors.DeadlockDetected,
    errors.LockNotAvailable,
    errors.AdminShutdown,
    errors.CrashShutdown,
    errors.CannotConnectNow,
    errors.TooManyConnections,
    errors.ReadOnlySqlTransaction,
    errors.IdleInTransactionSessionTimeout,
)


class Undone(Exception):
    """The transaction changed nothing and may be begun again."""


class _Began(NamedTuple):
    """A transaction: the clock, its number, and which life of which server it belongs to."""

    now: int
    xid: str
    born: str


@lru_cache(maxsize=256)
def translated(statement: str) -> str:
    """The statement with parameters as psycopg names them."""
    return _NAME.sub(r"%(\1)s", _ARRAY.sub(r"%(\1)b", statement))


def conninfo(url: str) -> str:
    """The URL (or libpq's words) with our defaults. Raises StoreError, without the password."""
    try:
        given = conninfo_to_dict(url)
    except psycopg.ProgrammingError:
        raise StoreError("store: This is no PostgreSQL URL, such as postgres://user@host/database.") from None
    return make_conninfo(**{**CONNECT, **given})


def away(error: BaseException | None = None, doubt: bool = False) -> StoreAway:
    """What a client is told while the database is away."""
    if error is not None:
        log.warning("The database is away: %s", str(error).strip().replace("\n", " "))
    what = "Whether this was stored is not known" if doubt else "Nothing was changed"
    message = f"The coordinator's database cannot be reached. {what}; try again."
    return StoreAway(Fault("overloaded", message, detail={"retry_after_s": RETRY_HINT_S}))


class PostgresLink:
    """All connections of one store. Functions may be called from any thread.

    Args:
        url: of the database; several hosts may be named.
        pooled: a pooler in transaction mode is in between: no prepared statements, no settings of a session.
        connections: at most so many.

    Raises:
        StoreError: it cannot be reached, or refuses us.
    """

    def __init__(self, url: str, *, pooled: bool, connections: int) -> None:
        self.conninfo, self.pooled = conninfo(url), pooled
        self._mine = threading.local()
        settings = [
            sql.SQL("SET LOCAL {} = {}").format(sql.Identifier(name), sql.Literal(ms)) for name, ms in BOUNDS_MS.items()
        ]
        local = sql.SQL("; ").join(settings).as_string(None) + "; " if pooled else ""
        self._begin = f"BEGIN; {local}"
        self.connect().close()  # a refusal at the start is a sentence, not a pool that tries for ever
        self._pool: ConnectionPool[Connection] = ConnectionPool(
            self.conninfo,
            min_size=1,
            max_size=connections,
            kwargs=self._options(),
            configure=self._configure,
            open=True,
            timeout=CONNECTION_S,
            reconnect_timeout=CONNECTION_S,
            max_lifetime=3600.0,
            name="store",
        )

    def connect(self) -> Connection:
        """A connection of its own, outside the pool. Raises StoreError."""
        try:
            connection: Connection = psycopg.Connection.connect(self.conninfo, **self._options())
        except psycopg.Error as error:
            raise StoreError(f"The database cannot be reached: {str(error).strip()}") from None
        self._configure(connection)
        return connection

    def pool(self) -> dict[str, int]:
        """psycopg's numbers of the pool: pool_size, pool_available, requests_waiting and others."""
        return self._pool.get_stats()

    def close(self) -> None:
        """Close all connections; later calls raise StoreError."""
        self._pool.close()

    def _options(self) -> dict[str, Any]:
        options: dict[str, Any] = {"autocommit": True, "row_factory": dict_row}
        return {**options, "prepare_threshold": None} if self.pooled else options

    def _configure(self, connection: Connection) -> None:
        if not self.pooled:
            for name, ms in BOUNDS_MS.items():
                connection.execute(sql.SQL("SET {} = {}").format(sql.Identifier(name), sql.Literal(ms)))

    # ---- steps ---------------------------------------------------------------------------------------------

    def to_the_end(self, call: Callable[[], T]) -> T:
        """Run a step, again as long as it was undone, for PATIENCE_S. Raises StoreAway after that."""
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                return call()
            except Undone as undone:
                if time.monotonic() >= until:
                    raise away(undone.__cause__) from None
            time.sleep(RETRY_PAUSE_S)

    def read(self, statement: str, names: dict[str, Any]) -> list[dict[str, Any]]:
        """Rows as they are committed. Raises StoreError."""
        if self.pooled:
            with self.transaction():
                return self.all(statement, names)
        with self._connection() as connection, _judged(connection):
            return _run(connection, statement, names)

    def all(self, statement: str, names: dict[str, Any]) -> list[dict[str, Any]]:
        """Rows of a statement of the transaction that this thread is in."""
        connection: Connection = self._mine.connection
        return _run(connection, statement, names)

    @contextlib.contextmanager
    def transaction(self, *, synced: bool = True) -> Iterator[int]:
        """One transaction of this thread; yields the store's clock. Raises Undone, StoreAway, StoreError."""
        with self._connection() as connection:
            self._mine.connection = connection
            try:
                with _judged(connection):
                    began = self._began(connection, synced)
                    yield began.now
                lost = _commit(connection)
            except BaseException:
                _roll_back(connection)
                raise
            finally:
                self._mine.connection = None
        if lost is not None:  # the connection is given back first, because asking takes another one
            self._ask_fate(began, lost)

    def _began(self, connection: Connection, synced: bool) -> _Began:
        lazily = "" if synced else "SET LOCAL synchronous_commit = off; "
        ask = "SELECT now_ms() AS now, pg_current_xact_id()::text AS xid, pg_postmaster_start_time()::text AS born"
        cursor = connection.execute(f"{self._begin}{lazily}{ask}".encode(), prepare=False)
        while cursor.nextset():
            pass
        row = cursor.fetchone()
        assert row is not None
        return _Began(**row)

    def _ask_fate(self, began: _Began, lost: psycopg.Error) -> None:
        """Return when the transaction was committed. Raises Undone, or StoreAway when nobody can tell."""
        until = time.monotonic() + PATIENCE_S
        while time.monotonic() < until:
            try:
                with self._connection() as connection:
                    rows = connection.execute(_ASK_FATE, (began.xid,)).fetchall()
            except (psycopg.Error, StoreAway):
                time.sleep(RETRY_PAUSE_S)
                continue
            if rows[0]["born"] != began.born:
                break  # another life of the server, or another server: the number may be somebody else's there
            if rows[0]["fate"] == "committed":
                return
            if rows[0]["fate"] == "aborted":
                raise Undone from lost
            time.sleep(RETRY_PAUSE_S)
        raise away(lost, doubt=True)

    @contextlib.contextmanager
    def _connection(self) -> Iterator[Connection]:
        try:
            connection = self._pool.getconn()
        except PoolClosed:
            raise StoreError("The job store is closed.") from None
        except (PoolTimeout, TooManyRequests) as error:
            raise away(error) from None
        try:
            yield connection
        finally:
            self._pool.putconn(connection)


def _run(connection: Connection, statement: str, names: dict[str, Any]) -> list[dict[str, Any]]:
    with connection.cursor(binary=True) as cursor:
        cursor.execute(translated(statement).encode(), names)
        return cursor.fetchall()


def _commit(connection: Connection) -> psycopg.Error | None:
    """End the transaction; the error when its answer was lost. Raises Undone when the server refused."""
    try:
        connection.execute("COMMIT", prepare=False)
    except psycopg.Error as error:
        if connection.broken:
            return error
        raise Undone from error
    return None


def _roll_back(connection: Connection) -> None:
    if connection.info.transaction_status != psycopg.pq.TransactionStatus.IDLE and not connection.broken:
        with contextlib.suppress(psycopg.Error):
            connection.execute("ROLLBACK", prepare=False)


@contextlib.contextmanager
def _judged(connection: Connection) -> Iterator[None]:
    """The one place where psycopg's exceptions become ours; for what goes wrong before COMMIT."""
    try:
        yield
    except psycopg.Error as error:
        if connection.broken or isinstance(error, _UNDONE):
            raise Undone from error
        raise _fault(error) from error


def _fault(error: psycopg.Error) -> FaultError | StoreError:
    if isinstance(error, errors.DiskFull):
        return refuse("storage_full", "The coordinator's database is full; try again when there is room.")
    if isinstance(error, errors.QueryCanceled):
        return away(error)
    if isinstance(error, psycopg.DataError):  # a NUL, mostly, which PostgreSQL's text cannot hold
        return refuse("invalid_parameter", "A text of the request holds characters that cannot be stored, such as NUL.")
    return StoreError(f"The database refused a statement: {str(error).strip()}")
