"""The texts of a service. Where systemd-analyze is installed it reads them, too; nothing has to run for that."""

from __future__ import annotations

import plistlib
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from xml.etree import ElementTree

import pytest

from supervisor.errors import ExitCode
from supervisor.service_units import (
    NOT_RESTARTED,
    ServicePlan,
    launchd_job,
    launchd_shell,
    stop_s,
    systemd_unit,
    systemd_words,
    sysusers,
    windows_task,
    windows_word,
)
from supervisor.settings import LimitsTable

PLAN = ServicePlan(name="bulkhead", python="/opt/b/bin/python", config="/etc/bulkhead/worker.toml")
SYSTEM = ServicePlan(name="bulkhead", python=PLAN.python, config=PLAN.config, system=True, stop_s=77)
ODD_NAMES = ["plain", "a b", "50%", "%h", "$HOME", "${x}", 'q"q', "back\\slash", "it's", "tab\there", ";", "#x", "ü"]


def keys(unit: str) -> dict[str, str]:
    return dict(line.split("=", 1) for line in unit.splitlines() if "=" in line and not line.startswith("#"))


def test_every_ending_is_either_restarted_or_not():
    others = {ExitCode.STOPPED, ExitCode.INTERNAL, ExitCode.RESTART}
    of_other_commands = {ExitCode.FAILED, ExitCode.NOT_RUNNING}
    assert {*NOT_RESTARTED, *others, *of_other_commands} == set(ExitCode)
    said = keys(systemd_unit(PLAN))
    assert said["RestartPreventExitStatus"] == "64 69 73 77 78 79"
    assert said["RestartForceExitStatus"] == "75"


@pytest.mark.parametrize("plan", [PLAN, SYSTEM])
def test_what_both_units_promise(plan: ServicePlan):
    said = keys(systemd_unit(plan))
    promised = {
        "Type": "notify",
        "NotifyAccess": "main",
        "WatchdogSec": "30",
        "KillMode": "mixed",
        "Restart": "on-failure",
        "StartLimitIntervalSec": "0",
        "OOMPolicy": "continue",
        "Delegate": "yes",
        "TimeoutStopSec": str(plan.stop_s),
        "WantedBy": "multi-user.target" if plan.system else "default.target",
    }
    assert promised.items() <= said.items()
    # Each of these takes something from the engines' sandbox, or the GPU from the engines.
    forbidden = {"SystemCallFilter", "RestrictNamespaces", "PrivateDevices", "ProtectProc", "ProcSubset", "DeviceAllow"}
    assert not forbidden & set(said)
    # A user's manager ignores some of these silently, and keeps StateDirectory= where no other command of ours looks.
    assert ("StateDirectory" in said) is plan.system
    assert ("User" in said) is plan.system


def test_a_stop_may_take_the_drain_and_every_wait_after_it():
    limits = LimitsTable(drain_s=600, cancel_grace_s=7, term_grace_s=4)
    waits_s = 600 + 7 + 2 * (4 + 2 + 10)  # cancel; TERM, lifeline and SIGKILL of the engines, then of the coordinator
    assert waits_s < stop_s(limits) < waits_s + 60


def test_nvidias_nodes_are_made_by_root_before_the_start():
    unit = systemd_unit(
        ServicePlan(name="b", python="/p", config="/c", system=True, modprobe="/usr/bin/nvidia-modprobe")
    )
    assert "ExecStartPre=-+:/usr/bin/nvidia-modprobe -u -c=0" in unit
    assert "ExecStartPre" not in systemd_unit(SYSTEM)


@pytest.mark.parametrize("name", ODD_NAMES)
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_finds_a_program_of_any_name(tmp_path: Path, name: str):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "python").symlink_to("/bin/true")
    for system in (False, True):
        plan = ServicePlan(
            name="b", python=str(folder / "python"), config=str(folder / "worker.toml"), system=system, user="root"
        )
        unit = tmp_path / "b.service"
        unit.write_text(systemd_unit(plan))
        said = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True, check=False
        )
        # It returns 0 for unknown keys and bad values, too: only silence is praise.
        assert (
            said.returncode,
            [line for line in said.stderr.splitlines() if "b.service" in line or name in line],
        ) == (0, [])


def test_arguments_are_quoted_for_systemd():
    assert systemd_words(("/bin/x", "--flag=1", "")) == ':/bin/x --flag=1 ""'
    assert systemd_words(("/a b/x", 'q"\\', "50%", "$HOME")) == ':"/a b/x" "q\\"\\\\" 50%% "$HOME"'


def test_the_services_user_belongs_to_the_groups_of_gpu_devices():
    lines = sysusers("bulkhead").splitlines()[1:]
    assert lines == ['u bulkhead - "Bulkhead worker" /var/lib/bulkhead', "m bulkhead video", "m bulkhead render"]


# ---- launchd -------------------------------------------------------------------------------------------------------


def test_the_property_list():
    job = plistlib.loads(launchd_job(PLAN, "/Users/x/Library/Logs/bulkhead.log"))
    assert job["Label"] == "bulkhead"
    assert job["ProgramArguments"][:2] == ["/bin/sh", "-c"]
    assert tuple(job["ProgramArguments"][4:]) == PLAN.argv
    assert job["KeepAlive"] == {"SuccessfulExit": False}
    assert job["ExitTimeOut"] == PLAN.stop_s
    assert job["ProcessType"] == "Interactive"
    assert "UserName" not in job
    assert plistlib.loads(launchd_job(SYSTEM, "/x"))["UserName"] == "bulkhead"


@pytest.mark.parametrize("code", [0, 1, 64, 69, 70, 73, 75, 77, 78, 79])
def test_launchd_sees_success_where_a_restart_would_only_repeat_the_ending(code: int):
    program = [sys.executable, "-c", f"raise SystemExit({code})"]
    done = subprocess.run(["/bin/sh", "-c", launchd_shell(), "supervisor", *program], capture_output=True, check=False)
    assert done.returncode == (0 if code in NOT_RESTARTED else code)
    assert (b"needs a person" in done.stderr) is (code in NOT_RESTARTED)


def test_launchds_sigterm_reaches_the_supervisor_and_its_drain_is_waited_for():
    program = """
import signal, sys, time
def drain(*_):
    time.sleep(0.3)
    print("drained", flush=True)
    sys.exit(0)
signal.signal(signal.SIGTERM, drain)
print("up", flush=True)
signal.pause()
"""
    argv = ["/bin/sh", "-c", launchd_shell(), "supervisor", sys.executable, "-c", program]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as shell:
        assert shell.stdout is not None
        assert shell.stdout.readline() == "up\n"
        began = time.monotonic()
        shell.send_signal(signal.SIGTERM)
        assert shell.wait(60) == 0
        assert time.monotonic() - began >= 0.3
        assert shell.stdout.read() == "drained\n"


# ---- Windows -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("system", [False, True])
def test_the_scheduled_task_runs_for_ever_and_on_batteries(system: bool):
    plan = ServicePlan(
        name="b & b", python="C:\\Program Files\\py\\python.exe", config="C:\\a b\\worker.toml", system=system
    )
    task = ElementTree.fromstring(windows_task(plan, "BOX\\me & you").encode("utf-16"))
    space = {"t": "http://schemas.microsoft.com/windows/2004/02/mit/task"}

    def text(path: str) -> str | None:
        return task.findtext(path, namespaces=space)

    assert text(".//t:ExecutionTimeLimit") == "PT0S"
    assert text(".//t:DisallowStartIfOnBatteries") == text(".//t:StopIfGoingOnBatteries") == "false"
    assert text(".//t:MultipleInstancesPolicy") == "IgnoreNew"
    assert text(".//t:Command") == plan.python
    assert text(".//t:Arguments") == subprocess.list2cmdline(plan.argv[1:])
    assert text(".//t:Principal/t:UserId") == ("S-1-5-19" if system else "BOX\\me & you")
    assert (text(".//t:LogonTrigger/t:UserId") is None) is system


@pytest.mark.parametrize("word", [*ODD_NAMES, "", "C:\\a b\\", 'a\\" b', "a\\\\ b\\\\", "\\\\server\\share x"])
def test_words_for_windows_are_those_of_pythons_own_quoting(word: str):
    """But for quotes around a word that needs none, which mean the same."""
    theirs = subprocess.list2cmdline([word])
    assert windows_word(word) in (theirs, f'"{theirs}"')
