"""Which workers a job is not offered, and which come last for it: those that declined it, or on which it failed.

Kept per replica. A job that ended elsewhere is told to nobody here, so what has not been touched for a while is let go.
Pure: times are handed in, in seconds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from types import MappingProxyType

FIRST_PAUSE_S = 0.25  # doubled with every decline of the same job, because most declines say "busy"
LONGEST_PAUSE_S = 10.0
LONGEST_ASKED_S = 60.0  # that a worker may ask for
KEPT_S = 600.0  # at least so long, and at most twice as long, after the last time that something was noted of a job
MOST_TOLD = 100  # jobs of one worker that the other replicas are told of
_NONE: Mapping[str, float] = MappingProxyType({})


class Refusals:
    """See the module."""

    def __init__(self) -> None:
        self._avoid: dict[str, dict[str, float]] = {}  # job -> worker -> until
        self._avoiding: dict[str, dict[str, float]] = {}  # the same: worker -> job -> until
        self._shunned: dict[str, set[str]] = {}  # job -> workers on which it has failed
        self._refused: dict[str, set[str]] = {}  # job -> workers that will never take it; the latest last
        self._declined: Counter[str] = Counter()  # job -> declines
        self._lately: set[str] = set()
        self._before: set[str] = set()
        self._look_at = 0.0

    def avoid(self, job: str, worker: str, until: float) -> None:
        """Do not offer the job to this worker before `until`."""
        self._lately.add(job)
        self._avoid.setdefault(job, {})[worker] = until
        self._avoiding.setdefault(worker, {})[job] = until

    def shun(self, job: str, worker: str) -> None:
        """Prefer any other worker for this job, because it failed on this one."""
        self._lately.add(job)
        self._shunned.setdefault(job, set()).add(worker)

    def refuse(self, job: str, worker: str) -> None:
        """The worker will never take this job."""
        self._lately.add(job)
        self._refused[job] = self._refused.pop(job, set()) | {worker}

    def declined(self, job: str, retry_after_ms: int = 0) -> float:
        """Count a decline; for how many seconds its worker is not asked again, by its own word if it said one."""
        self._lately.add(job)
        before = min(self._declined[job], 10)
        self._declined[job] += 1
        if retry_after_ms > 0:
            return min(LONGEST_ASKED_S, retry_after_ms / 1000)
        return min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0**before)

    def avoided(self, job: str) -> Mapping[str, float]:
        """Worker -> until, for a job."""
        return self._avoid.get(job, _NONE)

    def shunned(self, job: str) -> Collection[str]:
        """Workers on which the job has failed."""
        return self._shunned.get(job, ())

    def refused(self, job: str) -> Collection[str]:
        """Workers that will never take the job."""
        return self._refused.get(job, ())

    def refused_by(self, worker: str) -> tuple[str, ...]:
        """Jobs that this worker will never take, for the other replicas; of many the latest."""
        found = [job for job, workers in self._refused.items() if worker in workers]
        return tuple(found[-MOST_TOLD:])

    def by_worker(self) -> dict[str, list[str]]:
        """The same of all workers."""
        found: dict[str, list[str]] = {}
        for job, workers in self._refused.items():
            for worker in workers:
                found.setdefault(worker, []).append(job)
        return {worker: jobs[-MOST_TOLD:] for worker, jobs in found.items()}

    def avoided_by_all(self, workers: Iterable[str], now: float) -> tuple[str, ...]:
        """Jobs that none of these workers is to be offered now. Asked at each look at free slots, so it looks at those
        of the worker with the fewest alone."""
        of_each = []
        for worker in workers:
            if worker not in self._avoiding:
                return ()
            of_each.append(self._avoiding[worker])
        fewest, *others = sorted(of_each, key=len)
        found = [job for job, until in fewest.items() if until > now]
        for jobs in others:
            found = [job for job in found if jobs.get(job, 0.0) > now]
        return tuple(found)

    def forget(self, job: str) -> None:
        """The job has ended."""
        for worker in self._avoid.pop(job, ()):
            jobs = self._avoiding[worker]
            del jobs[job]
            if not jobs:
                del self._avoiding[worker]
        for kept in (self._shunned, self._refused, self._declined):
            kept.pop(job, None)
        self._lately.discard(job)
        self._before.discard(job)

    def tidy(self, now: float) -> None:
        """Let go of jobs of which nothing was noted for `KEPT_S`: they ended elsewhere, or can be asked about again."""
        if now < self._look_at:
            return
        for job in self._before - self._lately:
            self.forget(job)
        self._before, self._lately, self._look_at = self._lately, set(), now + KEPT_S
