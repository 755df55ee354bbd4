"""What a worker took is not lost with its process: two lives of it on one disk, over a real WebSocket."""

from __future__ import annotations

import contextlib
import errno
import hashlib
from pathlib import Path

import msgspec
import pytest
import trio

from protocol import link_wire as wire
from protocol.engine_wire import OutputFile
from protocol.faults import Fault
from supervisor.link import keeping as keepings
from supervisor.link.keeping import OnDisk
from supervisor.link.outbox import Outbox
from supervisor.store import Store, StoreProblem, open_store
from supervisor.testing import FakePeer
from tests.supervisor.link.test_worker import Rig, rig

CLIP = OutputFile("a.mp4", "video/mp4", 4, hashlib.sha256(b"clip").hexdigest())


class Life:
    """The parts of one life."""

    def __init__(self, made: Rig, keeping: OnDisk, store: Store) -> None:
        self.host, self.transfer, self.worker, self.attempts = made.host, made.transfer, made.worker, made.attempts
        self.session, self.offered = made.session, made.offered
        self.keeping, self.store = keeping, store


@contextlib.asynccontextmanager
async def life(tmp_path: Path):
    """One life of a worker; leaving it early is its death."""
    async with open_store(tmp_path / "worker.db") as store:
        keeping = OnDisk(store, Outbox(tmp_path / "outbox", 1000))
        async with rig(tmp_path, keeping) as made:
            yield Life(made, keeping, store)


async def later(r: Life) -> FakePeer:
    """The first session of a later life, with what was held from the one before."""
    peer = await r.session()
    await peer.expect(wire.Started)
    return peer


async def end_run(r: Life, peer, body: dict, *files: OutputFile) -> None:
    run = await r.offered(peer, upload="/up/{name}")
    for file in files:
        (run.request.folder / file.name).write_bytes(b"clip")
    run.done(body, list(files))


async def test_a_result_whose_upload_was_cut_short_is_delivered_in_the_next_life(tmp_path):
    async with life(tmp_path) as r:
        peer = await r.session()
        r.transfer.gate = trio.Event()
        await end_run(r, peer, {"seconds": 1}, CLIP)
        await r.transfer.uploading.wait()
    async with life(tmp_path) as r:
        peer = await later(r)
        assert peer.hello.held == (wire.Held(job="job_1", attempt=1, started=True),)
        complete = await peer.expect(wire.Complete)
        assert complete.files == (CLIP,)
        assert msgspec.msgpack.decode(complete.result) == {"seconds": 1}
        assert r.transfer.taken == {"a.mp4": b"clip"}
        assert r.attempts.ledger.taken("chat") == 0
        await peer.send(wire.Ack(), "job_1", 1)
        with trio.fail_after(20):
            await r.attempts.ledger.wait_empty()
    async with life(tmp_path) as r:
        assert (await r.session()).hello.held == ()
        assert list((tmp_path / "outbox").iterdir()) == []


async def test_a_result_that_was_told_and_not_acknowledged_is_told_again(tmp_path):
    async with life(tmp_path) as r:
        peer = await r.session()
        await end_run(r, peer, {"text": "x" * 70_000})
        await peer.expect(wire.Complete)
    async with life(tmp_path) as r:
        peer = await later(r)
        complete = await peer.expect(wire.Complete)
        assert complete.inline is None
        assert msgspec.msgpack.decode(r.transfer.taken[wire.RESULT_FILE])["text"] == "x" * 70_000


async def test_what_was_under_way_has_failed_and_may_be_tried_again(tmp_path):
    async with life(tmp_path) as r:
        peer = await r.session()
        await r.offered(peer)
    for _ in range(2):  # told until it is acknowledged
        async with life(tmp_path) as r:
            peer = await later(r)
            fail = await peer.expect(wire.Fail)
            assert (fail.fault.code, fail.fault.may_retry) == ("worker_lost", True)
            assert r.worker.running == 0


async def test_a_stream_whose_pieces_went_with_the_process_has_failed_whole_as_its_result_is(tmp_path):
    """Nobody knows any more which pieces the coordinator has: a client must not take a torn answer for a whole one."""
    async with life(tmp_path) as r:
        peer = await r.session()
        run = await r.offered(peer, stream=True, upload="/up/{name}")
        run.start()
        run.chunk({"text": "x"})
        (run.request.folder / CLIP.name).write_bytes(b"clip")
        run.done({"text": "x"}, [CLIP])
        for kind in (wire.Started, wire.Chunk, wire.Complete):
            await peer.expect(kind)
    for _ in range(2):
        async with life(tmp_path) as r:
            peer = await later(r)
            fail = await peer.expect(wire.Fail)
            assert (fail.fault.code, fail.fault.may_retry) == ("worker_lost", True)
            assert list((tmp_path / "outbox").iterdir()) == []
            assert r.attempts.ledger.taken("chat") == 0


async def test_a_failure_is_told_with_its_own_words_in_the_next_life(tmp_path):
    async with life(tmp_path) as r:
        peer = await r.session()
        run = await r.offered(peer)
        run.fail("out_of_memory")
        await peer.expect(wire.Fail)
    async with life(tmp_path) as r:
        assert (await (await later(r)).expect(wire.Fail)).fault.code == "out_of_memory"


async def test_a_worker_that_stops_leaves_its_kept_results_to_the_next_life(tmp_path):
    async with life(tmp_path) as r:
        peer = await r.session()
        r.transfer.gate = trio.Event()
        await end_run(r, peer, {}, CLIP)
        await r.transfer.uploading.wait()
        r.attempts.stop_all(Fault("worker_stopping", "The worker stopped."))
        with trio.fail_after(20):
            await r.attempts.ledger.wait_empty()
    async with life(tmp_path) as r:
        assert (await (await later(r)).expect(wire.Complete)).files == (CLIP,)


async def test_a_cancel_ends_a_kept_result_and_forgets_its_files(tmp_path):
    async with life(tmp_path) as r:
        peer = await r.session()
        r.transfer.gate = trio.Event()
        await end_run(r, peer, {}, CLIP)
        await r.transfer.uploading.wait()
        assert r.keeping._outbox.held_bytes == 4
        await peer.send(wire.Cancel(), "job_1", 1)
        assert (await peer.expect(wire.Fail)).fault.code == "cancelled"
        assert r.keeping._outbox.held_bytes == 0


async def test_a_job_that_is_given_back_is_told_now_although_its_result_is_kept(tmp_path):
    async with life(tmp_path) as r:
        peer = await r.session()
        r.transfer.gate = trio.Event()
        await end_run(r, peer, {}, CLIP)
        await r.transfer.uploading.wait()
        r.attempts.give_back("job_1", 1, "")
        assert (await peer.expect(wire.Fail)).fault.code == "worker_stopping"
        assert r.keeping._outbox.held_bytes == 0


async def test_a_full_outbox_takes_no_more_jobs(tmp_path):
    async with life(tmp_path) as r:
        peer = await r.session()
        r.keeping._outbox._budget = 4
        r.transfer.gate = trio.Event()
        assert r.keeping.reason() == ""
        await end_run(r, peer, {}, CLIP)
        await r.transfer.uploading.wait()
        assert "limits.outbox_gb" in r.keeping.reason()


async def test_a_claim_that_cannot_be_written_down_is_declined_until_it_can(tmp_path, monkeypatch):
    monkeypatch.setattr(keepings, "TRY_AGAIN_S", 0.01)
    async with life(tmp_path) as r:
        peer = await r.session()
        real = r.store._commit

        def full(batch) -> None:
            for write in batch:
                write.error = StoreProblem(
                    "The worker's records cannot be written: database or disk is full.", full=True
                )

        r.store._commit = full
        await peer.offer("job_1", 1, "llm", "chat", {"messages": [{"role": "user", "content": "hi"}]})
        decline = await peer.expect(wire.Decline)
        assert (decline.code, "disk is full" in decline.reason, decline.retry_after_ms) == ("paused", True, 5000)
        assert "disk is full" in r.keeping.reason()
        assert len(r.attempts.ledger) == 0
        mended = trio.Event()
        r.keeping.on_change = mended.set
        r.store._commit = real
        async with trio.open_nursery() as nursery:
            nursery.start_soon(r.keeping.run)
            with trio.fail_after(20):
                await mended.wait()
            nursery.cancel_scope.cancel()
        assert r.keeping.reason() == ""
        await r.offered(peer, "job_2")


async def test_a_fence_that_comes_while_a_failure_is_written_down_is_the_end_of_it(tmp_path):
    async with life(tmp_path) as r:
        peer = await r.session()
        run = await r.offered(peer)
        gate, writing, real = trio.Event(), trio.Event(), r.keeping.failed

        async def slow(*args: object) -> None:
            writing.set()
            await gate.wait()
            await real(*args)

        r.keeping.failed = slow
        run.fail("out_of_memory")
        await writing.wait()
        await peer.close()
        second = await r.session()
        await second.send(wire.Ack(verdict="fenced"), "job_1", 1)
        with trio.fail_after(20):
            await r.attempts.ledger.wait_empty()
        gate.set()
        await second.offer("job_2", 1, "llm", "chat", {"messages": [{"role": "user", "content": "hi"}]})
        await second.expect(wire.Accept)  # the same session, which nothing illegal has ended
    async with life(tmp_path) as r:
        assert [held.job for held in (await later(r)).hello.held] == ["job_2"]


async def test_a_result_that_cannot_be_kept_is_delivered_all_the_same(tmp_path, monkeypatch):
    async with life(tmp_path) as r:

        async def full(*_args: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(r.keeping._outbox, "keep", full)
        peer = await r.session()
        await end_run(r, peer, {}, CLIP)
        assert (await peer.expect(wire.Complete)).files == (CLIP,)
        assert r.transfer.taken == {"a.mp4": b"clip"}


async def test_an_offer_of_a_session_that_ended_before_it_was_written_down_is_forgotten(tmp_path):
    async with life(tmp_path) as r:
        peer = await r.session()
        gate = trio.Event()
        real = r.keeping.claimed

        async def slow(*args: object) -> None:
            await gate.wait()
            await real(*args)

        r.keeping.claimed = slow
        await peer.offer("job_1", 1, "llm", "chat", {"messages": [{"role": "user", "content": "hi"}]})
        with trio.fail_after(20):
            while not r.worker.holds("job_1", 1):
                await trio.testing.wait_all_tasks_blocked(0.01)
        await peer.close()
        second = await r.session()
        assert second.hello.held == ()
        gate.set()
        with trio.fail_after(20):
            await r.attempts.ledger.wait_empty()
    async with life(tmp_path) as r:
        assert (await r.session()).hello.held == ()
        assert not r.host._running


@pytest.mark.parametrize("spoil", ["size", "sha256"])
async def test_an_output_that_is_not_what_was_said_is_not_kept(tmp_path, spoil):
    wrong = msgspec.structs.replace(CLIP, **({"size": 3} if spoil == "size" else {"sha256": "0" * 64}))
    async with life(tmp_path) as r:
        peer = await r.session()
        await end_run(r, peer, {}, wrong)
        assert (await peer.expect(wire.Fail)).fault.code == "engine_protocol"
