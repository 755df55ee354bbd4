"""How a real PostgreSQL is doing, as `coordinator doctor` sees it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from coordinator.config import Config
from coordinator.doctor import store as doctor_store
from coordinator.doctor.examine import Finding, Patient
from coordinator.records import Submission
from coordinator.store.base import Want

if TYPE_CHECKING:
    from coordinator.store.postgres import PostgresStore

WAIT_S = 60.0
SILENT_MS = 600_000  # only the shifted clock makes a store silent, never a slow machine


@pytest.fixture
def used(space: str) -> Iterator[PostgresStore]:
    """A store that a coordinator serves from."""
    from coordinator.store.postgres import PostgresStore

    store = PostgresStore(space)
    yield store
    store.close()


def look(url: str) -> dict[str, Finding]:
    return {one.name: one for one in doctor_store.store(Patient(Config(), url, Path("/nowhere")))}


def test_an_empty_database_and_one_in_use(space: str) -> None:
    from coordinator.store.postgres import PostgresStore

    found = look(space)
    assert found["store"].verdict == "ok"
    assert "There is none yet" in found["schema"].sentence
    assert found["fsync"].verdict == "bad"  # the servers of tests sync nothing
    store = PostgresStore(space)
    try:
        found = look(space)
        wanted = ("store", "clock", "schema", "transactions", "vacuum", "replicas")
        assert {name: found[name].verdict for name in wanted} == dict.fromkeys(wanted, "ok")
        assert found["replicas"].sentence == "1 live."
        assert found["idle timeout"].verdict == "warn"
    finally:
        store.close()


def test_a_transaction_that_was_left_open(space: str, used: PostgresStore, monkeypatch: pytest.MonkeyPatch) -> None:
    import psycopg

    monkeypatch.setattr(doctor_store, "SLOW_S", -1.0)
    with psycopg.connect(space, application_name="report\x07er") as forgotten:
        forgotten.execute("SELECT count(*) FROM jobs")
        found = look(space)["transactions"]
        assert found.verdict == "warn"
        assert f"Session {forgotten.info.backend_pid} (report?er)" in found.sentence
        assert found.sentence.endswith("idle.")
        monkeypatch.setattr(doctor_store, "STUCK_S", -1.0)
        assert look(space)["transactions"].verdict == "bad"


def test_a_coordinator_that_fell_silent(space: str, used: PostgresStore) -> None:
    used.insert("j", Submission(kind="llm", model="chat", params=b""))
    used.claim([Want("chat", ("llm",), 1)])
    used.shift_clock(60_000)
    found = look(space)
    assert found["replicas"].verdict == "bad"
    assert "hold 1 open jobs, and 0 live" in found["replicas"].sentence
    assert found["store clock"].verdict == "bad"
    from coordinator.store.postgres import PostgresStore

    second = PostgresStore(space, silent_ms=SILENT_MS)
    try:
        assert look(space)["replicas"].verdict == "warn"
        end = time.monotonic() + WAIT_S
        while not second.beat().taken:  # it judges when it has been there for so long itself
            second.shift_clock(SILENT_MS // 4)
            assert time.monotonic() < end
        assert "1 fell silent" in look(space)["replicas"].sentence
    finally:
        second.close()


def test_dead_rows_are_told(space: str, used: PostgresStore, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[dict[str, Any]] = [{"live": 100, "dead": 20_000, "bytes": 1, "vacuumed_s": None}]
    monkeypatch.setattr(doctor_store._Database, "rows", lambda *_: rows)
    found = doctor_store._table(doctor_store._Database(None))
    assert found.verdict == "warn"
    assert "20000 dead ones, never vacuumed" in found.sentence


def test_another_versions_schema(space: str, used: PostgresStore) -> None:
    import psycopg

    with psycopg.connect(space, autocommit=True) as admin:
        admin.execute("INSERT INTO schema_version VALUES (99)")
    assert look(space)["schema"].verdict == "bad"


def test_a_database_that_is_away() -> None:
    pytest.importorskip("psycopg_pool")
    found = look("postgresql://nobody@127.0.0.1:1/none")["store"]
    assert found.verdict == "bad"
    assert "cannot be reached" in found.sentence
