"""What counts as a worker's failure, and how long it rests: pure, with times handed in."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator import quarantine
from coordinator.quarantine import FIRST_PAUSE_S, LONGEST_PAUSE_S, Failing, Quarantine
from protocol.faults import CODES, Fault, Owner


class Tried:
    """One worker and one model; time goes on a little with every failure."""

    def __init__(self) -> None:
        self.kept = Quarantine()
        self.now = 0.0

    def fails(self, job: str, code: str = "engine_failed", *, sole: bool = False, **more: Any) -> Failing | None:
        since = more.pop("since", self.now + 0.5)
        self.now += 1.0
        return self.kept.failed("w", "m", job, Fault(code, "It broke.", detail=more), since, self.now, sole=sole)


def test_three_different_jobs_in_a_row_and_a_success_ends_the_row() -> None:
    tried = Tried()
    assert [tried.fails("a"), tried.fails("b")] == [None, None]
    assert tried.kept.succeeded("w", "m") is not None
    assert [tried.fails("a"), tried.fails("b")] == [None, None]
    resting = tried.fails("c")
    assert resting is not None
    assert (resting.until, resting.failed, resting.code) == (tried.now + FIRST_PAUSE_S, 3, "engine_failed")


def test_one_job_that_fails_again_and_again_may_be_the_one_to_blame() -> None:
    tried = Tried()
    assert [tried.fails("a") for _ in range(9)] == [None] * 9


def test_a_crash_under_several_jobs_is_one_failure() -> None:
    tried = Tried()
    crash: dict[str, Any] = {"code": "engine_crashed", "suspects": 4, "since": 0.1}
    assert [tried.fails(job, **crash) for job in "abcd"] == [None] * 4
    assert tried.kept.of("w")["m"].jobs == {"a"}
    assert tried.fails("e", "engine_crashed", suspects=2) is None
    assert tried.fails("f", "engine_crashed", alone=True) is not None


def test_the_rest_doubles_up_to_a_bound_while_the_one_job_after_it_fails() -> None:
    tried = Tried()
    pauses = []
    for n in range(12):
        if resting := tried.fails(f"j{n}"):
            pauses.append(resting.until - tried.now)
            tried.now = resting.until
    assert pauses == [min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2**n) for n in range(10)]


def test_what_ran_beside_those_that_were_counted_makes_the_rest_no_longer() -> None:
    tried = Tried()
    for job in "abc":
        tried.fails(job)
    before = tried.kept.of("w")["m"].until
    assert tried.fails("d", since=2.0) is None
    assert tried.kept.of("w")["m"].until == before


def test_only_the_engine_and_the_worker_are_to_blame_and_not_for_what_callers_choose() -> None:
    blamed = set()
    for code in CODES:
        tried = Tried()
        if any(tried.fails(job, code) for job in "abc"):
            blamed.add(code)
    assert {CODES[code].owner for code in blamed} == {Owner.ENGINE, Owner.WORKER}
    assert {"engine_failed", "engine_crashed", "out_of_memory", "load_failed", "worker_failed", "gpu_failed"} <= blamed
    innocent = {"invalid_parameter", "payload_too_large", "cancelled", "deadline_exceeded", "command_failed"}
    assert not blamed & (innocent | {"job_poisoned", "worker_lost", "worker_stopping"})
    assert not blamed & {"input_unavailable", "upload_failed"}  # the store of files is away, and for all workers


def test_the_only_worker_has_one_job_at_a_time_and_no_rest_and_later_ones_grow_by_none_of_it() -> None:
    tried = Tried()
    told = [tried.fails(f"j{n}", sole=True) for n in range(20)]
    assert [n for n, one in enumerate(told) if one is not None] == [2]
    failing = tried.kept.of("w")["m"]
    assert (failing.rests, failing.until <= tried.now, failing.failed) == (1, True, 20)
    assert tried.fails("later") is failing
    assert failing.until == tried.now + 2 * FIRST_PAUSE_S


def test_a_code_of_a_newer_worker_is_an_engines_and_is_not_repeated_in_our_words() -> None:
    tried = Tried()
    assert [tried.fails("a", "new\n"), tried.fails("b", "new\n")] == [None, None]
    resting = tried.fails("c", "new\n")
    assert resting is not None
    assert resting.code == "engine_failed"


def test_what_is_kept_of_workers_that_never_fail_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quarantine, "MOST_WORKERS", 4)
    kept = Quarantine()
    kept.failed("bad", "m", "j", Fault("engine_failed", "It broke."), 0.0, 1.0, sole=False)
    for n in range(20):
        kept.of(f"w{n}")
    assert kept.of("bad")["m"].failed == 1
    assert len(kept._workers) <= 5
