"""The contract of a store: every implementation passes these."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from coordinator.records import JobRecord, StoredFile, StoredInput, Submission
from coordinator.store import Store, StoreError
from coordinator.store.base import LEFT_BEHIND, Done, Held, Outcome, Purged, Want
from protocol.faults import Fault, FaultError

CRASH = Fault("engine_crashed", "The engine crashed.")
WRONG = Fault("invalid_parameter", "The grammar is wrong.", field="grammar")
WAIT_S = 60.0
STEP_MS = 150_000  # a quarter of the silence that makes a store of these tests one that is gone
CANCEL = Fault("cancelled", "The client left.")
DONE = Outcome(
    b"\x81\xa7content\xa2ok", (StoredFile("a.png", "j/1/x-a.png", "image/png", 3, "0" * 64),), {"images": 1.0}
)
ANY = Want("chat", ("llm",), 100)
_ids = itertools.count()


def job(store: Store, **options: Any) -> JobRecord:
    wanted = Submission(**{"kind": "llm", "model": "chat", "params": b"\x80", **options})
    return store.insert(f"job_{next(_ids):06}", wanted)[0]


def claim(store: Store, want: Want = ANY) -> list[JobRecord]:
    return [record for record, _ in store.claim([want])]


def running(store: Store, worker: str = "w1", **options: Any) -> JobRecord:
    """A job that this worker has accepted."""
    wanted = job(store, **options)
    (claimed,) = claim(store)
    assert claimed.id == wanted.id
    assert store.accept(claimed.id, claimed.attempt, worker)
    return row(store, wanted.id)


def row(store: Store, job_id: str) -> JobRecord:
    record = store.get(job_id)
    assert record is not None
    return record


# ---- submitting --------------------------------------------------------------------------------------------


def test_a_row_says_everything_that_was_submitted(store: Store) -> None:
    file = StoredInput("audio", "blob_x", 5, "f" * 64, "audio/wav")
    asked = Submission(
        kind="audio_stt",
        model="ears",
        params=b"\x81\xa1a\x01",
        inputs=(file,),
        stream=True,
        tenant="t",
        key_id="k",
        idempotency_key="once",
        priority=3,
        deadline_ms=5000,
        labels={"pool": "eu"},
        vram_gb_estimate=1.5,
        max_attempts=2,
        traceparent="00-1-2-01",
    )
    before = store.now_ms()
    made, created = store.insert("job_1", asked)
    assert created
    assert made == store.get("job_1")
    assert made.deadline_at_ms == made.created_ms + 5000
    assert before <= made.created_ms <= store.now_ms()
    unsaid = {"deadline_ms", "wait_for_worker", "attended", "weight", "cost", "key_open", "tenant_open", "asked"}
    for name in msgspec.structs.asdict(asked):
        if name not in unsaid:
            assert getattr(made, name) == getattr(asked, name), name
    assert (made.state, made.attempt, made.tries, made.result, made.fault) == ("queued", 0, 0, None, None)


def test_a_job_is_seen_by_its_tenant_alone(store: Store) -> None:
    mine = job(store, tenant="a")
    assert store.get(mine.id, "a") == mine
    assert store.get(mine.id, "b") is None
    assert store.recent("b", 10) == []
    assert store.cancel(mine.id, "b", CANCEL) is None
    assert row(store, mine.id).state == "queued"


def test_the_same_key_is_the_same_job(store: Store) -> None:
    first = job(store, idempotency_key="k")
    again, created = store.insert(
        "job_other", Submission(kind="llm", model="chat", params=b"\x80", idempotency_key="k")
    )
    assert (again.id, created) == (first.id, False)
    assert store.by_key(Submission(kind="llm", model="chat", params=b"\x80", idempotency_key="k")) == again
    assert job(store, idempotency_key="k", tenant="other").id != first.id
    assert job(store).id != job(store).id  # no key, no sameness


def test_a_key_used_for_another_request_conflicts(store: Store) -> None:
    job(store, idempotency_key="k")
    for change in (
        {"params": b"\x81\xa1a\x01"},
        {"model": "other"},
        {"inputs": (StoredInput("audio", "b", 1, "0" * 64),)},
    ):
        asked = Submission(**{"kind": "llm", "model": "chat", "params": b"\x80", "idempotency_key": "k", **change})
        for attempt in (lambda asked=asked: store.insert("job_x", asked), lambda asked=asked: store.by_key(asked)):
            with pytest.raises(FaultError) as caught:
                attempt()
            assert (caught.value.fault.code, caught.value.fault.field) == ("conflict", "idempotency_key")


def test_one_key_from_many_threads_makes_one_job(store: Store) -> None:
    asked = Submission(kind="llm", model="chat", params=b"\x80", idempotency_key="k")
    seen: list[tuple[JobRecord, bool]] = []
    threads = [threading.Thread(target=lambda n=n: seen.append(store.insert(f"job_{n}", asked))) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len({record.id for record, _ in seen}) == 1
    assert sum(created for _, created in seen) == 1


def test_videos_are_listed_in_pages(store: Store) -> None:
    kinds = ("video", "llm", "video", "image", "video", "video")
    one, _, two, _, gone, three = (job(store, kind=kind).id for kind in kinds)
    job(store, kind="video", tenant="b")
    store.cancel(gone, "default", CANCEL)

    def listed(*args: Any) -> list[str]:
        return [found.id for found in store.videos("default", *args)]

    assert listed(9) == [three, two, one]
    assert listed(9, "", True) == [one, two, three]
    assert (listed(2), listed(2, two), listed(2, one)) == ([three, two], [one], [])
    assert (listed(2, "", True), listed(1, one, True)) == ([one, two], [two])
    assert listed(2, gone) == [two, one], "what was cancelled still has its place"
    assert listed(9, "job_unknown") == listed(9, store.videos("b", 9)[0].id) == []
    assert all(found.params for found in store.videos("default", 9))


def test_recent_is_newest_first_and_light(store: Store) -> None:
    first, second, third = job(store), job(store), job(store)
    assert [one.id for one in store.recent("default", 2)] == [third.id, second.id]
    store.cancel(first.id, "default", CANCEL)
    assert [one.id for one in store.recent("default", 9, "cancelled")] == [first.id]
    (offered,) = claim(store, Want("chat", ("llm",), 1))
    assert {one.id for one in store.recent("default", 9, "queued")} == {second.id, third.id}
    assert offered.state == "queued"  # an offer is nobody's business outside
    assert all(one.params == b"" and one.result is None for one in store.recent("default", 9))
    assert store.queued() == {("llm", "chat"): 1}


# ---- claiming ----------------------------------------------------------------------------------------------


def test_claims_go_by_priority_then_age(store: Store) -> None:
    ids = [job(store, priority=priority).id for priority in (0, 5, 0, 5, -1)]
    order = [1, 3, 0, 2, 4]
    assert [record.id for record in claim(store)] == [ids[n] for n in order]


def test_claims_match_model_and_kind_and_limit(store: Store) -> None:
    chat = [job(store) for _ in range(3)]
    job(store, model="other")
    vector = job(store, kind="embedding")
    assert [r.id for r in claim(store, Want("chat", ("llm",), 2))] == [chat[0].id, chat[1].id]
    assert [r.id for r in claim(store, Want("chat", ("embedding", "rerank"), 9))] == [vector.id]
    assert [r.id for r in claim(store, Want("chat", ("llm", "embedding"), 9))] == [chat[2].id]
    assert claim(store, Want("nothing", ("llm",), 9)) == []


def test_a_want_may_be_for_jobs_that_have_waited(store: Store) -> None:
    """Those that are younger are left to others, and so are their places in the line."""
    old = job(store)
    store.shift_clock(700_000)
    young = job(store)
    patient = Want("chat", ("llm",), 9, waited_ms=600_000)
    assert [r.id for r in claim(store, patient)] == [old.id]
    assert claim(store, patient) == []
    assert [r.id for r in claim(store, Want("chat", ("llm",), 9))] == [young.id]


def test_a_clock_that_went_back_makes_no_job_young(store: Store) -> None:
    waiting = job(store)
    store.shift_clock(-3_600_000)
    assert [r.id for r in claim(store, Want("chat", ("llm",), 9, waited_ms=250))] == [waiting.id]


def test_one_that_came_after_the_look_began_has_not_waited(store: Store) -> None:
    """Its time is a little later than that of the claim; far later, it is of a clock that went back."""
    patient = Want("chat", ("llm",), 9, waited_ms=600_000)
    store.shift_clock(300_000)
    job(store)
    store.shift_clock(-300_000)
    assert claim(store, patient) == []
    store.shift_clock(-600_000)
    assert len(claim(store, patient)) == 1


def test_every_claim_mints_a_new_attempt(store: Store) -> None:
    wanted = job(store)
    for attempt in (1, 2, 3):
        (claimed,) = claim(store)
        assert (claimed.attempt, claimed.tries) == (attempt, 0)
        assert store.release(wanted.id, attempt)
        assert not store.release(wanted.id, attempt)
    assert not store.accept(wanted.id, 3, "w1")


def test_a_released_job_waits_its_delay(store: Store) -> None:
    wanted = job(store)
    claim(store)
    store.release(wanted.id, 1, delay_ms=60_000)
    assert claim(store) == []
    store.shift_clock(60_001)
    assert [record.id for record in claim(store)] == [wanted.id]


def test_a_claim_says_how_much_time_is_left(store: Store) -> None:
    job(store)
    job(store, deadline_ms=600_000)
    left = [ms for _, ms in store.claim([ANY])]
    assert left[0] == 0
    assert 500_000 < left[1] <= 600_000


def test_a_job_can_be_queued_and_claimed_at_once(store: Store) -> None:
    older, wanted = job(store), Submission(kind="llm", model="chat", params=b"\x80", idempotency_key="k")
    made, created, claimed = store.insert_and_claim("job_new", wanted, [ANY])
    assert (made.id, made.state, created) == ("job_new", "queued", True)
    assert [(record.id, record.attempt) for record, _ in claimed] == [(older.id, 1), ("job_new", 1)]
    assert {attempt.job for attempt in store.open_attempts()} == {older.id, "job_new"}
    # What exists is not made again, and then nothing is claimed.
    job(store)
    known, created, claimed = store.insert_and_claim("job_other", wanted, [ANY])
    assert (known.id, created, claimed) == ("job_new", False, [])
    with pytest.raises(FaultError, match="idempotency"):
        store.insert_and_claim("job_other", msgspec.structs.replace(wanted, params=b"\x90"), [ANY])


def test_nothing_is_claimed_twice_by_threads(store: Store) -> None:
    wanted = {job(store).id for _ in range(120)}
    seen: list[str] = []

    def work() -> None:
        while claimed := claim(store, Want("chat", ("llm",), 7)):
            seen.extend(record.id for record in claimed)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(seen) == len(set(seen)) == 120
    assert set(seen) == wanted


# ---- ending ------------------------------------------------------------------------------------------------


def test_complete_stores_result_files_and_usage_at_once(store: Store) -> None:
    wanted = running(store)
    assert (wanted.state, wanted.worker, wanted.tries) == ("running", "w1", 1)
    assert wanted.started_ms is not None
    ending = store.complete(wanted.id, 1, "w1", DONE)
    assert ending.verdict == "stored"
    assert ending.record == row(store, wanted.id)
    assert ending.record is not None
    assert (ending.record.state, ending.record.result, ending.record.files, ending.record.usage) == (
        "succeeded",
        DONE.result,
        DONE.files,
        DONE.usage,
    )
    assert ending.record.finished_ms is not None
    assert ending.record.ended


def test_a_repeated_completion_is_known_and_changes_nothing(store: Store) -> None:
    wanted = running(store)
    store.complete(wanted.id, 1, "w1", DONE)
    before = row(store, wanted.id)
    assert store.complete(wanted.id, 1, "w1", Outcome(b"\x80")).verdict == "again"
    assert row(store, wanted.id) == before


@pytest.mark.parametrize(("attempt", "worker"), [(2, "w1"), (1, "w2"), (0, "w1")])
def test_only_the_holder_of_the_attempt_ends_it(store: Store, attempt: int, worker: str) -> None:
    wanted = running(store)
    before = row(store, wanted.id)
    assert store.complete(wanted.id, attempt, worker, DONE).verdict == "fenced"
    assert store.fail(wanted.id, attempt, worker, WRONG).verdict == "fenced"
    assert not store.mark_streamed(wanted.id, attempt, worker)
    assert row(store, wanted.id) == before


def test_a_retryable_fault_requeues_with_growing_pauses(store: Store) -> None:
    wanted = running(store)
    before = time.time() * 1000
    first = store.fail(wanted.id, 1, "w1", CRASH)
    assert (first.verdict, first.requeued) == ("stored", True)
    assert first.record is not None
    assert (first.record.state, first.record.fault) == ("queued", None)
    assert first.record.run_after_ms >= before + 200
    store.shift_clock(251)
    (second,) = claim(store)
    assert (second.attempt, second.tries) == (2, 1)
    store.accept(wanted.id, 2, "w2")
    before = time.time() * 1000 + 251
    again = store.fail(wanted.id, 2, "w2", CRASH)
    assert again.record is not None
    assert again.record.run_after_ms >= before + 450
    store.shift_clock(501)
    assert [record.attempt for record in claim(store)] == [3]


def test_a_clock_that_goes_back_holds_up_no_next_try(store: Store) -> None:
    """It was an hour ahead when the machine started; what was asked to start later still does."""
    store.shift_clock(3_600_000)
    held = running(store)
    assert store.fail(held.id, 1, "w1", CRASH).requeued
    later = job(store, run_after_ms=store.now_ms() + 1000)
    store.expire(0)
    store.shift_clock(-3_600_000)
    store.expire(0)
    assert [record.id for record in claim(store)] == [held.id]
    store.shift_clock(3_602_000)
    assert [record.id for record in claim(store)] == [later.id]


def test_after_the_last_try_the_last_fault_is_kept(store: Store) -> None:
    wanted = running(store, max_attempts=2)
    store.fail(wanted.id, 1, "w1", CRASH)
    store.shift_clock(300)
    claim(store)
    store.accept(wanted.id, 2, "w1")
    ending = store.fail(wanted.id, 2, "w1", CRASH)
    assert not ending.requeued
    fault = row(store, wanted.id).fault
    assert fault is not None
    assert (fault.code, fault.detail["attempts"], fault.may_retry) == ("engine_crashed", 2, False)
    assert fault.message == f"{CRASH.message} All 2 attempts failed."


@pytest.mark.parametrize(
    ("options", "fault", "streamed"), [({}, WRONG, False), ({}, CRASH, True), ({"max_attempts": 1}, CRASH, False)]
)
def test_what_must_not_be_tried_again_fails_with_its_own_fault(
    store: Store, options: dict[str, Any], fault: Fault, streamed: bool
) -> None:
    wanted = running(store, **options)
    ending = store.fail(wanted.id, 1, "w1", fault, streamed)
    assert not ending.requeued
    assert (row(store, wanted.id).state, row(store, wanted.id).fault) == ("failed", fault)
    assert store.fail(wanted.id, 1, "w1", fault).verdict == "again"


def test_no_new_attempt_after_the_first_chunk(store: Store) -> None:
    wanted = running(store)
    assert store.mark_streamed(wanted.id, 1, "w1")
    assert not store.fail(wanted.id, 1, "w1", CRASH).requeued
    assert row(store, wanted.id).streamed
    assert not store.mark_streamed(wanted.id, 1, "w1")


def test_many_steps_at_once_are_each_judged_alone(store: Store) -> None:
    jobs = [job(store, max_attempts=1) for _ in range(5)]
    claim(store)
    names = [one.id for one in jobs]
    held = [Held(names[0], 1, "w1"), Held(names[1], 1, "w1"), Held(names[0], 1, "w1"), Held(names[2], 7, "w1")]
    assert store.accept_many([*held, Held("job_unknown", 1, "w1"), Held(names[3], 1, "w2")]) == [
        True,
        True,
        False,
        False,
        False,
        True,
    ]
    assert store.accept_many([Held(names[4], 1, "w1")]) == [True]
    store.cancel(names[4], "default", CANCEL)
    done = [
        Done(names[0], 1, "w1", DONE),
        Done(names[1], 1, "w2", DONE),
        Done(names[0], 1, "w1", Outcome(b"\x80")),
        Done(names[3], 1, "w2", Outcome(b"\x81\xa1a\x01")),
        Done(names[4], 1, "w1", DONE),
        Done(names[4], 1, "w1", DONE),
        Done("job_unknown", 1, "w1", DONE),
    ]
    endings = store.complete_many(done)
    verdicts = ["stored", "fenced", "again", "stored", "late", "again", "fenced"]
    assert [ending.verdict for ending in endings] == verdicts
    assert row(store, names[0]).result == DONE.result
    assert row(store, names[1]).state == "running"
    assert row(store, names[3]).result == b"\x81\xa1a\x01"
    assert endings[0].record == row(store, names[0])
    assert store.accept_many([]) == []
    assert store.complete_many([]) == []


# ---- cancelling --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["queued", "offered", "running"])
def test_cancel_ends_a_job_in_any_open_state(store: Store, state: str) -> None:
    wanted = job(store)
    if state != "queued":
        claim(store)
    if state == "running":
        store.accept(wanted.id, 1, "w1")
    cancelled = store.cancel(wanted.id, "default", CANCEL)
    assert cancelled is not None
    assert cancelled.won
    assert (cancelled.record.state, cancelled.record.fault) == ("cancelled", CANCEL)
    assert claim(store) == []
    assert not store.accept(wanted.id, 1, "w1")
    assert not store.release(wanted.id, 1)


@pytest.mark.parametrize("state", ["queued", "offered", "running"])
def test_jobs_whose_clients_hung_on_an_earlier_life_are_left(make: Callable[[], Store], state: str) -> None:
    before = make()
    attended, kept = job(before, attended=True), job(before)
    if state != "queued":
        claim(before)
    if state == "running":
        before.accept(attended.id, 1, "w1")
    before.close()
    store = make()
    found = store.leave_unattended(CANCEL)
    end = time.monotonic() + WAIT_S
    while not found and time.monotonic() < end:  # where others may share the database: when it was silent for a while
        store.shift_clock(STEP_MS)
        found = list(store.beat().left)
    (left,) = found
    assert (left.id, left.state) == (attended.id, "cancelled")
    assert left.fault in (CANCEL, LEFT_BEHIND)
    assert store.leave_unattended(CANCEL) == []
    assert row(store, kept.id).state in ("queued", state)  # another coordinator holds what it took over
    if state == "running":  # the worker that comes back with it is told to stop
        assert store.adopt(attended.id, 1, "w1").verdict == "cancelled"


def test_a_cancelled_job_keeps_no_result_but_its_usage_once(store: Store) -> None:
    wanted = running(store)
    store.cancel(wanted.id, "default", CANCEL)
    late = store.complete(wanted.id, 1, "w1", Outcome(b"\x80", DONE.files, {"completion_tokens": 7.0}))
    assert late.verdict == "late"
    record = row(store, wanted.id)
    assert (record.state, record.result, record.files, record.usage) == (
        "cancelled",
        None,
        (),
        {"completion_tokens": 7.0},
    )
    assert store.complete(wanted.id, 1, "w1", Outcome(b"\x80", (), {"completion_tokens": 9.0})).verdict == "again"
    assert store.fail(wanted.id, 1, "w1", CRASH).verdict == "again"
    assert row(store, wanted.id) == record


def test_the_first_terminal_state_wins(store: Store) -> None:
    done = running(store)
    store.complete(done.id, 1, "w1", DONE)
    after = store.cancel(done.id, "default", CANCEL)
    assert after is not None
    assert not after.won
    assert after.record == row(store, done.id)
    assert after.record.state == "succeeded"


def test_end_fails_an_open_attempt_without_a_retry(store: Store) -> None:
    wanted = job(store)
    assert store.end(wanted.id, 0, CRASH).verdict == "fenced"
    claim(store)
    assert store.end(wanted.id, 1, CRASH).verdict == "stored"
    assert row(store, wanted.id).state == "failed"
    assert store.end(wanted.id, 1, CRASH).verdict == "fenced"


# ---- coming back -------------------------------------------------------------------------------------------


def test_a_worker_that_comes_back_keeps_its_attempt(store: Store) -> None:
    wanted = running(store)
    adoption = store.adopt(wanted.id, 1, "w1")
    assert (adoption.verdict, adoption.record) == ("adopted", row(store, wanted.id))
    assert row(store, wanted.id).tries == 1


def test_an_accept_that_was_lost_is_made_up_for(store: Store) -> None:
    wanted = job(store)
    claim(store)
    assert store.adopt(wanted.id, 1, "w1").verdict == "adopted"
    record = row(store, wanted.id)
    assert (record.state, record.worker, record.tries) == ("running", "w1", 1)


def test_a_requeued_attempt_may_be_adopted_until_the_next_is_minted(store: Store) -> None:
    wanted = running(store)
    store.fail(wanted.id, 1, "w1", Fault("worker_lost", "gone"))
    assert store.adopt(wanted.id, 1, "w2").verdict == "fenced"
    assert store.adopt(wanted.id, 1, "w1").verdict == "adopted"
    assert claim(store) == []
    store.fail(wanted.id, 1, "w1", Fault("worker_lost", "gone"))
    store.shift_clock(60_000)
    assert [record.attempt for record in claim(store)] == [2]
    assert store.adopt(wanted.id, 1, "w1").verdict == "fenced"


def test_adoption_tells_what_became_of_the_attempt(store: Store) -> None:
    done, gone, failed = running(store), running(store), running(store)
    store.complete(done.id, 1, "w1", DONE)
    store.cancel(gone.id, "default", CANCEL)
    store.fail(failed.id, 1, "w1", WRONG)
    assert store.adopt(done.id, 1, "w1").verdict == "stored"
    assert store.adopt(done.id, 1, "w2").verdict == "fenced"
    assert store.adopt(gone.id, 1, "w1").verdict == "cancelled"
    assert store.adopt(failed.id, 1, "w1").verdict == "fenced"
    assert store.adopt("job_unknown", 1, "w1").verdict == "fenced"
    assert store.open_attempts() == []


def test_open_attempts_are_those_offered_or_running(store: Store) -> None:
    held = running(store)
    offered = job(store)
    claim(store)
    job(store)
    states = {(one.job, one.attempt): (one.state, one.worker) for one in store.open_attempts()}
    assert states == {(held.id, 1): ("running", "w1"), (offered.id, 1): ("offered", "")}


# ---- time --------------------------------------------------------------------------------------------------


def test_deadlines_end_waiting_jobs_at_once_and_running_ones_later(store: Store) -> None:
    held = running(store, deadline_ms=600_000)
    waiting, timeless = job(store, deadline_ms=600_000), job(store)
    assert store.expire(300_000) == []
    store.shift_clock(600_001)
    assert [record.id for record in claim(store)] == [timeless.id]  # not the one that is too late
    (expired,) = store.expire(300_000)
    assert expired.id == waiting.id
    assert expired.fault is not None
    assert (expired.state, expired.fault.code) == ("failed", "deadline_exceeded")
    store.shift_clock(300_000)
    assert [record.id for record in store.expire(300_000)] == [held.id]
    assert store.complete(held.id, 1, "w1", DONE).verdict == "fenced"
    assert store.expire(300_000) == []


def test_a_retry_that_would_come_too_late_is_not_made(store: Store) -> None:
    wanted = running(store, deadline_ms=600_000)
    store.shift_clock(599_800)
    assert not store.fail(wanted.id, 1, "w1", CRASH).requeued
    fault = row(store, wanted.id).fault
    assert fault is not None
    assert (fault.code, fault.detail["last"]["code"]) == ("deadline_exceeded", "engine_crashed")


def test_ended_jobs_are_purged_after_the_retention(store: Store) -> None:
    shared = StoredInput("audio", "blob_shared", 1, "0" * 64)
    own = StoredInput("image", "blob_own", 1, "0" * 64)
    old, open_job = job(store, inputs=(shared, own)), job(store, inputs=(shared,))
    store.cancel(old.id, "default", CANCEL)
    assert store.purge(600_000) == []
    store.shift_clock(600_001)
    (purged,) = store.purge(600_000)
    assert (purged.job, purged.blobs) == (old.id, ("blob_own",))
    assert store.get(old.id) is None
    assert not store.has_job(old.id)
    assert store.has_job(open_job.id)
    assert (store.has_blob("blob_own"), store.has_blob("blob_shared")) == (False, True)


def test_a_job_that_has_ended_is_removed_by_its_tenant_alone(store: Store) -> None:
    mine = running(store, inputs=(StoredInput("image", "blob_mine", 1, "0" * 64),))
    assert store.remove(mine.id, mine.tenant) is None
    store.complete(mine.id, mine.attempt, "w1", DONE)
    assert store.remove(mine.id, "other") is None
    assert store.remove(mine.id, mine.tenant) == Purged(mine.id, ("blob_mine",))
    assert store.get(mine.id) is None
    assert not store.has_blob("blob_mine")
    assert store.remove(mine.id, mine.tenant) is None


def test_everything_survives_a_restart(make: Callable[[], Store]) -> None:
    first = make()
    held = running(first)
    first.close()
    with pytest.raises(StoreError, match="closed"):
        first.get(held.id)
    with pytest.raises(StoreError, match="closed"):
        first.accept(held.id, 1, "w1")
    again = make()
    assert row(again, held.id) == held
    assert again.complete(held.id, 1, "w1", DONE).verdict == "stored"


# ---- turns -------------------------------------------------------------------------------------------------


def test_a_tenant_with_a_long_queue_does_not_make_others_wait_for_all_of_it(store: Store) -> None:
    big = [job(store, tenant="big").id for _ in range(40)]
    late = [job(store, tenant="late").id for _ in range(3)]
    one = job(store, tenant="one").id
    first = [record.id for record in claim(store, Want("chat", ("llm",), 9))]
    assert set(late) | {one} <= set(first)
    assert [name for name in first if name in big] == big[:5]  # and each tenant's own jobs stay in their order
    assert [name for name in first if name in late] == late


def test_turns_are_taken_within_a_priority_and_a_model(store: Store) -> None:
    high = [job(store, tenant="big", priority=1).id for _ in range(5)]
    job(store, tenant="big", model="other")
    low = [job(store, tenant="other").id, job(store, tenant="big").id]
    assert [record.id for record in claim(store)] == high + low


def test_a_tenant_that_was_served_is_not_in_debt(store: Store) -> None:
    for _ in range(20):
        job(store, tenant="busy")
    claim(store)
    first, second = job(store, tenant="busy"), job(store, tenant="new")
    assert [record.id for record in claim(store)] == [first.id, second.id]


# ---- beats -------------------------------------------------------------------------------------------------


def test_what_an_earlier_life_held_is_held_again(make: Callable[[], Store]) -> None:
    before = make()
    held = running(before)
    before.close()
    store = make()
    end = time.monotonic() + WAIT_S
    while not store.open_attempts() and time.monotonic() < end:
        store.shift_clock(STEP_MS)
        store.beat()
    assert [(one.job, one.state, one.worker) for one in store.open_attempts()] == [(held.id, "running", "w1")]
