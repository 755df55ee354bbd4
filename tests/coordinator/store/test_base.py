"""What a failed attempt does to its job, as one table."""

from __future__ import annotations

import pytest

from coordinator.store.base import LONGEST_BACKOFF_MS, Again, Failing, after_failure
from protocol.faults import Fault

CRASH = Fault("engine_crashed", "It crashed.")
WRONG = Fault("invalid_parameter", "It is wrong.")
FORCED = Fault("command_failed", "Exit code 42.", retryable=True)


@pytest.mark.parametrize(
    ("tries", "most", "streamed", "deadline", "fault", "expected"),
    [
        (1, 3, False, 0, CRASH, 250),
        (2, 3, False, 0, CRASH, 500),
        (1, 3, False, 0, FORCED, 250),
        (30, 99, False, 0, CRASH, LONGEST_BACKOFF_MS),
        (1, 3, False, 1251, CRASH, 250),
        (1, 3, False, 1250, CRASH, "deadline_exceeded"),
        (1, 3, False, 0, WRONG, "invalid_parameter"),
        (1, 3, True, 0, CRASH, "engine_crashed"),
        (1, 1, False, 0, CRASH, "engine_crashed"),
        (3, 3, False, 0, CRASH, "engine_crashed"),
        (3, 3, False, 0, WRONG, "invalid_parameter"),
    ],
)
def test_requeue_or_end(
    tries: int, most: int, streamed: bool, deadline: int, fault: Fault, expected: int | str
) -> None:
    decided = after_failure(Failing(tries, most, streamed, deadline), fault, now_ms=1000)
    assert (decided.code if isinstance(decided, Fault) else decided.delay_ms) == expected


def crash(**detail: object) -> Fault:
    return Fault("engine_crashed", "It crashed.", detail=detail)


def test_a_crash_under_several_jobs_costs_none_of_them_a_try_and_each_runs_again_alone() -> None:
    decided = after_failure(Failing(1, 1, False, 0), crash(suspects=4), now_ms=0)
    assert decided == Again(250, alone=True, crashes=0, spared=1)


def test_the_sparing_has_an_end() -> None:
    row = Failing(tries=6, max_attempts=1, streamed=False, deadline_at_ms=0, spared=5)
    assert isinstance(after_failure(row, crash(suspects=4), now_ms=0), Fault)


def test_the_second_crash_alone_ends_a_job_and_names_it_as_the_cause() -> None:
    first = after_failure(Failing(1, 9, False, 0), crash(alone=True), now_ms=0)
    assert first == Again(250, alone=True, crashes=1, spared=0)
    second = after_failure(Failing(2, 9, False, 0, crashes=1), crash(alone=True, signal=11), now_ms=0)
    assert isinstance(second, Fault)
    assert (second.code, second.detail["crashes"], second.detail["signal"]) == ("job_poisoned", 2, 11)
    assert "It crashed." in second.message
    assert not second.may_retry


@pytest.mark.parametrize("detail", [{"alone": "yes"}, {"alone": 1}, {"suspects": "4"}, {"suspects": 1}, {}])
def test_what_is_not_said_plainly_blames_nobody(detail: dict[str, object]) -> None:
    assert after_failure(Failing(1, 3, False, 0), crash(**detail), now_ms=0) == Again(250)


def test_only_a_crash_can_poison() -> None:
    lost = Fault("worker_lost", "It went away.", detail={"alone": True})
    assert after_failure(Failing(1, 3, False, 0, crashes=1), lost, now_ms=0) == Again(250, alone=True, crashes=1)
