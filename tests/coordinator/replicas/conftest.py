"""Two replicas over one real PostgreSQL, each a whole coordinator in a thread of this process."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from coordinator.testing import Running, running
from tests.coordinator.replicas.rig import SECRET, Start, until


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """URL of an empty schema of a real server."""
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed (extra: postgres)")
    from coordinator.testing_postgres import postgres_server, why_not

    if reason := why_not():
        pytest.skip(reason)
    with postgres_server() as server, server.space() as url:
        yield url


@pytest.fixture(scope="module")
def start(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Start]:
    """Start one more replica; all share a state folder, so that they know the same keys."""
    from coordinator.replicas.opening import ReplicaTable, open_doorway
    from coordinator.store.postgres import PostgresStore

    folder: Path = tmp_path_factory.mktemp("replicas")
    secret = folder / "secret"
    secret.write_text(SECRET + "\n")
    with ExitStack() as stack:

        def one() -> Running:
            doorway = open_doorway(ReplicaTable(listen="127.0.0.1:0", secret_file=str(secret)))
            return stack.enter_context(
                running(folder / "state", open_store=lambda: PostgresStore(database), doorway=doorway)
            )

        yield one


@pytest.fixture(scope="module")
def two(start: Start) -> tuple[Running, Running]:
    """Two replicas that have found each other."""
    pair = start(), start()
    both = [one.coordinator.replicas for one in pair]
    until(lambda: all(found is not None and any(peer.connected for peer in found.peers) for found in both))
    return pair
