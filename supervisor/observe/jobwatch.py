"""One attempt, watched: which phase it is in, how long each took, how it ended. Feeds the numbers and the trace.

Phases follow one another, so whoever moves the attempt on says only what begins: `enter("fetch")`. A phase that an
attempt is in already is not begun again, and nothing counts after the end.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Protocol

from supervisor.observe.paces import rate_of
from supervisor.observe.tally import Tally
from supervisor.observe.tracing import PHASES, NoTracer, Span, Tracer, attributes_of, parse_traceparent

# Told a model and its work a second, after a run that succeeded and says something about its speed.
OnRate = Callable[[str, float], None]


def _nobody(_model: str, _rate: float) -> None:
    """Wants no rates."""


class Listener(Protocol):
    """Told what becomes of each attempt, on the trio thread; must not block (control/jobs_seen.py)."""

    def began(self, job: str, attempt: int, kind: str, model: str) -> None:
        """It was accepted."""

    def entered(self, job: str, attempt: int, phase: str) -> None:
        """It went on to this phase."""

    def progressed(self, job: str, attempt: int, done: int, total: int | None) -> None:
        """Its engine has come so far."""

    def streamed(self, job: str, attempt: int) -> None:
        """A chunk came."""

    def ended(self, job: str, attempt: int, outcome: str, code: str, usage: Mapping[str, float]) -> None:
        """It is over."""


class JobWatch:
    """Begins in the phase "accept".

    Args:
        listener: told of everything, if there is one.
        on_rate: see `OnRate`.
        clock_ns: since the epoch, in ns; spans need the wall clock.
    """

    def __init__(
        self,
        tally: Tally,
        tracer: Tracer,
        *,
        job: str,
        attempt: int,
        kind: str,
        model: str,
        traceparent: str = "",
        on_rate: OnRate = _nobody,
        listener: Listener | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._listener = listener
        self._tally, self._tracer, self._on_rate, self._clock_ns = tally, tracer, on_rate, clock_ns
        self._job, self._attempt, self._kind, self._model = job, attempt, kind, model
        self._parent = parse_traceparent(traceparent)
        self._began = clock_ns()
        self._phases: list[tuple[str, int]] = [("accept", self._began)]
        self._first: int | None = None
        self._latest = self._began
        self._over = False
        if listener is not None:
            listener.began(job, attempt, kind, model)

    def enter(self, phase: str) -> None:
        """The attempt goes on to this phase.

        Raises:
            ValueError: there is no such phase.
        """
        if phase not in PHASES:
            raise ValueError(f"phase must be one of {', '.join(PHASES)}, not {phase!r}")
        if not self._over and self._phases[-1][0] != phase:
            self._phases.append((phase, self._clock_ns()))
            if self._listener is not None:
                self._listener.entered(self._job, self._attempt, phase)

    def progress(self, done: int, total: int | None) -> None:
        """The engine has come so far, of what it counts."""
        if self._listener is not None and not self._over:
            self._listener.progressed(self._job, self._attempt, done, total)

    @property
    def seconds(self) -> float:
        """How long ago it began."""
        return _seconds(self._clock_ns() - self._began)

    def fetched(self, count: int) -> None:
        """So many bytes of its inputs came."""
        self._tally.transferred("in", count)

    def delivered(self, count: int) -> None:
        """So many bytes of its outputs went out."""
        self._tally.transferred("out", count)

    def output(self) -> None:
        """A chunk came."""
        if self._over:
            return
        self._latest = self._clock_ns()
        if self._listener is not None:
            self._listener.streamed(self._job, self._attempt)
        if self._first is None:
            self._first = self._latest
            self._tally.first_output(self._kind, self._model, _seconds(self._latest - self._began))

    def end(self, outcome: str, code: str = "", usage: Mapping[str, float] | None = None) -> None:
        """It is over: "succeeded", "failed" or "cancelled", with the code of its fault. Later calls change nothing."""
        if self._over:
            return
        self._over = True
        now = self._clock_ns()
        used = dict(usage or {})
        if self._listener is not None:
            self._listener.ended(self._job, self._attempt, outcome, code, used)
        ends = [*(start for _, start in self._phases[1:]), now]
        spans = []
        why = "" if outcome == "succeeded" else code or outcome
        for number, ((phase, start), end) in enumerate(zip(self._phases, ends, strict=True), 1):
            failed = why if number == len(ends) else ""
            spans.append(Span(name=phase, start_ns=start, end_ns=max(start, end), failed=failed))
            self._tally.phase(self._kind, phase, _seconds(end - start))
            if phase == "run" and outcome == "succeeded":
                self._rated(rate_of(self._kind, used, _seconds(end - start)))
        self._tally.ended(self._kind, self._model, outcome, code)
        if outcome == "succeeded":
            self._tally.used(self._model, used)
        tokens = used.get("completion_tokens", 0)
        if self._first is not None and tokens > 1:
            self._tally.token_pace(self._model, _seconds(self._latest - self._first) / (tokens - 1))
        about = attributes_of(
            job=self._job,
            attempt=self._attempt,
            kind=self._kind,
            model=self._model,
            outcome=outcome,
            fault=code,
            usage=used,
        )
        whole = Span(
            name=f"job {self._kind}",
            start_ns=self._began,
            end_ns=max(self._began, now),
            attributes=about,
            failed=why,
        )
        self._tracer.record(self._parent, whole, tuple(spans))

    def _rated(self, rate: float) -> None:
        if rate:
            self._on_rate(self._model, rate)


class Watches:
    """Makes the watch of each attempt; without arguments nothing leaves, and numbers stay in memory."""

    def __init__(
        self,
        tally: Tally | None = None,
        tracer: Tracer | None = None,
        *,
        on_rate: OnRate = _nobody,
        listener: Listener | None = None,
    ) -> None:
        self._tally, self._tracer, self._on_rate = tally or Tally(), tracer or NoTracer(), on_rate
        self._listener = listener

    def begin(self, *, job: str, attempt: int, kind: str, model: str, traceparent: str = "") -> JobWatch:
        """An offer was accepted."""
        return JobWatch(
            self._tally,
            self._tracer,
            job=job,
            attempt=attempt,
            kind=kind,
            model=model,
            traceparent=traceparent,
            on_rate=self._on_rate,
            listener=self._listener,
        )


def _seconds(nanoseconds: int) -> float:
    return max(0, nanoseconds) / 1e9
