"""What a tenant's jobs have taken lately."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator import costs
from coordinator.costs import UNKNOWN, Costs
from coordinator.records import JobRecord


def done(seconds: float, tenant: str = "t", **options: Any) -> JobRecord:
    fixed: dict[str, Any] = {"id": "j", "kind": "llm", "model": "m", "state": "succeeded", "attempt": 1}
    times = {"created_ms": 0, "started_ms": 1000, "finished_ms": 1000 + int(seconds * 1000)}
    return JobRecord(**{**fixed, "tenant": tenant, "params": b"", **times, **options})


def test_what_is_not_known_costs_one() -> None:
    assert Costs().of("t", "m") == UNKNOWN


def test_the_mean_follows_what_jobs_take_per_tenant_and_model() -> None:
    made = Costs()
    made.note(done(4.0))
    assert made.of("t", "m") == 4.0
    for _ in range(50):
        made.note(done(10.0))
    assert made.of("t", "m") == pytest.approx(10.0, rel=0.01)
    assert made.of("t", "other") == UNKNOWN


def test_who_has_run_none_yet_is_reckoned_as_the_others_of_the_model() -> None:
    made = Costs()
    made.note(done(10.0))
    assert made.of("new", "m") == 10.0
    made.note(done(0.5, tenant="quick"))
    assert made.of("quick", "m") == 0.5
    assert made.of("t", "m") == 10.0
    assert 0.5 < made.of("new", "m") < 10.0
    assert made.of("new", "other") == UNKNOWN


def test_what_the_worker_measured_comes_before_what_the_clock_says() -> None:
    made = Costs()
    made.note(done(4.0, usage={"compute_ms": 500.0}))
    assert made.of("t", "m") == 0.5


@pytest.mark.parametrize("options", [{"state": "failed"}, {"state": "cancelled"}, {"started_ms": None}])
def test_other_ends_say_nothing(options: dict[str, Any]) -> None:
    made = Costs()
    made.note(done(9.0, **options))
    assert made.of("t", "m") == UNKNOWN


def test_names_of_clients_do_not_fill_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(costs, "_MOST", 3)
    made = Costs()
    for n in range(5):
        made.note(done(5.0, tenant=f"t{n}", model=f"m{n}"))
    assert [made.of(f"t{n}", f"m{n}") for n in range(5)] == [UNKNOWN, UNKNOWN, 5.0, 5.0, 5.0]
    assert [made.of("new", f"m{n}") for n in range(5)] == [UNKNOWN, UNKNOWN, 5.0, 5.0, 5.0]
