"""Real children, real clock, short graces."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import psutil
import pytest
import trio

from supervisor.host.child import ChildSpec, Exit, open_child, run_child, signal_name


def python(code: str, **more: object) -> ChildSpec:
    return ChildSpec(name="test", argv=(sys.executable, "-c", code), **more)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not (nobody reaps orphans in a bare container)."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


async def test_output_exit_code_and_last_words_are_kept():
    spec = python("import sys; print('out'); sys.stderr.write('one\\ntwo'); sys.exit(3)")
    output, how, child = await run_child(spec, deadline_s=60)
    assert (output, how) == (b"out\n", Exit(code=3))
    assert child.stderr_tail() == ["one", "two"]
    assert how.describe() == "ended with exit code 3"


async def test_signals_are_named():
    _output, how, _child = await run_child(python("import os; os.abort()"), deadline_s=60)
    assert how == Exit(signal=signal.SIGABRT)
    assert how.describe() == "killed by SIGABRT"
    assert signal_name(250) == "signal 250"


async def test_missing_program_is_an_oserror_at_once():
    with pytest.raises(FileNotFoundError):
        async with open_child(ChildSpec(name="x", argv=("/no/such/program",))):
            pass


async def test_leaving_the_block_ends_a_child_that_obeys_term():
    async with open_child(python("print(1, flush=True); import time; time.sleep(1000)")) as child:
        await child.read()
    assert child.exit == Exit(signal=signal.SIGTERM)
    assert not psutil.pid_exists(child.pid)


async def test_a_child_deaf_to_term_is_killed_after_the_grace():
    code = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(1, flush=True); time.sleep(1000)"
    async with open_child(python(code), term_grace_s=0.2) as child:
        await child.read()
    assert child.exit == Exit(signal=signal.SIGKILL)


async def test_cancelling_the_block_still_reaps():
    with trio.CancelScope() as scope:
        async with open_child(ChildSpec(name="sleep", argv=("sleep", "1000"))) as child:
            scope.cancel()
            await child.read()
    assert child.exit == Exit(signal=signal.SIGTERM)


async def test_the_whole_group_dies_with_its_leader():
    code = "import subprocess; p = subprocess.Popen(['sleep', '1000']); print(p.pid, flush=True)"
    async with open_child(python(code)) as child:
        grandchild = int(await child.read())
        await child.wait()
    with trio.fail_after(60):
        while alive(grandchild):  # noqa: ASYNC110  nothing tells us of another process
            await trio.sleep(0.01)


async def test_a_grandchild_that_holds_the_pipe_cannot_hold_us():
    code = "import subprocess; p = subprocess.Popen(['sleep', '60'], start_new_session=True); print(p.pid, flush=True)"
    with trio.fail_after(30):
        async with open_child(python(code)) as child:
            said = b""
            while data := await child.read():
                said += data
    pid = int(said)
    os.kill(pid, signal.SIGKILL)


async def test_large_data_both_ways_does_not_deadlock():
    total = 8 * 2**20
    got = 0
    async with open_child(ChildSpec(name="cat", argv=("cat",))) as child, trio.open_nursery() as nursery:
        nursery.start_soon(child.write, memoryview(bytes(total // 2)), bytes(total // 2))
        while got < total:
            got += len(await child.read())
    assert got == total


async def test_a_stderr_flood_never_blocks_the_child_and_memory_stays_bounded():
    lines: list[str] = []
    code = "import sys\nfor n in range(20000): sys.stderr.write('x' * 100 + '\\n')\nsys.stderr.write('y' * 100000)"
    spec = python(code, stderr_lines=10, on_stderr_line=lines.append)
    _output, how, child = await run_child(spec, deadline_s=60)
    assert how == Exit(code=0)
    assert len(lines) >= 20000
    assert len(child.stderr_tail(1000)) == 10
    assert max(map(len, lines)) <= 8192


async def test_writing_to_a_dead_child_is_a_broken_pipe():
    async with open_child(ChildSpec(name="true", argv=("true",))) as child:
        await child.wait()
        with pytest.raises(BrokenPipeError):
            await child.write(b"x")


async def test_a_deadline_ends_run_child():
    _output, how, _child = await run_child(ChildSpec(name="s", argv=("sleep", "1000")), deadline_s=0.2)
    assert how == Exit(signal=signal.SIGTERM)


async def test_a_child_that_ends_with_its_spawning_thread_outlives_ten_idle_seconds_of_trio():
    """PDEATHSIG follows the spawning thread; trio retires idle pool threads after 10 s. Ours is the main thread."""
    code = "import ctypes, os; ctypes.CDLL(None).prctl(1, 9, 0, 0, 0); print(os.getppid(), flush=True); input()"
    async with open_child(python(code)) as child:
        assert int(await child.read()) == os.getpid()
        task = Path(f"/proc/{child.pid}/status").read_text()
        assert "State:" in task
        await trio.to_thread.run_sync(lambda: None)  # a pool thread comes and goes
        with trio.move_on_after(0.5):
            await child.wait()
        assert child.exit is None
