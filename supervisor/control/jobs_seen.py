"""The jobs of this life: those that wait, those that run, and the latest that ended. Never what they say.

A listener: whoever watches an attempt tells it what happens, and it answers whoever asks. Of a fault it keeps the
code and whose it is; its sentence may quote what the caller wrote, and so is not kept here.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import NamedTuple

import msgspec

from protocol.faults import Fault

KEPT = 500  # ended attempts; of older ones only the numbers in the metrics are left
MOST_CHANGES = 25  # that are told one by one between two looks; further ones are counted
# What an attempt does in these phases is its own work; in the others it waits for files, a slot or a model.
_WORKS = ("run", "upload")

Key = tuple[str, int]


class JobView(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt.

    Attributes:
        state: waiting, running, ended.
        phase: accept, fetch, queue, load, run, upload; of an ended attempt where it was then.
        outcome: succeeded, failed, cancelled; "" as long as it has not ended.
        fault: code of what went wrong, `owner` whose it is; "" when nothing did.
        done, total: of what the engine counts (steps, seconds of sound); None as long as it says nothing.
        chunks: pieces of output that were streamed.
        usage: what it took, as the engine counted it (completion_tokens, …).
        accepted, started, ended: seconds since the epoch; None as long as it is not so far.
    """

    job: str
    attempt: int
    kind: str
    model: str
    state: str
    phase: str
    outcome: str = ""
    fault: str = ""
    owner: str = ""
    done: int | None = None
    total: int | None = None
    chunks: int = 0
    usage: Mapping[str, float] = {}
    accepted: float
    started: float | None = None
    ended: float | None = None


class Changes(NamedTuple):
    """What changed its state since it was asked last; `more` counts what is not among `jobs`."""

    jobs: tuple[JobView, ...] = ()
    more: int = 0


class _Job:
    """One attempt, as it goes on."""

    __slots__ = ("chunks", "code", "done", "ended", "kind", "model", "outcome", "phase", "started", "total", "usage")

    def __init__(self, kind: str, model: str) -> None:
        self.kind, self.model = kind, model
        self.phase, self.outcome, self.code = "accept", "", ""
        self.done: int | None = None
        self.total: int | None = None
        self.chunks = 0
        self.usage: Mapping[str, float] = {}
        self.started: float | None = None
        self.ended: float | None = None


class JobBook:
    """See the module. Lives on the trio thread.

    Args:
        now: seconds since the epoch.

    Attributes:
        on_change: called when an attempt was accepted, began to run, or ended; must not block.
    """

    def __init__(self, *, kept: int = KEPT, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._open: dict[Key, tuple[float, _Job]] = {}
        self._over: deque[tuple[Key, float, _Job]] = deque(maxlen=kept)
        self._totals: Counter[str] = Counter()
        self._changed: dict[Key, tuple[float, _Job]] = {}
        self._more = 0
        self.on_change: Callable[[], None] = lambda: None

    # ---- what is told of an attempt; of one that is not open nothing is taken

    def began(self, job: str, attempt: int, kind: str, model: str) -> None:
        """It was accepted."""
        self._open[job, attempt] = self._now(), _Job(kind, model)
        self._note((job, attempt))

    def entered(self, job: str, attempt: int, phase: str) -> None:
        """It went on to this phase."""
        if (found := self._open.get((job, attempt))) is None or found[1].phase == phase:
            return
        found[1].phase = phase
        found[1].done = found[1].total = None  # what a load has counted says nothing of the run
        if phase == "run" and found[1].started is None:
            found[1].started = self._now()
            self._note((job, attempt))

    def progressed(self, job: str, attempt: int, done: int, total: int | None) -> None:
        """Its engine has come so far."""
        if found := self._open.get((job, attempt)):
            found[1].done, found[1].total = done, total

    def streamed(self, job: str, attempt: int) -> None:
        """A chunk came."""
        if found := self._open.get((job, attempt)):
            found[1].chunks += 1

    def ended(self, job: str, attempt: int, outcome: str, code: str, usage: Mapping[str, float]) -> None:
        """It is over: "succeeded", "failed" or "cancelled", with the code of its fault."""
        if (found := self._open.pop((job, attempt), None)) is None:
            return
        accepted, one = found
        one.outcome, one.code, one.usage, one.ended = outcome, code, dict(usage), self._now()
        self._over.append(((job, attempt), accepted, one))
        self._totals[outcome] += 1
        self._note((job, attempt), found)

    def _note(self, key: Key, found: tuple[float, _Job] | None = None) -> None:
        if key in self._changed or len(self._changed) < MOST_CHANGES:
            self._changed[key] = found or self._open[key]
        else:
            self._more += 1
        self.on_change()

    # ---- what is asked

    def changes(self) -> Changes:
        """What changed since the last call, each attempt once, as it is now."""
        jobs = tuple(_view(key, *found) for key, found in self._changed.items())
        found, self._more = Changes(jobs, self._more), 0
        self._changed.clear()
        return found

    def all(self, *, state: str = "", model: str = "", kind: str = "", limit: int | None = None) -> list[JobView]:
        """What is open, the oldest first, then what ended, the latest first.

        Args:
            state: only those of this state or outcome.
            model, kind: only those of it.
        """
        found: list[JobView] = []
        entries = [(key, *one) for key, one in self._open.items()] + list(reversed(self._over))
        for entry in entries:
            if limit is not None and len(found) >= limit:
                break
            if (model and entry[2].model != model) or (kind and entry[2].kind != kind):
                continue
            view = _view(*entry)
            if not state or state in (view.state, view.outcome):
                found.append(view)
        return found

    def attempts(self, job: str) -> list[JobView]:
        """Every attempt of a job that is known, the latest first."""
        found = [_view(key, *one) for key, one in self._open.items() if key[0] == job]
        found += [_view(*entry) for entry in self._over if entry[0][0] == job]
        return sorted(found, key=lambda view: (view.attempt, view.accepted), reverse=True)

    def counts(self) -> dict[str, int]:
        """How many wait and run now, and how many ended in which way since the start."""
        running = sum(one.phase in _WORKS for _, one in self._open.values())
        ends = {outcome: self._totals[outcome] for outcome in ("succeeded", "failed", "cancelled")}
        return {"waiting": len(self._open) - running, "running": running, **ends}


def _view(key: Key, accepted: float, one: _Job) -> JobView:
    state = "ended" if one.outcome else "running" if one.phase in _WORKS else "waiting"
    return JobView(
        job=key[0],
        attempt=key[1],
        kind=one.kind,
        model=one.model,
        state=state,
        phase=one.phase,
        outcome=one.outcome,
        fault=one.code,
        owner=str(Fault(one.code, "").owner) if one.code else "",
        done=one.done,
        total=one.total,
        chunks=one.chunks,
        usage=one.usage,
        accepted=accepted,
        started=one.started,
        ended=one.ended,
    )
