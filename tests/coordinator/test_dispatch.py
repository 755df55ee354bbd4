"""Submitting, watching, offering: the dispatcher over a real store and real workers' WebSockets."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import anyio
import msgspec
import pytest

from coordinator.blobs.folder import FolderBlobs
from coordinator.bus import LocalBus
from coordinator.dispatch import Dispatcher
from coordinator.dispatch_settings import DispatchSettings
from coordinator.records import JobChunk, JobEnded, JobProgress, JobStarted, StoredInput
from coordinator.store import SqliteStore
from coordinator.store.base import Beat, Claimed, Want
from coordinator.submitting import MAX_PARAMS_BYTES
from coordinator.testing_link import CHAT, PATIENCE_S, Desk, RawWorker, Said, pieces, running_desk, submission
from protocol import link_wire as wire
from protocol.faults import Fault, FaultError

FAST = DispatchSettings(poll_s=0.05, sweep_s=0.05, worker_grace_s=0.5, startup_grace_s=0.5, repair_s=0.2)

DONE = msgspec.Raw(msgspec.msgpack.encode({"content": "done"}))
TOOL = wire.ModelOffer(name="tool", kinds=("x-tool",), engine="e")  # its jobs have files


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with running_desk(tmp_path, FAST) as desk:
        yield desk


@pytest.fixture
def worker(desk: Desk) -> Iterator[RawWorker]:
    with desk.worker() as worker:
        yield worker


@contextlib.contextmanager
def refused(code: str) -> Iterator[pytest.ExceptionInfo[FaultError]]:
    with pytest.raises(FaultError) as caught:
        yield caught
    assert caught.value.fault.code == code


# ---- one job -----------------------------------------------------------------------------------------------


def test_a_job_goes_out_and_its_answer_comes_back(desk: Desk, worker: RawWorker) -> None:
    worker.send(wire.Announce(capabilities=wire.Capabilities(models=(CHAT,), labels={"a": "b"})))
    record, events = desk.follow(
        wait_for_worker=True, stream=True, labels={"a": "b"}, tenant="t", priority=2, traceparent="tp"
    )
    assert (record.state, record.attempt) == ("queued", 0)
    offer = worker.take()
    assert (offer.job, offer.attempt) == (record.id, 1)
    assert (offer.body.kind, offer.body.model, offer.body.stream) == ("llm", "chat", True)
    assert (offer.body.labels, offer.body.tenant, offer.body.priority) == ({"a": "b"}, "t", 2)
    assert (offer.body.traceparent, offer.body.deadline_ms) == ("tp", 0)
    assert bytes(offer.body.params) == record.params
    worker.send(wire.Progress(n=1, total=9, phase="prefill", text="…"), offer.job, offer.attempt)
    for seq in range(3):
        worker.chunk(offer, seq)
    assert worker.complete(offer, usage={"completion_tokens": 3}).verdict == "stored"
    started, progress, *chunks, end = events.result(PATIENCE_S)
    assert started == JobStarted()
    assert progress == JobProgress(1, 9, "prefill", "…")
    assert [(chunk.seq, msgspec.msgpack.decode(chunk.data)) for chunk in chunks if isinstance(chunk, JobChunk)] == [
        (seq, {"delta": {"content": f"w{seq}"}}) for seq in range(3)
    ]
    assert end == JobEnded(desk.get(record.id), chunks=3)
    assert isinstance(end, JobEnded)
    assert (end.record.state, end.record.usage, end.record.worker) == ("succeeded", {"completion_tokens": 3.0}, "w1")
    counters = desk.dispatcher.counters
    assert counters.jobs == {("llm", "chat", "succeeded"): 1}
    assert counters.usage == {("chat", "completion_tokens"): 3.0}
    assert (counters.submitted, counters.events["offers"]) == ({("llm", "chat"): 1}, 1)


def test_inputs_are_fetched_and_outputs_left_by_url(desk: Desk) -> None:
    stored = desk.call(desk.blobs.put, pieces(b"RIFFaudio"), 100)
    file = StoredInput("audio", stored.key, stored.size, stored.sha256, "audio/wav")
    with desk.worker("w1", wire.ModelOffer(name="pic", kinds=("image",), engine="e")) as worker:
        record, events = desk.follow(kind="image", model="pic", inputs=(file,))
        offer = worker.take()
        (reference,) = offer.body.inputs
        assert (reference.name, reference.size, reference.sha256, reference.mime) == (
            "audio",
            9,
            stored.sha256,
            "audio/wav",
        )
        assert worker.fetch(reference.url) == (200, b"RIFFaudio")
        result = {"width": 8, "height": 8, "format": "png", "seeds": [1, 2]}
        files = (worker.upload(offer, "0.png", b"first"), worker.upload(offer, "50%41 ü.png", b"second"))
        assert worker.complete(offer, result, files).verdict == "stored"
        assert worker.put(offer.body.upload.replace("{name}", "late.png"), b"x") == 409
        end = events.result(PATIENCE_S)[-1]
        assert isinstance(end, JobEnded)
        assert [desk.call(desk.blobs.read, f.blob, 99) for f in end.record.files] == [b"first", b"second"]
        assert end.record.files[1].name == "50%41 ü.png"
        assert desk.get(record.id).state == "succeeded"


def test_a_result_whose_files_are_missing_is_tried_again(desk: Desk) -> None:
    with desk.worker("w1", TOOL) as worker:
        record, events = desk.follow(kind="x-tool", model="tool")
        offer = worker.take()
        file = worker.upload(offer, "a.txt", b"x")
        assert worker.complete(offer, files=(msgspec.structs.replace(file, size=2),)).verdict == "stored"
        offer = worker.take()
        assert offer.attempt == 2
        worker.complete(offer)
        assert isinstance(events.result(PATIENCE_S)[-1], JobEnded)
        assert desk.get(record.id).tries == 2


# ---- refusals ----------------------------------------------------------------------------------------------


def test_refusals_say_what_is_wrong(desk: Desk) -> None:
    with refused("no_worker") as caught:
        desk.submit()
    assert caught.value.fault.http_status == 503
    assert caught.value.fault.detail["retry_after_s"] > 0
    with desk.worker():
        with refused("model_not_found"):
            desk.submit(model="nope")
        with refused("unsupported"):
            desk.submit(kind="image")
        with refused("unsupported"):
            desk.submit(kind="nonsense", wait_for_worker=True)
        with refused("payload_too_large"):
            desk.submit(params=b"x" * (MAX_PARAMS_BYTES + 1))
        with refused("invalid_parameter"):
            desk.submit(max_attempts=0)
        with refused("invalid_parameter"):
            desk.submit(deadline_ms=-1)
        desk.portal.call(desk.dispatcher.stop_accepting)
        with refused("overloaded"):
            desk.submit()
    assert desk.store.queued() == {}


def test_the_largest_params_fit_into_an_offer(desk: Desk, worker: RawWorker) -> None:
    params = msgspec.msgpack.encode({"prompt": "x" * (MAX_PARAMS_BYTES - 20)})
    desk.submit(params=params)
    assert bytes(worker.expect(wire.Offer).body.params) == params


def test_a_job_may_wait_for_its_worker(desk: Desk) -> None:
    record, events = desk.follow(wait_for_worker=True)
    with desk.worker() as worker:
        worker.complete(worker.take())
        assert isinstance(events.result(PATIENCE_S)[-1], JobEnded)
        assert desk.get(record.id).state == "succeeded"


def test_an_idempotency_key_finds_its_job_even_without_a_worker(desk: Desk) -> None:
    with desk.worker() as worker:
        first, events = desk.follow(idempotency_key="k")
        worker.complete(worker.take())
        ended = events.result(PATIENCE_S)[-1]
    assert desk.submit(idempotency_key="k").id == first.id
    again, replay = desk.follow(idempotency_key="k")
    assert again.state == "succeeded"
    assert isinstance(ended, JobEnded)
    assert replay.result(PATIENCE_S) == [JobEnded(ended.record)]
    with refused("conflict"):
        desk.submit(idempotency_key="k", params=b"\x81\xa1a\x01")


def test_two_submissions_with_one_key_share_a_running_job(desk: Desk, worker: RawWorker) -> None:
    first, events = desk.follow(idempotency_key="k", stream=True)
    offer = worker.take()
    second, more = desk.follow(idempotency_key="k", stream=True)
    assert first.id == second.id
    worker.chunk(offer, 0)
    worker.complete(offer)
    assert events.result(PATIENCE_S)[-1] == more.result(PATIENCE_S)[-1]
    assert worker.quiet()


# ---- watching ----------------------------------------------------------------------------------------------


def test_watching_an_ended_or_unknown_job(desk: Desk, worker: RawWorker) -> None:
    record, events = desk.follow()
    worker.complete(worker.take())
    events.result(PATIENCE_S)
    assert desk.ended(record.id) == desk.get(record.id)
    with refused("not_found"):
        desk.ended("job_unknown")


def test_an_end_that_nobody_announced_is_read_from_the_row(desk: Desk, worker: RawWorker) -> None:
    record, events = desk.follow()
    offer = worker.take()
    # Behind the dispatcher's back, as another replica would.
    desk.until(lambda: desk.get(record.id).state == "running")
    desk.store.end(record.id, offer.attempt, Fault("internal", "It ended elsewhere."))
    end = events.result(PATIENCE_S)[-1]
    assert isinstance(end, JobEnded)
    assert end.record.state == "failed"


async def test_a_reader_that_falls_behind_is_told_and_a_waiter_is_not(tmp_path: Path) -> None:
    store, bus = SqliteStore(tmp_path / "jobs.sqlite"), LocalBus(max_events=2)
    try:
        dispatcher = Dispatcher(store, FolderBlobs(tmp_path / "blobs"), bus, FAST)
        for stream in (True, False):
            async with dispatcher.submit_and_watch(submission(stream=stream, wait_for_worker=True)) as (record, events):
                for seq in range(5):
                    bus.publish(record.id, JobChunk(seq, b""))
                if stream:
                    with pytest.raises(FaultError) as caught:
                        await anext(events)
                    assert caught.value.fault.code == "overloaded"
                else:
                    await dispatcher.cancel(record.id, "default", "")
                    assert isinstance(await anext(events), JobEnded)
    finally:
        store.close()


async def test_watchers_end_when_the_coordinator_stops(tmp_path: Path) -> None:
    store, bus = SqliteStore(tmp_path / "jobs.sqlite"), LocalBus()
    try:
        dispatcher = Dispatcher(store, FolderBlobs(tmp_path / "blobs"), bus, FAST)
        async with dispatcher.submit_and_watch(submission(wait_for_worker=True)) as (_, events):
            bus.close()
            with pytest.raises(FaultError) as caught:
                await anext(events)
            assert caught.value.fault.code == "overloaded"
    finally:
        store.close()


# ---- offers ------------------------------------------------------------------------------------------------


def test_suspects_are_offered_again_alone_and_only_the_culprit_is_poisoned(desk: Desk) -> None:
    with desk.worker("w1", msgspec.structs.replace(CHAT, slots=2)) as worker:
        culprit, bystander = desk.submit(max_attempts=1), desk.submit(max_attempts=1)
        offers = [worker.take(), worker.take()]
        assert not any(offer.body.alone for offer in offers)
        again = failed_as_suspects(worker, offers)
        assert all(offer.body.alone for offer in again)
        for offer in again:
            if offer.job == culprit.id:
                worker.fail(offer, detail={"alone": True})
            else:
                worker.complete(offer)
        desk.until(lambda: desk.get(bystander.id).state == "succeeded")
        end = desk.get(culprit.id)
        assert (end.state, end.fault and end.fault.code) == ("failed", "engine_crashed")  # its one try is used up
        twice = desk.submit()
        for _ in range(2):
            worker.fail(worker.take(), detail={"alone": True})
        desk.until(lambda: desk.get(twice.id).ended)
        fault = desk.get(twice.id).fault
        assert fault is not None
        assert (fault.code, fault.detail["crashes"], desk.get(twice.id).tries) == ("job_poisoned", 2, 2)


def failed_as_suspects(worker: RawWorker, offers: list[Said]) -> list[Said]:
    """Both fail; the first may be offered again before the end of the second has been taken."""
    fault = Fault("engine_crashed", "It was engine_crashed.", detail={"suspects": len(offers)})
    for offer in offers:
        worker.send(wire.Fail(fault=fault), offer.job, offer.attempt)
    heard = [worker.expect(wire.Ack, wire.Offer) for _ in range(2 * len(offers))]
    again = [said for said in heard if isinstance(said.body, wire.Offer)]
    assert {said.job for said in heard if isinstance(said.body, wire.Ack)} == {said.job for said in again}
    for offer in again:
        worker.send(wire.Accept(), offer.job, offer.attempt)
        worker.send(wire.Started(), offer.job, offer.attempt)
    return again


def test_one_offer_per_free_slot(desk: Desk) -> None:
    with desk.worker("w1", msgspec.structs.replace(CHAT, slots=2)) as worker:
        jobs = [desk.submit().id for _ in range(3)]
        first, second = worker.expect(wire.Offer), worker.expect(wire.Offer)
        assert [first.job, second.job] == jobs[:2]
        assert worker.quiet()
        for offer in (first, second):
            worker.send(wire.Accept(), offer.job, offer.attempt)
        assert worker.quiet()
        worker.send(wire.Started(), first.job, first.attempt)
        worker.complete(first)
        assert worker.expect(wire.Offer).job == jobs[2]


def test_no_job_waits_for_the_poll(tmp_path: Path) -> None:
    slow = DispatchSettings(poll_s=3600, sweep_s=3600, repair_s=3600)
    other = msgspec.structs.replace(CHAT, name="other")
    with running_desk(tmp_path, slow) as desk, desk.worker("w1", CHAT, other) as worker:
        wanted = [{"model": "chat"}, {"model": "other"}] * 3
        jobs = {desk.submit(**options).id for options in wanted}
        failed, stored = "", 0
        while stored < len(wanted) + 1:  # every job once, and the one that failed twice
            said = worker.receive()
            if isinstance(said.body, wire.Ack):
                stored += 1
                continue
            worker.send(wire.Accept(), said.job, said.attempt)
            worker.send(wire.Started(), said.job, said.attempt)
            if failed:
                worker.send(wire.Complete(result=DONE), said.job, said.attempt)
            else:
                failed = said.job
                worker.send(wire.Fail(fault=Fault("engine_crashed", "It crashed.")), said.job, said.attempt)
        assert {job: desk.get(job).state for job in jobs} == dict.fromkeys(jobs, "succeeded")
        assert desk.get(failed).tries == 2


def test_a_sweep_that_takes_long_holds_no_beat_up(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    sweeping, beats, beat = threading.Event(), threading.Semaphore(0), desk.store.beat

    async def reconcile(_grace_s: float) -> None:
        sweeping.set()
        await anyio.sleep_forever()

    def counted() -> Beat:
        beats.release()
        return beat()

    monkeypatch.setattr(desk.store, "beat", counted)
    assert beats.acquire(timeout=PATIENCE_S)  # the look at what an earlier life left is over
    monkeypatch.setattr(desk.dispatcher.attempts, "reconcile", reconcile)
    assert sweeping.wait(PATIENCE_S)
    for _ in range(3):
        assert beats.acquire(timeout=PATIENCE_S)


def test_a_job_that_ends_costs_no_look_at_an_empty_queue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = DispatchSettings(poll_s=3600, sweep_s=3600)
    with running_desk(tmp_path, slow) as desk, desk.worker() as worker:
        claims: list[int] = []
        claim = desk.store.claim

        def counted(wants: Sequence[Want]) -> list[Claimed]:
            claims.append(len(wants))
            return claim(wants)

        desk.until(desk.dispatcher.models)
        monkeypatch.setattr(desk.store, "claim", counted)
        for _ in range(5):
            desk.submit()
            worker.complete(worker.take())
        assert len(claims) <= 1


def test_a_client_that_leaves_while_its_job_is_queued_leaves_no_job(desk: Desk, worker: RawWorker) -> None:
    writing, go_on = threading.Event(), threading.Event()
    insert = desk.store.insert_and_claim

    def slow(*args: Any) -> Any:
        writing.set()
        assert go_on.wait(PATIENCE_S)
        return insert(*args)

    desk.until(desk.dispatcher.models)
    desk.store.insert_and_claim = slow  # type: ignore[method-assign]

    async def leave() -> str:
        seen = ""
        with anyio.CancelScope() as scope:
            async with anyio.create_task_group() as tasks:

                async def gone() -> None:
                    await anyio.to_thread.run_sync(writing.wait, PATIENCE_S)
                    scope.cancel()
                    go_on.set()

                tasks.start_soon(gone)
                async with desk.dispatcher.submit_and_watch(submission()) as (record, _events):
                    seen = record.id
                    await anyio.sleep_forever()
        return seen

    job = desk.call(leave)
    # It was made known in spite of the cancellation, so whoever watched it can cancel it; and it was offered.
    assert worker.expect(wire.Offer).job == job


def test_a_loaded_worker_gets_the_job(desk: Desk) -> None:
    cold = msgspec.structs.replace(CHAT, resident=False)
    with desk.worker("a", cold) as other, desk.worker("b") as warm:
        desk.submit()
        warm.expect(wire.Offer)
        desk.submit()  # the warm one is full
        other.expect(wire.Offer)


def test_what_changes_is_announced(desk: Desk) -> None:
    with desk.worker("a", accepting=False, reason="paused") as worker:
        desk.submit()
        assert worker.quiet()
        assert [view.accepting for view in desk.dispatcher.workers()] == [False]
        worker.send(wire.Announce(capabilities=wire.Capabilities(models=(CHAT,))))
        worker.expect(wire.Offer)
        assert [model.name for model in desk.dispatcher.models()] == ["chat"]


def test_priority_and_the_deadline_travel_with_the_offer(desk: Desk) -> None:
    late, first = (desk.submit(wait_for_worker=True, priority=n, deadline_ms=60_000) for n in (0, 1))
    with desk.worker() as worker:
        offer = worker.take()
        assert offer.job == first.id
        assert 30_000 < offer.body.deadline_ms <= 60_000
        worker.complete(offer)
        assert worker.expect(wire.Offer).job == late.id


# ---- cancelling, deadlines, retention ----------------------------------------------------------------------


def test_a_waiting_job_is_cancelled_at_once(desk: Desk) -> None:
    record, events = desk.follow(wait_for_worker=True)
    assert desk.call(desk.dispatcher.cancel, record.id, "other", "x") is None
    after = desk.call(desk.dispatcher.cancel, record.id, "default", "The client left.")
    assert after == desk.get(record.id)
    assert after is not None
    assert after.fault is not None
    assert (after.state, after.fault.message) == ("cancelled", "The client left.")
    assert events.result(PATIENCE_S) == [JobEnded(after)]
    again = desk.call(desk.dispatcher.cancel, record.id, "default", "again")
    assert again == after
    with desk.worker() as worker:
        assert worker.quiet()


def test_a_running_job_is_cancelled_and_its_worker_stops(desk: Desk, worker: RawWorker) -> None:
    record, events = desk.follow(stream=True)
    offer = worker.take()
    worker.chunk(offer, 0)
    desk.submit()
    desk.call(desk.dispatcher.cancel, record.id, "default", "The client left.")
    cancel = worker.expect(wire.Cancel)
    assert (cancel.job, cancel.attempt, cancel.body.reason) == (record.id, 1, "The client left.")
    end = events.result(PATIENCE_S)[-1]
    assert isinstance(end, JobEnded)
    assert end.record.state == "cancelled"
    assert worker.quiet()  # the slot is not free before the worker says so
    worker.chunk(offer, 1)
    assert worker.complete(offer, usage={"completion_tokens": 2}).verdict == "stored"
    worker.expect(wire.Offer)
    after = desk.get(record.id)
    assert (after.state, after.result, after.usage) == ("cancelled", None, {"completion_tokens": 2.0})
    assert desk.dispatcher.counters.jobs == {("llm", "chat", "cancelled"): 1}
    assert desk.dispatcher.counters.usage == {("chat", "completion_tokens"): 2.0}


def test_a_cancel_that_crosses_the_offer(desk: Desk, worker: RawWorker) -> None:
    record = desk.submit()
    offer = worker.expect(wire.Offer)
    desk.call(desk.dispatcher.cancel, record.id, "default", "")
    worker.expect(wire.Cancel)
    worker.send(wire.Accept(), offer.job, offer.attempt)
    assert worker.fail(offer, "cancelled").verdict == "fenced"  # it was never this worker's
    assert desk.get(record.id).state == "cancelled"


def test_a_completion_before_the_cancel_wins(desk: Desk, worker: RawWorker) -> None:
    record, _ = desk.follow()
    worker.complete(worker.take())
    after = desk.call(desk.dispatcher.cancel, record.id, "default", "too late")
    assert after is not None
    assert after.state == "succeeded"
    assert worker.quiet()


def test_a_waiting_job_ends_at_its_deadline(desk: Desk) -> None:
    record, events = desk.follow(wait_for_worker=True, deadline_ms=60_000)
    desk.store.shift_clock(60_001)
    end = events.result(PATIENCE_S)[-1]
    assert isinstance(end, JobEnded)
    assert end.record.fault is not None
    assert (end.record.id, end.record.fault.code) == (record.id, "deadline_exceeded")


def test_a_running_job_is_stopped_after_its_deadline(tmp_path: Path) -> None:
    slack = msgspec.structs.replace(FAST, deadline_slack_s=3600.0)
    with running_desk(tmp_path, slack) as desk, desk.worker() as worker:
        _, events = desk.follow(deadline_ms=60_000)
        offer = worker.take()
        worker.send(wire.Progress(n=1), offer.job, offer.attempt)
        desk.until(lambda: desk.get(offer.job).state == "running")
        desk.store.shift_clock(60_001)
        assert worker.quiet(0.2)  # ending it in time is the worker's business
        desk.store.shift_clock(3_600_000)
        worker.expect(wire.Cancel)
        end = events.result(PATIENCE_S)[-1]
        assert isinstance(end, JobEnded)
        assert end.record.fault is not None
        assert end.record.fault.code == "deadline_exceeded"
        assert worker.complete(offer).verdict == "fenced"


def test_old_jobs_and_their_files_are_deleted(tmp_path: Path) -> None:
    with running_desk(tmp_path, msgspec.structs.replace(FAST, purge_s=0.05)) as desk, desk.worker("w1", TOOL) as worker:
        stored = desk.call(desk.blobs.put, pieces(b"x"), 100)
        file = StoredInput("audio", stored.key, 1, stored.sha256)
        record, events = desk.follow(kind="x-tool", model="tool", inputs=(file,))
        offer = worker.take()
        worker.complete(offer, files=(worker.upload(offer, "a", b"x"),))
        end = events.result(PATIENCE_S)[-1]
        assert isinstance(end, JobEnded)
        output = desk.blobs.path(end.record.files[0].blob)
        assert output.exists()
        desk.store.shift_clock(24 * 3600 * 1000 + 1000)

        desk.until(lambda: not desk.store.get(record.id))
        desk.until(lambda: not output.exists() and not desk.blobs.path(stored.key).exists())
