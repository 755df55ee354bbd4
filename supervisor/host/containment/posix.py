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
from typing import TYPE_CHECKING

import trio

from supervisor.host.containment.base import ChildSpec, Exit
from supervisor.host.share import Share

assert sys.platform != "win32" or not TYPE_CHECKING  # for the type checker: the rest is for the others

from supervisor.host.pipe import PipeReader, PipeWriter  # noqa: E402

# A family that forks faster than we can look is ended by its group, its warden or its cgroup, not by a list.
MAX_MEMBERS = 4096
# Between looks at who is left of a killed family: most are gone with their warden.
FIRST_LOOK_S, LONGEST_LOOK_S = 0.002, 0.5


class PosixLeash:
    """A session leader, its group and its lifeline."""

    def __init__(self, spec: ChildSpec, is_over: Callable[[], bool]) -> None:
        self._process, self._lifeline = spawn(spec)
        self._known: dict[int, str] = {}
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
        """Wait for the leader, and for everybody of a family that was killed.

        A warden dies when it is told to, even while its engine hangs in the kernel and still holds a GPU.
        """
        await self.leader_dead()
        left, pause_s, share = dict(self._known), FIRST_LOOK_S, Share()
        while left:
            for pid, started in list(left.items()):
                if not self.is_there(pid, started):
                    del left[pid]
                await share.give_way()
            if left:
                await trio.sleep(pause_s)
                pause_s = min(2 * pause_s, LONGEST_LOOK_S)

    async def leader_dead(self) -> None:
        """Wait until the leader is a zombie, without reaping it: each system has its own way."""
        raise NotImplementedError

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
        if self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, number)

    def terminate(self) -> bool:
        """SIGTERM to the group."""
        self.signal_group(signal.SIGTERM)
        return True

    def dump_stacks(self) -> bool:
        """SIGUSR2 to the leader; a warden passes it on to its engine."""
        self.signal(signal.SIGUSR2)
        return True

    def kill_family(self) -> bool:
        """Cut the lifeline. The family is noted first: afterwards its orphans cannot be told from strangers."""
        self._note_members()
        return self.cut_lifeline()

    def kill_members(self) -> None:
        """SIGKILL to the group, and to every process of the family that is or was known.

        First all are stopped, until a look finds none that is new: what is stopped cannot fork while we kill.
        """
        self.signal(signal.SIGSTOP)
        while fresh := self._note_members():
            for pid, started in fresh.items():
                self.signal_exactly(pid, started, signal.SIGSTOP)
        self._kill_group()
        for pid, started in self._known.items():
            self.signal_exactly(pid, started, signal.SIGKILL)

    def stuck_pid(self) -> int:
        """The lowest in the family of those that are left: what stands above it only waits for it."""
        left = [pid for pid, started in self._known.items() if self.is_there(pid, started)]
        return left[-1] if left else self.pid

    def _note_members(self) -> dict[int, str]:
        """Returns those that are new."""
        if self._process.returncode is not None or len(self._known) >= MAX_MEMBERS:
            return {}
        fresh = {pid: started for pid, started in self.members().items() if self._known.get(pid) != started}
        self._known.update(fresh)
        return fresh

    def members(self) -> dict[int, str]:
        """The leader's descendants that can be seen now, each with its start; not the leader itself."""
        raise NotImplementedError

    def is_there(self, pid: int, started: str) -> bool:
        """Whether this very process has not ended; a zombie has."""
        raise NotImplementedError

    def signal_exactly(self, pid: int, started: str, number: int) -> bool:
        """Send a signal to this very process, never to a later one with its number; whether there was one."""
        raise NotImplementedError

    def _kill_group(self) -> None:
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
