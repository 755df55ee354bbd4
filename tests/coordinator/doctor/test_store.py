"""What is looked at in a SQLite store; PostgreSQL's half is in store/test_vitals.py."""

from __future__ import annotations

import sqlite3
from pathlib import Path

from coordinator.config import Config
from coordinator.doctor.examine import Patient
from coordinator.doctor.store import store
from coordinator.store import SqliteStore
from coordinator.store.opening import STORE_FILE


def look(tmp_path: Path) -> dict[str, str]:
    return {finding.name: finding.verdict for finding in store(Patient(Config(), "", tmp_path))}


def test_a_store_in_use_is_whole(tmp_path: Path) -> None:
    assert look(tmp_path) == {"store": "ok"}
    used = SqliteStore(tmp_path / STORE_FILE)
    try:
        assert look(tmp_path) == {"store": "ok", "schema": "ok"}
        used.shift_clock(60_000)
        assert look(tmp_path)["store clock"] == "bad"
    finally:
        used.close()


def test_another_versions_store(tmp_path: Path) -> None:
    SqliteStore(tmp_path / STORE_FILE).close()
    for version, verdict in ((99, "bad"), (2, "warn")):
        file = sqlite3.connect(tmp_path / STORE_FILE)
        file.execute(f"PRAGMA user_version = {version}")
        file.close()
        assert look(tmp_path)["schema"] == verdict


def test_a_broken_store(tmp_path: Path) -> None:
    (tmp_path / STORE_FILE).write_bytes(b"no database at all" * 100)
    assert look(tmp_path) == {"store": "bad"}
