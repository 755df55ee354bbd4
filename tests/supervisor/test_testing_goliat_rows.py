"""A machine is found again as the dashboard's contract says, which is by guessing."""

from __future__ import annotations

import pytest

from supervisor.testing_goliat_rows import Part, Workers


class Bench:
    def __init__(self) -> None:
        self.now = 1000.0
        self.running: set[str] = set()
        self.workers = Workers(lambda: self.now, self.running.__contains__)

    def meet(self, machine: str, after_s: float = 0.0, hostname: str = "") -> str:
        self.now += after_s
        return self.workers.meet(machine, hostname).id


@pytest.fixture
def bench() -> Bench:
    return Bench()


@pytest.mark.parametrize(("status", "limit_s"), [("IDLE", 600.0), ("RUNNING", 300.0), ("ERROR", 300.0)])
def test_a_silent_row_is_stale_after_five_minutes_or_ten_when_idle(bench: Bench, status: str, limit_s: float) -> None:
    assert bench.meet("box") == "w-1"
    bench.workers.rows[0].status = status
    assert bench.meet("box", limit_s) == "w-1"
    bench.workers.rows[0].status = status
    assert bench.meet("box", limit_s + 1) == "w-2"
    assert [bench.workers.stale(row) for row in bench.workers.rows] == [True, False]
    newest = bench.workers.of("box")
    assert newest is not None
    assert newest.id == "w-2"
    assert bench.workers.of("den") is None


def test_a_young_row_with_something_running_is_taken_for_any_machines(bench: Bench) -> None:
    bench.meet("box")
    assert bench.meet("den") == "w-2"
    bench.running.add("w-1")
    assert bench.meet("attic", 120) == "w-1"
    assert bench.meet("cellar", 1) == "w-3"
    assert bench.meet("attic") == "w-1", "it has the row's name now"


def test_else_the_host_name_tells_for_five_minutes(bench: Bench) -> None:
    bench.meet("10.0.0.1", hostname="box")
    assert bench.meet("10.0.0.2", 300, hostname="box") == "w-1"
    assert bench.meet("10.0.0.3", 301, hostname="box") == "w-2"
    assert bench.meet("10.0.0.4") == "w-3", "without a host name nobody is alike"


def test_a_silent_row_is_shown_as_idle_sooner_when_it_has_nothing(bench: Bench) -> None:
    bench.meet("box")
    row = bench.workers.rows[0]
    row.status = "RUNNING"
    shown = []
    for running, silent_s in ((True, 60), (True, 61), (False, 15), (False, 16)):
        bench.running.clear()
        if running:
            bench.running.add("w-1")
        bench.now = row.seen + silent_s
        shown.append((bench.workers.shown(row)["status"], bench.workers.shown(row)["isOffline"]))
    assert shown == [("RUNNING", True), ("IDLE", True), ("RUNNING", False), ("IDLE", False)]


def test_an_assignment_is_listed_with_its_progress() -> None:
    part = Part(id="a", index=2, config={"n": 1})
    assert part.row() == {
        "id": "a",
        "index": 2,
        "workerId": None,
        "splitConfig": {"n": 1},
        "status": "PENDING",
        "progress": 0,
    }
    part.status = "COMPLETED"
    assert part.row()["progress"] == 100
