"""The suite passes good engines and catches each misbehaviour in the right case."""

from __future__ import annotations

import json
from functools import partial

import pytest
import trio

from engines.catalog import CATALOG
from supervisor import conformance
from supervisor.conformance import CASES, CaseResult, passed, render, run_suite, to_json
from supervisor.host.work import EngineSpec
from supervisor.probe import engine_spec
from supervisor.settings import EngineTable


def failed(results: list[CaseResult]) -> dict[str, str]:
    return {result.name: result.reason for result in results if result.status == "failed"}


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What an engine gets at a user's is too little where other tests have the processor."""
    monkeypatch.setattr(conformance, "PONG_S", 20.0)
    monkeypatch.setattr(conformance, "CANCEL_S", 40.0)
    monkeypatch.setattr(conformance, "EXIT_S", 40.0)


@pytest.mark.usefixtures("patient")
async def test_a_good_engine_passes_every_case(wordy):
    results = await run_suite(wordy())
    assert failed(results) == {}
    assert len(results) == len(CASES)
    assert {result.status for result in results} == {"ok"}


@pytest.mark.usefixtures("patient")
async def test_the_synthetic_engine_passes():
    results = await run_suite(engine_spec("synthetic", EngineTable()))
    assert failed(results) == {}


@pytest.mark.usefixtures("patient")
async def test_the_example_of_another_repository_passes(foreign_python: str):
    engine = EngineSpec(name="wordcount", module="wordcount_engine", python=foreign_python)
    assert failed(await run_suite(engine)) == {}


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(
    ("name", "backend"),
    [(name, backend) for name, entry in CATALOG.items() for backend in entry.backends if name != "synthetic"],
)
def test_every_shipped_engine_passes(name: str, backend: str):
    # Not an async test: pytest would not show the reason of a skip inside one.
    results = trio.run(partial(run_suite, engine_spec(name, EngineTable()), backend=backend))
    if any("is missing" in reason or "No module named" in reason for reason in failed(results).values()):
        pytest.skip(f"{name} is not installed: {failed(results)}")
    assert failed(results) == {}


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize(
    ("wrong", "case", "said"),
    [
        ("crash-import", "the engine describes its fixture", "said nothing"),
        ("answer", "every case of the fixture is answered right", "got {'text': 'WRONG'}"),
        ("accept-all", "what the model cannot serve is refused, naming the field", "is accepted"),
        ("no-field", "what the model cannot serve is refused, naming the field", "without naming the field"),
        ("always-chunks", "no chunks unless a stream was asked for", "although"),
        ("silent-stream", "streams add up to the result, in order", "no chunk"),
        ("noise", "the fixture loads and ready is sane", "not a frame"),
        ("die-on-bad-model", "a missing model file is a fault of the load; the process lives", "exit code 1"),
        ("crash-load", "the fixture loads and ready is sane", "SIGABRT"),
    ],
)
async def test_a_misbehaviour_is_caught_in_its_case(wordy, wrong: str, case: str, said: str):
    results = await run_suite(wordy(wrong))
    assert not passed(results)
    assert said in failed(results)[case]


@pytest.mark.usefixtures("patient")
async def test_an_engine_that_ignores_cancel_is_caught_and_ended(wordy, monkeypatch):
    monkeypatch.setattr("supervisor.conformance.CANCEL_S", 0.5)
    results = await run_suite(wordy("deaf"))
    assert "no end of run" in failed(results)["cancel ends an endless run; the next run works"]
    assert {r.name: r.status for r in results}["shutdown ends it with 0 and no noise on the wire"] == "ok"


@pytest.mark.usefixtures("patient")
async def test_what_cannot_be_asked_is_skipped_with_the_reason(wordy):
    results = await run_suite(wordy("no-files"))
    (skipped,) = [result for result in results if result.status == "skipped"]
    assert "names no files" in skipped.reason
    assert passed(results)


def test_the_report_in_both_forms():
    results = [
        CaseResult(name="one", status="ok", ms=1.5),
        CaseResult(name="two", status="failed", reason="because", ms=2),
    ]
    assert not passed(results)
    assert "because" in render(results)
    assert "1 ok, 1 failed, 0 skipped" in render(results)
    assert json.loads(to_json(results))[1] == {"name": "two", "status": "failed", "reason": "because", "ms": 2.0}
