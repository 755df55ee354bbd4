"""The leash: whatever a family does to get away, and whoever is killed, nobody is left."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

LAUNCH = Path(__file__).parents[3] / "engines" / "launch.py"
PATIENCE_S = 90.0
SETS = {
    "all": ["namespaces", "privileges", "landlock", "seccomp"],
    "no namespaces": ["privileges", "landlock", "seccomp"],
}

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the leash is Linux's")

# An engine that makes a child, a child in a session of its own, and a daemon, ignores SIGTERM, and then hangs with
# the GIL held in C. Each of them works in the scratch folder, by which the test finds them.
_NASTY = """
import ctypes, os, signal, sys
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
def stay():
    while True:
        signal.pause()
gone, tell = os.pipe()
if os.fork() == 0:
    stay()
if os.fork() == 0:
    os.setsid()
    os.write(tell, b"x")
    stay()
os.read(gone, 1)
if (middle := os.fork()) == 0:
    os.setsid()
    if os.fork() == 0:
        stay()
    os._exit(0)
os.waitpid(middle, 0)
print("up", flush=True)
ctypes.PyDLL(None).sleep(1000)
"""
_END = """
import os, resource, signal, sys
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
word = sys.argv[3]
gone, tell = os.pipe()
if os.fork() == 0:
    os.setsid()
    os.close(gone)
    os.write(tell, b"x")
    signal.pause()
os.read(gone, 1)
if word == "wait":
    print("up", flush=True)
    signal.pause()
if word.isdigit():
    os._exit(int(word))
os.kill(os.getpid(), getattr(signal, word))
signal.pause()
"""


def living_in(folder: Path) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.cwd() == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def dead_children(parent: psutil.Process) -> list[psutil.Process]:
    """Those whose exit code nobody has asked for yet."""
    found = []
    for child in parent.children():
        with contextlib.suppress(psutil.NoSuchProcess):
            if child.status() == psutil.STATUS_ZOMBIE:
                found.append(child)
    return found


def nobody_in(folder: Path) -> bool:
    until = time.monotonic() + PATIENCE_S
    while left := living_in(folder):
        if time.monotonic() > until:
            for process in left:
                process.kill()
            return False
        time.sleep(0.01)
    return True


@pytest.fixture(params=SETS)
def argv(request: pytest.FixtureRequest, tmp_path: Path):
    """Makes the launcher's argv for an engine that is this code."""

    def make(code: str, *args: str) -> list[str]:
        boot = tmp_path / "root/engines/runtime/boot.py"
        boot.parent.mkdir(parents=True)
        boot.write_text(code)
        (tmp_path / "scratch").mkdir()
        policy = {
            "layers": SETS[request.param],
            "read": ["/proc", str(tmp_path / "root")],
            "execute": ["/usr", "/lib", "/lib64", sys.prefix, sys.base_prefix],
            "write": [str(tmp_path / "scratch")],
            "spawns": True,
        }
        spec = {
            "root": str(tmp_path / "root"),
            "module": "none",
            "python": sys.executable,
            "scratch": str(tmp_path / "scratch"),
            "args": list(args),
            "sandbox": policy,
        }
        return [sys.executable, "-I", "-S", str(LAUNCH), json.dumps(spec)]

    return make


class Started:
    """A launched engine with its lifeline."""

    def __init__(self, argv: list[str]) -> None:
        theirs, self.lifeline = os.pipe()
        self.process = subprocess.Popen(
            [*argv, str(theirs)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=(theirs,),
            start_new_session=True,
        )
        os.close(theirs)

    def up(self) -> Started:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"up\n"
        return self

    def close(self) -> int:
        code = self.process.wait(PATIENCE_S)
        for end in (self.process.stdin, self.process.stdout):
            assert end is not None
            end.close()
        if self.lifeline >= 0:
            os.close(self.lifeline)
        return code


def test_the_lifeline_ends_a_family_that_wants_to_stay(argv, tmp_path: Path):
    started = Started(argv(_NASTY)).up()
    assert len(living_in(tmp_path / "scratch")) == 4
    os.close(started.lifeline)
    started.lifeline = -1
    assert started.close() == -signal.SIGKILL
    assert not living_in(tmp_path / "scratch")  # the warden ends last


def test_a_killed_supervisor_leaves_nobody(argv, tmp_path: Path):
    code = (
        "import os, subprocess, sys, time\n"
        "theirs, ours = os.pipe()\n"
        f"child = subprocess.Popen([*{argv(_NASTY)!r}, str(theirs)], stdin=subprocess.PIPE, pass_fds=(theirs,),\n"
        "    stdout=subprocess.PIPE, start_new_session=True)\n"
        "os.close(theirs)\n"
        "print(child.stdout.readline().decode(), flush=True)\n"
        "time.sleep(1000)\n"
    )
    supervisor = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert supervisor.stdout is not None
    assert supervisor.stdout.readline() == b"up\n"
    family = living_in(tmp_path / "scratch")
    assert len(family) == 4
    supervisor.kill()
    supervisor.wait(PATIENCE_S)
    supervisor.stdout.close()
    assert nobody_in(tmp_path / "scratch")


@pytest.mark.parametrize(("word", "code"), [("7", 7), ("0", 0), ("SIGSEGV", -11), ("SIGABRT", -6), ("SIGKILL", -9)])
def test_the_end_is_mirrored_and_what_was_left_behind_is_gone(argv, tmp_path: Path, word: str, code: int):
    started = Started(argv(_END, word))
    assert started.close() == code
    assert not living_in(tmp_path / "scratch")


def test_sigterm_to_the_warden_alone_reaches_the_engine(argv, tmp_path: Path):
    started = Started(argv(_END, "wait")).up()
    started.process.terminate()
    assert started.close() == -signal.SIGTERM
    assert not living_in(tmp_path / "scratch")


def test_a_stack_dump_that_is_asked_for_too_early_ends_nobody(argv, tmp_path: Path):
    """Between exec and the moment when the engine's runtime registers faulthandler."""
    started = Started(argv("import sys\nprint('up', flush=True)\nprint(sys.stdin.readline(), end='', flush=True)")).up()
    leader = psutil.Process(started.process.pid)
    for process in (leader, *leader.children(recursive=True)):
        process.send_signal(signal.SIGUSR2)
    assert started.process.stdin is not None
    assert started.process.stdout is not None
    started.process.stdin.write(b"alive\n")
    started.process.stdin.close()
    assert started.process.stdout.readline() == b"alive\n"
    assert started.close() == 0


@pytest.mark.parametrize("code", [_NASTY, _END], ids=["nasty", "setsid child"])
def test_a_killed_warden_takes_the_whole_family_with_it(argv, tmp_path: Path, code: str):
    started = Started(argv(code, "wait")).up()
    assert len(living_in(tmp_path / "scratch")) >= 2
    started.process.kill()
    assert started.close() == -signal.SIGKILL
    assert nobody_in(tmp_path / "scratch")


def test_sigkill_to_the_whole_group_leaves_nobody(argv, tmp_path: Path):
    """As the host does when nothing else helped: warden and engine die at once, the setsid child is the guard's."""
    started = Started(argv(_NASTY)).up()
    os.killpg(started.process.pid, signal.SIGKILL)
    assert started.close() == -signal.SIGKILL
    assert nobody_in(tmp_path / "scratch")


def test_a_killed_guard_leaves_nobody(argv, tmp_path: Path):
    """Or the first process of the pid namespace, which stands in the same place."""
    started = Started(argv(_NASTY)).up()
    (between,) = psutil.Process(started.process.pid).children()
    between.kill()
    assert started.close() == -signal.SIGKILL
    assert not living_in(tmp_path / "scratch")


def test_the_guard_buries_who_was_left_to_it(argv, tmp_path: Path):
    """A daemon's dead children must not fill the process table while the engine lives."""
    code = (
        "import os, signal\n"
        "gone, tell = os.pipe()\n"
        "for _ in range(20):\n"
        "    if os.fork() == 0:\n"
        "        if os.fork() == 0:\n"
        "            os._exit(0)\n"
        "        os._exit(0)\n"
        "    os.wait()\n"
        "os.close(tell)\n"
        "os.read(gone, 1)\n"
        "print('up', flush=True)\n"
        "signal.pause()\n"
    )
    started = Started(argv(code)).up()
    (between,) = psutil.Process(started.process.pid).children()
    until = time.monotonic() + PATIENCE_S
    while left := dead_children(between):
        assert time.monotonic() < until, left
        time.sleep(0.01)
    os.close(started.lifeline)
    started.lifeline = -1
    started.close()


def test_the_pipe_ends_when_the_engine_closes_it(argv):
    started = Started(argv("import os, sys, time\nos.close(1)\nsys.stdin.read()"))
    assert started.process.stdout is not None
    assert select.select([started.process.stdout], [], [], PATIENCE_S)[0]
    assert started.process.stdout.read() == b""
    assert started.process.poll() is None
    assert started.process.stdin is not None
    started.process.stdin.close()
    assert started.process.wait(PATIENCE_S) == 0
    started.process.stdout.close()
    os.close(started.lifeline)
