"""What the doctor looks at on this machine."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from supervisor import doctor_box
from supervisor.config import load
from supervisor.doctor import Finding, Patient
from supervisor.errors import SupervisorError
from supervisor.service_backend import ServiceState


@pytest.fixture
def patient(tmp_path: Path) -> Patient:
    (tmp_path / "worker.toml").write_text('[worker]\nstate_dir = "state"\n[control]\nsocket = "s"\n')
    settings = load(tmp_path / "worker.toml", {})
    return Patient(tmp_path / "worker.toml", settings, tmp_path / "state", environ={})


def verdicts(found: Any) -> list[tuple[str, str]]:
    findings: list[Finding] = list(found)
    for finding in findings:
        assert finding.sentence.endswith("."), finding
        assert bool(finding.cure) == (finding.verdict != "ok"), finding
    return [(finding.name, finding.verdict) for finding in findings]


def test_the_configuration(patient):
    assert verdicts(doctor_box.config(patient)) == [("config", "ok")]
    assert verdicts(doctor_box.config(patient._replace(notes=("It is old.",)))) == [("config", "warn")]
    mistaken = patient._replace(settings=None, problems=("a: wrong.", "b: wrong."))
    assert verdicts(doctor_box.config(mistaken)) == [("config", "fail")] * 2
    for check in (doctor_box.state, doctor_box.control, doctor_box.limits, doctor_box.memory, doctor_box.cgroup):
        list(check(mistaken))  # nothing else minds


def test_the_state_folder_before_and_after_its_first_use(patient, monkeypatch):
    assert verdicts(doctor_box.state(patient)) == [("disk", "ok")]
    patient.state.mkdir(mode=0o700)
    assert verdicts(doctor_box.state(patient)) == [("disk", "ok")]
    patient.state.chmod(0o777)
    assert verdicts(doctor_box.state(patient))[0] == ("state folder", "warn")
    patient.state.chmod(0o700)
    usage = SimpleNamespace(total=100 * 2**30, used=0, free=2 * 2**30)
    monkeypatch.setattr(doctor_box.shutil, "disk_usage", lambda _folder: usage)
    assert verdicts(doctor_box.state(patient)) == [("disk", "warn")]
    usage.free = 2**20
    assert verdicts(doctor_box.state(patient)) == [("disk", "fail")]
    monkeypatch.setattr(doctor_box.os, "access", lambda *_args: False)
    assert verdicts(doctor_box.state(patient)) == [("state folder", "fail")]


def test_the_control_socket(patient, tmp_path, monkeypatch):
    path = tmp_path / "s"
    assert verdicts(doctor_box.control(patient)) == [("supervisor", "warn")]
    assert verdicts(doctor_box.control(patient._replace(seen={"pid": 3, "state": "idle"}))) == [("supervisor", "ok")]
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        assert verdicts(doctor_box.control(patient)) == [("supervisor", "fail")], "it listens, and gave no status"
    (finding,) = doctor_box.control(patient)
    assert (finding.verdict, "left behind" in finding.sentence) == ("warn", True)
    path.unlink()
    path.write_text("")
    assert verdicts(doctor_box.control(patient)) in ([("supervisor", "fail")], [("supervisor", "warn")])


def state(**fields: Any) -> ServiceState:
    return ServiceState(**{"name": "bulkhead", "scope": "user", "installed": False, "unit": "/u", **fields})


@pytest.mark.parametrize(
    ("states", "verdict"),
    [
        ([state(), state()], "warn"),
        ([state(), state(scope="system", installed=True, active=True, enabled=True)], "ok"),
        ([state(installed=True), state(installed=True, active=True, enabled=True)], "ok"),
        ([state(installed=True, active=True), state()], "warn"),
        ([state(installed=True, enabled=True, reason="It crashed."), state()], "fail"),
        ([state(installed=True, state="dead"), state()], "fail"),
    ],
)
def test_the_service(patient, monkeypatch, states, verdict):
    from supervisor import service_commands

    left = list(states)
    monkeypatch.setattr(
        service_commands, "backend", lambda _name, *, system: SimpleNamespace(state=lambda: left[int(system)])
    )
    assert verdicts(doctor_box.service(patient)) == [("service", verdict)]


def test_no_service_manager_is_no_failure(patient, monkeypatch):
    from supervisor import service_commands

    def none(_name: str, *, system: bool) -> None:
        raise SupervisorError("systemctl cannot be run.")

    monkeypatch.setattr(service_commands, "backend", none)
    assert verdicts(doctor_box.service(patient)) == [("service", "warn")]


@pytest.mark.skipif(sys.platform == "win32", reason="no such limits")
def test_the_limits_of_this_user(patient, monkeypatch):
    import resource

    found = {finding.name for finding in doctor_box.limits(patient)}
    assert "limit of open files" in found
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (10, 20))
    assert {finding.verdict for finding in doctor_box.limits(patient)} == {"warn"}
    monkeypatch.setattr(resource, "getrlimit", lambda _kind: (resource.RLIM_INFINITY,) * 2)
    assert {finding.sentence for finding in doctor_box.limits(patient)} == {"It is unlimited."}


@pytest.mark.parametrize(("free", "swapped", "verdict"), [(0.5, 0.0, "ok"), (0.01, 0.0, "warn"), (0.5, 0.9, "warn")])
def test_memory(patient, monkeypatch, free, swapped, verdict):
    total = 2**34
    ram = SimpleNamespace(total=total, available=int(free * total))
    swap = SimpleNamespace(total=total, used=int(swapped * total))
    monkeypatch.setattr(doctor_box.psutil, "virtual_memory", lambda: ram)
    monkeypatch.setattr(doctor_box.psutil, "swap_memory", lambda: swap)
    assert verdicts(doctor_box.memory(patient)) == [("memory", verdict)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells")
@pytest.mark.parametrize(("told", "verdict"), [(0, "ok"), (1, "ok"), (5, "warn"), (-1, "warn")])
def test_the_clock(patient, monkeypatch, told, verdict):
    assert [name for name, _verdict in verdicts(doctor_box.clock(patient))] == ["clock"], "the real one answers"
    library = SimpleNamespace(adjtimex=lambda _timex: told)
    monkeypatch.setattr(doctor_box.ctypes, "CDLL", lambda *_args, **_named: library)
    assert verdicts(doctor_box.clock(patient)) == [("clock", verdict)]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux has them")
def test_the_cgroup_of_the_supervisor_is_what_counts(patient):
    assert [name for name, _verdict in verdicts(doctor_box.cgroup(patient))] == ["cgroup"]
    assert verdicts(doctor_box.cgroup(patient._replace(seen={"pid": 0}))) == [("cgroup", "warn")]
    assert verdicts(doctor_box.cgroup(patient._replace(seen={"pid": os.getpid()})))[0][0] == "cgroup"
