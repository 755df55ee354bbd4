"""Lines of workers' logs as lines of ours: whose each is, which job it speaks of, and how many were lost.

A worker is somebody else's program: a line is cut, cannot break out of its line, and a batch has no more than so many.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterable
from typing import NamedTuple

from coordinator.kept_lines import KeptLines

# The supervisor leaves out this logger's lines where it embeds a coordinator: they are its own.
log = logging.getLogger("coordinator.worker")

MOST_LINES = 1000  # of a batch; ours send 200
MOST_CHARS = 4000
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


def tell(worker: str, lines: Iterable[Line], dropped: int = 0, *, kept: KeptLines) -> None:
    """Log a batch, and how many lines were lost before it and left out of it; `kept` gets those of jobs."""
    told = iter(lines)
    shown = list(itertools.islice(told, MOST_LINES))
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
