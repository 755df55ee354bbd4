"""Linux: a pidfd tells of the end, a cgroup or the warden ends the family, /proc tells who belongs to it.

What confines the child itself (namespaces, Landlock, seccomp) is the launcher's work (engines/launch.py); here is
only the supervisor's side.
"""

from __future__ import annotations

import contextlib
import os
import platform
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from supervisor.host import family, procfs
from supervisor.host.containment.base import ChildSpec

assert sys.platform == "linux" or not TYPE_CHECKING  # for the type checker: the rest is Linux's

from supervisor.host.containment.posix import PosixLeash  # noqa: E402


class LinuxLeash(PosixLeash):
    """A pidfd, a group, a lifeline and perhaps a cgroup."""

    def __init__(self, spec: ChildSpec, is_over: Callable[[], bool]) -> None:
        super().__init__(spec, is_over)
        self._cgroup = spec.cgroup

    async def leader_dead(self) -> None:
        """Wait on a pidfd. Some Pythons are built without pidfd_open (old kernel headers)."""
        if not hasattr(os, "pidfd_open"):
            await self._wait_in_thread()
            return
        pidfd = os.pidfd_open(self.pid)
        try:
            await trio.lowlevel.wait_readable(pidfd)
        finally:
            trio.lowlevel.notify_closing(pidfd)
            os.close(pidfd)

    async def _wait_in_thread(self) -> None:
        await trio.to_thread.run_sync(
            lambda: os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT),
            abandon_on_cancel=True,
            limiter=trio.CapacityLimiter(1),  # the shared one would run out at 40 children
        )

    def dump_stacks(self) -> bool:
        """SIGUSR2, when the leader would survive it: before the warden or faulthandler took it, it kills."""
        if not _takes(self.pid, signal.SIGUSR2):
            return False
        return super().dump_stacks()

    def kill_family(self) -> bool:
        """cgroup.kill and the lifeline."""
        cut = super().kill_family()
        return self._kill_cgroup() or cut

    def members(self) -> dict[int, str]:
        """As /proc shows them."""
        return members(self.pid)

    def is_there(self, pid: int, started: str) -> bool:
        """As /proc shows it."""
        return is_there(pid, started)

    def signal_exactly(self, pid: int, started: str, number: int) -> bool:
        """By a pidfd."""
        return signal_exactly(pid, started, number)

    def _kill_cgroup(self) -> bool:
        if self._cgroup is None:
            return False
        try:  # since Linux 5.14
            (self._cgroup / "cgroup.kill").write_text("1")
        except OSError:
            return False
        return True


class Linux:
    """The backend."""

    name = "linux"

    def spawn(self, spec: ChildSpec, is_over: Callable[[], bool]) -> LinuxLeash:
        """Start a child."""
        return LinuxLeash(spec, is_over)

    def verdicts(self) -> dict[str, str]:
        """None: every layer is the launcher's."""
        return {}

    def facts(self) -> dict[str, str]:
        """Under WSL2 the kernel is Microsoft's and GPUs are reached through /dev/dxg."""
        return {"platform": "wsl2" if is_wsl2(platform.release()) else "linux"}


def is_wsl2(release: str) -> bool:
    """Whether a kernel release is WSL2's ("5.15.153.1-microsoft-standard-WSL2"); WSL1's ends in "-Microsoft"."""
    return "microsoft" in release and not release.endswith("-Microsoft")


# ---- who belongs to a family


def members(leader: int) -> dict[int, str]:
    """The leader's descendants that /proc shows now, each with its start time; not the leader itself."""
    below = {pid: start_time(pid) for pid in family.members(leader) if pid != leader}
    return {pid: began for pid, began in below.items() if began}


def start_time(pid: int) -> str:
    """In clock ticks since boot: with the pid it names one process for ever; "" when gone."""
    found = procfs.stat(pid)
    return "" if found is None else str(found.started)


def is_there(pid: int, started: str) -> bool:
    """Whether this very process has not ended; a zombie has."""
    found = procfs.stat(pid)
    return found is not None and str(found.started) == started and found.state not in "ZXx"


def signal_exactly(pid: int, started: str, number: int) -> bool:
    """Send a signal to this very process, never to a later one with its number; whether there was one."""
    if not hasattr(os, "pidfd_open"):
        return _signal_nearly_exactly(pid, started, number)
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        return False
    try:
        if start_time(pid) != started:
            return False
        signal.pidfd_send_signal(pidfd, number)
    except OSError:
        return False
    finally:
        os.close(pidfd)
    return True


def _signal_nearly_exactly(pid: int, started: str, number: int) -> bool:
    """Between the look and the signal the number could change hands; there is nothing better without a pidfd."""
    if start_time(pid) != started:
        return False
    with contextlib.suppress(OSError):
        os.kill(pid, number)
        return True
    return False


def _takes(pid: int, number: int) -> bool:
    """Whether a process catches, ignores or blocks a signal, so that it does not end it."""
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    masks = [int(line.split()[1], 16) for line in text.splitlines() if line.startswith(("SigBlk", "SigIgn", "SigCgt"))]
    return any(mask >> (number - 1) & 1 for mask in masks)
