"""Messages that wait to be sent: one line for each attempt, served in turn.

Order matters only within an attempt. In a single line, one engine that talks faster than the link can carry would
hold up the results of all others, and the heartbeats, by as much as it is ahead.
"""

from __future__ import annotations

import collections

from protocol.link_wire import Body, Chunk, Progress

Item = tuple[Body, str, int]
_BOUND = (Chunk, Progress)


class Turns:
    """See the module. What speaks of the session as a whole has a line of its own."""

    def __init__(self) -> None:
        self._lines: collections.OrderedDict[tuple[str, int], collections.deque[Body]] = collections.OrderedDict()
        self._plain = 0

    def __bool__(self) -> bool:
        return bool(self._lines)

    @property
    def plain(self) -> int:
        """How many wait that no claim has a bound for: all but the chunks and the progress of runs."""
        return self._plain

    def put(self, body: Body, job: str, attempt: int) -> None:
        """Join the line of this attempt."""
        self._lines.setdefault((job, attempt), collections.deque()).append(body)
        self._plain += not isinstance(body, _BOUND)

    def take(self) -> Item:
        """The next message. Raises KeyError when there is none."""
        (job, attempt), line = self._lines.popitem(last=False)
        body = line.popleft()
        self._plain -= not isinstance(body, _BOUND)
        if line:
            self._lines[job, attempt] = line  # behind all others
        return body, job, attempt

    def drop(self, job: str, attempt: int) -> None:
        """Nobody wants what waits for this attempt any more."""
        line = self._lines.pop((job, attempt), ())
        self._plain -= sum(not isinstance(body, _BOUND) for body in line)
