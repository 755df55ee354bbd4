"""`supervisor drain --wait`: how far it is, until the supervisor has ended."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING, Any

from supervisor.control.client import NotRunning, RequestFailed
from supervisor.control.commands.asking import as_json, ask
from supervisor.control.commands.layout import count, paper_of, say, until
from supervisor.errors import ExitCode

if TYPE_CHECKING:
    import psutil  # type: ignore[import-untyped]

EVERY_S = 0.5
SOON_S = 0.05
GOING_S = 30.0  # from the end of the socket to that of the process: its coordinator is ended meanwhile
MUTE_S = 60.0  # a supervisor that ends may be too busy for an answer, but not this long


def drained(arguments: argparse.Namespace, seen: Any) -> int:
    """Wait for the end of the drain that answered with `seen`; returns the exit code.

    Raises:
        RequestFailed: it gave no answer for `MUTE_S`.

    Cancellation: Ctrl-C ends the wait, not the drain.
    """
    pid, line = seen["pid"], _Line()
    process = _process(pid)
    answered = time.monotonic()
    while True:
        line.show(progress(seen))
        time.sleep(EVERY_S)
        try:
            found = ask(arguments, "GET", "/v1/status")
        except NotRunning:
            break
        except RequestFailed:
            if time.monotonic() - answered > MUTE_S:
                raise
            continue
        answered = time.monotonic()
        if found["pid"] != pid:
            break  # it has been started again
        seen = found
    if process is not None:
        _gone(process)
    line.clear()
    if arguments.json:
        say(as_json({"ended": True, "pid": pid}))
    else:
        say("The supervisor has ended." if not arguments.restart else "The supervisor has ended to be started again.")
    return int(ExitCode.STOPPED)


def progress(seen: Any) -> str:
    """One line: what is left, and until when."""
    left = f"Draining: {count(seen['jobs'], 'job')} left"
    if seen["jobs"] and seen.get("drain_until"):
        left += f", ended {until(seen['drain_until'], seen['now'], '')} at the latest"
    return left


def _process(pid: int) -> psutil.Process | None:
    """The supervisor; None when it is seen by another number here, as from a container."""
    import psutil

    try:
        return psutil.Process(pid)
    except psutil.Error:
        return None


def _gone(process: psutil.Process) -> None:
    """Wait until nothing of it runs: it closes its socket first, and holds its state folder to the end.

    A process that only waits for its parent to ask for its exit code has ended.
    """
    import psutil

    end = time.monotonic() + GOING_S
    try:
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE and time.monotonic() < end:
            time.sleep(SOON_S)
    except psutil.Error:
        return


class _Line:
    """A line on stderr that is drawn over itself on a terminal; elsewhere only what is new is written."""

    def __init__(self) -> None:
        self._tty, self._last = sys.stderr.isatty(), ""

    def show(self, text: str) -> None:
        if self._tty:
            sys.stderr.write(f"\r{text[: (paper_of(sys.stderr).width or 80) - 1]}\x1b[K")
        elif text.partition(",")[0] != self._last:
            self._last = text.partition(",")[0]
            sys.stderr.write(text + "\n")
        sys.stderr.flush()

    def clear(self) -> None:
        if self._tty:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()
