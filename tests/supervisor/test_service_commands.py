from __future__ import annotations

import argparse
import json
import sys

import pytest

from supervisor import service_commands
from supervisor.errors import ConfigError, ExitCode, NoPermission
from supervisor.service_backend import Called, ServiceFailed, ServiceState
from supervisor.service_units import ServicePlan


class FakeBackend:
    """A service manager that remembers; ships nowhere, decides nothing."""

    def __init__(self, state: ServiceState) -> None:
        self._state = state
        self.did: list[object] = []

    def text(self, plan: ServicePlan) -> str:
        return f"the text for {plan.name}\n"

    def check(self) -> None:
        self.did.append("check")

    def prepare(self, plan: ServicePlan) -> list[str]:
        self.did.append("prepare")
        return []

    def install(self, plan: ServicePlan, *, start: bool) -> list[str]:
        self.did.append((plan, start))
        return ["installed"]

    def uninstall(self) -> list[str]:
        self.did.append("uninstall")
        return ["uninstalled"]

    def state(self) -> ServiceState:
        return self._state


@pytest.fixture
def managers(monkeypatch):
    """One for each scope."""
    made = {
        system: FakeBackend(ServiceState(name="bulkhead", scope="system" if system else "user", installed=False))
        for system in (False, True)
    }
    monkeypatch.setattr(service_commands, "backend", lambda _name, *, system: made[system])
    return made


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "worker.toml"
    path.write_text('[limits]\ndrain_s = 100\n[[models]]\nname = "synthetic"\nengine = "synthetic"\n')
    return path


def run(*words: str) -> int:
    parser = argparse.ArgumentParser()
    service_commands.add_arguments(parser)
    arguments = parser.parse_args(words)
    return arguments.command(arguments)


def test_install_checks_rehearses_and_installs(managers, config, capsys, monkeypatch):
    monkeypatch.setenv("BULKHEAD__LOG__LEVEL", "debug")
    assert run("install") == 0
    check, prepare, (plan, start) = managers[False].did
    assert (check, prepare, start) == ("check", "prepare", True)
    assert (plan.python, plan.config, plan.system) == (sys.executable, str(config), False)
    assert 100 < plan.stop_s < 200, "the drain and what follows it"
    said = capsys.readouterr().out
    assert said.startswith("installed\n")
    assert "does not see BULKHEAD__LOG__LEVEL of this shell" in said


def test_a_bad_configuration_is_78_even_when_the_shell_hides_it(managers, config, capsys, monkeypatch):
    config.write_text("[limits]\ndrain_s = 0\n")
    monkeypatch.setenv("BULKHEAD__LIMITS__DRAIN_S", "5")
    assert run("install") == ExitCode.BAD_CONFIG
    assert "worker.toml:2: limits.drain_s" in capsys.readouterr().err
    assert managers[False].did == []


def test_a_dry_run_changes_nothing(managers, config, capsys):
    assert run("install", "--dry-run") == 0
    assert capsys.readouterr().out == "the text for bulkhead\n"
    assert managers[False].did == []


def test_no_start_and_a_user_of_the_operators_choice(managers, config):
    assert run("install", "--system", "--no-start", "--run-as", "me", "--config", str(config)) == 0
    plan, start = managers[True].did[-1]
    assert (plan.user, plan.system, start) == ("me", True, False)


def test_run_as_belongs_to_the_system(managers, config, capsys):
    assert run("install", "--run-as", "me") == ExitCode.FAILED
    assert "--system" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a b", "-x", "x" * 65, "a@b"])
def test_a_name_that_is_none_is_refused(name: str):
    with pytest.raises(ServiceFailed, match="--name"):
        service_commands.backend(name, system=False)


@pytest.mark.parametrize("name", ["bulkhead", "gpu-0", "a.b_c"])
def test_names_that_are_fine(name: str):
    assert service_commands.backend(name, system=False).state().name == name


def test_what_the_rehearsal_finds_is_told_for_its_user(monkeypatch):
    plan = ServicePlan(name="b", python="/root/py", config="/c", system=True)
    monkeypatch.setattr(service_commands, "rehearse", lambda *_: Called(78, "", "worker.toml:1: x\nworker.toml:2: y"))
    with pytest.raises(ConfigError) as bad:
        service_commands._rehearse(plan, [])
    assert bad.value.problems == ["For the user bulkhead:", "worker.toml:1: x", "worker.toml:2: y"]
    monkeypatch.setattr(service_commands, "rehearse", lambda *_: Called(127, "", "setpriv: Permission denied"))
    with pytest.raises(NoPermission, match=r"bulkhead cannot run /root/py -m supervisor: setpriv.*--run-as"):
        service_commands._rehearse(plan, [])


def test_a_service_does_not_inherit_our_settings():
    kept = service_commands.bare({"PATH": "/bin", "HOME": "/h", "BULKHEAD_CONFIG": "/x", "PYTHONPATH": "/y"})
    assert kept == {"PATH": "/bin", "HOME": "/h"}


def test_uninstall_points_to_the_other_scope(managers, capsys):
    managers[True]._state = ServiceState(name="bulkhead", scope="system", installed=True)
    assert run("uninstall") == ExitCode.FAILED
    assert "add --system" in capsys.readouterr().err
    assert run("uninstall", "--system") == 0
    assert managers[True].did == ["check", "uninstall"]


def test_status_finds_whichever_is_installed(managers, capsys):
    assert run("status") == ExitCode.NOT_RUNNING
    assert "not installed" in capsys.readouterr().out
    managers[True]._state = ServiceState(
        name="bulkhead",
        scope="system",
        installed=True,
        enabled=True,
        active=True,
        state="active (running)",
        pid=7,
        restarts=2,
        status="1 of 1 model ready, no job runs",
        unit="/etc/systemd/system/bulkhead.service",
    )
    assert run("status") == 0
    assert capsys.readouterr().out == (
        "bulkhead (system): active (running)\n1 of 1 model ready, no job runs\npid 7, 2 restarts\n"
        "/etc/systemd/system/bulkhead.service\n"
    )
    assert run("status", "--json") == 0
    assert json.loads(capsys.readouterr().out)["pid"] == 7


def test_a_service_that_failed_says_why(managers, capsys):
    managers[False]._state = ServiceState(
        name="bulkhead",
        scope="user",
        installed=True,
        state="failed (failed)",
        exit_code=78,
        reason="It ended with exit code 78.",
    )
    assert run("status") == ExitCode.NOT_RUNNING
    said = capsys.readouterr().out
    assert "It ended with exit code 78." in said
    assert "not enabled" in said
