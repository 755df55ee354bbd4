"""Which store: by its address on the command line or in the configuration."""

from __future__ import annotations

from pathlib import Path

from coordinator.store.base import Store, StoreError
from coordinator.store.sqlite import SqliteStore

STORE_FILE = "coordinator.sqlite"  # in the state folder, where no other store is named
SQLITE = "sqlite:"
POSTGRES = ("postgres://", "postgresql://")


def is_postgres(where: str) -> bool:
    """Whether the address names a PostgreSQL database."""
    return where.startswith(POSTGRES)


def check_address(where: str) -> None:
    """Raises StoreError for what is no address of a store; says nothing of it, because it may hold a password."""
    if where and not is_postgres(where) and not where.startswith(SQLITE):
        raise StoreError("store: Expected postgres://USER@HOST/DATABASE, or sqlite:PATH.")


def open_store(where: str, default: Path, *, pooled: bool = False) -> Store:
    """Open `sqlite:PATH` or `postgres://…`; "" means SQLite at the default path.

    Raises:
        StoreError: it is no address, cannot be opened, or its library is not installed.
    """
    check_address(where)
    if not is_postgres(where):
        return SqliteStore(Path(where.removeprefix(SQLITE)) if where else default)
    require_psycopg()
    from coordinator.store.postgres import PostgresStore

    return PostgresStore(where, pooled=pooled)


def require_psycopg() -> None:
    """Raises StoreError when the library for PostgreSQL is missing."""
    try:
        import psycopg_pool  # noqa: F401
    except ImportError:
        raise StoreError("store: PostgreSQL needs an extra; run pip install 'bulkhead-worker[postgres]'.") from None
