"""Attempts that are declined, fail, are lost, come back, or come late."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from coordinator import attempts
from coordinator.dispatch_settings import DispatchSettings
from coordinator.records import JobChunk, JobEnded, JobRecord
from coordinator.store.base import Want
from coordinator.testing_link import CHAT, PATIENCE_S, Desk, RawWorker, Said, running_desk
from protocol import link_wire as wire
from protocol.faults import Fault, refuse

FAST = DispatchSettings(poll_s=0.05, sweep_s=0.05, worker_grace_s=0.5, startup_grace_s=0.5, repair_s=0.2)
PATIENT = msgspec.structs.replace(FAST, worker_grace_s=60.0, startup_grace_s=60.0)


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with running_desk(tmp_path, FAST) as desk:
        yield desk


@pytest.fixture
def worker(desk: Desk) -> Iterator[RawWorker]:
    with desk.worker() as worker:
        yield worker


def decline(worker: RawWorker, offer: Said, code: str, retry_after_ms: int = 0) -> None:
    worker.send(
        wire.Decline(code=code, reason=f"I am {code}.", retry_after_ms=retry_after_ms), offer.job, offer.attempt
    )


def held(*offers: Said, started: bool = True) -> tuple[wire.Held, ...]:
    return tuple(wire.Held(job=offer.job, attempt=offer.attempt, started=started) for offer in offers)


def running(desk: Desk, worker: RawWorker) -> Said:
    """An offer that the row says is running."""
    offer = worker.take()
    desk.until(lambda: desk.get(offer.job).state == "running")
    return offer


def events_of(desk: Desk, name: str) -> int:
    return desk.dispatcher.counters.events[name]


# ---- declines ----------------------------------------------------------------------------------------------


def test_a_declined_job_goes_to_another_worker_at_once(desk: Desk) -> None:
    with desk.worker("a") as first, desk.worker("b", msgspec.structs.replace(CHAT, resident=False)) as second:
        record = desk.submit(max_attempts=1)
        decline(first, first.expect(wire.Offer), "busy", retry_after_ms=30_000)
        offer = second.take()
        assert offer.job == record.id
        second.complete(offer)
        after = desk.get(record.id)
        assert (after.state, after.tries, after.worker) == ("succeeded", 1, "b")
        assert desk.dispatcher.counters.declines == {"busy": 1}


def test_a_declining_worker_is_left_alone_for_as_long_as_it_said(desk: Desk, worker: RawWorker) -> None:
    desk.submit()
    desk.submit()
    offer = worker.expect(wire.Offer)
    declined_at = time.monotonic()
    decline(worker, offer, "busy", retry_after_ms=600)
    again = worker.expect(wire.Offer)  # neither the same job nor the next one comes before
    assert time.monotonic() - declined_at >= 0.59
    assert again.attempt == (2 if again.job == offer.job else 1)


def test_declines_without_a_hint_back_off_and_never_count(desk: Desk, worker: RawWorker) -> None:
    record = desk.submit(max_attempts=1)
    for _ in range(3):
        decline(worker, worker.expect(wire.Offer), "busy")
    assert (desk.get(record.id).state, desk.get(record.id).tries) == ("queued", 0)
    worker.complete(worker.take())
    assert desk.get(record.id).state == "succeeded"


@pytest.mark.parametrize("code", ["paused", "draining"])
def test_a_worker_that_takes_nothing_is_offered_no_other_model(desk: Desk, code: str) -> None:
    other = wire.ModelOffer(name="other", kinds=("llm",), engine="e")
    with desk.worker("w1", CHAT, other) as worker:
        desk.submit()
        decline(worker, worker.expect(wire.Offer), code, retry_after_ms=30_000)
        desk.submit(model="other", wait_for_worker=True)
        assert worker.quiet()


def test_a_job_that_every_worker_refuses_for_good_fails(desk: Desk) -> None:
    with desk.worker("a") as first, desk.worker("b") as second:
        record, events = desk.follow()
        decline(first, first.expect(wire.Offer), "too_large")
        decline(second, second.expect(wire.Offer), "unsupported")
        end = events.result(PATIENCE_S)[-1]
        assert isinstance(end, JobEnded)
        assert end.record.fault is not None
        assert (end.record.id, end.record.fault.code) == (record.id, "unsupported")
        assert "I am unsupported." in end.record.fault.message


def test_a_job_that_cannot_be_placed_does_not_block_those_behind_it(desk: Desk) -> None:
    with desk.worker("big") as big, desk.worker("small", msgspec.structs.replace(CHAT, resident=False)) as small:
        busy = desk.submit()
        running(desk, big)
        large = desk.submit()
        decline(small, small.expect(wire.Offer), "too_large")
        desk.until(lambda: desk.get(large.id).state == "queued")
        behind = desk.submit()
        offer = small.take()
        assert offer.job == behind.id
        small.complete(offer)
        assert small.quiet()
        assert desk.get(busy.id).state == "running"


# ---- failures ----------------------------------------------------------------------------------------------


def test_a_retry_before_the_first_chunk_is_invisible(desk: Desk, worker: RawWorker) -> None:
    record, events = desk.follow(stream=True)
    assert worker.fail(worker.take(), "engine_crashed").verdict == "stored"
    offer = worker.take()
    assert offer.attempt == 2
    worker.chunk(offer, 0)
    worker.complete(offer)
    seen = events.result(PATIENCE_S)
    assert [event.seq for event in seen if isinstance(event, JobChunk)] == [0]
    assert isinstance(seen[-1], JobEnded)
    assert seen[-1].record.state == "succeeded"
    assert (desk.get(record.id).tries, events_of(desk, "requeued")) == (2, 1)


def test_after_the_first_chunk_no_new_attempt_starts(desk: Desk, worker: RawWorker) -> None:
    record, events = desk.follow(stream=True)
    offer = worker.take()
    worker.chunk(offer, 0)
    worker.fail(offer, "engine_crashed", streamed=True)
    end = events.result(PATIENCE_S)[-1]
    assert isinstance(end, JobEnded)
    assert end.record.fault is not None
    assert (end.record.state, end.record.fault.code) == ("failed", "engine_crashed")
    assert worker.quiet()
    assert desk.get(record.id).streamed


def test_chunks_of_a_job_that_did_not_ask_for_them_do_not_prevent_a_retry(desk: Desk, worker: RawWorker) -> None:
    record, events = desk.follow(stream=False)
    offer = worker.take()
    worker.chunk(offer, 0)
    worker.fail(offer, "engine_crashed")
    worker.complete(worker.take())
    seen = events.result(PATIENCE_S)
    assert not [event for event in seen if isinstance(event, JobChunk)]
    assert desk.get(record.id).state == "succeeded"


def test_the_callers_fault_is_final(desk: Desk, worker: RawWorker) -> None:
    record, _ = desk.follow()
    worker.fail(worker.take(start=False), "invalid_parameter")
    assert desk.ended(record.id).state == "failed"
    assert desk.get(record.id).tries == 1


def test_attempts_are_exhausted(desk: Desk, worker: RawWorker) -> None:
    record, events = desk.follow(max_attempts=2)
    for attempt in (1, 2):
        offer = worker.take()
        assert offer.attempt == attempt
        worker.fail(offer, "out_of_memory")
    end = events.result(PATIENCE_S)[-1]
    assert isinstance(end, JobEnded)
    assert end.record.fault is not None
    assert (end.record.fault.code, end.record.fault.detail["attempts"]) == ("out_of_memory", 2)
    assert not end.record.fault.may_retry
    assert desk.dispatcher.counters.faults == {("llm", "chat", "out_of_memory"): 1}
    assert record.id == end.record.id


# ---- workers that vanish -----------------------------------------------------------------------------------


def test_a_worker_that_comes_back_in_time_goes_on(tmp_path: Path) -> None:
    with running_desk(tmp_path, PATIENT) as desk:
        with desk.worker() as worker:
            record, events = desk.follow(stream=True)
            offer = worker.take()
            for seq in range(3):
                worker.chunk(offer, seq)
            desk.until(lambda: events_of(desk, "chunks") == 3)
            worker.drop()
        desk.until(lambda: desk.dispatcher.workers() == [])
        with desk.worker(held=held(offer)) as worker:
            for seq in range(1, 5):  # again from the last one it knows to be acknowledged
                worker.chunk(offer, seq)
            assert worker.complete(offer).verdict == "stored"
        seen = events.result(PATIENCE_S)
        assert [event.seq for event in seen if isinstance(event, JobChunk)] == [0, 1, 2, 3, 4]
        after = desk.get(record.id)
        assert (after.state, after.attempt, after.tries) == ("succeeded", 1, 1)
        assert events_of(desk, "adopted") == 1


def test_a_worker_that_stays_away_loses_its_job(desk: Desk) -> None:
    with desk.worker("a") as first:
        record, events = desk.follow()
        offer = running(desk, first)
        first.drop()
    with desk.worker("b") as second:
        again = second.take()
        assert (again.job, again.attempt) == (record.id, 2)
        # The first one comes back too late: fenced, whatever it says.
        with desk.worker("a", held=held(offer)) as first:
            ack = first.expect(wire.Ack)
            assert (ack.job, ack.attempt, ack.body.verdict) == (record.id, 1, "fenced")
        second.complete(again, usage={"completion_tokens": 1})
    events.result(PATIENCE_S)
    assert (desk.get(record.id).worker, desk.get(record.id).tries) == ("b", 2)
    assert (events_of(desk, "lost"), events_of(desk, "fenced")) == (1, 1)


def test_an_end_that_crosses_the_fence_is_ignored(desk: Desk) -> None:
    with desk.worker("a") as first:
        record = desk.submit()
        offer = running(desk, first)
        first.drop()
    with desk.worker("b") as second:
        again = second.take()
        with RawWorker(desk.port, "a", judge=False) as first:
            capabilities = wire.Capabilities(models=(CHAT,))
            first.send(wire.Hello(worker="a", low=1, high=1, capabilities=capabilities, held=held(offer)))
            first.expect(wire.Welcome)
            first.send(wire.Complete(), offer.job, offer.attempt)  # before it has read the acknowledgement
            assert first.expect(wire.Ack).body.verdict == "fenced"
            first.send(wire.Heartbeat(n=1))
            assert first.expect(wire.HeartbeatAck).body.n == 1
        desk.until(lambda: desk.get(record.id).state == "running")
        second.complete(again)


def test_a_lost_stream_ends_with_worker_lost(desk: Desk) -> None:
    with desk.worker() as worker:
        _, events = desk.follow(stream=True)
        offer = worker.take()
        worker.chunk(offer, 0)
        desk.until(lambda: events_of(desk, "chunks") == 1)
        worker.drop()
    end = events.result(PATIENCE_S)[-1]
    assert isinstance(end, JobEnded)
    assert end.record.fault is not None
    assert (end.record.state, end.record.fault.code) == ("failed", "worker_lost")


def test_what_a_returning_worker_does_not_hold_is_requeued_at_once(tmp_path: Path) -> None:
    with running_desk(tmp_path, PATIENT) as desk:
        with desk.worker() as worker:
            record = desk.submit()
            running(desk, worker)
            worker.drop()
        desk.until(lambda: desk.dispatcher.workers() == [])
        with desk.worker() as worker:
            offer = worker.take()
            assert (offer.job, offer.attempt) == (record.id, 2)
            worker.complete(offer)


def test_an_offer_that_was_not_answered_before_the_loss_is_not_counted(desk: Desk) -> None:
    with desk.worker("a") as first:
        record = desk.submit(max_attempts=1)
        first.expect(wire.Offer)
        first.drop()
    with desk.worker("b") as second:
        offer = second.take()
        assert (offer.job, offer.attempt) == (record.id, 2)
        second.complete(offer)
    assert desk.get(record.id).tries == 1


def test_an_accept_that_was_lost_with_the_connection(tmp_path: Path) -> None:
    with running_desk(tmp_path, PATIENT) as desk:
        with desk.worker() as worker:
            record = desk.submit()
            offer = worker.expect(wire.Offer)
            worker.drop()
        desk.until(lambda: desk.dispatcher.workers() == [])
        with desk.worker(held=held(offer, started=False)) as worker:
            assert worker.complete(offer).verdict == "stored"
        assert desk.get(record.id).state == "succeeded"


def test_a_job_cancelled_while_its_worker_was_away(tmp_path: Path) -> None:
    with running_desk(tmp_path, PATIENT) as desk:
        with desk.worker() as worker:
            record = desk.submit()
            offer = running(desk, worker)
            worker.drop()
        desk.until(lambda: desk.dispatcher.workers() == [])
        desk.call(desk.dispatcher.cancel, record.id, "default", "enough")
        with desk.worker(held=held(offer)) as worker:
            assert worker.expect(wire.Cancel).job == record.id
            assert worker.complete(offer, usage={"completion_tokens": 5}).verdict == "stored"
        assert (desk.get(record.id).state, desk.get(record.id).usage) == ("cancelled", {"completion_tokens": 5.0})


def test_an_acknowledgement_that_was_lost_is_given_again(tmp_path: Path) -> None:
    with running_desk(tmp_path, PATIENT) as desk:
        with desk.worker() as worker:
            record = desk.submit()
            offer = worker.take()
            worker.complete(offer, usage={"completion_tokens": 5})
        with desk.worker(held=held(offer)) as worker:
            ack = worker.expect(wire.Ack)
            assert (ack.job, ack.body.verdict) == (record.id, "stored")
        assert desk.dispatcher.counters.usage == {("chat", "completion_tokens"): 5.0}


def test_an_unanswered_offer_is_taken_back(tmp_path: Path) -> None:
    with running_desk(tmp_path, msgspec.structs.replace(FAST, offer_s=0.2)) as desk, desk.worker("a") as deaf:
        record = desk.submit(max_attempts=1)
        offer = deaf.expect(wire.Offer)
        assert deaf.expect(wire.Cancel).job == record.id
        desk.dispatcher.settings = FAST  # the next one that is asked may be slow
        with desk.worker("b") as second:
            again = second.take()
            second.complete(again)
        assert desk.get(record.id).state == "succeeded"
        deaf.send(wire.Accept(), offer.job, offer.attempt)
        assert deaf.fail(offer, "cancelled").verdict == "fenced"
        desk.submit()
        deaf.expect(wire.Offer)  # its slot is free again


# ---- restarts of the coordinator ---------------------------------------------------------------------------


def left_running(tmp_path: Path) -> tuple[JobRecord, Said, JobRecord]:
    """A job that runs and one that waits, in a coordinator that is gone."""
    with running_desk(tmp_path, FAST) as desk, desk.worker() as worker:
        record = desk.submit()
        offer = running(desk, worker)
        waiting = desk.submit()
    return record, offer, waiting


def test_after_a_restart_workers_keep_their_attempts(tmp_path: Path) -> None:
    record, offer, waiting = left_running(tmp_path)
    with running_desk(tmp_path, PATIENT) as desk, desk.worker(held=held(offer)) as worker:
        worker.send(wire.Progress(n=5), offer.job, offer.attempt)
        assert worker.complete(offer).verdict == "stored"
        assert desk.get(record.id).tries == 1
        second = worker.take()
        assert second.job == waiting.id
        worker.complete(second)


def test_after_a_restart_missing_workers_lose_their_attempts(tmp_path: Path) -> None:
    record, _, waiting = left_running(tmp_path)
    with running_desk(tmp_path, FAST) as desk, desk.worker("other", msgspec.structs.replace(CHAT, slots=2)) as worker:
        offers = {worker.take().job, worker.take().job}
        assert offers == {record.id, waiting.id}
        assert desk.get(record.id).attempt == 2


def test_after_a_restart_no_second_stream_starts(tmp_path: Path) -> None:
    with running_desk(tmp_path, FAST) as desk, desk.worker() as worker:
        record, _ = desk.follow(stream=True)
        offer = worker.take()
        worker.chunk(offer, 0)
        desk.until(lambda: events_of(desk, "chunks") == 1)
    with running_desk(tmp_path, FAST) as desk:
        after = desk.ended(record.id)
        assert after.fault is not None
        assert (after.state, after.fault.code) == ("failed", "worker_lost")


def test_a_stream_goes_on_with_the_same_attempt_after_a_restart(tmp_path: Path) -> None:
    with running_desk(tmp_path, FAST) as desk, desk.worker() as worker:
        record, _ = desk.follow(stream=True)
        offer = worker.take()
        worker.chunk(offer, 0)
        desk.until(lambda: events_of(desk, "chunks") == 1)
    with running_desk(tmp_path, PATIENT) as desk, desk.worker(held=held(offer)) as worker:
        worker.chunk(offer, 1)
        assert worker.complete(offer).verdict == "stored"
        assert desk.get(record.id).state == "succeeded"


def test_a_claim_whose_answer_was_lost_is_found_again(desk: Desk, worker: RawWorker) -> None:
    """The row is offered, yet no worker ever heard of it."""
    record = desk.submit(model="ghost", wait_for_worker=True)
    desk.store.claim([Want("ghost", ("llm",), 1)])
    worker.send(
        wire.Announce(
            capabilities=wire.Capabilities(models=(wire.ModelOffer(name="ghost", kinds=("llm",), engine="e"),))
        )
    )
    offer = worker.take()
    assert (offer.job, offer.attempt) == (record.id, 2)


def test_of_many_orphans_a_look_gives_up_only_some(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a transaction, and whoever takes over thousands has to do more than that."""
    looks, reconcile = threading.Semaphore(0), attempts.Attempts.reconcile

    async def counted(self: attempts.Attempts, grace_s: float) -> None:
        await reconcile(self, grace_s)
        looks.release()

    monkeypatch.setattr(attempts, "LOST_AT_ONCE", 2)
    monkeypatch.setattr(attempts.Attempts, "reconcile", counted)
    with running_desk(tmp_path, msgspec.structs.replace(FAST, sweep_s=3600.0)) as desk:
        for _ in range(2):
            assert looks.acquire(timeout=PATIENCE_S), "the looks of its start are over"
        jobs = [desk.submit(model="ghost", wait_for_worker=True) for _ in range(5)]
        assert len(desk.store.claim([Want("ghost", ("llm",), 5)])) == 5
        for given_up in (2, 4, 5, 5):
            desk.portal.call(desk.dispatcher.attempts.reconcile, 0.0)
            assert events_of(desk, "lost") == given_up
        assert {row.id for row, _ in desk.store.claim([Want("ghost", ("llm",), 9)])} == {job.id for job in jobs}


# ---- other coordinators ------------------------------------------------------------------------------------


def test_an_attempt_that_another_coordinator_ended_is_stopped(desk: Desk, worker: RawWorker) -> None:
    desk.submit()
    offer = running(desk, worker)
    desk.store.cancel(offer.job, "default", Fault("cancelled", "The client left."))  # behind the dispatcher's back
    stopped = worker.expect(wire.Cancel)
    assert (stopped.job, stopped.attempt) == (offer.job, offer.attempt)


def test_after_a_long_silence_workers_say_again_what_they_hold(tmp_path: Path) -> None:
    """Others may have taken over: who is asked is the worker, so nothing is claimed from where it has gone since."""
    with running_desk(tmp_path, msgspec.structs.replace(FAST, sweep_s=60.0)) as desk:
        with desk.worker("a") as first, desk.worker("b") as second:
            for _ in range(2):
                desk.submit()
            kept, lost = running(desk, first), running(desk, second)
            desk.store.cancel(lost.job, "default", Fault("cancelled", "The client left."))
            desk.portal.call(desk.dispatcher.attempts.hold_again)
            assert second.expect_close() == (None, 1001)
            first.complete(kept)
            assert desk.get(kept.job).state == "succeeded"
        with RawWorker(desk.port, "b") as again:
            again.hello(held=(wire.Held(lost.job, lost.attempt, True),))
            assert again.expect(wire.Cancel).job == lost.job


def test_a_full_disk_does_not_keep_a_replica_from_handing_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(_job: str, _attempt: int) -> None:
        raise refuse("storage_full", "The disk is full.")

    with running_desk(tmp_path, PATIENT) as desk, desk.worker() as worker:
        desk.submit()
        worker.expect(wire.Offer)
        with monkeypatch.context() as patched:
            patched.setattr(desk.store, "release", full)
            desk.portal.call(desk.dispatcher.attempts.take_back)
    lines = [(one.getMessage(), bool(one.exc_info)) for one in caplog.records if one.name == "coordinator.attempts"]
    why = "Open offers are not taken back; they are when this replica is gone: The disk is full."
    assert lines == [(why, False)]


def test_a_job_that_only_a_busy_worker_would_take_waits_for_it_and_is_not_claimed_meanwhile(desk: Desk) -> None:
    with desk.worker("free") as free, desk.worker("busy") as busy:
        first, second = desk.submit(), desk.submit()
        offers = {offer.job: (worker, offer) for worker in (free, busy) for offer in [worker.take()]}
        assert set(offers) == {first.id, second.id}
        wanted = desk.submit()
        mine = next(offer for worker, offer in offers.values() if worker is free)
        free.complete(mine)
        decline(free, free.expect(wire.Offer), "unsupported")
        others = [desk.submit() for _ in range(5)]
        for _ in others:  # each is a look at the queue, and so are the polls meanwhile
            offer = free.take()
            assert offer.job != wanted.id
            free.complete(offer)
        record = desk.get(wanted.id)
        assert (record.state, record.attempt) == ("queued", 1)
        busy.complete(next(offer for worker, offer in offers.values() if worker is busy))
        offer = busy.take()
        assert (offer.job, offer.attempt) == (wanted.id, 2)
        busy.complete(offer)
