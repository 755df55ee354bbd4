"""`coordinator usage`, beside a coordinator that has the store open."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from coordinator.cli.main import main
from coordinator.records import Submission
from coordinator.store import SqliteStore
from protocol.faults import Fault


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SqliteStore]:
    """A store in use, with three cancelled jobs of two tenants."""
    monkeypatch.delenv("COORDINATOR_STORE", raising=False)
    store = SqliteStore(tmp_path / "coordinator.sqlite")
    for n, tenant in enumerate(("one", "two", "two")):
        store.insert(f"j{n}", Submission(kind="llm", model="@m\x1b", params=b"", tenant=tenant))
        store.cancel(f"j{n}", tenant, Fault("cancelled", "Gone."))
    yield store
    store.close()


def ask(tmp_path: Path, *arguments: str) -> int:
    return main(["usage", "--state", str(tmp_path), *arguments])


def test_json(store: SqliteStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(tmp_path, "--by", "tenant", "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(row["tenant"], row["cancelled"]) for row in found["data"]] == [("one", 1), ("two", 2)]


def test_csv(store: SqliteStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(tmp_path, "--by", "model", "--csv", "--tenant", "two") == 0
    header, line = capsys.readouterr().out.split("\r\n")[:2]
    assert header.startswith("model,jobs,")
    assert line.startswith("'@m\x1b,2,")


def test_a_table_is_fit_for_a_terminal(store: SqliteStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(tmp_path, "--by", "model,worker") == 0
    _, head, line = capsys.readouterr().out.splitlines()
    assert head.split() == ["model", "worker", "jobs", "cancelled"]
    assert line.split() == ["@m?", "-", "3", "3"]


def test_days_are_bounds(store: SqliteStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(tmp_path, "--from", "2020-01-01", "--to", "2020-01-02", "--json") == 0
    assert json.loads(capsys.readouterr().out)["data"] == []
    assert ask(tmp_path, "--from", "soon") == 64
    assert "from: Expected a day" in capsys.readouterr().err


def test_without_a_store_it_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ask(tmp_path / "nowhere") == 1
    assert "There is no such store" in capsys.readouterr().err
