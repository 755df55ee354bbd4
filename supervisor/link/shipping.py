"""Log lines for the coordinator: what the ring has, a batch a second, never in the way of jobs.

Lines wait in the ring while the coordinator is away; the ring is bounded, and what it has lost by the next session is
told as a number. Only lines about a job, and warnings, go out at all: the rest is the owner's.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable

import trio

from protocol import link_wire as wire
from supervisor.observe.ring import Entry, Ring

EVERY_S = 1.0
MOST_LINES = 200  # in one batch
MOST_CHARS = 2000  # of one line
_SHIPPED = frozenset({"warning", "error", "critical"})


class Shipping:
    """See the module.

    Args:
        post: sends when there is a session; returns whether there was one.
    """

    def __init__(self, ring: Ring, post: Callable[[wire.Body], bool]) -> None:
        self._ring, self._post = ring, post
        self._seen = ring.last

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._ring.wait_after(self._seen)
            self.ship()
            await trio.sleep(EVERY_S)

    def ship(self) -> None:
        """One batch of what came since the last; it stays in the ring when nobody is there to take it."""
        entries = self._ring.since(self._seen)
        if not entries:
            return
        wanted = [entry for entry in entries if entry.job or entry.level in _SHIPPED]
        dropped = max(0, entries[0].seq - self._seen - 1) + max(0, len(wanted) - MOST_LINES)
        lines = tuple(_line(entry) for entry in wanted[-MOST_LINES:])
        if (lines or dropped) and not self._post(wire.LogBatch(lines=lines, dropped=dropped)):
            return
        self._seen = entries[-1].seq


def _line(entry: Entry) -> wire.LogLine:
    when = datetime.datetime.fromtimestamp(entry.time, datetime.UTC)
    text = entry.message if len(entry.message) <= MOST_CHARS else f"{entry.message[: MOST_CHARS - 1]}…"
    return wire.LogLine(
        ts=when.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
        level=entry.level,
        message=f"{entry.logger}: {text}",
        job=entry.job,
    )
