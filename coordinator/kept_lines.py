"""What workers' logs said of each job, kept in memory for a while: an owner asks here why a job went as it did.

The lines are those that workers ship, and ours ship no word of what callers wrote. They are on no disk and gone with
the process. The ring is bounded in bytes, and one worker that talks without end displaces its own lines first. What is
not there any more is told: since when nothing of the job was displaced, and how many lines were lost on their way.
"""

from __future__ import annotations

import sys
import time
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable

import msgspec

from coordinator.counting import Tally

MOST_BYTES = 8 * 2**20
SHARE = 4  # one worker has at most this part of them
MOST_LINES = 1000  # of one answer
MOST_CHARS = 500_000  # of one answer
MOST_MARKED = 5000  # jobs of which is known since when nothing is missing, and so many that are not kept any more
_AROUND = 700  # bytes of one line besides its texts: the objects and the three places that name it


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
        since_ms: of what was told of the job before this instant, lines may be missing.
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
        self._of: dict[str, OrderedDict[int, None]] = {}  # worker -> its lines, likewise
        self._about: dict[str, dict[int, None]] = {}  # job -> its lines, likewise
        self._bytes_of: dict[str, int] = {}
        self._lost: Tally[str] = Tally()
        self._last = 0
        self._since_ms = self._now()  # of every job
        self._marks: OrderedDict[str, int] = OrderedDict()  # job -> likewise, of those that lost lines here
        self._dropped: OrderedDict[str, None] = OrderedDict()  # jobs whose lines are not kept any more
        self.bytes = 0

    def lose(self, worker: str, count: int) -> None:
        """So many lines of this worker never came here."""
        self._lost[worker] += count

    def keep(self, worker: str, at: str, level: str, message: str, job: str) -> None:
        """Keep a line; what finds no room any more goes."""
        line = KeptLine(at, self._now(), worker, level, message, job)
        if job in self._dropped:
            return self._mark(job, line.told_ms + 1)
        self._last += 1
        self._lines[self._last] = line
        self._of.setdefault(worker, OrderedDict())[self._last] = None
        self._about.setdefault(job, {})[self._last] = None
        self._add(line, _size(line))
        while self._bytes_of.get(worker, 0) > self._most // SHARE:
            self._displace(next(iter(self._of[worker])))
        while self.bytes > self._most:
            self._displace(next(iter(self._lines)))

    def drop(self, jobs: Collection[str]) -> None:
        """Let go of all lines of these jobs; workers ship in batches: what they still tell of them is not kept."""
        now = self._now()
        for job in jobs:
            for number in list(self._about.get(job, ())):
                self._displace(number)
            self._dropped[job] = None
            self._mark(job, now + 1)
        while len(self._dropped) > MOST_MARKED:
            self._dropped.popitem(last=False)

    def of(self, job: str, worker: str = "", limit: int = MOST_LINES) -> Lines:
        """The latest lines of a job, of one worker or of all."""
        told = (self._lines[number] for number in self._about.get(job, ()))
        every = [one for one in told if worker in ("", one.worker)]
        shown, chars = list[KeptLine](), 0
        for line in reversed(every[max(0, len(every) - min(limit, MOST_LINES)) :]):
            chars += len(line.message)
            if chars > MOST_CHARS:
                break
            shown.append(line)
        shown.reverse()
        lost = {name: count for name in {one.worker for one in every} | {worker} if (count := self._lost.get(name, 0))}
        since_ms = max(self._since_ms, self._marks.get(job, 0))
        return Lines(lines=shown, more=len(every) - len(shown), since_ms=since_ms, lost=lost)

    def _displace(self, number: int) -> None:
        """Let go of a line."""
        line = self._lines.pop(number)
        self._add(line, -_size(line))
        del self._of[line.worker][number], self._about[line.job][number]
        if not self._of[line.worker]:
            del self._of[line.worker], self._bytes_of[line.worker]
        if not self._about[line.job]:
            del self._about[line.job]
        self._mark(line.job, line.told_ms + 1)

    def _mark(self, job: str, since_ms: int) -> None:
        """Lines of the job from before this instant are missing; a mark that finds no room counts for every job."""
        self._marks[job] = max(since_ms, self._marks.get(job, 0))
        self._marks.move_to_end(job)
        while len(self._marks) > MOST_MARKED:
            self._since_ms = max(self._since_ms, self._marks.popitem(last=False)[1])

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
