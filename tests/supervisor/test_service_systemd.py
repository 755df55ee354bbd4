"""What can be known without a running systemd; the rest is in tests/system/test_systemd.py."""

from __future__ import annotations

import os

import pytest

from supervisor import service_systemd
from supervisor.errors import NoPermission
from supervisor.service_backend import Called, ServiceFailed
from supervisor.service_systemd import Systemd
from supervisor.service_units import MARK, ServicePlan

PLAN = ServicePlan(name="b", python="/py", config="/c")
SYSTEM = ServicePlan(name="b", python="/py", config="/c", system=True)


@pytest.fixture
def booted(tmp_path):
    """Looks like a machine whose PID 1 is systemd, and a user who is logged in."""
    (tmp_path / "booted").mkdir()
    (tmp_path / "runtime/systemd").mkdir(parents=True)
    (tmp_path / "runtime/systemd/private").touch()
    return tmp_path


@pytest.fixture
def called(monkeypatch):
    """Records what would be run; answers come from `called.answers`, by verb."""

    class Calls(list[tuple[str, ...]]):
        answers: dict[str, Called]

    calls = Calls()
    calls.answers = {}

    def call(*argv: str, **_options: object) -> Called:
        calls.append(argv)
        verb = next((word for word in argv[1:] if not word.startswith("-")), "")
        return calls.answers.get(verb, Called(0, "", ""))

    monkeypatch.setattr(service_systemd, "call", call)
    return calls


def of_user(folder) -> Systemd:
    environ = {"HOME": str(folder / "home"), "XDG_RUNTIME_DIR": str(folder / "runtime")}
    return Systemd("b", system=False, environ=environ, booted=folder / "booted", root=folder)


def of_system(folder) -> Systemd:
    return Systemd("b", system=True, environ={}, booted=folder / "booted", root=folder)


def test_units_go_where_systemd_looks(tmp_path):
    assert of_user(tmp_path).unit == tmp_path / "home/.config/systemd/user/b.service"
    elsewhere = Systemd("b", system=False, environ={"HOME": "/h", "XDG_CONFIG_HOME": "/x"})
    assert str(elsewhere.unit) == "/x/systemd/user/b.service"
    assert of_system(tmp_path).unit == tmp_path / "etc/systemd/system/b.service"


def test_no_systemd_no_root_and_no_manager_are_sentences_with_a_cure(tmp_path, booted, monkeypatch):
    nowhere = Systemd("b", system=True, booted=tmp_path / "no")
    with pytest.raises(ServiceFailed, match=r"systemd does not run here.*--dry-run"):
        nowhere.check()
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(NoPermission, match="sudo"):
        of_system(booted).check()
    of_user(booted).check()
    (booted / "runtime/systemd/private").unlink()
    with pytest.raises(ServiceFailed, match=r"loginctl enable-linger .*--system"):
        of_user(booted).check()


def test_a_user_unit_is_written_enabled_and_started_and_lingering_is_told(booted, called):
    called.answers["show"] = Called(
        0, "LoadState=loaded\nActiveState=active\nSubState=running\nMainPID=7\nStatusText=fine\n", ""
    )
    said = of_user(booted).install(PLAN, start=True)
    verbs = [argv[2] for argv in called if argv[:2] == ("systemctl", "--user")]
    assert [verb for verb in verbs if verb != "show"] == ["daemon-reload", "enable", "reset-failed", "restart"]
    assert (booted / "home/.config/systemd/user/b.service").read_text().startswith(MARK)
    assert "It runs (pid 7): fine." in said
    assert "loginctl enable-linger" in said[-1]


def test_without_a_start_the_command_for_it_is_told(booted, called):
    said = of_system(booted).install(SYSTEM, start=False)
    assert said[-1] == "Start it with: systemctl start b.service"
    assert not [argv for argv in called if "restart" in argv or "start" in argv]


def test_a_start_that_fails_is_told_with_reason_and_last_words(booted, called):
    called.answers["restart"] = Called(1, "", "Job for b.service failed.")
    called.answers["show"] = Called(
        0, "LoadState=loaded\nActiveState=failed\nSubState=failed\nExecMainCode=1\nExecMainStatus=77\n", ""
    )
    called.answers["cat"] = Called(0, "supervisor: The state folder /x cannot be used\n", "")  # journalctl -o cat
    with pytest.raises(ServiceFailed, match=r"77: a file or folder is out of its reach.\nsupervisor: The state folder"):
        of_system(booted).install(SYSTEM, start=True)


def test_systemd_refusing_is_its_own_words(booted, called):
    called.answers["enable"] = Called(1, "", "Failed to enable unit: it is masked")
    with pytest.raises(ServiceFailed, match=r"systemctl enable b\.service failed: Failed to enable unit: it is masked"):
        of_system(booted).install(SYSTEM, start=True)


def test_only_what_is_ours_is_removed(booted, called):
    manager = of_system(booted)
    with pytest.raises(ServiceFailed, match="not installed"):
        manager.uninstall()
    manager.unit.parent.mkdir(parents=True)
    manager.unit.write_text("[Service]\n")
    with pytest.raises(ServiceFailed, match="left alone"):
        manager.uninstall()
    assert manager.unit.exists()
    manager.unit.write_text(f"{MARK}\nUser=bulkhead\n")
    assert "user bulkhead stays" in manager.uninstall()[-1]
    assert not manager.unit.exists()
    assert ("systemctl", "disable", "--now", "b.service") in called


def test_the_user_of_the_service_is_made_or_has_to_be_there(booted, called):
    manager = of_system(booted)
    with pytest.raises(ServiceFailed, match="no user nobody-of-that-name"):
        manager.prepare(ServicePlan(name="b", python="/p", config="/c", system=True, user="nobody-of-that-name"))
    assert not called, "only the service's own user is made"
    assert manager.prepare(ServicePlan(name="b", python="/p", config="/c", system=True, user="root")) == [
        "setpriv",
        "--reuid=0",
        "--regid=0",
        "--init-groups",
        "--",
    ]
    assert of_user(booted).prepare(PLAN) == []


@pytest.mark.parametrize(
    ("shown", "active", "code", "reason"),
    [
        ("active running 0 0 success", True, None, ""),
        ("failed failed 1 69 exit-code", False, 69, "the coordinator refused"),
        ("failed failed 2 6 watchdog", False, None, "no life"),
        ("activating auto-restart 3 11 core-dump", False, None, "A signal ended it"),
    ],
)
def test_what_systemd_knows_as_a_state(booted, called, shown: str, active: bool, code: int | None, reason: str):
    names = ("ActiveState", "SubState", "ExecMainCode", "ExecMainStatus", "Result")
    lines = ["LoadState=loaded", "UnitFileState=enabled", "MainPID=0", "NRestarts=3"]
    lines += [f"{name}={value}" for name, value in zip(names, shown.split(), strict=True)]
    called.answers["show"] = Called(0, "\n".join(lines), "")
    state = of_system(booted).state()
    assert (state.active, state.enabled, state.restarts, state.exit_code) == (active, True, 3, code)
    assert reason in state.reason


def test_without_a_manager_the_files_tell(tmp_path):
    state = Systemd("b", system=True, booted=tmp_path / "no", root=tmp_path).state()
    assert (state.installed, state.active, state.state) == (False, False, "")


def test_the_text_for_people_names_every_file(tmp_path):
    text = of_system(tmp_path).text(SYSTEM)
    assert f"# {tmp_path}/etc/sysusers.d/bulkhead.conf\n" in text
    assert f"# {tmp_path}/etc/systemd/system/b.service\n" in text
    other = ServicePlan(name="b", python="/py", config="/c", system=True, user="me")
    assert "sysusers" not in of_system(tmp_path).text(other)
    assert "User=" not in of_user(tmp_path).text(PLAN)
