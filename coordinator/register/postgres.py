"""The register in the store's PostgreSQL: what one replica writes, all of them find."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import psycopg

from coordinator.register.base import Register
from coordinator.register.schema import MIGRATIONS, POSTGRES, statements
from coordinator.store.base import SILENT_MS, StoreError, StoreTooNew
from coordinator.store.postgres import migrate as migrate_store
from coordinator.store.postgres_link import Connection, PostgresLink
from coordinator.store.rows import Row

T = TypeVar("T")
CONNECTIONS = 2  # registers are read a few times a second, and hardly ever written
_MIGRATING = 0x62756C72  # of the advisory lock; the store's has another number


class PostgresRegister(Register):
    """`Register` over the store's database.

    Args:
        url, pooled: as the store's.

    Raises:
        StoreTooNew: a later version wrote it.
        StoreError: it cannot be reached, or refuses us.
    """

    LOCK, SKIP, CLOCK = " FOR UPDATE", " FOR UPDATE SKIP LOCKED", "now_ms()"

    def __init__(self, url: str, *, pooled: bool = False) -> None:
        self._link = PostgresLink(url, pooled=pooled, connections=CONNECTIONS)
        try:
            connection = self._link.connect()
            try:
                migrate(connection)
            finally:
                connection.close()
        except BaseException:
            self._link.close()
            raise

    def close(self) -> None:
        """Close the connections."""
        self._link.close()

    def replicas(self) -> int:
        """How many coordinators have beaten lately, at least 1."""
        rows = self._read("SELECT count(*) AS n FROM gateways WHERE beat_ms > now_ms() - :silent", silent=SILENT_MS)
        return max(1, int(rows[0]["n"]))

    def _transaction(self, *, synced: bool = True) -> AbstractContextManager[int]:
        return self._link.transaction(synced=synced)

    def _to_the_end(self, call: Callable[[], T]) -> T:
        return self._link.to_the_end(call)

    def _all(self, sql: str, **names: Any) -> Sequence[Row]:
        return self._link.all(sql, names)

    def _read(self, sql: str, **names: Any) -> Sequence[Row]:
        return self._link.to_the_end(lambda: self._link.read(sql, names))


def migrate(connection: Connection) -> None:
    """Bring the register's tables, and the store's, up to date. Raises StoreTooNew, StoreError."""
    migrate_store(connection)  # the clock is there
    try:
        with connection.transaction():
            connection.execute("SELECT pg_advisory_xact_lock(%s)", (_MIGRATING,))
            connection.execute("CREATE TABLE IF NOT EXISTS register_version (version INTEGER NOT NULL)")
            row = connection.execute("SELECT coalesce(max(version), 0) AS version FROM register_version").fetchone()
            version = int(row["version"]) if row else 0
            if version > len(MIGRATIONS):
                raise StoreTooNew(
                    f"A later version of the coordinator wrote the keys of this database (schema {version}, this "
                    f"program knows {len(MIGRATIONS)}); install that version again."
                )
            for number in range(version + 1, len(MIGRATIONS) + 1):
                for statement in statements(number, POSTGRES):
                    connection.execute(statement.encode(), prepare=False)
                connection.execute("INSERT INTO register_version VALUES (%s)", (number,))
    except psycopg.Error as error:
        raise StoreError(f"The register's tables cannot be brought up to date: {str(error).strip()}") from None
