from __future__ import annotations

import pytest

from supervisor.observe.jobwatch import JobWatch, Watches
from supervisor.observe.tally import Tally
from supervisor.observe.tracing import Parent, Span

TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
S = 10**9


class Recorded:
    def __init__(self) -> None:
        self.jobs: list[tuple[Parent | None, Span, tuple[Span, ...]]] = []

    def record(self, parent: Parent | None, job: Span, phases: tuple[Span, ...]) -> None:
        self.jobs.append((parent, job, phases))

    def close(self) -> None:
        pass


class Clock:
    now = 1000 * S

    def __call__(self) -> int:
        return self.now


def begun(kind: str = "llm") -> tuple[JobWatch, Tally, Recorded, Clock]:
    tally, tracer, clock = Tally(), Recorded(), Clock()
    watch = JobWatch(tally, tracer, job="j", attempt=2, kind=kind, model="m", traceparent=TRACEPARENT, clock_ns=clock)
    return watch, tally, tracer, clock


def test_a_whole_job_in_phases_numbers_and_spans() -> None:
    watch, tally, tracer, clock = begun()
    for phase in ("fetch", "queue", "load", "load", "run"):
        clock.now += S
        watch.enter(phase)
    for _ in range(5):
        clock.now += S
        watch.output()
    watch.enter("upload")
    clock.now += S
    watch.end("succeeded", usage={"prompt_tokens": 9, "completion_tokens": 5})
    [(parent, job, phases)] = tracer.jobs
    assert parent == Parent(0x0AF7651916CD43DD8448EB211C80319C, 0xB7AD6B7169203331, True)
    assert job.name == "job llm"
    assert job.end_ns - job.start_ns == 11 * S
    assert job.attributes["gen_ai.usage.output_tokens"] == 5
    # A phase that was entered already goes on: "load" was said twice.
    assert [(span.name, (span.end_ns - span.start_ns) // S) for span in phases] == [
        ("accept", 1), ("fetch", 1), ("queue", 1), ("load", 2), ("run", 5), ("upload", 1),
    ]  # fmt: skip
    assert [span.start_ns for span in phases[1:]] == [span.end_ns for span in phases[:-1]]
    lines = tally.lines()
    assert 'bulkhead_time_to_first_token_seconds_sum{kind="llm",model="m"} 6' in lines
    assert 'bulkhead_time_per_output_token_seconds_sum{model="m"} 1' in lines
    assert 'bulkhead_tokens_total{model="m",direction="input"} 9' in lines
    assert 'bulkhead_jobs_total{kind="llm",model="m",outcome="succeeded"} 1' in lines
    assert 'bulkhead_job_duration_seconds_sum{kind="llm",phase="run"} 5' in lines


def test_a_failure_marks_the_phase_that_it_came_in() -> None:
    watch, tally, tracer, _clock = begun()
    watch.enter("fetch")
    watch.end("failed", "engine_hung", {"completion_tokens": 3})
    [(_parent, job, phases)] = tracer.jobs
    assert [span.failed for span in phases] == ["", "engine_hung"]
    assert job.failed == "engine_hung"
    assert job.attributes["error.type"] == "engine_hung"
    assert not [line for line in tally.lines() if "tokens_total" in line]
    assert 'bulkhead_job_faults_total{kind="llm",model="m",code="engine_hung"} 1' in tally.lines()


def test_nothing_counts_after_the_end() -> None:
    watch, tally, tracer, clock = begun()
    watch.end("cancelled")
    before = [line for line in tally.lines() if "jobs" in line or "job_" in line]
    clock.now += S
    watch.enter("run")
    watch.output()
    watch.end("succeeded")
    assert [line for line in tally.lines() if "jobs" in line or "job_" in line] == before
    assert len(tracer.jobs) == 1


def test_a_wall_clock_that_jumps_back_makes_no_negative_time() -> None:
    watch, tally, tracer, clock = begun()
    clock.now -= 500 * S
    watch.enter("run")
    watch.output()
    watch.end("succeeded")
    [(_parent, job, phases)] = tracer.jobs
    assert all(span.end_ns >= span.start_ns for span in (job, *phases))
    assert not [line for line in tally.lines() if re_negative(line)]


def re_negative(line: str) -> bool:
    return not line.startswith("#") and " -" in line


def test_a_phase_that_does_not_exist_is_refused() -> None:
    watch, *_ = begun()
    with pytest.raises(ValueError, match="phase must be one of accept, fetch"):
        watch.enter("lunch")


def test_watches_share_one_tally() -> None:
    tally = Tally()
    watches = Watches(tally)
    for n in range(3):
        watches.begin(job=f"j{n}", attempt=1, kind="llm", model="m").end("succeeded")
    assert 'bulkhead_jobs_total{kind="llm",model="m",outcome="succeeded"} 3' in tally.lines()


def test_bytes_and_the_rate_of_a_run_are_passed_on() -> None:
    rates: list[tuple[str, float]] = []
    clock, tally = Clock(), Tally()
    for outcome in ("succeeded", "failed"):
        watch = JobWatch(
            tally, Recorded(), job="j", attempt=1, kind="llm", model="m",
            on_rate=lambda model, rate: rates.append((model, rate)), clock_ns=clock,
        )  # fmt: skip
        watch.fetched(3)
        watch.delivered(4)
        for phase in ("load", "run", "upload"):
            clock.now += 2 * S
            watch.enter(phase)
        assert watch.seconds == 6
        clock.now += 100 * S
        watch.end(outcome, "" if outcome == "succeeded" else "engine_hung", {"completion_tokens": 100})
    assert rates == [("m", 50.0)], "neither load nor upload count, nor does what failed"
    assert 'bulkhead_transfer_bytes_total{direction="in"} 6' in tally.lines()
    assert 'bulkhead_transfer_bytes_total{direction="out"} 8' in tally.lines()
