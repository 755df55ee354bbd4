"""From the SQLite register to the one in PostgreSQL: part of `coordinator migrate`, in its last transaction."""

from __future__ import annotations

from pathlib import Path

from psycopg import sql

from coordinator.register.opening import FILE_NAME
from coordinator.register.schema import TABLES
from coordinator.register.sqlite import SqliteRegister
from coordinator.store.postgres_link import Connection


def copy_register(store: Path, connection: Connection) -> dict[str, int]:
    """Copy the register that lies beside a store's file, if there is one; returns table -> rows.

    What the target has already stays. What admins did before is not taken along: it is in the old log.

    Raises:
        StoreError: the file cannot be read.
        psycopg.Error: the target refuses a row.
    """
    path = store.parent / FILE_NAME
    if not path.is_file():
        return {}
    counts: dict[str, int] = {}
    register = SqliteRegister(path)
    try:
        for table in TABLES:
            rows = [dict(row) for row in register.read(f"SELECT * FROM {table}")]  # type: ignore[call-overload]
            counts[table] = len(rows)
            if not rows:
                continue
            names = list(rows[0])
            statement = sql.SQL("INSERT INTO {} ({}) VALUES ({}) ON CONFLICT DO NOTHING").format(
                sql.Identifier(table),
                sql.SQL(", ").join(map(sql.Identifier, names)),
                sql.SQL(", ").join(sql.Placeholder() * len(names)),
            )
            with connection.cursor() as cursor:
                cursor.executemany(statement, [[row[name] for name in names] for row in rows])
        number = int(register.read("SELECT number FROM changes WHERE one = 1")[0]["number"])
        connection.execute("UPDATE changes SET number = greatest(number, %s) + 1 WHERE one = 1", (number,))
    finally:
        register.close()
    return counts
