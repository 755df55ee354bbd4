"""Lines of workers' logs as lines of ours: whose each is, which job it speaks of, and how many were lost.

A worker is somebody else's program: a line is cut, cannot break out of its line, a batch has no more than so many, and
a worker no more than so many a second, however often it comes anew: our log, and whoever reads it, is everybody's. How
many lines were lost is told less often still, and then of all together.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import NamedTuple

from coordinator.kept_lines import KeptLines

# The supervisor leaves out this logger's lines where it embeds a coordinator: they are its own.
log = logging.getLogger("coordinator.worker")

MOST_LINES = 1000  # of a batch; ours send 200
MOST_CHARS = 4000
AT_ONCE, A_SECOND = 5000, 500.0  # of a worker; ours send 200 a second, also what waited while we were away
LOST_LINES = 3, 0.1  # at once, a second: of a worker, how many of its lines were lost
MOST_LOST = 10**9  # of a batch; the sum of many is a number that JSON can say
MOST_EARS = 10_000  # names come from workers, so their number is not ours to trust
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
    """How many lines may be told: some at once, then so many a second.

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


class Ear:
    """How often one worker is heard.

    Args:
        clock: seconds, monotonic.
        lines: the pace of its lines.

    Attributes:
        lost: how many of its lines were lost and not told of yet; they are with the first batch that may tell it.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic, lines: Pace | None = None) -> None:
        self.lines, self.losses = lines or Pace(clock=clock), Pace(*LOST_LINES, clock=clock)
        self.lost = 0


class Ears:
    """The ears for all workers; of more than `most`, those that were silent for the longest are forgotten."""

    def __init__(self, most: int = MOST_EARS, clock: Callable[[], float] = time.monotonic) -> None:
        self._most, self._clock = most, clock
        self._ears: OrderedDict[str, Ear] = OrderedDict()

    def of(self, worker: str) -> Ear:
        """The ear for this worker, the same over all its sessions."""
        ear = self._ears.get(worker) or Ear(self._clock)
        self._ears[worker] = ear
        self._ears.move_to_end(worker)
        while len(self._ears) > self._most:
            self._ears.popitem(last=False)
        return ear


def tell(worker: str, lines: Iterable[Line], dropped: int = 0, *, kept: KeptLines, ear: Ear) -> None:
    """Log a batch, and how many lines were lost before it and left out of it; `kept` gets those of jobs."""
    told = iter(lines)
    shown = list(itertools.islice(told, MOST_LINES))
    if (passed := ear.lines.take(len(shown))) < len(shown):
        told = itertools.chain(shown[passed:], told)
        shown = shown[:passed]
    if lost := min(max(0, dropped), MOST_LOST) + sum(1 for _ in told):
        kept.lose(worker, lost)
        ear.lost += lost
    if ear.lost and ear.losses.take(1):
        lost, ear.lost = ear.lost, 0
        log.warning("%s: %d lines of its log were lost", worker, lost, extra={"worker": worker, "dropped": lost})
    for line in shown:
        at, message, job = line.at[:_SHORT], line.message[:MOST_CHARS], line.job[:_SHORT]
        level = _LEVELS.get(line.level.lower(), logging.INFO)
        log.log(level, "%s: %r", worker, message, extra={"worker": worker, "at": at} | ({"job": job} if job else {}))
        if job:
            kept.keep(worker, at, logging.getLevelName(level).lower(), message, job)
