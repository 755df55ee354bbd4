"""launchd and the Task Scheduler, with their programs played: what is asked of them, and what their words mean."""

from __future__ import annotations

import os
import plistlib

import pytest

from supervisor.errors import NoPermission
from supervisor.service_backend import Called, ServiceFailed
from supervisor.service_others import Launchd, TaskScheduler
from supervisor.service_units import ServicePlan

PLAN = ServicePlan(name="b", python="/py", config="/c")


class Played:
    """A program that answers by its verb."""

    def __init__(self, **answers: Called) -> None:
        self.answers = answers
        self.asked: list[tuple[str, ...]] = []

    def __call__(self, *argv: str, **_options: object) -> Called:
        self.asked.append(argv)
        return self.answers.get(argv[1].lstrip("/"), Called(0, "", ""))


def agent(tmp_path, run: Played) -> Launchd:
    return Launchd("b", system=False, environ={"HOME": str(tmp_path)}, run=run)


def test_an_agent_is_written_and_loaded_into_the_session(tmp_path):
    run = Played()
    said = agent(tmp_path, run).install(PLAN, start=True)
    path = tmp_path / "Library/LaunchAgents/b.plist"
    assert plistlib.loads(path.read_bytes())["Label"] == "b"
    gui = f"gui/{os.getuid()}"
    assert run.asked == [
        ("launchctl", "enable", f"{gui}/b"),
        ("launchctl", "bootout", f"{gui}/b"),  # an older one; its absence is no mistake
        ("launchctl", "bootstrap", gui, str(path)),
    ]
    assert said[-1] == "It is started."
    assert agent(tmp_path, Played()).install(PLAN, start=False)[-1].startswith("Start it with: launchctl bootstrap")


def test_a_job_that_launchd_refuses(tmp_path):
    run = Played(bootstrap=Called(5, "", "Bootstrap failed: 5: Input/output error"))
    with pytest.raises(ServiceFailed, match="Input/output error"):
        agent(tmp_path, run).install(PLAN, start=True)


def test_an_agent_is_stopped_and_removed(tmp_path):
    run = Played()
    job = agent(tmp_path, run)
    with pytest.raises(ServiceFailed, match="not installed"):
        job.uninstall()
    job.install(PLAN, start=False)
    job.uninstall()
    assert not job.unit.exists()
    assert run.asked[-1][1] == "bootout"


PRINTED = """\
gui/501/b = {
	active count = 1
	path = /Users/x/Library/LaunchAgents/b.plist
	state = running
	runs = 3
	pid = 4711
	last exit code = 70
}
"""


def test_what_launchctl_prints_as_a_state(tmp_path):
    state = agent(tmp_path, Played(print=Called(0, PRINTED, ""))).state()
    assert (state.active, state.pid, state.restarts, state.exit_code) == (True, 4711, 2, 70)
    ended = PRINTED.replace("running", "not running").replace("70", "(never exited)").replace("\tpid = 4711\n", "")
    state = agent(tmp_path, Played(print=Called(0, ended, ""))).state()
    assert (state.active, state.pid, state.exit_code) == (False, 0, None)
    absent = agent(tmp_path, Played(print=Called(113, "", "Could not find service"))).state()
    assert (absent.installed, absent.active, absent.state) == (False, False, "not loaded")


def test_a_daemon_needs_root_and_a_user_that_is_there(tmp_path, monkeypatch):
    daemon = Launchd("b", system=True, run=Played(), root=tmp_path)
    assert daemon.unit == tmp_path / "Library/LaunchDaemons/b.plist"
    with pytest.raises(ServiceFailed, match="--run-as"):
        daemon.prepare(ServicePlan(name="b", python="/p", config="/c", system=True))
    plan = ServicePlan(name="b", python="/p", config="/c", system=True, user="me")
    assert daemon.prepare(plan) == ["sudo", "-n", "-u", "me", "--"]
    monkeypatch.setattr(os, "geteuid", lambda: 501)
    with pytest.raises(NoPermission, match="sudo"):
        daemon.check()


def task(tmp_path, run: Played) -> TaskScheduler:
    environ = {"LOCALAPPDATA": str(tmp_path), "USERNAME": "me", "USERDOMAIN": "BOX"}
    return TaskScheduler("b", system=False, environ=environ, run=run)


def test_a_task_is_registered_from_utf16_and_run(tmp_path):
    run = Played()
    task(tmp_path, run).install(PLAN, start=True)
    path = tmp_path / "bulkhead/b.task.xml"
    assert path.read_bytes()[:2] in (b"\xff\xfe", b"\xfe\xff"), "schtasks wants the byte order mark"
    assert "BOX\\me" in path.read_bytes().decode("utf-16")
    assert run.asked == [
        ("schtasks", "/Create", "/TN", "b", "/F", "/XML", str(path)),
        ("schtasks", "/Run", "/TN", "b"),
    ]


def test_a_task_is_ended_and_removed(tmp_path):
    run = Played()
    made = task(tmp_path, run)
    made.install(PLAN, start=False)
    made.uninstall()
    assert [argv[1] for argv in run.asked[-2:]] == ["/End", "/Delete"]
    assert not made.unit.exists()


def test_what_windows_refuses(tmp_path):
    with pytest.raises(NoPermission, match="administrator"):
        task(tmp_path, Played(Create=Called(1, "", "ERROR: Access is denied."))).install(PLAN, start=True)
    with pytest.raises(ServiceFailed, match="malformed"):
        task(tmp_path, Played(Create=Called(1, "", "ERROR: The task XML is malformed."))).install(PLAN, start=True)


def test_what_schtasks_lists_as_a_state(tmp_path):
    running = "TaskName:      \\b\nStatus:        Wird ausgeführt\nLast Result:   267009\n"
    assert task(tmp_path, Played(Query=Called(0, running, ""))).state().active
    ended = task(tmp_path, Played(Query=Called(0, running.replace("267009", "0"), ""))).state()
    assert (ended.installed, ended.active) == (True, False)
    assert not task(tmp_path, Played(Query=Called(1, "", "ERROR"))).state().installed
