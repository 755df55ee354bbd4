"""What workers' logs said of each job, kept in memory for a while: an owner asks here why a job went as it did.

The lines are those that workers ship, and ours ship no word of what callers wrote. They are on no disk and gone with
the process. The ring is bounded in bytes, and one worker that talks without end displaces its own lines first. What is
not there any more is told: since when nothing was displaced, and how many lines were lost on their way.
"""

from __future__ import annotations

import sys
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable

import msgspec

from coordinator.counting import Tally

MOST_BYTES = 8 * 2**20
SHARE = 4  # one worker has at most this part of them
MOST_LINES = 1000  # of one answer
MOST_CHARS = 500_000  # of one answer
_AROUND = 400  # bytes of one line besides its texts: the objects and the two places that name it


class KeptLine(msgspec.Struct, frozen=True):
    """One line of a worker's log.

    Attributes:
        at: when, in the worker's own words.
        told_ms: when it came here, milliseconds since the epoch.
        level: debug, info, warning, error, critical.
    """

    at: str
    told_ms: int
    worker: str
    level: str
    message: str
    job: str


class Lines(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a job.

    Attributes:
        lines: the latest, the oldest of them first.
        more: how many older ones are kept as well.
        since_ms: of what was told before this instant, lines may be missing.
        lost: worker -> lines, of whatever job, that it lost before they came here.
    """

    lines: list[KeptLine] = []
    more: int = 0
    since_ms: int = 0
    lost: dict[str, int] = {}


class KeptLines:
    """See the module. Not thread-safe: everything happens on the event loop.

    Args:
        most_bytes: of memory, about.
        clock: seconds since the epoch.
    """

    def __init__(self, most_bytes: int = MOST_BYTES, clock: Callable[[], float] = time.time) -> None:
        self._most, self._clock = most_bytes, clock
        self._lines: OrderedDict[int, KeptLine] = OrderedDict()  # in the order in which they came
        self._of: dict[str, deque[int]] = {}  # worker -> its lines, likewise
        self._bytes_of: dict[str, int] = {}
        self._lost: Tally[str] = Tally()
        self._last = 0
        self._since_ms = self._now()
        self.bytes = 0

    def lose(self, worker: str, count: int) -> None:
        """So many lines of this worker never came here."""
        self._lost[worker] += count

    def keep(self, worker: str, at: str, level: str, message: str, job: str) -> None:
        """Keep a line; what finds no room any more goes."""
        line = KeptLine(at, self._now(), worker, level, message, job)
        self._last += 1
        self._lines[self._last] = line
        self._of.setdefault(worker, deque()).append(self._last)
        self._add(line, _size(line))
        while self._bytes_of.get(worker, 0) > self._most // SHARE:
            self._displace(self._of[worker][0])
        while self.bytes > self._most:
            self._displace(next(iter(self._lines)))

    def of(self, job: str, worker: str = "", limit: int = MOST_LINES) -> Lines:
        """The latest lines of a job, of one worker or of all."""
        every = [one for one in self._lines.values() if one.job == job and worker in ("", one.worker)]
        shown, chars = list[KeptLine](), 0
        for line in reversed(every[-min(limit, MOST_LINES) :]):
            chars += len(line.message)
            if chars > MOST_CHARS:
                break
            shown.append(line)
        shown.reverse()
        lost = {name: count for name in {one.worker for one in every} | {worker} if (count := self._lost.get(name, 0))}
        return Lines(lines=shown, more=len(every) - len(shown), since_ms=self._since_ms, lost=lost)

    def _displace(self, number: int) -> None:
        """Let go of the oldest line of its worker."""
        line = self._lines.pop(number)
        numbers = self._of[line.worker]
        numbers.popleft()
        self._add(line, -_size(line))
        if not numbers:
            del self._of[line.worker], self._bytes_of[line.worker]
        self._since_ms = max(self._since_ms, line.told_ms + 1)

    def _add(self, line: KeptLine, size: int) -> None:
        self.bytes += size
        self._bytes_of[line.worker] = self._bytes_of.get(line.worker, 0) + size

    def _now(self) -> int:
        return int(self._clock() * 1000)


def merged(found: Iterable[Lines], limit: int) -> Lines:
    """What several replicas know, as one: an attempt that moved has told its lines to both."""
    known = list(found)
    lines = sorted((line for one in known for line in one.lines), key=lambda line: line.told_ms)
    lost: dict[str, int] = {}
    for one in known:
        for name, count in one.lost.items():
            lost[name] = lost.get(name, 0) + count
    cut = max(0, len(lines) - limit)
    since_ms = max((one.since_ms for one in known), default=0)
    return Lines(lines=lines[cut:], more=cut + sum(one.more for one in known), since_ms=since_ms, lost=lost)


def _size(line: KeptLine) -> int:
    return _AROUND + sys.getsizeof(line.message) + sys.getsizeof(line.at) + sys.getsizeof(line.job)
