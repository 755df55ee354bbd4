"""The log level, and changing it for a while in a running supervisor.

A level "for ten minutes" needs no timer: the root logger lets through what either of the two levels wants, and each
line asks the clock which one is in force.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

LEVELS = ("debug", "info", "warning", "error")
# Libraries that tell of every request at INFO; theirs is our DEBUG.
CHATTY = ("httpx", "httpcore", "trio-websocket", "urllib3", "sentry_sdk", "opentelemetry")


class Levels:
    """The level of the process.

    Args:
        level: one of `LEVELS`.
        clock: seconds, monotonic.
    """

    def __init__(self, level: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lasting = _number(level)
        self._passing: int | None = None
        self._until = 0.0
        self._apply()

    @property
    def now(self) -> str:
        """The level in force."""
        return logging.getLevelName(self._in_force()).lower()

    def set(self, level: str, for_s: float | None = None) -> None:
        """Change it, for good or for a while; a change for good ends one for a while.

        Raises:
            ValueError: there is no such level, or `for_s` is not above 0.
        """
        number = _number(level)
        if for_s is None:
            self._lasting, self._passing = number, None
        elif for_s > 0:
            self._passing, self._until = number, self._clock() + for_s
        else:
            raise ValueError(f"for_s must be above 0, not {for_s:g}")
        self._apply()

    def admits(self, record: logging.LogRecord) -> bool:
        """Whether the record passes now."""
        force = self._in_force()
        if force > logging.DEBUG and record.levelno < logging.WARNING and record.name.split(".")[0] in CHATTY:
            return False
        return record.levelno >= force

    def _in_force(self) -> int:
        if self._passing is not None and self._clock() >= self._until:
            self._passing = None
            self._apply()
        return self._lasting if self._passing is None else self._passing

    def _apply(self) -> None:
        """What loggers ask before they make a record at all."""
        least = self._lasting if self._passing is None else min(self._lasting, self._passing)
        logging.getLogger().setLevel(least)
        for name in CHATTY:
            logging.getLogger(name).setLevel(logging.DEBUG if least == logging.DEBUG else logging.WARNING)


def _number(level: str) -> int:
    if level not in LEVELS:
        raise ValueError(f"level must be one of {', '.join(LEVELS)}, not {level!r}")
    number: int = getattr(logging, level.upper())
    return number
