"""The alerts for coordinators name what a real coordinator tells: replicas over one PostgreSQL."""

from __future__ import annotations

import importlib.util
import re
from contextlib import ExitStack
from pathlib import Path

import httpx
import pytest

from coordinator import vitals
from coordinator.testing import running

ROOT = Path(__file__).resolve().parents[2]
NAME = re.compile(r"bulkhead_coordinator_[a-z0-9_]+")
WAIT_S = 60.0


def named() -> set[str]:
    """By the group of rules for coordinators: workers tell others, also with this beginning."""
    text = (ROOT / "deploy/prometheus/alerts.yml").read_text().partition("- name: bulkhead-coordinator")[2]
    return {name for line in text.splitlines() if "expr:" in line for name in NAME.findall(line)}


def test_every_metric_that_an_alert_names_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vitals, "PATIENCE_S", WAIT_S)  # a database that is slow to answer is left out
    if importlib.util.find_spec("psycopg") is None:
        pytest.skip("psycopg is not installed (extra: postgres)")
    from coordinator.replicas.opening import ReplicaTable, open_doorway
    from coordinator.store.postgres import PostgresStore
    from coordinator.testing_postgres import postgres_server, why_not

    if reason := why_not():
        pytest.skip(reason)
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef" * 4 + "\n")
    with ExitStack() as stack:
        url = stack.enter_context(stack.enter_context(postgres_server()).space())
        doorway = open_doorway(ReplicaTable(listen="127.0.0.1:0", secret_file=str(secret)))
        served = stack.enter_context(
            running(tmp_path / "state", open_store=lambda: PostgresStore(url), doorway=doorway)
        )
        answer = httpx.get(served.url + "/metrics", headers=served.headers, timeout=WAIT_S)
    assert answer.status_code == 200
    told = {line.split()[2] for line in answer.text.splitlines() if line.startswith("# TYPE")}
    assert named() - told == set()
    assert len(named()) >= 8


def test_a_replica_that_was_counted_twice_for_a_moment_is_missed_by_nobody() -> None:
    """After an upgrade its row of its former life is there for a few seconds: only what lasted is compared with."""
    text = (ROOT / "deploy/prometheus/alerts.yml").read_text().partition("- alert: BulkheadReplicaSilent")[2]
    expr = text.partition('expr: "')[2].partition('"')[0]
    now, _, before = expr.partition(" < ")
    assert before == f"max_over_time(min_over_time({now}[2m:15s])[1h:1m])"
