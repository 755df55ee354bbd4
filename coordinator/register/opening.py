"""Which register: in the store's PostgreSQL when that is used, else a file in the state folder."""

from __future__ import annotations

from pathlib import Path

from coordinator.register.base import Register
from coordinator.register.sqlite import SqliteRegister
from coordinator.store.opening import is_postgres, require_psycopg

FILE_NAME = "keys.sqlite"


def open_register(where: str, path: Path, *, pooled: bool = False) -> Register:
    """Open the register that belongs to the store at the address `where`.

    Args:
        where: the store's address; "" and sqlite:PATH mean the file.
        path: the file.
        pooled: a pooler in transaction mode is in between.

    Raises:
        StoreError: it cannot be opened.
    """
    if not is_postgres(where):
        return SqliteRegister(path)
    require_psycopg()
    from coordinator.register.postgres import PostgresRegister

    return PostgresRegister(where, pooled=pooled)


def opened(place: Register | Path) -> Register:
    """The register itself, or the one in this file."""
    return SqliteRegister(place) if isinstance(place, Path) else place
