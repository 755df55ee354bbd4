"""Finding, ending and imitating the processes below us."""

from __future__ import annotations

import os
import select
import signal
import sys

import pytest

from engines.lockdown import family

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="children are told by Linux")


def in_a_child(work) -> int:
    """The exit code, or minus the signal, of a child that does this."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        except BaseException:
            os._exit(99)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.mark.parametrize("code", [0, 7, 255])
def test_an_exit_code_is_imitated(code: int):
    assert in_a_child(lambda: family.end_like(code << 8)) == code


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV])
def test_a_signal_is_imitated_even_when_it_was_held_back(number: int):
    def work() -> None:
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_IGN)
            signal.pthread_sigmask(signal.SIG_BLOCK, {number})
        family.end_like(number)

    assert in_a_child(work) == -number


def test_a_sweep_gets_orphans_in_sessions_of_their_own():
    read, write = os.pipe()

    def work() -> None:
        family.adopt_orphans()
        for _ in range(3):
            if os.fork() == 0:
                os.setsid()
                if os.fork() == 0:
                    signal.pause()
                os._exit(0)
        os.close(write)
        assert family.children()
        family.sweep()
        assert family.children() == []
        assert family.reap(1) is None

    assert in_a_child(work) == 0
    os.close(write)
    # Whoever lives still holds the other end.
    assert select.select([read], [], [], 60)[0]
    assert os.read(read, 1) == b""
    os.close(read)


def test_reaping_tells_only_of_the_one_asked_for():
    def work() -> None:
        first = os.fork() or os._exit(3)
        second = os.fork() or os._exit(4)
        os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)
        os.waitid(os.P_PID, second, os.WEXITED | os.WNOWAIT)
        status = family.reap(second)
        assert status is not None
        assert os.waitstatus_to_exitcode(status) == 4
        assert family.children() == []

    assert in_a_child(work) == 0


def test_a_child_that_asked_dies_with_its_parent():
    read, write = os.pipe()
    middle = os.fork()
    if middle == 0:
        if os.fork() == 0:
            family.die_with_parent()
            os.write(write, b"x")
            signal.pause()
        os.close(write)
        signal.pause()
    os.close(write)
    assert os.read(read, 1) == b"x"
    os.kill(middle, signal.SIGKILL)
    os.waitpid(middle, 0)
    assert select.select([read], [], [], 60)[0]
    assert os.read(read, 1) == b""
    os.close(read)
