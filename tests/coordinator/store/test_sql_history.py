"""What became of a job's attempts, and a new start for one that failed."""

from __future__ import annotations

import pytest

from coordinator.records import JobRecord, Submission
from coordinator.store import Store
from coordinator.store.base import Outcome, Want
from protocol.faults import Fault, FaultError

ANY = Want("chat", ("llm",), 100)
CRASH = Fault("engine_crashed", "The engine crashed.")
WRONG = Fault("invalid_parameter", "The grammar is wrong.")


def put(store: Store, name: str = "job_1", **options: object) -> None:
    store.insert(name, Submission(**{"kind": "llm", "model": "chat", "params": b"\x80", **options}))  # type: ignore[arg-type]


def row(store: Store, name: str = "job_1") -> JobRecord:
    record = store.get(name)
    assert record is not None
    return record


def take(store: Store, worker: str) -> int:
    """Claim and accept; the attempt."""
    ((record, _),) = store.claim([ANY])
    assert store.accept(record.id, record.attempt, worker)
    return record.attempt


def history(store: Store, name: str = "job_1") -> list[tuple[int, str, str, str]]:
    return [
        (one.n, one.worker, one.outcome, one.fault.code if one.fault else "")
        for one in store.attempts_of(row(store, name))
    ]


def test_every_attempt_is_remembered_with_its_worker_times_and_fault(store: Store) -> None:
    put(store)
    assert history(store) == []
    store.fail("job_1", take(store, "w1"), "w1", CRASH)
    assert history(store) == [(1, "w1", "failed", "engine_crashed")]
    store.shift_clock(600_000)
    (offered,) = store.claim([ANY])
    assert history(store) == [(1, "w1", "failed", "engine_crashed")], "an offer is no attempt"
    store.release("job_1", offered[0].attempt)
    assert take(store, "w2") == 3
    assert history(store)[1] == (3, "w2", "running", "")
    store.complete("job_1", 3, "w2", Outcome(b"\x80"))
    assert history(store) == [(1, "w1", "failed", "engine_crashed"), (3, "w2", "succeeded", "")]
    first, last = store.attempts_of(row(store))
    assert first.began_ms is not None
    assert first.ended_ms is not None
    assert first.began_ms <= first.ended_ms <= row(store).created_ms + 500_000
    assert last.ended_ms == row(store).finished_ms


def test_an_attempt_that_was_given_up_and_goes_on_has_not_failed(store: Store) -> None:
    put(store)
    store.fail("job_1", take(store, "w1"), "w1", Fault("worker_lost", "It went away."))
    assert store.adopt("job_1", 1, "w1").verdict == "adopted"
    assert history(store) == [(1, "w1", "running", "")]
    store.cancel("job_1", "default", Fault("cancelled", "Enough."))
    assert history(store) == [(1, "w1", "cancelled", "cancelled")]


def test_a_failed_job_starts_again_with_all_its_tries_and_its_history(store: Store) -> None:
    put(store, max_attempts=1, deadline_ms=60_000)
    store.fail("job_1", take(store, "w1"), "w1", CRASH)
    failed = row(store)
    assert (failed.state, failed.dead) == ("failed", True)
    store.shift_clock(3_600_000)
    again = store.retry("job_1", "default")
    assert again == row(store)
    assert again is not None
    assert (again.state, again.tries, again.fault, again.dead, again.finished_ms) == ("queued", 0, None, False, None)
    assert again.deadline_at_ms == pytest.approx(store.now_ms() + 60_000, abs=50_000), "its whole time again"
    assert store.complete("job_1", 1, "w1", Outcome(b"\x80")).verdict == "fenced", "the old attempt is over"
    assert take(store, "w2") == 2
    store.complete("job_1", 2, "w2", Outcome(b"\x80"))
    assert history(store) == [(1, "w1", "failed", "engine_crashed"), (2, "w2", "succeeded", "")]


def test_an_attempt_that_the_deadline_ended_is_remembered_through_a_retry(store: Store) -> None:
    put(store, deadline_ms=1000)
    take(store, "w1")
    store.shift_clock(5000)
    assert [one.id for one in store.expire(0)] == ["job_1"]
    assert history(store) == [(1, "w1", "failed", "deadline_exceeded")]
    store.retry("job_1", None)
    assert history(store) == [(1, "w1", "failed", "deadline_exceeded")]


def test_only_a_failed_job_of_the_tenants_is_tried_again(store: Store) -> None:
    put(store)
    assert store.retry("job_1", "other") is None
    assert store.retry("job_unknown", None) is None
    for end in (lambda: None, lambda: store.cancel("job_1", "default", Fault("cancelled", "Enough."))):
        end()
        with pytest.raises(FaultError, match="only one that failed") as caught:
            store.retry("job_1", "default")
        assert caught.value.fault.code == "conflict"


def test_dead_are_those_that_failed_without_their_callers_doing(store: Store) -> None:
    for name, fault in (("job_1", CRASH), ("job_2", WRONG)):
        put(store, name, max_attempts=1)
        store.fail(name, take(store, "w1"), "w1", fault)
    put(store, "job_3", deadline_ms=1)
    store.shift_clock(10)
    store.expire(0)
    put(store, "job_4")
    assert [one.id for one in store.recent("default", 9, "failed", dead=True)] == ["job_3", "job_1"]
    assert [one.id for one in store.recent("default", 9, dead=True)] == ["job_3", "job_1"]
    assert store.recent("other", 9, dead=True) == []
    store.retry("job_1", "default")
    assert [one.id for one in store.recent("default", 9, "failed", dead=True)] == ["job_3"]


def test_the_history_goes_with_its_job(store: Store) -> None:
    put(store, max_attempts=1)
    store.fail("job_1", take(store, "w1"), "w1", CRASH)
    gone = row(store)
    store.remove("job_1", "default")
    put(store)
    assert store.attempts_of(gone)[:-1] == [], "only what the old row says of itself"
    assert history(store) == []
