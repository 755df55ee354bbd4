"""What every platform gives to one child: the interface of the backends, and the values they share.

A backend is chosen once (`containment.backend`). It spawns, and returns a `Leash`: our hold on one process and on
the family that it starts. `Child` (child.py) has the escalation with its bounds; a leash has the single acts, each of
which returns at once except `wait_dead`.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import msgspec

# SIGKILL that has not worked after this long will not: the process is stuck in the kernel (D state).
UNKILLABLE_AFTER_S = 10.0
# Windows has no such signals; its backend tells crashes and kills by them all the same.
_NAMES_ELSEWHERE = {4: "SIGILL", 6: "SIGABRT", 8: "SIGFPE", 9: "SIGKILL", 11: "SIGSEGV", 15: "SIGTERM"}


class ChildSpec(msgspec.Struct, frozen=True, kw_only=True):
    """What to start.

    Attributes:
        name: for logs.
        env: the whole environment; None means ours.
        pass_fds: descriptors that stay open under the same numbers; POSIX only.
        lifeline: give the child the read end of a pipe whose other end only we hold, and its number as a last word of
            argv. Its end of file means that we are gone, or want the whole family of the child dead (warden.py).
        cgroup: folder of the child's own cgroup, which the child entered before its exec; Linux only.
        memory_bytes: ceiling of the whole family where the platform's container has one (a Job Object); 0 for none.
        stderr_lines: how many of the latest stderr lines are kept as evidence.
        on_stderr_line: called for each line, on the trio thread; must not block.
    """

    name: str
    argv: tuple[str, ...]
    env: Mapping[str, str] | None = None
    cwd: Path | None = None
    pass_fds: tuple[int, ...] = ()
    lifeline: bool = False
    cgroup: Path | None = None
    memory_bytes: int = 0
    stderr_lines: int = 200
    on_stderr_line: Callable[[str], None] | None = None


class Exit(msgspec.Struct, frozen=True):
    """How a child ended: an exit code, a signal, or neither when it could not be killed."""

    code: int | None = None
    signal: int | None = None

    @property
    def unkillable(self) -> bool:
        """Still there after SIGKILL; its handle was abandoned."""
        return self.code is None and self.signal is None

    def describe(self) -> str:
        """One phrase for people."""
        if self.signal is not None:
            return f"killed by {signal_name(self.signal)}"
        if self.code is not None:
            return f"ended with exit code {self.code}"
        return f"still there {UNKILLABLE_AFTER_S:.0f} s after SIGKILL"


def signal_name(number: int) -> str:
    """ "SIGSEGV" for 11; the number where there is no name for it."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return _NAMES_ELSEWHERE.get(number, f"signal {number}")


class Reader(Protocol):
    """Our end of a pipe that the child writes."""

    async def read(self, max_bytes: int = ...) -> bytes:
        """At least one byte, b"" at the end. Cancellation: nothing is lost."""

    def wake(self) -> None:
        """Make a waiting read look again whether the child is over."""

    def close(self) -> None:
        """Let go of the pipe."""


class Writer(Protocol):
    """Our end of a pipe that the child reads."""

    async def write(self, *buffers: bytes | memoryview) -> None:
        """Write all. Raises BrokenPipeError when nobody reads, trio.ClosedResourceError when we closed it."""

    def close(self) -> None:
        """Let the child read the end of its input."""


class Leash(Protocol):
    """Our hold on one child and its family."""

    @property
    def pid(self) -> int:
        """Of the leader."""

    @property
    def stdin(self) -> Writer:
        """What the child reads."""

    @property
    def stdout(self) -> Reader:
        """What the child writes."""

    @property
    def stderr(self) -> Reader:
        """What it complains of."""

    async def wait_dead(self) -> None:
        """Wait until the leader is dead, and with it the family where that was killed, without reaping it.

        Cancellation: only the waiting ends.
        """

    def reap(self) -> Exit:
        """Kill what the dead leader left in its group, reap it, tell how it ended. Only after `wait_dead`."""

    def signal(self, number: int) -> None:
        """Send a signal to the leader alone; nothing when it is gone, or where there are no signals."""

    def signal_group(self, number: int) -> None:
        """Send a signal to the leader's group; nothing when it is gone."""

    def terminate(self) -> bool:
        """Ask the group to end: SIGTERM, or CTRL_BREAK; False when it cannot be asked, so that waiting is no use."""

    def dump_stacks(self) -> bool:
        """Ask for the stacks of all threads on stderr; False when it was not asked, for it would have been killed."""

    def kill_family(self) -> bool:
        """Let the platform's container end the whole family, at once; False when there is none."""

    def kill_members(self) -> None:
        """Kill the group and every process of the family that is known; for when the container did not do."""

    def stuck_pid(self) -> int:
        """Who of the family is still there, for people: the process that the others wait for, else the leader."""

    def cut_lifeline(self) -> bool:
        """Let the warden end the family; False when there is no lifeline (any more)."""

    def close(self) -> None:
        """Let go of the pipes and the lifeline; the process is dead or given up."""


class Containment(Protocol):
    """One platform's way to start children and hold their families together."""

    @property
    def name(self) -> str:
        """Of the platform."""

    def spawn(self, spec: ChildSpec, is_over: Callable[[], bool]) -> Leash:
        """Start a child; from trio's main thread, with the loop running.

        Args:
            is_over: whether the child is known to be dead; an empty pipe then counts as ended.

        Raises:
            OSError: the program cannot be started.
        """

    def verdicts(self) -> dict[str, str]:
        """Layer -> verdict of what this backend itself puts around every child; the launcher tells of its own."""

    def facts(self) -> dict[str, str]:
        """What is worth knowing of this machine in a report: `platform`, and whether it is WSL2."""
