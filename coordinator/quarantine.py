"""Workers on which job after job fails, by model: they rest for a while, and then are tried with one job at a time.

Whoever fails fastest is always the least busy: without this, one broken box would be offered every job while sound
boxes work. What counts is different jobs in a row that failed by the engine's or the worker's doing; a success ends
it. The only worker that a job could have gets one job at a time and no rest: there it would keep out those requests
whose success ends it. Each replica counts what it saw itself. Pure: times are handed in, in seconds.
"""

from __future__ import annotations

import dataclasses

from protocol.faults import CODES, Fault, Owner

FAILURES = 3  # different jobs in a row; one job that fails again and again may be the one to blame
FIRST_PAUSE_S = 15.0  # doubled each time that the one job after it fails, too
LONGEST_PAUSE_S = 600.0
MOST_WORKERS = 10_000  # names come from workers, so their number is not ours to trust
# Of the engine or the worker by the table, and yet no sign that the next job would fail there: what callers choose
# (a deadline, a command, a job that kills any engine), a store of files that is away, as it is for all workers, and a
# session that ended, which a new one begins anew.
_CALLERS = {"deadline_exceeded", "command_failed", "job_poisoned"}
_TELLS_NOTHING = frozenset(_CALLERS | {"input_unavailable", "upload_failed", "worker_stopping", "worker_lost"})


@dataclasses.dataclass
class Failing:
    """How jobs of one model have failed on one worker, since the last that did not.

    Attributes:
        jobs: those that count before it rests; at most `FAILURES` are kept.
        failed: how many attempts have failed in all.
        code: of the last fault.
        crashed_at: when an engine last crashed under several jobs at once, which is one failure and not several.
        began: when it was last told to rest.
        rests: how often it was told to rest; from then on it has one job at a time, until one succeeds.
        until: it gets no job before this.
    """

    jobs: set[str] = dataclasses.field(default_factory=set)
    failed: int = 0
    code: str = ""
    crashed_at: float | None = None
    began: float = 0.0
    rests: int = 0
    until: float = 0.0


Models = dict[str, Failing]


class Quarantine:
    """See the module."""

    def __init__(self) -> None:
        self._workers: dict[str, Models] = {}

    def of(self, worker: str) -> Models:
        """What is counted of a worker, by model; the same object for all its sessions."""
        if worker not in self._workers and len(self._workers) >= MOST_WORKERS:
            self._workers = {name: models for name, models in self._workers.items() if models}
        return self._workers.setdefault(worker, {})

    def came_again(self, worker: str) -> Models:
        """A new session of it: its owner may have mended it, so it is tried at once, with one job at a time."""
        models = self.of(worker)
        for failing in models.values():
            failing.until = 0.0
        return models

    def failed(
        self, worker: str, model: str, job: str, fault: Fault, since: float, now: float, *, sole: bool
    ) -> Failing | None:
        """An attempt failed there. Returns what is counted when the worker is to rest from now until `until`,
        or, being the only one, is to have one job at a time from now on.

        Args:
            worker, model, job: where, and which.
            fault: as the worker told it.
            since: when the attempt was offered.
            now: the same clock.
            sole: no other worker takes such jobs now: no pause, and none of those that follow is made longer by it.
        """
        if fault.owner not in (Owner.ENGINE, Owner.WORKER) or fault.code in _TELLS_NOTHING:
            return None
        one = self.of(worker).setdefault(model, Failing())
        if one.rests and since <= one.began:
            return None  # it ran beside those that were counted
        if _under_several(fault):
            if one.crashed_at is not None and since <= one.crashed_at:
                return None
            one.crashed_at = now
        one.failed += 1
        one.code = fault.code if fault.code in CODES else "engine_failed"
        if len(one.jobs) < FAILURES:
            one.jobs.add(job)
        if not one.rests and len(one.jobs) < FAILURES:
            return None
        one.began = now
        if sole:
            told, one.rests = one.rests > 0, max(one.rests, 1)
            return None if told else one
        one.rests += 1
        pause = FIRST_PAUSE_S * 2.0 ** min(one.rests - 1, 10)
        one.until = now + min(LONGEST_PAUSE_S, pause)
        return one

    def succeeded(self, worker: str, model: str) -> Failing | None:
        """An attempt succeeded there. Returns what was counted until then, if anything."""
        return self._workers.get(worker, {}).pop(model, None)


def _under_several(fault: Fault) -> bool:
    suspects = fault.detail.get("suspects")
    return isinstance(suspects, int) and suspects > 1
