"""Every store, opened by name. A new database adds one entry to `STORES`."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from coordinator.store import SqliteStore, Store

if TYPE_CHECKING:
    from coordinator.testing_postgres import PostgresServer

SILENT_MS = 600_000  # only the shifted clock makes a store silent, never a slow machine
STORES = ("sqlite", "postgres")


@pytest.fixture(scope="session")
def postgres() -> Iterator[PostgresServer]:
    """One server for the whole session; every test has a schema of its own in it."""
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed (extra: postgres)")
    from coordinator.testing_postgres import postgres_server, why_not

    if reason := why_not():
        pytest.skip(reason)
    with postgres_server() as server:
        yield server


@pytest.fixture
def space(postgres: PostgresServer) -> Iterator[str]:
    """URL of an empty schema."""
    with postgres.space() as url:
        yield url


@pytest.fixture(params=STORES)
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Callable[[], Store]]:
    """Open the store; every call opens the same data again. All are closed with the test."""
    with ExitStack() as stack:
        if request.param == "sqlite":

            def open_store() -> Store:
                store: Store = SqliteStore(tmp_path / "jobs.sqlite")
                stack.callback(store.close)
                return store
        else:
            url = request.getfixturevalue("space")
            from coordinator.store.postgres import PostgresStore

            def open_store() -> Store:
                store: Store = PostgresStore(url, silent_ms=SILENT_MS)
                stack.callback(store.close)
                return store

        yield open_store


@pytest.fixture
def store(make: Callable[[], Store]) -> Store:
    """An empty store."""
    return make()
