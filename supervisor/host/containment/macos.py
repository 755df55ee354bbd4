"""macOS: kqueue tells of the end, a warden holds the lifeline, seatbelt confines what runs inside.

There is no PDEATHSIG, no subreaper and no cgroup here. The warden (engines/lockdown/seatbelt.py) stays outside the
sandbox, reads the lifeline and ends the family when it closes. A daemon that left the family between two looks of the
warden is not found; engines that start no programs are therefore refused the fork itself (seatbelt_profile.py).
Everything in this module is written against the documented interfaces and has not yet run on a Mac.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import psutil  # type: ignore[import-untyped]
import trio

from supervisor.host.containment.base import ChildSpec

assert sys.platform == "darwin" or not TYPE_CHECKING  # for the type checker: the rest is macOS's

from supervisor.host.containment.posix import PosixLeash  # noqa: E402


class MacosLeash(PosixLeash):
    """A kqueue event, a group and a lifeline."""

    async def leader_dead(self) -> None:
        """Wait for NOTE_EXIT."""
        await wait_exit(self.pid)

    def members(self) -> dict[int, str]:
        """As the process table shows them."""
        try:
            below = psutil.Process(self.pid).children(recursive=True)
        except psutil.Error:
            return {}
        found = {}
        for process in below:
            with contextlib.suppress(psutil.Error):
                found[process.pid] = repr(process.create_time())
        return found

    def is_there(self, pid: int, started: str) -> bool:
        """As the process table shows it."""
        try:
            process = psutil.Process(pid)
            return repr(process.create_time()) == started and process.status() != psutil.STATUS_ZOMBIE
        except psutil.Error:
            return False

    def signal_exactly(self, pid: int, started: str, number: int) -> bool:
        """Look, then send: there is no pidfd."""
        try:
            if repr(psutil.Process(pid).create_time()) != started:
                return False
            os.kill(pid, number)
        except (psutil.Error, OSError):
            return False
        return True

    def dump_stacks(self) -> bool:
        """SIGUSR2. Nobody tells here whether it is caught: ask only a child that has said hello."""
        self.signal(signal.SIGUSR2)
        return True


async def wait_exit(pid: int) -> None:
    """Wait until a child of ours has exited, without reaping it. Cancellation: only the waiting ends."""
    kqueue = trio.lowlevel.current_kqueue()

    def event(flags: int) -> select.kevent:
        return select.kevent(pid, select.KQ_FILTER_PROC, flags, select.KQ_NOTE_EXIT)

    try:
        kqueue.control([event(select.KQ_EV_ADD | select.KQ_EV_ONESHOT)], 0)
    except ProcessLookupError:  # already a zombie: kqueue no longer knows it
        return

    def abort(_raise_cancel: object) -> trio.lowlevel.Abort:
        with contextlib.suppress(OSError):  # it ended this moment; an error here would end the event loop
            kqueue.control([event(select.KQ_EV_DELETE)], 0)
        return trio.lowlevel.Abort.SUCCEEDED

    await trio.lowlevel.wait_kevent(pid, select.KQ_FILTER_PROC, abort)


class Macos:
    """The backend."""

    name = "macos"

    def spawn(self, spec: ChildSpec, is_over: Callable[[], bool]) -> MacosLeash:
        """Start a child."""
        return MacosLeash(spec, is_over)

    def verdicts(self) -> dict[str, str]:
        """None: seatbelt's is the launcher's, who tries it from inside."""
        return {}

    def facts(self) -> dict[str, str]:
        """Nothing more to tell."""
        return {"platform": "macos"}
