"""The whole examination: without a supervisor, with mistakes in the configuration, and of a supervisor by itself."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
import trio
import trio.testing

from supervisor import doctor_run
from supervisor.config import load
from supervisor.control.snapshot import Link, Snapshot
from supervisor.control.surface import Surface
from supervisor.control.why import explained
from supervisor.doctor import Check, Finding, Patient, ok
from supervisor.doctor_run import CHECKS, SelfExamination, examined_here, patient_here


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("STATE_DIRECTORY", "BULKHEAD_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    path = tmp_path / "worker.toml"
    path.write_text(
        '[worker]\nstate_dir = "state"\n[coordinator]\nlisten = "127.0.0.1:0"\n'
        '[[models]]\nname = "synthetic"\nengine = "synthetic"\n'
    )
    return path


def test_every_check_says_who_it_is_and_what_it_looks_at():
    names = [check.name for check in CHECKS]
    assert len(set(names)) == len(names)
    for check in CHECKS:
        look = check.look or check.later
        assert look is not None
        assert look.__doc__, check.name
        assert 0 < check.within_s <= doctor_run.ALL_S


def test_a_machine_without_a_running_supervisor(config, capsys):
    told = examined_here(str(config))
    assert told["running"] is False
    names = {one["name"] for one in told["checks"]}
    assert names >= {
        "config",
        "disk",
        "supervisor",
        "service",
        "port",
        "engine synthetic",
        "model synthetic",
        "sandbox",
    }
    assert {one["verdict"] for one in told["checks"] if one["name"] in ("config", "disk", "port")} == {"ok"}
    assert capsys.readouterr().err == "", "no progress where no terminal is"


def test_a_broken_configuration_keeps_no_check_from_being_made(config, monkeypatch):
    config.write_text("[worker]\nnmae = 1\n[limtis]\n")
    cheap = [check for check in CHECKS if check.name not in ("gpu", "sandbox", "service")]
    monkeypatch.setattr(doctor_run, "CHECKS", cheap)
    told = examined_here(str(config))
    assert told["ok"] is False
    bad = [one for one in told["checks"] if one["verdict"] == "fail"]
    assert [one["name"] for one in bad] == ["config", "config"]
    assert any("did you mean" in one["sentence"] for one in bad)
    assert {"memory", "disk"} <= {one["name"] for one in told["checks"]}


def test_a_configuration_that_is_not_there(tmp_path):
    patient = patient_here(str(tmp_path / "none.toml"))
    assert patient.settings is None
    assert "no such file" in patient.problems[0]


async def test_a_running_supervisor_is_asked_for_what_it_knows(config):
    """Over its real socket."""
    from supervisor.control.server import open_control

    shown = Snapshot(version="1", worker="box", pid=7, link=Link(url="ws://127.0.0.1:1", connected=True))
    state = config.parent / "state"
    state.mkdir(mode=0o700)
    async with open_control(state / "control.sock", Surface(lambda: explained(shown), None)):
        patient = await trio.to_thread.run_sync(patient_here, str(config))
    assert patient.seen is not None
    assert patient.seen["worker"] == "box"


async def test_a_supervisor_examines_itself_once_for_all_who_ask(config, monkeypatch):
    times: list[Patient] = []
    go = threading.Event()

    def look(patient: Patient) -> list[Finding]:
        times.append(patient)
        go.wait(30)
        return [ok("x", "It is well.")]

    monkeypatch.setattr(doctor_run, "CHECKS", [Check("x", look, within_s=30), Check("port", look, offline=True)])
    settings = load(config, {})
    own = SelfExamination(config, lambda: settings, config.parent, lambda: Snapshot(version="1", pid=7))
    answers: list[object] = []

    async def ask() -> None:
        answers.append(await own.examined())

    async with trio.open_nursery() as nursery:
        for _ in range(5):
            nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked()
        go.set()
    assert len(times) == 1, "five who ask at the same time are told the same"
    assert (
        answers
        == [
            {
                "ok": True,
                "running": True,
                "checks": [{"name": "x", "verdict": "ok", "sentence": "It is well.", "cure": ""}],
            }
        ]
        * 5
    )
    assert times[0].inside
    assert times[0].seen["pid"] == 7
    await own.examined()
    assert len(times) == 2, "who asks later is told anew"
    config.write_text("[worker]\nnmae = 1\n")
    await own.examined()
    assert "nmae" in times[2].problems[0]
    assert times[2].settings is settings, "the old one stays in force"
