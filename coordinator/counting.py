"""Counters and histograms that cannot grow without end, whatever names callers and workers think of."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Hashable, Iterator
from typing import Any, TypeVar

K = TypeVar("K", bound=Hashable)

MOST_SERIES = 1000
OTHER = "(other)"
# Seconds: from a request that only reads, to a job that runs for ten minutes.
LATENCIES_S = (0.005, 0.025, 0.1, 0.25, 1.0, 2.5, 10.0, 60.0, 600.0)
STORE_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.1, 0.5, 2.5)
LAG_S = STORE_S  # a token is here for a fraction of a millisecond, too, where nothing else is done


class Tally(Counter[K]):
    """A counter of at most `most` names; what comes after them is counted together, under `(other)`.

    Every name is a series that Prometheus keeps for weeks, and some names are made by callers.
    """

    def __init__(self, most: int = MOST_SERIES) -> None:
        super().__init__()
        self._most = most

    def __setitem__(self, name: K, count: int) -> None:
        if name not in self and len(self) >= self._most:
            other: Any = tuple(OTHER for _ in name) if isinstance(name, tuple) else OTHER
            super().__setitem__(other, self.get(other, 0) + count)
            return
        super().__setitem__(name, count)


class Histogram:
    """Observations in buckets with these upper bounds, and their sum."""

    def __init__(self, bounds: tuple[float, ...] = LATENCIES_S) -> None:
        self.bounds = bounds
        self.total = 0.0
        self._counts = [0] * (len(bounds) + 1)

    def observe(self, value: float) -> None:
        """Count one."""
        self._counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """How many there were."""
        return sum(self._counts)

    def buckets(self) -> Iterator[tuple[str, int]]:
        """(upper bound as Prometheus writes it, how many were not above it), up to all of them."""
        below = 0
        for bound, count in zip((*self.bounds, None), self._counts, strict=True):
            below += count
            yield "+Inf" if bound is None else f"{bound:g}", below


class Counters:
    """What happened since the start, for metrics. Only ever counts up.

    Attributes:
        jobs: (kind, model, outcome) -> ended jobs; outcome is a terminal state.
        faults: (kind, model, code) -> jobs that ended with this fault.
        usage: (model, key) -> sum, of jobs that succeeded or were cancelled.
        submitted: (kind, model) -> jobs.
        declines: code -> declined offers.
        stream_lag: seconds from a worker's piece of a stream to its place in the client's connection.
        events: offers, accepted, requeued, fenced, adopted, lost, offer_timeouts, chunks, sessions, …
    """

    def __init__(self) -> None:
        self.jobs: Tally[tuple[str, str, str]] = Tally()
        self.faults: Tally[tuple[str, str, str]] = Tally()
        self.usage: dict[tuple[str, str], float] = {}
        self.submitted: Tally[tuple[str, str]] = Tally()
        self.declines: Tally[str] = Tally(50)
        self.stream_lag = Histogram(LAG_S)
        self.events: Counter[str] = Counter()

    def written(self, came_at: float) -> None:
        """A piece of a stream was written to its client; `came_at` on the monotonic clock, 0 when it is not known."""
        if came_at:
            self.stream_lag.observe(time.monotonic() - came_at)

    def add_usage(self, model: str, usage: dict[str, float]) -> None:
        """Add what one job used."""
        for key, value in usage.items():
            name = (model, key) if (model, key) in self.usage or len(self.usage) < MOST_SERIES else (OTHER, OTHER)
            self.usage[name] = self.usage.get(name, 0.0) + value
