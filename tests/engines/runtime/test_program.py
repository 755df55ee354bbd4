"""Programs on the leash: lines as they come, endings as they were, nobody left behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from engines.runtime.program import MAX_LINE_BYTES, Program, describe, inherited

LEASH = Path(__file__).parents[3] / "engines" / "lockdown" / "leash.py"


@pytest.fixture
def start(tmp_path):
    programs = []

    def begin(code, *args, grace_s=5.0):  # noqa: ANN002
        argv = [sys.executable, "-I", "-c", code, *args]
        programs.append(Program(argv, env=dict(os.environ), cwd=tmp_path, grace_s=grace_s))
        return programs[-1]

    yield begin
    for program in programs:
        program.kill()
        program.wait()


@pytest.mark.parametrize(
    ("code", "ending", "words"),
    [
        ("pass", 0, "ended with exit code 0"),
        ("import sys; sys.exit(42)", 42, "ended with exit code 42"),
        ("import os; os.abort()", -6, "was killed by SIGABRT"),
        ("import os; os.kill(os.getpid(), 9)", -9, "was killed by SIGKILL"),
        ("import os; os.kill(os.getpid(), 15)", -15, "was killed by SIGTERM"),
        (
            "import os, signal; signal.signal(13, signal.SIG_DFL); os.kill(os.getpid(), 13)",
            -13,
            "was killed by SIGPIPE",
        ),
    ],
)
def test_it_ends_as_the_program_did(start, code, ending, words):
    program = start(code)
    assert list(program.lines()) == []
    assert program.wait() == ending
    assert describe(ending) == words


def test_the_program_has_its_own_words_and_nothing_else(start, tmp_path):
    code = (
        "import os, signal, sys; print(os.getcwd(), sys.argv[1:], os.read(0, 1), sorted(os.listdir('/proc/self/fd')))"
    )
    program = start(code, "a b", "")
    (line,) = program.lines()
    assert line.startswith(f"{tmp_path} ['a b', ''] b''")
    assert line.endswith("['0', '1', '2', '3']")  # 3 is the listing itself


def test_signals_have_their_defaults_in_the_program(start):
    code = "import signal; print(signal.getsignal(signal.SIGTERM) == signal.SIG_DFL, signal.pthread_sigmask(0, []))"
    assert list(start(code).lines()) == ["True set()"]


def test_a_signal_that_only_the_engine_ignores_has_its_default_in_the_program(start):
    """The launcher has SIGUSR2 ignored; in modes that never register faulthandler it stays so."""
    before = signal.signal(signal.SIGUSR2, signal.SIG_IGN)
    try:
        program = start("import signal; print(signal.getsignal(signal.SIGUSR2) == signal.SIG_DFL)")
        assert list(program.lines()) == ["True"]
    finally:
        signal.signal(signal.SIGUSR2, before)


def test_lines_come_as_they_are_printed(start):
    program = start("import sys\nprint('one', flush=True)\nsys.stdin.read()\nimport time\ntime.sleep(100)")
    assert next(program.lines()) == "one"


def test_long_lines_are_cut_once(start):
    program = start(f"print('x' * {5 * MAX_LINE_BYTES}); print('y')")
    assert [len(line) for line in program.lines()] == [MAX_LINE_BYTES + 1, 1]


def test_terminate_then_kill(start):
    code = "import signal, time\nsignal.signal(15, signal.SIG_IGN)\nprint('deaf', flush=True)\ntime.sleep(100)"
    program = start(code, grace_s=0.1)
    lines = program.lines()
    assert next(lines) == "deaf"
    program.terminate()
    program.terminate()
    assert list(lines) == []
    assert program.wait() == -9


def test_terminate_right_after_the_start_is_not_lost(start):
    """The SIGTERM may come between fork and exec; it must not be swallowed there."""
    for _ in range(5):
        program = start("import time; time.sleep(100)", grace_s=60)
        program.terminate()
        assert list(program.lines()) == []
        assert program.wait() == -15


def test_after_the_end_nothing_raises(start):
    program = start("pass")
    list(program.lines())
    program.wait()
    program.terminate()
    program.kill()


@pytest.mark.parametrize(
    ("argv", "code", "words"),
    [
        (["/no/such/program"], 127, "No such file"),
        (["/"], 126, "Permission denied"),
    ],
)
def test_what_cannot_be_started_ends_as_in_a_shell(tmp_path, argv, code, words):
    program = Program(argv, env=dict(os.environ), cwd=tmp_path, grace_s=1)
    (line,) = program.lines()
    assert words in line
    assert program.wait() == code


def test_orphans_in_sessions_of_their_own_are_found(start, tmp_path):
    code = (
        f"# {tmp_path}\n"
        "import os, time\n"
        "for _ in range(3):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        if os.fork():\n"
        "            os._exit(0)\n"
        "        os.close(1); os.close(2)\n"
        "        time.sleep(100)\n"
        "for _ in range(3): os.wait()\n"
    )
    program = start(code)
    assert list(program.lines()) == []
    assert program.wait() == 0
    assert _running(str(tmp_path)) == []


def _running(words):
    found = []
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        try:
            if words in Path(f"/proc/{pid}/cmdline").read_text(errors="replace"):
                found.append(int(pid))
        except OSError:
            continue
    return found


def test_the_leash_treats_a_signal_of_its_own_as_a_wish_to_end(tmp_path):
    read, write = os.pipe()
    argv = [sys.executable, "-I", "-S", str(LEASH), str(read), "5", sys.executable, "-c"]
    code = "import time; print('up', flush=True); time.sleep(100)"
    leash = subprocess.Popen([*argv, code], pass_fds=(read,), stdout=subprocess.PIPE)
    try:
        assert leash.stdout.readline() == b"up\n"
        leash.send_signal(signal.SIGTERM)
        assert select.select([leash.stdout], [], [], 60)[0]
        assert leash.wait(60) == -signal.SIGTERM
    finally:
        os.close(read)
        os.close(write)
        leash.stdout.close()


def test_a_program_gets_our_environment_without_what_is_meant_for_libraries(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # as the launcher sets it
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")  # as the operator set it
    monkeypatch.setenv("KEPT", "yes")
    env = inherited()
    assert "HF_HUB_OFFLINE" not in env
    assert (env["OMP_WAIT_POLICY"], env["KEPT"], env["PYTHONUNBUFFERED"]) == ("ACTIVE", "yes", "1")
