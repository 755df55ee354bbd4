"""From SQLite to PostgreSQL: everything that the file holds, once, and counted.

The source is locked, so no coordinator serves from it meanwhile. Jobs go over in pieces, each with a note of how far
the copy is, so a copy that was interrupted goes on where it was; no coordinator opens a target before its copy is
finished. What the register beside the file holds, such as keys and tenants, goes with them; blobs lie in the state
folder and stay there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psycopg
from psycopg import sql

from coordinator.register.moving import copy_register
from coordinator.register.postgres import migrate
from coordinator.store.base import SILENT_MS, StoreError
from coordinator.store.postgres_link import Connection, PostgresLink
from coordinator.store.sqlite import SqliteStore

PIECE = 200  # jobs per transaction; each may have megabytes of parameters
# Behind the jobs, in the order of their references.
SMALL_TABLES = (
    "input_blobs",
    "attempts",
    "lots",
    "turns",
    "files",
    "batches",
    "batch_items",
    "usage_days",
    "usage_fresh",
    "deployments",
    "placements",
)
TABLES = ("jobs", *SMALL_TABLES)
_NUMBERED = ("jobs", "files", "batches", "usage_fresh")
_SUMMED = ("state", "jobs", "attempts", "numbers", "bytes")
_SUMS = (
    "SELECT state, count(*) AS jobs, sum(attempt) AS attempts, sum(seq) AS numbers, sum({length}(params)) AS bytes "
    "FROM jobs GROUP BY state ORDER BY state"
)


def move(source: Path, target: str, say: Callable[[str], None]) -> dict[str, int]:
    """Copy all rows; returns table -> rows.

    Args:
        source: the SQLite file.
        target: URL of a database without jobs, or with a part of this copy.
        say: told how far it is.

    Raises:
        StoreBusy: a coordinator serves from the source.
        StoreError: there is no source, the target is not empty or in use, or the counts differ.
    """
    if not source.is_file():
        raise StoreError(f"{source}: There is no such file.")
    store = SqliteStore(source)
    try:
        link = PostgresLink(target, pooled=False, connections=1)
        try:
            connection = link.connect()
            try:
                migrate(connection)
                return _copy(store, connection, source, say)
            except psycopg.Error as error:
                text = str(error).strip()
                raise StoreError(f"The copy stopped: {text}. What was copied stays; run it again.") from None
            finally:
                connection.close()
        finally:
            link.close()
    finally:
        store.close()


def _name(source: Path) -> str:
    return f"sqlite:{source.resolve()}"


def _copy(store: SqliteStore, connection: Connection, source: Path, say: Callable[[str], None]) -> dict[str, int]:
    name = _name(source)
    last = _begin(connection, name)
    total = int(store._read("SELECT count(*) AS n FROM jobs")[0]["n"])
    done = int(store._read("SELECT count(*) AS n FROM jobs WHERE seq <= :last", last=last)[0]["n"])
    if done:
        say(f"An earlier copy got as far as {done} of {total} jobs; it goes on there.")
    while rows := store._read("SELECT * FROM jobs WHERE seq > :last ORDER BY seq LIMIT :n", last=last, n=PIECE):
        last, done = rows[-1]["seq"], done + len(rows)
        with connection.transaction():
            _insert(connection, "jobs", rows)
            connection.execute("UPDATE copies SET last_seq = %s WHERE source = %s", (last, name))
        say(f"{done} of {total} jobs")
    with connection.transaction():
        for table in SMALL_TABLES:
            rows = store._read(f"SELECT * FROM {table}")
            for first in range(0, len(rows), PIECE):
                _insert(connection, table, rows[first : first + PIECE])
        counts = {**_verified(store, connection), **copy_register(source, connection)}
        for table in _NUMBERED:
            following = "SELECT setval(pg_get_serial_sequence('{0}', 'seq'), max(seq)) FROM {0} HAVING max(seq) > 0"
            connection.execute(following.format(table).encode())
        connection.execute("UPDATE copies SET finished = TRUE WHERE source = %s", (name,))
    return counts


def _begin(connection: Connection, name: str) -> int:
    """Note the copy; the number of the last job that is over already. Raises StoreError for a target in use."""
    with connection.transaction():
        connection.execute("LOCK TABLE copies")
        known = connection.execute("SELECT source, last_seq FROM copies WHERE NOT finished").fetchone()
        if known is not None:
            if known["source"] != name:
                raise StoreError(f"The target holds a part of a copy of {known['source']}; finish that one.")
            return int(known["last_seq"])
        full = [table for table in TABLES if connection.execute(f"SELECT 1 FROM {table} LIMIT 1".encode()).fetchone()]
        if full:
            raise StoreError(f"The target is not empty: it has {', '.join(full)}. Give an empty database.")
        live = connection.execute("SELECT 1 FROM gateways WHERE beat_ms > now_ms() - %s", (SILENT_MS,)).fetchone()
        if live is not None:
            raise StoreError("A coordinator serves from the target; stop it first.")
        connection.execute("INSERT INTO copies (source, last_seq) VALUES (%s, 0)", (name,))
        return 0


def _insert(connection: Connection, table: str, rows: Sequence[Any]) -> None:
    names = list(rows[0])
    statement = sql.SQL("INSERT INTO {} ({}) VALUES ({})").format(
        sql.Identifier(table),
        sql.SQL(", ").join(map(sql.Identifier, names)),
        sql.SQL(", ").join(sql.Placeholder() * len(names)),
    )
    with connection.cursor() as cursor:
        cursor.executemany(statement, [tuple(row.values()) for row in rows])


def _verified(store: SqliteStore, connection: Connection) -> dict[str, int]:
    """Rows by table, when both sides have the same. Raises StoreError."""
    counts: dict[str, int] = {}
    for table in TABLES:
        here = int(store._read(f"SELECT count(*) AS n FROM {table}")[0]["n"])
        row = connection.execute(f"SELECT count(*) AS n FROM {table}".encode()).fetchone()
        there = int(row["n"]) if row else 0
        if here != there:
            raise StoreError(f"{table}: {here} rows here, {there} in the target. Empty the target and begin again.")
        counts[table] = here
    ours = [{name: row[name] for name in _SUMMED} for row in store._read(_SUMS.format(length="length"))]
    theirs = connection.execute(_SUMS.format(length="octet_length").encode()).fetchall()
    if ours != theirs:
        raise StoreError("The jobs of both sides differ: the source changed meanwhile. Empty the target, begin again.")
    return counts
