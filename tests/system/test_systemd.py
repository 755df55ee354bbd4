"""`supervisor service` and what its units do, under a real systemd (systemd_box.py)."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

_spec = importlib.util.spec_from_file_location("tests_systemd_box", Path(__file__).with_name("systemd_box.py"))
assert _spec is not None
assert _spec.loader is not None
boxes: ModuleType = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = boxes
_spec.loader.exec_module(boxes)

pytestmark = [pytest.mark.systemd, pytest.mark.skipif(bool(boxes.missing()), reason=boxes.missing() or "there is one")]

_NUMBERS = itertools.count(1)


@pytest.fixture(scope="module")
def box(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One box for the module."""
    with boxes.booted(tmp_path_factory.mktemp("box")) as booted:
        yield booted


@pytest.fixture
def worker(box: Any) -> Iterator[Any]:
    """A name and a configuration of this test's own; removed with it."""
    made = boxes.Worker(box, f"w{next(_NUMBERS)}")
    yield made
    made.remove()


@pytest.fixture
def quick(worker: Any) -> Any:
    """The worker, installed, running and serving, with the pace of tests."""
    assert worker.install("--no-start").returncode == 0
    worker.drop_in(boxes.QUICK)
    started = worker.ctl("start")
    assert started.returncode == 0, worker.box.log(worker.unit)
    return worker


def family(box: Any) -> dict[int, str]:
    """Processes of any supervisor, coordinator or engine in the box, strays of engines included.

    Clients of ours are none: one that was cut off needs a moment to end.
    """
    system = ("/usr/lib/systemd/", "/lib/systemd/", "/usr/bin/dbus-daemon", "(sd-pam)", "nsenter")
    found = box.processes().items()
    return {pid: words for pid, words in found if not words.startswith(system) and "urllib.request" not in words}


# ---- install, status, uninstall ------------------------------------------------------------------------------------


def test_install_status_uninstall_for_the_system(box, worker):
    done = worker.install()
    assert done.returncode == 0, done.stderr
    # `install` came back, so systemd has heard READY=1: by then it must serve.
    assert worker.show("ActiveState") == "active"
    worker.models()
    groups = box.ok("id", "-nG", "bulkhead").split()
    assert {"video", "render"} <= set(groups), "GPU devices belong to these groups"
    told = json.loads(worker.service("status", "--json").stdout)
    assert (told["installed"], told["enabled"], told["active"]) == (True, True, True)
    assert (told["scope"], told["pid"], told["restarts"]) == ("system", worker.pid(), 0)
    assert box.ok("stat", "-c", "%U", f"/proc/{worker.pid()}").strip() == "bulkhead"
    assert "Found" in worker.install().stdout, "the same unit again is no change"

    gone = worker.service("uninstall")
    assert gone.returncode == 0, gone.stderr
    assert worker.show("LoadState") == "not-found"
    assert family(box) == {}
    assert box.ok("ls", worker.state_dir), "what the worker learned stays"
    assert worker.service("status").returncode == 3
    assert worker.service("uninstall").returncode == 1


def test_install_and_linger_for_a_user(box):
    box.ok("useradd", "--create-home", "tester")
    worker = boxes.Worker(box, "desk", user="tester")
    refused = worker.install()
    assert refused.returncode == 1
    assert "loginctl enable-linger tester" in refused.stderr, refused.stderr
    box.ok("loginctl", "enable-linger", "tester")
    boxes.until(
        lambda: box.run(["systemctl", "--user", "is-system-running"], user="tester").stdout, "the user's manager"
    )
    box.ok("chown", "-R", "tester:", "/home/tester")
    try:
        done = worker.install()
        assert done.returncode == 0, done.stderr
        assert "enable-linger" not in done.stdout, "it lingers already"
        assert worker.show("ActiveState") == "active"
        worker.models()
        assert "desk (user): active (running)" in worker.service("status").stdout
        assert box.ok("stat", "-c", "%U", f"/proc/{worker.pid()}").strip() == "tester"
        worker.serving()
        asked = worker.chat("synthetic-odd", "still here")
        assert asked.communicate(timeout=180)[0].strip(), "an engine works below a user's manager"
    finally:
        gone = worker.service("uninstall")
    assert gone.returncode == 0, gone.stderr
    assert family(box) == {}
    box.ok("loginctl", "disable-linger", "tester")


def test_what_cannot_work_is_refused_with_its_cure(box, worker):
    worker.rewrite("[limits]\ndrain_s = 0\n")
    bad = worker.install()
    assert bad.returncode == 78
    assert "limits.drain_s" in bad.stderr
    worker.rewrite(boxes.TOML)
    box.ok("useradd", "--create-home", "plain")
    no_root = box.run(
        (sys.executable, "-P", "-m", "supervisor", "service", "install", "--system", "--config", worker.config),
        user="plain",
    )
    assert no_root.returncode == 77
    assert "sudo" in no_root.stderr
    # Root can read this one, the service's user cannot: found before anything is written.
    box.ok("chmod", "600", worker.config)
    unreadable = worker.install()
    assert unreadable.returncode == 78
    assert "For the user bulkhead" in unreadable.stderr
    assert "Permission denied" in unreadable.stderr
    assert worker.show("LoadState") == "not-found"


def test_an_interpreter_that_the_services_user_cannot_reach_is_refused(box, worker):
    # As in a checkout below /root: the unit would end with 203/EXEC again and again.
    box.ok("sh", "-c", f"mkdir -m 700 /closed && ln -s {sys.executable} /closed/python")
    asked = (
        sys.executable,
        "-P",
        "-c",
        "import sys; sys.executable = '/closed/python'; from supervisor.cli import main; sys.exit(main(sys.argv[1:]))",
    )
    done = box.run((*asked, "service", "install", "--system", "--name", worker.name, "--config", worker.config))
    assert done.returncode == 77, done.stderr
    assert "/closed/python" in done.stderr
    assert "--run-as" in done.stderr


def test_a_service_that_does_not_come_up_is_told_with_its_last_words(box, worker):
    worker.rewrite(boxes.TOML.replace("127.0.0.1:0", "127.0.0.1:7777"))
    holder = subprocess.Popen(
        ["nsenter", "-t", str(box.init), "-n", sys.executable, "-c",
         "import socket,sys; s = socket.create_server(('127.0.0.1', 7777)); print('up', flush=True); sys.stdin.read()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"up\n"
        done = worker.install()
        holder.communicate(b"", timeout=60)
    assert done.returncode == 1
    assert "does not come up" in done.stderr
    assert "7777" in done.stderr, "the sentence of the supervisor itself"


# ---- the unit ------------------------------------------------------------------------------------------------------


def test_the_unit_pleases_systemd_and_takes_no_layer_from_the_engines(box, worker):
    assert worker.install("--no-start").returncode == 0
    path = f"/etc/systemd/system/{worker.unit}"
    verified = box.run(["systemd-analyze", "verify", "--man=no", path])
    assert (verified.returncode, verified.stderr) == (0, ""), "it returns 0 for unknown keys, too"
    exposure = box.ok("systemd-analyze", "security", "--no-pager", worker.unit).splitlines()[-1]
    assert float(exposure.split(": ")[1].split()[0]) <= 5.6, exposure

    def verdicts(prefix: list[str]) -> dict[str, str]:
        done = box.run([*prefix, sys.executable, "-P", "-m", "supervisor.probe", "synthetic", "--sandbox", "--json"])
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)[0]["sandbox"]

    properties = [f"--property={line}" for line in settings(worker)]
    inside = verdicts(["systemd-run", "--quiet", "--wait", "--pipe", *properties])
    uid = box.uid("bulkhead")
    outside = verdicts(["setpriv", f"--reuid={uid}", f"--regid={uid}", "--init-groups"])
    assert inside == outside
    assert inside["landlock"] == inside["seccomp"] == "verified"


# Keys that belong to a unit file, or that a transient unit of systemd-run sets by itself.
OF_THE_FILE = frozenset(
    "Description Wants After StartLimitIntervalSec Type NotifyAccess ExecStart ExecStartPre WatchdogSec WantedBy "
    "Restart RestartSec RestartPreventExitStatus RestartForceExitStatus SuccessExitStatus TimeoutStartSec".split()
)


def settings(worker: Any) -> list[str]:
    """What the unit says of the process's surroundings, as systemd-run takes it."""
    lines = worker.box.ok("cat", f"/etc/systemd/system/{worker.unit}").splitlines()
    known = [line for line in lines if "=" in line and not line.startswith("#")]
    return [line for line in known if line.split("=")[0] not in OF_THE_FILE]


_DIVIDE = """
import pathlib, subprocess, sys
from supervisor.host.cgroups import Cgroups
found = Cgroups.find()
assert found is not None, "the unit's group is not ours to divide"
group = found.make("engine", 2**30)
child = subprocess.Popen(["sleep", "60"])
assert group.join(child.pid) and group.pids() == [child.pid]
assert group.kill() and child.wait(10) == -9
assert group.remove()
print(group.path)
"""


def test_a_unit_s_control_group_can_be_divided_by_its_user(box, worker):
    assert worker.install("--no-start").returncode == 0
    argv = ["systemd-run", "--quiet", "--wait", "--pipe", *(f"--property={line}" for line in settings(worker))]
    done = box.run([*argv, "--unit=divided", sys.executable, "-P", "-c", _DIVIDE])
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("/sys/fs/cgroup/system.slice/divided.service/bulkhead-engine-")


def test_each_engine_has_a_control_group_of_its_own(box, quick):
    quick.serving()
    quick.chat("synthetic-slow", "divide", 400)
    group = quick.show("ControlGroup")

    def engines() -> list[str]:
        pids = [pid for pid, words in family(box).items() if "-m engines" in words or "launch.py" in words]
        lines = [box.run(["cat", f"/proc/{pid}/cgroup"]).stdout for pid in pids]
        return [line.strip().partition("::")[2] for line in lines if line]

    boxes.until(lambda: any(place.startswith(f"{group}/bulkhead-") for place in engines()), "engines have own groups")


def test_the_status_line_says_what_it_does(quick):
    boxes.until(
        lambda: quick.show("StatusText").startswith("2 of 2 models ready, no job runs"), quick.show("StatusText")
    )
    quick.chat("synthetic-slow", "look at me", 400)
    boxes.until(lambda: "1 job runs" in quick.show("StatusText"), "the job is seen")


# ---- endings -------------------------------------------------------------------------------------------------------


def test_a_supervisor_that_lives_is_left_alone_and_a_wedged_one_replaced(box, quick):
    quick.drop_in(boxes.WATCHED)
    assert quick.ctl("restart").returncode == 0, box.log(quick.unit)
    quick.serving()
    pid = quick.pid()
    began = time.monotonic()
    # The watchdog's time passes while it serves.
    boxes.until(lambda: time.monotonic() - began > 1.2 * boxes.WATCHDOG_S, "more than its time")
    assert (quick.pid(), quick.show("NRestarts")) == (pid, "0"), box.log(quick.unit)
    old = set(family(box))
    box.ok("kill", "-STOP", str(pid))
    boxes.until(lambda: quick.pid() not in (0, pid) and quick.show("ActiveState") == "active", "another one serves")
    assert quick.show("NRestarts") == "1"
    assert "Watchdog timeout" in box.log(quick.unit)
    assert not old & set(family(box)), "what the wedged one had started"
    quick.serving()


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGSEGV"])
def test_a_crash_is_followed_by_a_restart_that_finds_a_clean_box(box, quick, signal: str):
    quick.serving()
    pid, old = quick.pid(), set(family(box))
    assert quick.chat("synthetic-odd", "daemon").communicate(timeout=180)[0]
    old |= set(family(box))
    quick.ctl("kill", f"--signal={signal}", "--kill-whom=main")
    boxes.until(lambda: quick.pid() not in (0, pid) and quick.show("ActiveState") == "active", "another one serves")
    assert quick.show("NRestarts") == "1"
    assert not old & set(family(box))
    quick.serving()


@pytest.mark.parametrize(
    ("code", "restarted"),
    [*((code, False) for code in (0, 64, 69, 73, 77, 78, 79)), *((code, True) for code in (1, 70, 75))],
)
def test_which_exit_codes_are_restarted(worker, code: int, restarted: bool):
    assert worker.install("--no-start").returncode == 0
    worker.drop_in(
        f"{boxes.QUICK}ExecStart=\nExecStart=/bin/sh -c 'systemd-notify --ready; exit {code}'\nNotifyAccess=all\n"
    )
    worker.ctl("start")
    if restarted:
        boxes.until(lambda: int(worker.show("NRestarts")) >= 2, "it is started again and again")
    else:
        # "failed" and not "activating (auto-restart)": systemd has decided.
        boxes.until(lambda: worker.show("ActiveState") == ("failed" if code else "inactive"), "it rests")
        assert worker.show("NRestarts") == "0"


def _refused(box: Any, worker: Any) -> None:
    """A coordinator that does not know this worker's token."""
    other = boxes.Worker(box, "coord")
    assert other.install().returncode == 0
    url, _key = other.endpoint()
    box.write(f"/etc/{worker.name}/token", "bw_wrong\n", 0o600)
    box.ok("chown", "bulkhead:", f"/etc/{worker.name}/token")
    worker.rewrite(f'[coordinator]\nurl = "{url.replace("http", "ws")}"\ntoken_file = "token"\n')


def _held(box: Any, worker: Any) -> None:
    """Another process has the state folder."""
    other = boxes.Worker(box, "coord", toml=f'{boxes.TOML}[worker]\nstate_dir = "{worker.state_dir}"\n')
    box.ok("sh", "-c", f"mkdir -p {worker.state_dir} && chown bulkhead: {worker.state_dir}")
    assert other.install().returncode == 0


def _out_of_reach(box: Any, worker: Any) -> None:
    worker.rewrite(f'{boxes.TOML}[worker]\nstate_dir = "/root/closed"\n')


def _broken(box: Any, worker: Any) -> None:
    worker.rewrite("[limits]\ndrain_s = 0\n")


@pytest.mark.parametrize(("cause", "code"), [(_refused, 69), (_held, 73), (_out_of_reach, 77), (_broken, 78)])
def test_real_endings_that_need_a_person_are_not_restarted_and_told(
    box, worker, cause: Callable[[Any, Any], None], code: int
):
    assert worker.install("--no-start").returncode == 0
    worker.drop_in(boxes.QUICK)
    try:
        cause(box, worker)
        worker.ctl("start")
        boxes.until(lambda: worker.show("ActiveState") == "failed", f"it ends\n{box.log(worker.unit)}")
        told = json.loads(worker.service("status", "--json").stdout)
        assert (told["exit_code"], told["restarts"], told["active"]) == (code, 0, False), box.log(worker.unit)
        assert str(code) in told["reason"]
    finally:
        boxes.Worker(box, "coord").remove()


# ---- stop ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stray", ["fork", "daemon", "hang-gil"])
def test_a_stop_leaves_nothing_of_any_engine(box, quick, stray: str):
    quick.rewrite(boxes.TOML.replace("drain_s = 20", "drain_s = 1"))
    quick.ctl("restart")
    quick.serving()
    asked = quick.chat("synthetic-odd", stray)
    if stray != "hang-gil":
        asked.communicate(timeout=180)
    boxes.until(lambda: any("misbehave" in words for words in family(box).values()), "the engine runs")
    assert quick.ctl("stop").returncode == 0
    assert family(box) == {}
    assert quick.show("Result") == "success", box.log(quick.unit)
    assert box.run(["test", "-e", f"/sys/fs/cgroup/system.slice/{quick.unit}"]).returncode == 1


def test_a_stop_finishes_what_runs_even_beyond_the_units_own_patience(box, quick):
    # A worker.toml with a longer drain than the unit was written for: the drain asks for more time by itself.
    quick.drop_in(f"{boxes.QUICK}TimeoutStopSec=1\n")
    quick.serving()
    asked = quick.chat("synthetic-slow", "nothing is lost " * 40, 320)  # 8 s of work
    boxes.until(lambda: any("synthetic.engine" in words for words in family(box).values()), "the engine runs")
    boxes.until(lambda: "1 job runs" in quick.show("StatusText"), "the job runs")
    stopped = quick.ctl("stop")
    answer, errors = asked.communicate(timeout=180)
    assert stopped.returncode == 0
    assert answer.startswith("nothing is lost"), errors
    assert quick.show("Result") == "success", box.log(quick.unit)
    assert family(box) == {}
