"""Processes below this one: adopting them, ending them all, ending as one of them did.

For the warden of an engine and for the leash of a program that an engine runs: single-threaded programs that may fork
by hand. Linux and macOS; on macOS nobody can adopt, and only children are found.
"""

from __future__ import annotations

import os
import sys
import time

TYPE_CHECKING = False  # what start.py says of `typing`
if TYPE_CHECKING:
    import signal
    from typing import NoReturn
else:
    import _signal as signal

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR2)
_STEP_S = 0.0005
# Processes that ignore SIGKILL for this long are stuck in the kernel; waiting longer helps nobody.
SWEEP_S = 5.0


def adopt_orphans() -> None:
    """Become the parent of whoever below us loses his own; nothing where the system has no such thing."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def die_with_parent() -> None:
    """Ask for SIGKILL when the parent ends; it may have ended already, so look at it afterwards."""
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _prctl(option: int, value: int) -> None:
    if sys.platform.startswith("linux"):
        from engines.lockdown import foreign

        foreign.function("prctl")(option, value, 0, 0, 0)


def children() -> list[int]:
    """Pids of our children, adopted ones included; none where the kernel does not tell."""
    try:
        with open(f"/proc/self/task/{os.getpid()}/children") as file:
            return [int(word) for word in file.read().split()]
    except OSError:
        return []


def reap(pid: int) -> int | None:
    """Reap everything that has ended; the wait status of `pid` if it is among them."""
    found = None
    while True:
        try:
            ended, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return found
        if ended == 0:
            return found
        if ended == pid:
            found = status


def sweep(patience_s: float = SWEEP_S) -> None:
    """Kill what is below us. Killed parents hand us their children, so look until there are none."""
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        for child in children():
            try:
                os.kill(child, signal.SIGKILL)
            except (ProcessLookupError, PermissionError):
                pass
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return
        time.sleep(_STEP_S)


def let_go_of_pipes() -> None:
    """Let go of the engine's pipes: the supervisor must see their end when the engine closes them."""
    null = os.open(os.devnull, os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)


def pass_on(pid: int) -> None:
    """Signals that are meant for the engine `pid` and reach only us go on to it."""

    def forward(number: int, _frame: object) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            pass

    for number in PASSED_ON:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, PASSED_ON)


def end_like(status: int) -> NoReturn:
    """End as the process with this wait status did: the same exit code or the same signal."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {number})
        os.kill(os.getpid(), number)
        time.sleep(1.0)
        os._exit(128 + number)  # a signal that does not kill
    os._exit(os.WEXITSTATUS(status))
