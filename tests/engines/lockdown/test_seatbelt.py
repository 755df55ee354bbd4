"""macOS's warden, run here with a kqueue played by poll, libproc by /proc, and sandbox-exec by a script.

What the stand-ins leave untested is the system itself: whether seatbelt refuses, and whether kqueue tells.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from engines.lockdown import seatbelt

ROOT = Path(__file__).parents[3]
PATIENCE_S = 90.0
linux_only = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the stand-ins use /proc and pidfds")

STAND_IN = """
import os, select, sys, types
from pathlib import Path
sys.path.insert(0, {root!r})
from engines.lockdown import seatbelt

class Event:
    def __init__(self, ident, filter, flags=0, fflags=0):
        self.ident, self.filter, self.flags, self.fflags = ident, filter, flags, fflags

class Queue:
    def __init__(self):
        self.poll, self.what = select.poll(), {{}}
    def control(self, changes, most, timeout=0):
        for change in changes:
            fd = change.ident if change.filter == -1 else os.pidfd_open(change.ident)
            self.what[fd] = change
            self.poll.register(fd, select.POLLIN)
        if not most:
            return []
        ready = [self.what[fd] for fd, _ in self.poll.poll(10)]
        fork = [Event(0, -5, 0, 0x40000000)]  # a fork may have been at any time
        return [Event(e.ident, e.filter, 0, 0x80000000 if e.filter == -5 else 0) for e in ready] or fork

def children(pid):
    try:
        return [int(word) for word in Path(f"/proc/{{pid}}/task/{{pid}}/children").read_text().split()]
    except OSError:
        return []

def started(pid):
    try:
        fields = Path(f"/proc/{{pid}}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] == "Z" else fields[19]

seatbelt.select = types.SimpleNamespace(kevent=Event, kqueue=Queue, select=select.select)
seatbelt.children, seatbelt.started = children, started
seatbelt.SANDBOX_EXEC = {sandbox_exec!r}
lifeline = int(sys.argv[1])
"""
DIRECTLY = """
seatbelt.confine({profile!r}, {policy!r}, lifeline, [sys.executable, "-c", {engine!r}], dict(os.environ))
"""
BY_THE_LAUNCHER = """
import json
from engines import launch
boot = Path({folder!r}) / "root/engines/runtime/boot.py"
boot.parent.mkdir(parents=True)
boot.write_text({engine!r})
spec = {{"root": {folder!r} + "/root", "module": "none", "python": sys.executable, "scratch": {folder!r}}}
spec |= {{"sandbox": {policy!r}, "seatbelt": {profile!r}, "keep": ["MARK"], "args": ["serve"]}}
sys.argv = ["launch.py", json.dumps(spec), str(lifeline)]
sys.platform = "darwin"
launch.main()
"""
OBEYING = '[ "$1" = -p ] && [ "$3" = -- ] || exit 64; shift 3; exec "$@"'


class Warded:
    """A warden with its engine, and the lifeline."""

    begin = DIRECTLY

    def __init__(
        self, folder: Path, engine: str, *, script: str = OBEYING, profile: str = "(version 1)", **policy: object
    ) -> None:
        sandbox_exec = folder / "sandbox-exec"
        sandbox_exec.write_text(f"#!/bin/sh\n{script}\n")
        sandbox_exec.chmod(0o755)
        given = {"root": str(ROOT), "sandbox_exec": str(sandbox_exec), "profile": profile}
        code = (STAND_IN + self.begin).format(**given, policy=policy, engine=engine, folder=str(folder))
        theirs, self.lifeline = os.pipe()
        self.process = subprocess.Popen(
            [sys.executable, "-c", code, str(theirs)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=(theirs,),
            start_new_session=True,
            env={**os.environ, "MARK": str(folder)},
        )
        os.close(theirs)

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().decode().strip()

    def cut(self) -> None:
        os.close(self.lifeline)
        self.lifeline = -1

    def end(self) -> tuple[int, str]:
        _out, err = self.process.communicate(timeout=PATIENCE_S)
        if self.lifeline >= 0:
            self.cut()
        return self.process.returncode, err.decode()


def marked(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("MARK") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def nobody_is_left(folder: Path) -> bool:
    until = time.monotonic() + PATIENCE_S
    while left := marked(folder):
        if time.monotonic() > until:
            for process in left:
                process.kill()
            return False
        time.sleep(0.01)
    return True


TELL = "import os; print(os.environ['BULKHEAD_SANDBOX'], flush=True)\n"
# A child, one in a session of its own, and a daemon whose parents live long enough to be looked at.
FAMILY = (
    TELL
    + """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
def stay():
    while True: signal.pause()
if os.fork() == 0: stay()
if os.fork() == 0:
    os.setsid()
    stay()
if (middle := os.fork()) == 0:
    os.setsid()
    if os.fork() == 0: stay()
    time.sleep(2)
    os._exit(0)
os.waitpid(middle, 0)
print("up", flush=True)
stay()
"""
)


@linux_only
def test_the_lifeline_ends_the_noted_family(tmp_path: Path):
    warded = Warded(tmp_path, FAMILY, spawns=True)
    warded.line()
    assert warded.line() == "up"
    assert len(marked(tmp_path)) == 5  # the warden too
    warded.cut()
    code, _err = warded.end()
    assert code == -signal.SIGKILL
    assert nobody_is_left(tmp_path)


@linux_only
def test_what_an_engine_leaves_behind_is_ended_with_it(tmp_path: Path):
    engine = FAMILY.replace('print("up", flush=True)\nstay()', "os._exit(5)")
    warded = Warded(tmp_path, engine, spawns=True)
    assert warded.end()[0] == 5
    assert nobody_is_left(tmp_path)


@linux_only
@pytest.mark.parametrize(
    ("engine", "code"), [("import os; os._exit(3)", 3), ("import os; os.kill(os.getpid(), 9)", -9), ("pass", 0)]
)
def test_the_warden_ends_as_the_engine_did(engine: str, code: int, tmp_path: Path):
    assert Warded(tmp_path, engine).end()[0] == code


@linux_only
def test_signals_reach_the_engine_through_the_warden(tmp_path: Path):
    warded = Warded(tmp_path, "import signal; print('up', flush=True); signal.pause()")
    assert warded.line() == "up"
    warded.process.send_signal(signal.SIGTERM)
    assert warded.end()[0] == -signal.SIGTERM


@linux_only
def test_verdicts_come_from_trying_and_here_nothing_is_refused(tmp_path: Path):
    warded = Warded(tmp_path, TELL, network="loopback")
    told = json.loads(warded.line())
    assert told["seatbelt"] == "failed"
    assert told["family"].startswith("partial")
    assert told["net"].startswith("partial")
    assert warded.end()[0] == 0


@linux_only
def test_a_required_sandbox_that_is_not_verified_starts_no_engine(tmp_path: Path):
    code, err = Warded(tmp_path, "print('must not run')", mode="require").end()
    assert code == seatbelt.EXIT_NOT_CONFINED
    assert err.splitlines()[-1] == 'sandbox = "require": seatbelt is failed'


@linux_only
@pytest.mark.parametrize(
    ("script", "profile", "told"),
    [
        ('echo "sandbox-exec: invalid profile" >&2; exit 65', "(nonsense", "unavailable(exit code 65)"),
        ("kill -KILL $$", "(version 1)", "unavailable(signal 9)"),
        (OBEYING, "", "unavailable(profile)"),
    ],
)
def test_a_sandbox_that_cannot_be_had_is_told_and_stops_only_who_requires_it(
    tmp_path: Path, script: str, profile: str, told: str
):
    warded = Warded(tmp_path, TELL + "raise SystemExit(3)", script=script, profile=profile)
    verdicts = json.loads(warded.line())
    assert (verdicts["seatbelt"], verdicts["warden"]) == (told, "claimed")
    assert warded.end()[0] == 3
    code, err = Warded(tmp_path, "print('must not run')", script=script, profile=profile, mode="require").end()
    assert code == seatbelt.EXIT_NOT_CONFINED
    assert err.splitlines()[-1] == f'sandbox = "require": seatbelt is {told}'


@linux_only
def test_the_lifeline_ends_a_sandbox_exec_that_hangs(tmp_path: Path):
    warded = Warded(tmp_path, TELL, script=f"echo up > {tmp_path}/up; exec sleep 1000")
    until = time.monotonic() + PATIENCE_S
    while not (tmp_path / "up").exists() and time.monotonic() < until:
        time.sleep(0.01)
    warded.cut()
    assert warded.end()[0] == -signal.SIGKILL
    assert nobody_is_left(tmp_path)


class Launched(Warded):
    begin = BY_THE_LAUNCHER


@linux_only
def test_the_launcher_hands_its_engine_over_with_a_clean_environment(tmp_path: Path):
    engine = (
        "import json, os, sys\n"
        "fds = [fd for fd in range(3, 256) if os.path.exists(f'/proc/self/fd/{fd}')]\n"
        "print(json.dumps([dict(os.environ), os.getcwd(), sys.argv[1:], fds]), flush=True)\n"
        "sys.exit(7)\n"
    )
    launched = Launched(tmp_path, engine)
    environment, cwd, argv, fds = json.loads(launched.line())
    assert json.loads(environment["BULKHEAD_SANDBOX"])["warden"] == "claimed"
    assert (environment["HOME"], environment["MARK"], cwd) == (str(tmp_path),) * 3
    assert environment["HF_HUB_OFFLINE"] == "1"
    assert argv == [f"{tmp_path}/root", "none", "serve"]
    assert fds == []
    assert launched.end()[0] == 7


@linux_only
def test_the_lifeline_of_a_launched_engine_ends_it(tmp_path: Path):
    launched = Launched(tmp_path, "import signal; print('up', flush=True); signal.pause()")
    assert launched.line() == "up"
    launched.cut()
    assert launched.end()[0] == -signal.SIGKILL
    assert nobody_is_left(tmp_path)


def test_the_verdict_counts_only_seatbelts_own_refusal():
    def refuse(number: int):
        def attempt() -> None:
            raise OSError(number, "no")

        return attempt

    denied, by_mode, allowed = refuse(errno.EPERM), refuse(errno.EACCES), lambda: None
    assert seatbelt.judge({"files": denied, "network": denied}) == "verified"
    assert seatbelt.judge({"files": by_mode, "network": denied}) == "partial(files open)"
    assert seatbelt.judge({"files": allowed, "network": by_mode}) == "failed"


def test_what_is_granted_is_not_tried():
    assert set(seatbelt.attempts({})) == {"files", "signals", "network", "fork"}
    assert set(seatbelt.attempts({"network": "host", "spawns": True})) == {"files", "signals"}


def test_libproc_structure_has_the_size_that_the_kernel_expects():
    assert ctypes.sizeof(seatbelt.ProcBsdInfo) == 136
    assert seatbelt.ProcBsdInfo.start_s.offset == 120
