"""Lines of workers' logs as lines of ours: whose each is, which job it speaks of, and how many were lost.

A worker is somebody else's program: a line is cut, cannot break out of its line, a batch has no more than so many, and
a session no more than so many a second: our log, and whoever reads it, is everybody's.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterable
from typing import NamedTuple

from coordinator.kept_lines import KeptLines

# The supervisor leaves out this logger's lines where it embeds a coordinator: they are its own.
log = logging.getLogger("coordinator.worker")

MOST_LINES = 1000  # of a batch; ours send 200
MOST_CHARS = 4000
AT_ONCE, A_SECOND = 5000, 500.0  # of a session; ours send 200 a second, also what waited while we were away
ODD_LINES = 20, 0.2  # at once, a second: of messages that cannot be read; /metrics counts them all
_SHORT = 128
_LEVELS = {
    "debug": logging.DEBUG,
    "warn": logging.WARNING,
    "warning": logging.WARNING,
    "error": logging.ERROR,
    "critical": logging.CRITICAL,
}


class Line(NamedTuple):
    """One line. `at` is the worker's own word for when."""

    at: str
    level: str
    message: str
    job: str = ""


class Pace:
    """How many lines one session may have told: some at once, then so many a second.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        at_once: int = AT_ONCE,
        a_second: float = A_SECOND,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most, self._a_second, self._clock = at_once, a_second, clock
        self._left, self._at = float(at_once), clock()

    def take(self, count: int) -> int:
        """How many of so many may be told now."""
        now = self._clock()
        self._left = min(float(self._most), self._left + (now - self._at) * self._a_second)
        self._at = now
        passed = min(count, int(self._left))
        self._left -= passed
        return passed


def tell(worker: str, lines: Iterable[Line], dropped: int = 0, *, kept: KeptLines, pace: Pace | None = None) -> None:
    """Log a batch, and how many lines were lost before it and left out of it; `kept` gets those of jobs."""
    told = iter(lines)
    shown = list(itertools.islice(told, MOST_LINES))
    if pace is not None and (passed := pace.take(len(shown))) < len(shown):
        told = itertools.chain(shown[passed:], told)
        shown = shown[:passed]
    lost = max(0, dropped) + sum(1 for _ in told)
    if lost:
        kept.lose(worker, lost)
        log.warning("%s: %d lines of its log were lost", worker, lost, extra={"worker": worker, "dropped": lost})
    for line in shown:
        at, message, job = line.at[:_SHORT], line.message[:MOST_CHARS], line.job[:_SHORT]
        level = _LEVELS.get(line.level.lower(), logging.INFO)
        log.log(level, "%s: %r", worker, message, extra={"worker": worker, "at": at} | ({"job": job} if job else {}))
        if job:
            kept.keep(worker, at, logging.getLevelName(level).lower(), message, job)
