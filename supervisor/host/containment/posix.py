"""What Linux and macOS share: a session of its own, signals to its group, pipes, and the lifeline.

`subprocess.Popen` from trio's main thread, never `trio.run_process`: that spawns from a pool thread, and a child that
asked to die with its parent (PDEATHSIG follows the *thread*) would be killed when the pool retires it after ten idle
seconds. Popen costs the loop about 0.1 ms.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import trio

from supervisor.host.containment.base import ChildSpec, Exit
from supervisor.host.pipe import PipeReader, PipeWriter


class PosixLeash:
    """A session leader, its group and its lifeline."""

    def __init__(self, spec: ChildSpec, is_over: Callable[[], bool]) -> None:
        self._process, self._lifeline = spawn(spec)
        process = self._process
        self.pid = process.pid
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        # The file objects would close the descriptors a second time: take the numbers out of them.
        self.stdin = PipeWriter(_detach(process.stdin))
        self.stdout = PipeReader(_detach(process.stdout), is_over)
        self.stderr = PipeReader(_detach(process.stderr), is_over)

    async def wait_dead(self) -> None:
        """Wait in a thread of its own until the process is a zombie; platforms with something better use that."""
        if sys.platform != "win32":
            await trio.to_thread.run_sync(
                lambda: os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT),
                abandon_on_cancel=True,
                limiter=trio.CapacityLimiter(1),  # the shared one would run out at 40 children
            )

    def reap(self) -> Exit:
        """Kill the stragglers of the group, while the zombie leader keeps its number ours; then reap it."""
        self._kill_group()
        code = self._process.wait()
        return Exit(signal=-code) if code < 0 else Exit(code=code)

    def signal(self, number: int) -> None:
        """To the leader alone; it is not reaped yet, so the number is its own."""
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def signal_group(self, number: int) -> None:
        """To the whole group. macOS answers EPERM for a group of zombies."""
        if sys.platform != "win32" and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    def terminate(self) -> bool:
        """SIGTERM to the group."""
        self.signal_group(signal.SIGTERM)
        return True

    def dump_stacks(self) -> bool:
        """SIGUSR2 to the leader; a warden passes it on to its engine."""
        if sys.platform == "win32":
            return False
        self.signal(signal.SIGUSR2)
        return True

    def kill_family(self) -> bool:
        """Cut the lifeline: the warden does the rest."""
        return self.cut_lifeline()

    def kill_members(self) -> None:
        """SIGKILL to the group."""
        self._kill_group()

    def _kill_group(self) -> None:
        if sys.platform != "win32":
            self.signal_group(signal.SIGKILL)

    def cut_lifeline(self) -> bool:
        """Close our end of it."""
        if self._lifeline < 0:
            return False
        os.close(self._lifeline)
        self._lifeline = -1
        return True

    def close(self) -> None:
        """Let go of everything but the process."""
        self.cut_lifeline()
        self.stdin.close()
        self.stdout.close()
        self.stderr.close()


def _detach(file: object) -> int:
    fd = os.dup(file.fileno())  # type: ignore[attr-defined]
    file.close()  # type: ignore[attr-defined]
    return fd


def spawn(spec: ChildSpec) -> tuple[subprocess.Popen[bytes], int]:
    """Start it; returns the process and our end of its lifeline, -1 when it has none."""
    ours, argv = -1, spec.argv
    theirs: tuple[int, ...] = ()
    if spec.lifeline:
        theirs_fd, ours = os.pipe()
        theirs, argv = (theirs_fd,), (*argv, str(theirs_fd))
    try:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=None if spec.env is None else dict(spec.env),
            cwd=spec.cwd,
            pass_fds=(*spec.pass_fds, *theirs),
            start_new_session=True,
            bufsize=0,
        )
    except BaseException:
        if ours >= 0:
            os.close(ours)
        raise
    finally:
        for fd in theirs:
            os.close(fd)
    return process, ours
