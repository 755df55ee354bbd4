"""Addresses of stores."""

from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

from coordinator.store import SqliteStore, StoreError
from coordinator.store.opening import check_address, is_postgres, open_store


def test_sqlite_is_the_default_and_may_be_named(tmp_path: Path) -> None:
    for where, path in (("", tmp_path / "a.sqlite"), (f"sqlite:{tmp_path / 'b.sqlite'}", tmp_path / "b.sqlite")):
        store = open_store(where, tmp_path / "a.sqlite")
        assert isinstance(store, SqliteStore)
        assert path.exists()
        store.close()


def test_postgres_by_its_url(space: str, tmp_path: Path) -> None:
    assert is_postgres(space)
    store = open_store(space, tmp_path / "a.sqlite", pooled=True)
    assert store.now_ms() > 0
    store.close()
    assert not (tmp_path / "a.sqlite").exists()


def test_what_is_no_address_is_refused_without_being_repeated() -> None:
    with pytest.raises(StoreError, match="postgres://USER@HOST") as caught:
        check_address("mysql://root:hunter2@host/db")
    assert "hunter2" not in str(caught.value)


def test_a_missing_library_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    really = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name == "psycopg_pool":
            raise ImportError(name)
        return really(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(StoreError, match=r"bulkhead-worker\[postgres\]"):
        open_store("postgres://host/db", tmp_path / "a.sqlite")
