"""Two replicas over one real PostgreSQL, each a whole coordinator in a thread of this process."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from starlette.responses import Response

from coordinator.replicas import door, peer
from coordinator.testing import Running, running
from tests.coordinator.replicas.rig import LONG_MS, PATIENCE_S, SECRET, Start, until
from tests.coordinator.replicas.uploads_rig import replicas
from tests.coordinator.studio_rig import FAST, House, opened

Two = tuple[Running, Running]

if TYPE_CHECKING:
    from coordinator.testing_postgres import PostgresServer


@pytest.fixture(scope="module", autouse=True)
def _standing_still_is_not_being_gone() -> Iterator[None]:
    """Replicas of one process stand still together on a slow machine; the connection between them outlives that."""
    with pytest.MonkeyPatch.context() as patch:
        for module, name in ((peer, "OPEN_S"), (peer, "PING_S"), (door, "PING_S")):
            patch.setattr(module, name, PATIENCE_S)
        yield


@pytest.fixture(scope="module")
def postgres() -> Iterator[PostgresServer]:
    """A real server."""
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed (extra: postgres)")
    from coordinator.testing_postgres import postgres_server, why_not

    if reason := why_not():
        pytest.skip(reason)
    with postgres_server() as server:
        yield server


@pytest.fixture(scope="module")
def database(postgres: PostgresServer) -> Iterator[str]:
    """URL of an empty schema."""
    with postgres.space() as url:
        yield url


@pytest.fixture
def apart(postgres: PostgresServer) -> Iterator[str]:
    """The same for replicas that those of other tests know nothing of."""
    with postgres.space() as url:
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
                running(
                    folder / "state",
                    studio=FAST,
                    open_store=lambda: PostgresStore(database, silent_ms=LONG_MS),
                    doorway=doorway,
                )
            )

        yield one


@pytest.fixture(scope="module")
def two(start: Start) -> tuple[Running, Running]:
    """Two replicas that have found each other."""
    pair = start(), start()
    both = [one.coordinator.replicas for one in pair]
    until(lambda: all(found is not None and any(peer.connected for peer in found.peers) for found in both))
    return pair


@pytest.fixture
def here(two: Two) -> Iterator[House]:
    """Where clients ask and uploads come."""
    with opened(two[0]) as house:
        yield house


@pytest.fixture
def there(two: Two) -> Iterator[House]:
    """Where the workers' sessions are."""
    with opened(two[1]) as house:
        yield house


@pytest.fixture
def passed_on(here: House, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Jobs whose uploads were passed on here."""
    seen: list[str] = []
    real = replicas(here)._uploads.pass_on

    async def noted(peer: Any, upload: Any) -> Response:
        seen.append(upload.job)
        return await real(peer, upload)

    monkeypatch.setattr(replicas(here)._uploads, "pass_on", noted)
    return seen
