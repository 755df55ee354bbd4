"""A handful of cases for real; the whole kit once, marked slow."""

from __future__ import annotations

import sys

import msgspec
import psutil
import pytest
import trio

from supervisor import selftest_judge, selftest_run
from supervisor.selftest_cases import CASES, Case
from supervisor.selftest_judge import Row
from supervisor.selftest_run import MARK, run_case, run_kit
from supervisor.settings import LimitsTable

BY_NAME = {case.name: case for case in CASES}

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the kit's engine is Linux's")


def _ours() -> list[int]:
    """Children of the kit that still live."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if MARK in process.environ():
                found.append(process.pid)
        except psutil.Error:
            continue
    return found


STALL_S = 6.0  # where a hang is the case
PATIENCE_S = 40.0


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second without a sign of life is a hang at a user's; where other tests have the processor it is nothing."""
    limits_of = Case.limits.fget

    def limits(case: Case) -> LimitsTable:
        stall_s = STALL_S if "engine_hung" in case.codes else PATIENCE_S
        return msgspec.structs.replace(limits_of(case), load_s=stall_s, first_output_s=stall_s, stall_s=stall_s)

    monkeypatch.setattr(Case, "limits", property(limits))
    monkeypatch.setattr(selftest_judge, "NEIGHBOUR_S", PATIENCE_S)
    monkeypatch.setattr(selftest_run, "RECOVERY_S", PATIENCE_S)


def patient(name: str, **changed: object) -> Case:
    """A case that waits longer than at a user's for its answer."""
    case = BY_NAME[name]
    return msgspec.structs.replace(case, **{"within_s": case.within_s + PATIENCE_S, **changed})


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("segv", "engine_crashed"),
        ("crash-beside", "engine_crashed"),
        ("hang-gil", "engine_hung"),
        ("frame-late", ""),
        ("load-crash", "engine_crashed"),
        ("daemon", "engine_crashed"),
    ],
)
async def test_a_case_is_run_judged_and_cleaned_up(tmp_path, name, code):
    case = patient(name)
    row = await run_case(case, tmp_path / "case")
    assert row.contained, row.outcome
    assert row.code == code
    assert row.neighbour_answers >= 3
    assert row.recovered_s is not None
    assert 0 < row.seconds < case.within_s
    assert not (tmp_path / "case").exists()
    assert _ours() == []


@pytest.mark.parametrize("name", ["spy", "signal", "home", "sockets", "wreck"])
async def test_without_a_sandbox_the_same_attack_is_not_contained(tmp_path, name):
    row = await run_case(patient(name), tmp_path / "case", mode="off")
    assert not row.contained
    assert "it managed: " in row.outcome
    assert not (tmp_path / "case").exists()


async def test_a_bug_of_the_host_is_a_row_and_no_traceback(tmp_path, monkeypatch):
    def broken(*_args: object) -> object:
        raise RuntimeError("a bug")

    monkeypatch.setattr("supervisor.selftest_run.open_host", broken)
    row = await run_case(BY_NAME["segv"], tmp_path / "case")
    assert not row.contained
    assert "the supervisor failed: RuntimeError('a bug')" in row.outcome


async def test_a_cancel_in_mid_case_ends_all_children_and_keeps_the_rows_that_are_done(tmp_path):
    rows: dict[str, Row] = {}
    cases = [patient("raise"), patient("start-hang", start_s=600.0, within_s=700.0)]  # the second one is not done
    with trio.CancelScope() as scope:

        def on_change(_running: list[str]) -> None:
            if rows:
                scope.cancel()

        await run_kit(cases, tmp_path, rows=rows, on_change=on_change)
    assert [*rows] == ["raise"]
    assert [*tmp_path.iterdir()] == []
    assert _ours() == []


@pytest.mark.slow
def test_the_whole_kit_is_contained_here():
    """On a box that lacks a layer, the attacks that it would have stopped are listed, and nothing else is."""
    from supervisor.selftest import run

    rows, stopped = run([patient(case.name) for case in CASES])
    assert not stopped
    assert [*sorted(rows)] == sorted(case.name for case in CASES)
    bad = {row.name: row.outcome for row in rows.values() if not row.contained}
    assert {name: outcome for name, outcome in bad.items() if "this box lacks" not in outcome} == {}
    assert all(BY_NAME[name].group == "attacks" for name in bad)
