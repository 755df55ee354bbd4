"""What attempts leave is deleted when they are over, however they end; a job's outputs stay."""

from __future__ import annotations

import hashlib
import os
from collections.abc import AsyncGenerator, Collection, Iterator
from contextlib import aclosing, closing, suppress
from pathlib import Path

import anyio
import pytest

from coordinator.blobs.folder import FolderBlobs
from coordinator.dispatch_settings import DispatchSettings
from coordinator.leftovers import Leftovers
from coordinator.store import SqliteStore
from coordinator.store.threads import StoreThreads
from coordinator.testing_link import Desk, RawWorker, Said, running_desk
from protocol import link_wire as wire
from protocol.engine_wire import OutputFile
from protocol.link_wire import RESULT_FILE

FAST = DispatchSettings(poll_s=0.05, sweep_s=0.05, worker_grace_s=0.5, startup_grace_s=0.5, repair_s=0.2)
TOOL = wire.ModelOffer(name="tool", kinds=("x-tool",), engine="e")
CHAT = wire.ModelOffer(name="chat", kinds=("llm",), engine="e")


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with running_desk(tmp_path, FAST) as desk:
        yield desk


def files(tmp_path: Path) -> list[str]:
    """All files of outputs, and of uploads that broke, by their names."""
    tops = [tmp_path / "blobs" / folder for folder in ("out", "parts", "tmp")]
    # `os.walk` passes over folders that go meanwhile, which `Path.rglob` does not.
    found = [name for top in tops for _, _, names in os.walk(top) for name in names]
    return sorted(name[65:] if "-" in name else "part" for name in found)


async def leave_part(blobs: FolderBlobs, job: str, attempt: int) -> None:
    """Two MiB of a file whose connection breaks then."""
    whole = b"p" * (3 * 2**20)

    async def broken() -> AsyncGenerator[bytes, None]:
        yield whole[: 2 * 2**20]
        raise ConnectionResetError

    with suppress(ConnectionResetError):
        async with aclosing(broken()) as data:
            await blobs.put_output(job, attempt, "p", data, hashlib.sha256(whole).hexdigest())


def litter(desk: Desk, worker: RawWorker) -> tuple[Said, OutputFile]:
    """Take the offer and leave an output, two files that nobody asked for, and a part."""
    offer = worker.take()
    for name in ("junk", RESULT_FILE):
        worker.upload(offer, name, b"junk")
    desk.call(leave_part, desk.blobs, offer.job, offer.attempt)
    return offer, worker.upload(offer, "output", b"output")


def test_of_a_success_the_declared_outputs_stay(desk: Desk, tmp_path: Path) -> None:
    with desk.worker("w1", TOOL) as worker:
        record = desk.submit(kind="x-tool", model="tool")
        offer, output = litter(desk, worker)
        assert files(tmp_path) == ["junk", "output", "part", RESULT_FILE]
        assert worker.complete(offer, {"output": 1}, (output,)).verdict == "stored"
        desk.until(lambda: files(tmp_path) == ["output"])
        [file] = desk.ended(record.id).files
        assert desk.call(desk.blobs.read, file.blob, 9) == b"output"
        desk.until(lambda: not desk.blobs.touched)


@pytest.mark.parametrize("end", ["fail", "decline", "cancel", "lost", "expired"])
def test_of_any_other_end_nothing_stays(desk: Desk, tmp_path: Path, end: str) -> None:
    with desk.worker("w1", TOOL) as worker:
        record = desk.submit(kind="x-tool", model="tool", max_attempts=1, deadline_ms=3_600_000)
        if end == "decline":
            offer = worker.expect(wire.Offer)
            desk.call(leave_part, desk.blobs, offer.job, offer.attempt)
            worker.send(wire.Decline(code="busy", reason="", retry_after_ms=50_000), offer.job, offer.attempt)
        else:
            offer, _output = litter(desk, worker)
        match end:
            case "fail":
                worker.fail(offer)
            case "cancel":
                assert desk.call(desk.dispatcher.cancel, record.id, record.tenant, "")
            case "lost":
                worker.drop()
            case "expired":
                desk.store.shift_clock(2 * 3_600_000)
        desk.until(lambda: not files(tmp_path))
        if end == "decline":
            assert desk.get(record.id).state == "queued", "it waits, and nothing of the first attempt does"
        else:
            assert desk.ended(record.id).state in ("failed", "cancelled")


def requeued(desk: Desk, worker: RawWorker, job: str) -> None:
    """The worker is lost for longer than its grace, and leftovers are looked after since."""
    worker.drop()
    desk.until(lambda: desk.get(job).state == "queued")
    desk.call(desk.dispatcher.leftovers.look)


def test_an_attempt_that_its_worker_may_still_come_back_with_keeps_what_it_left(desk: Desk, tmp_path: Path) -> None:
    with desk.worker("w1", TOOL) as worker:
        record = desk.submit(kind="x-tool", model="tool")
        offer, output = litter(desk, worker)
        requeued(desk, worker, record.id)
    assert files(tmp_path) == ["junk", "output", "part", RESULT_FILE]
    with RawWorker(desk.port, "w1", judge=False) as again:
        again.hello(TOOL, held=(wire.Held(offer.job, offer.attempt, started=True),))
        assert again.complete(offer, {"output": 1}, (output,)).verdict == "stored"
    ended = desk.ended(record.id)
    assert (ended.state, ended.attempt) == ("succeeded", offer.attempt)
    assert desk.call(desk.blobs.read, ended.files[0].blob, 9) == b"output"
    desk.until(lambda: files(tmp_path) == ["output"])


def test_a_worker_may_upload_for_an_attempt_before_it_comes_back_with_it(desk: Desk, tmp_path: Path) -> None:
    """As one does that was started again: it sends the results that it kept first."""
    with desk.worker("w1", TOOL) as worker:
        record = desk.submit(kind="x-tool", model="tool")
        offer = worker.take()
        requeued(desk, worker, record.id)
        output = worker.upload(offer, "output", b"output")
        desk.call(desk.dispatcher.leftovers.look)
    with RawWorker(desk.port, "w1", judge=False) as again:
        again.hello(TOOL, held=(wire.Held(offer.job, offer.attempt, started=True),))
        assert again.complete(offer, {"output": 1}, (output,)).verdict == "stored"
    assert desk.call(desk.blobs.read, desk.ended(record.id).files[0].blob, 9) == b"output"


def test_what_waits_for_its_worker_goes_with_the_next_attempt(desk: Desk, tmp_path: Path) -> None:
    with desk.worker("w1", TOOL) as worker:
        record = desk.submit(kind="x-tool", model="tool")
        offer, _output = litter(desk, worker)
        requeued(desk, worker, record.id)
        with desk.worker("w2", TOOL) as other:
            again = other.take()
            assert again.attempt > offer.attempt
            desk.until(lambda: not files(tmp_path))
            assert worker.put(offer.body.upload.replace("{name}", "output"), b"output") == 409


def test_a_running_attempt_keeps_what_it_left_and_the_one_before_does_not(desk: Desk, tmp_path: Path) -> None:
    with desk.worker("w1", TOOL) as one, desk.worker("w2", TOOL) as two:
        record = desk.submit(kind="x-tool", model="tool")
        workers = desk.dispatcher.attempts.fleet.workers
        desk.until(lambda: workers[one.id].attempts or workers[two.id].attempts)
        begun, other = (one, two) if workers[one.id].attempts else (two, one)
        first, _output = litter(desk, begun)
        begun.fail(first)
        again, output = litter(desk, other)
        assert again.attempt > first.attempt
        desk.until(lambda: files(tmp_path) == ["junk", "output", "part", RESULT_FILE])
        desk.until(lambda: desk.blobs.touched == {(record.id, again.attempt)})
        other.complete(again, {"output": 1}, (output,))
        desk.until(lambda: files(tmp_path) == ["output"])


def test_one_attempt_that_cannot_be_tidied_keeps_none_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blobs, asked = FolderBlobs(tmp_path / "blobs"), []

    def broken_first(job: str, _attempt: int, _keep: Collection[str]) -> None:
        asked.append(job)
        if len(asked) == 1:
            raise PermissionError("It may not be deleted.")

    monkeypatch.setattr(blobs, "tidy", broken_first)
    blobs.touched.update({("job_1", 1), ("job_2", 1), ("job_3", 1)})
    with closing(SqliteStore(tmp_path / "jobs.sqlite")) as store:
        leftovers = Leftovers(store, StoreThreads(), blobs)
        with pytest.raises(PermissionError):
            anyio.run(leftovers.look)
        assert sorted(asked) == ["job_1", "job_2", "job_3"]
        assert blobs.touched == {(asked[0], 1)}
        anyio.run(leftovers.look)
    assert asked[3:] == asked[:1]
    assert not blobs.touched


def test_what_came_through_a_coordinator_that_died_is_found(tmp_path: Path) -> None:
    with running_desk(tmp_path, FAST) as desk, desk.worker("w1", TOOL) as worker:
        record = desk.submit(kind="x-tool", model="tool")
        offer, output = litter(desk, worker)
    blobs = FolderBlobs(tmp_path / "blobs")
    with running_desk(tmp_path, FAST) as desk, desk.worker("w2", TOOL) as worker:
        # The first attempt is lost with its coordinator, the second one succeeds with one of its files.
        again, output = litter(desk, worker)
        assert again.attempt > offer.attempt
        worker.complete(again, {"output": 1}, (output,))
        desk.until(lambda: files(tmp_path) == ["output"])
        desk.ended(record.id)
    assert blobs.left_lately(3600.0) == {
        (record.id, again.attempt): {f"{record.id}/{again.attempt}/{output.sha256}-output"}
    }


def test_a_kind_that_makes_no_files_leaves_none_but_that_of_its_result(desk: Desk, tmp_path: Path) -> None:
    with desk.worker("w1", CHAT) as worker:
        record = desk.submit()
        offer = worker.take()
        assert worker.put(offer.body.upload.replace("{name}", "junk.bin"), b"x") == 413
        assert worker.put(offer.body.upload.replace("max=0-", "max=9-").replace("{name}", "junk.bin"), b"x") == 403
        worker.upload(offer, RESULT_FILE, b"\x81\xa7content\xa4done")
        assert worker.put(offer.body.upload.replace("{name}", RESULT_FILE), b"another") == 413
        worker.send(wire.Complete(), offer.job, offer.attempt)
        assert worker.expect(wire.Ack).body.verdict == "stored"
        assert desk.ended(record.id).result == b"\x81\xa7content\xa4done"
        desk.until(lambda: not files(tmp_path))
