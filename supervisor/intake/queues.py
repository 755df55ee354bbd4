"""Queues of the scheduler: jobs of one model by urgency, and things to look at by time. Pure; every step is log n.

Urgency is the arrival, moved earlier by priority. It never changes while a job waits, so that a heap holds it, and
since every job ages alike a low priority is overtaken for `PRIORITY_S` seconds a step and no longer.
"""

from __future__ import annotations

import heapq
from typing import Generic, TypeVar

from supervisor.intake.effects import Job

# One step of priority counts like this many seconds of waiting.
PRIORITY_S = 30.0
# A clock's heap may hold this many times set anew beside one for each thing, before they are cleared out.
STALE = 64
T = TypeVar("T")


class Waiting:
    """The jobs of one model that have not started, most urgent first."""

    __slots__ = ("_arrivals", "_heap", "_here", "_seq")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Job]] = []
        self._here: dict[str, Job] = {}
        self._arrivals = 0.0
        self._seq = 0

    def __len__(self) -> int:
        return len(self._here)

    def push(self, job: Job) -> None:
        """Add a job; its id is not in the queue."""
        self._seq += 1
        heapq.heappush(self._heap, (job.at - job.priority * PRIORITY_S, self._seq, job))
        self._here[job.id] = job
        self._arrivals += job.at

    def pop(self) -> Job:
        """Take the most urgent one out. The queue is not empty."""
        self._settle()
        job = heapq.heappop(self._heap)[2]
        self._forget(job)
        return job

    def first(self) -> Job:
        """The most urgent one, left in. The queue is not empty."""
        self._settle()
        return self._heap[0][2]

    def drop(self, job_id: str) -> bool:
        """Take a job out wherever it stands; False when it is not here."""
        job = self._here.get(job_id)
        if job is None:
            return False
        self._forget(job)
        return True

    def urgency(self) -> float:
        """Of the first job: smaller is more urgent. The queue is not empty."""
        self._settle()
        return self._heap[0][0]

    def waited(self, now: float) -> float:
        """Seconds that its jobs have waited, summed over them."""
        return len(self._here) * now - self._arrivals

    def _forget(self, job: Job) -> None:
        del self._here[job.id]
        self._arrivals = self._arrivals - job.at if self._here else 0.0

    def _settle(self) -> None:
        """Drop what was cancelled from the top: each job once, so the cost is that of its arrival."""
        heap, here = self._heap, self._here
        while here.get(heap[0][2].id) is not heap[0][2]:
            heapq.heappop(heap)


class Clock(Generic[T]):
    """Things to look at, each at one time at most; setting a new time replaces the old."""

    __slots__ = ("_heap", "_seq", "_times")

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._times: dict[T, tuple[float, int]] = {}
        self._seq = 0

    def set(self, what: T, at: float) -> None:
        """Look at `what` at `at`."""
        self._seq += 1
        self._times[what] = (at, self._seq)
        heapq.heappush(self._heap, (at, self._seq, what))
        if len(self._heap) > 2 * len(self._times) + STALE:
            # Old times leave the heap from its top, and behind one that stays there they would gather for ever.
            self._heap = [(at, seq, what) for what, (at, seq) in self._times.items()]
            heapq.heapify(self._heap)

    @property
    def size(self) -> int:
        """What it holds, old times included."""
        return len(self._heap)

    def time_of(self, what: T) -> float | None:
        """When it will be looked at; None when it will not."""
        found = self._times.get(what)
        return None if found is None else found[0]

    def unset(self, what: T) -> None:
        """Do not look at it."""
        self._times.pop(what, None)

    def next(self) -> float | None:
        """The earliest time; None when there is nothing."""
        heap, times = self._heap, self._times
        while heap and times.get(heap[0][2]) != heap[0][:2]:
            heapq.heappop(heap)
        return heap[0][0] if heap else None

    def first(self) -> T | None:
        """What comes first, left in; None when there is nothing."""
        return None if self.next() is None else self._heap[0][2]

    def pop(self, now: float) -> T | None:
        """The first thing that is due, taken out; None when none is."""
        at = self.next()
        if at is None or at > now:
            return None
        what = heapq.heappop(self._heap)[2]
        del self._times[what]
        return what
