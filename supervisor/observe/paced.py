"""Lines that a peer can cause as often as it likes: some at once, then a count, so that the log stays readable.

The sinks hold back a line that is the same again; these are never the same, because they quote the peer.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import trio

AT_ONCE = 20
EVERY_S = 10.0
QUOTED_CHARS = 500  # of what a peer says, in one line


class Paced:
    """See the module; for one kind of line each.

    Args:
        log: where to.
        what: what is counted, in the plural: "orders".
        clock: seconds, monotonic.
    """

    def __init__(self, log: logging.Logger, what: str, clock: Callable[[], float] = trio.current_time) -> None:
        self._log, self._what, self._clock = log, what, clock
        self._began, self._passed, self._left_out = float("-inf"), 0, 0

    def say(self, level: int, text: str, *values: object, extra: Mapping[str, object] | None = None) -> None:
        """Say it, or count it."""
        now = self._clock()
        if now - self._began >= EVERY_S:
            self.flush()
            self._began, self._passed = now, 0
        if self._passed < AT_ONCE:
            self._passed += 1
            self._log.log(level, text, *values, extra=extra)
        else:
            self._left_out += 1

    def flush(self) -> None:
        """Say how many were left out, if any were."""
        if self._left_out:
            self._log.warning("%d more %s in %g s or more were left out here", self._left_out, self._what, EVERY_S)
        self._left_out = 0
