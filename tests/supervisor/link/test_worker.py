"""The worker and its attempts over a real WebSocket, with the host played by the test."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from protocol import link_wire as wire
from protocol.engine_wire import OutputFile
from protocol.faults import Fault, refuse
from supervisor.host.ground import Attempt, Ground
from supervisor.host.work import Failed
from supervisor.intake.admission import ModelState
from supervisor.link import attempts as attempts_module
from supervisor.link import ledger as ledger_module
from supervisor.link.attempts import Attempts
from supervisor.link.keeping import OnDisk
from supervisor.link.reconnect import Backoff, keep_link
from supervisor.link.session import Address, converse
from supervisor.link.transfer import Output
from supervisor.link.tries import Moved
from supervisor.link.worker import Identity, Worker
from supervisor.observe.jobwatch import Watches
from supervisor.observe.paced import AT_ONCE
from supervisor.observe.tally import Tally
from supervisor.testing import FakeCoordinator, FakeHost, FakePeer, open_coordinator

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


class FakeTransfer:
    """Inputs come from `goods`, outputs go to `taken`; `gate` holds uploads back."""

    def __init__(self) -> None:
        self.goods: dict[str, bytes] = {}
        self.taken: dict[str, bytes] = {}
        self.gate = trio.Event()
        self.gate.set()
        self.uploading = trio.Event()

    async def fetch(self, file: wire.FileRef, target: Callable[[], int], moved: Moved) -> None:
        if file.name not in self.goods:
            raise refuse("input_unavailable", "gone")
        with os.fdopen(target(), "wb") as out:
            moved(out.write(self.goods[file.name]))

    async def upload(
        self, template: str, file: OutputFile, source: Output, until: float | None, moved: Moved, patience_s: float
    ) -> None:
        self.uploading.set()
        await self.gate.wait()
        if isinstance(source, bytes):
            self.taken[file.name] = source
        else:
            with os.fdopen(source(), "rb") as content:
                self.taken[file.name] = content.read()
        moved(len(self.taken[file.name]))


class Rig:
    def __init__(self, coordinator: FakeCoordinator, host: FakeHost, folder: Path) -> None:
        self.coordinator, self.host = coordinator, host
        self.ground = Ground(folder / "m0")
        self.transfer = FakeTransfer()
        self.models = {"chat": ModelState(kinds=("llm", "image"), slots=2), "ears": ModelState(kinds=("audio_stt",))}
        self.offers = (wire.ModelOffer(name="chat", kinds=("llm",), engine="e"),)
        self.shutdown: list[str] = []
        self.tally = Tally()
        self.removals, self._removals = trio.open_memory_channel[None](1000)
        self.worker: Worker
        self.attempts: Attempts

    async def gone(self, name: str) -> None:
        """Wait until an attempt's folders are removed."""
        with trio.fail_after(20):
            while (self.ground.inputs / name).exists() or (self.ground.outputs / name).exists():
                await self._removals.receive()

    async def session(self) -> FakePeer:
        return await self.coordinator.session()

    async def offered(self, peer: FakePeer, job: str = "job_1", attempt: int = 1, **fields: Any):
        """Offer a chat, see it accepted, return its run."""
        await peer.offer(job, attempt, "llm", "chat", CHAT, **fields)
        await peer.expect(wire.Accept)
        return await self.host.next_run()


@pytest.fixture(autouse=True)
def _removals(monkeypatch):
    """Tells the rig of each folder that was removed, which a thread does."""
    original = attempts_module._remove

    async def remove(folders: Attempt | None) -> None:
        await original(folders)
        current[0].removals.send_nowait(None)

    monkeypatch.setattr(attempts_module, "_remove", remove)


current: list[Rig] = []


@contextlib.asynccontextmanager
async def rig(tmp_path: Path, keeping: OnDisk | None = None):
    host = FakeHost()
    async with open_coordinator() as coordinator, trio.open_nursery() as nursery:
        made = Rig(coordinator, host, tmp_path)
        current[:] = [made]
        watches = Watches(made.tally)
        made.attempts = Attempts(host, made.transfer, lambda _model: made.ground, nursery, watches, keeping)
        if keeping is not None:
            made.attempts.restore(await keeping.restore())
        made.worker = Worker(
            Identity(name="w1", boot="b1"),
            made.attempts,
            offered=lambda reason: wire.Capabilities(models=made.offers, accepting=not reason, reason=reason),
            models=lambda: made.models,
            on_shutdown=made.shutdown.append,
        )
        address = Address(url=coordinator.url, token="t")
        nursery.start_soon(keep_link, lambda: converse(address, made.worker), Backoff(0.01, 0.01))
        nursery.start_soon(made.worker.keep_announced)
        yield made
        nursery.cancel_scope.cancel()


async def test_a_job_from_offer_to_acknowledgement(tmp_path):
    async with rig(tmp_path) as r:
        peer = await r.session()
        assert peer.hello.worker == "w1"
        assert [model.name for model in peer.hello.capabilities.models] == ["chat"]
        run = await r.offered(peer, stream=True, deadline_ms=60_000)
        assert run.request.label == "job_1#1"
        assert run.request.stream
        assert 30 < run.request.deadline_s <= 60
        assert msgspec.msgpack.decode(run.request.params) == CHAT
        assert run.request.folder.is_dir()
        run.start()
        run.chunk({"delta": {"content": "he"}})
        run.chunk({"delta": {"content": "llo"}})
        await peer.expect(wire.Started)
        first, second = await peer.expect(wire.Chunk), await peer.expect(wire.Chunk)
        assert (first.seq, second.seq) == (0, 1)
        run.done({"content": "hello"}, completion_tokens=2)
        complete = await peer.expect(wire.Complete)
        assert msgspec.msgpack.decode(complete.result) == {"content": "hello"}
        assert complete.usage == {"completion_tokens": 2}
        assert r.worker.holds("job_1", 1)
        await r.gone("job_1.1")
        await peer.send(wire.Ack(), "job_1", 1)
        with trio.fail_after(20):
            await r.attempts.ledger.wait_empty()
        assert not r.worker.holds("job_1", 1)


async def test_inputs_and_outputs_travel_as_files(tmp_path):
    async with rig(tmp_path) as r:
        peer = await r.session()
        r.transfer.goods["audio"] = b"RIFF"
        given = wire.FileRef(name="audio", url="/x", size=4, sha256=hashlib.sha256(b"RIFF").hexdigest())
        await peer.offer("job_1", 1, "audio_stt", "ears", {}, inputs=(given,), upload="/up/{name}")
        await peer.expect(wire.Accept)
        run = await r.host.next_run()
        assert run.request.inputs["audio"].read_bytes() == b"RIFF"
        (run.request.folder / "a.png").write_bytes(b"PNG")
        file = OutputFile("a.png", "image/png", 3, hashlib.sha256(b"PNG").hexdigest())
        run.done({"text": "x" * 70_000}, [file])
        complete = await peer.expect(wire.Complete)
        assert complete.inline is None, "a result above the inline limit travels as a file"
        assert complete.files == (file,)
        assert r.transfer.taken["a.png"] == b"PNG"
        assert msgspec.msgpack.decode(r.transfer.taken[wire.RESULT_FILE])["text"] == "x" * 70_000
        size = 3 + len(r.transfer.taken[wire.RESULT_FILE])
        assert {'bulkhead_transfer_bytes_total{direction="in"} 4'} <= {*r.tally.lines()}
        assert {f'bulkhead_transfer_bytes_total{{direction="out"}} {size}'} <= {*r.tally.lines()}


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (lambda run: run.fail("out_of_memory"), "out_of_memory"),
        (lambda run: run.done({}, [OutputFile(wire.RESULT_FILE, "x", 0, "0")]), "engine_protocol"),
        (lambda run: run.done({}, [OutputFile("../../in/x", "x", 0, "0")]), "engine_protocol"),
    ],
)
async def test_a_fault_is_told_once_and_typed(tmp_path, spoil, code):
    async with rig(tmp_path) as r:
        peer = await r.session()
        run = await r.offered(peer)
        spoil(run)
        fail = await peer.expect(wire.Fail)
        assert (fail.fault.code, fail.streamed) == (code, False)


async def test_the_evidence_of_a_fault_leaves_the_box_redacted(tmp_path):
    tail = ["loading with HF_TOKEN=short", "prompt: my secret diary says", "Segmentation fault"]
    async with rig(tmp_path) as r:
        peer = await r.session()
        run = await r.offered(peer)
        run.end(Failed(fault=Fault("engine_crashed", "It died.", detail={"signal": 11, "stderr_tail": tail})))
        fault = (await peer.expect(wire.Fail)).fault
        assert fault.detail["signal"] == 11
        assert fault.detail["stderr_tail"][-1] == "Segmentation fault"
        assert "short" not in str(fault)
        assert "diary" not in str(fault)


async def test_lines_are_left_out_only_where_they_are_no_log(tmp_path):
    async with rig(tmp_path) as r:
        peer = await r.session()
        for every_line, expected in ((False, ["line 0"]), (True, ["line 0", "line 1", "line 2"])):
            r.attempts.every_line = every_line
            run = await r.offered(peer, f"job_{every_line:d}")
            run.start()
            await peer.expect(wire.Started)
            for number in range(3):
                run.progress(number, text=f"line {number}")
            run.done({})
            heard = []
            while isinstance(body := (await peer.receive())[0], wire.Progress):
                heard.append(body.text)
            assert isinstance(body, wire.Complete)
            assert heard == expected


async def test_a_missing_input_fails_the_attempt_before_any_engine_sees_it(tmp_path):
    async with rig(tmp_path) as r:
        peer = await r.session()
        given = wire.FileRef(name="audio", url="/x", size=4, sha256="0" * 64)
        await peer.offer("job_1", 1, "audio_stt", "ears", {}, inputs=(given,))
        await peer.expect(wire.Accept)
        assert (await peer.expect(wire.Fail)).fault.code == "input_unavailable"


async def test_a_mistake_of_ours_costs_the_job_that_it_met_and_no_other(tmp_path, caplog, monkeypatch):
    async with rig(tmp_path) as r:
        peer = await r.session()
        other = await r.offered(peer, "job_2")

        async def fetch(*_args: object) -> None:
            raise RuntimeError("nobody thought of this")

        monkeypatch.setattr(r.transfer, "fetch", fetch)
        audio = wire.FileRef(name="audio", url="v1/x", size=3, sha256="0" * 64)
        await peer.offer("job_1", 1, "audio_stt", "ears", {}, inputs=(audio,))
        await peer.expect(wire.Accept)
        fault = (await peer.expect(wire.Fail)).fault
        assert (fault.code, fault.message) == ("worker_failed", "The worker made a mistake of its own: RuntimeError.")
        assert "nobody thought of this" in caplog.text
        assert not other.cancelled
        assert r.worker.holds("job_2", 1)


async def test_a_failure_after_the_first_chunk_says_so(tmp_path):
    async with rig(tmp_path) as r:
        peer = await r.session()
        run = await r.offered(peer, stream=True)
        run.start()
        run.chunk("x")
        run.end(Failed(fault=Fault("engine_crashed", "died"), streamed=False))
        await peer.expect(wire.Started)
        await peer.expect(wire.Chunk)
        assert (await peer.expect(wire.Fail)).streamed


# ---- refusing -------------------------------------------------------------------------------------------------


async def test_what_cannot_be_taken_is_declined_with_the_code(tmp_path):
    async with rig(tmp_path) as r:
        peer = await r.session()
        await peer.offer("job_1", 1, "llm", "gone", CHAT)
        assert (await peer.expect(wire.Decline)).code == "unknown_model"
        await peer.offer("job_2", 1, "llm", "chat", {})
        assert (await peer.expect(wire.Decline)).code == "bad_offer"
        for number in range(4):  # two slots and two that wait
            await r.offered(peer, f"job_{number + 3}")
        await peer.offer("job_9", 1, "llm", "chat", CHAT)
        busy = await peer.expect(wire.Decline)
        assert (busy.code, busy.retry_after_ms > 0) == ("busy", True)


async def test_pause_resume_drain_and_shutdown(tmp_path, caplog):
    caplog.set_level("INFO", "supervisor.link.worker")
    async with rig(tmp_path) as r:
        peer = await r.session()

        async def decline_code(job: str) -> str:
            await peer.offer(job, 1, "llm", "chat", CHAT)
            return (await peer.expect(wire.Decline)).code

        await peer.send(wire.Pause(reason="lunch"))
        assert not (await peer.expect(wire.Announce)).capabilities.accepting
        assert await decline_code("a") == "paused"
        await peer.send(wire.Resume())
        assert (await peer.expect(wire.Announce)).capabilities.accepting
        await r.offered(peer, "b")
        await peer.send(wire.Drain())
        assert not (await peer.expect(wire.Announce)).capabilities.accepting
        assert await decline_code("c") == "draining"
        await peer.send(wire.Resume())
        await peer.expect(wire.Announce)
        await peer.send(wire.Pause(for_ms=50))
        assert not (await peer.expect(wire.Announce)).capabilities.accepting
        assert (await peer.expect(wire.Announce)).capabilities.accepting, "a pause runs out by itself"
        await peer.send(wire.ShutdownWorker(reason="moving house"))
        r.worker.drain("asked to")
        assert (await peer.expect(wire.Draining)).reason == "asked to"
        assert await decline_code("d") == "draining"
        assert r.shutdown == ["moving house"]
    told = [record.message for record in caplog.records if record.name == "supervisor.link.worker"]
    assert told == [
        "the coordinator pauses this worker: lunch",
        "the coordinator lifts its pause and its drain",
        "the coordinator asks for a drain",
        "the coordinator lifts its pause and its drain",
        "the coordinator pauses this worker for 0.05 s: no reason was given",
        "the coordinator ends this worker: moving house",
    ], "whose machine it is finds out who paused it"


async def test_a_coordinator_that_says_much_is_quoted_shortly(tmp_path, caplog):
    caplog.set_level(logging.INFO, "supervisor")
    async with rig(tmp_path) as r:
        peer = await r.session()
        for number in range(100):
            await peer.send(wire.Pause(reason=f"{number} " + "x" * 100_000))
        await peer.offer("job_1", 1, "llm", "y" * 100_000, CHAT)
        declined = await peer.expect(wire.Decline)
        assert declined.code == "paused"
        await peer.send(wire.Resume())
        await peer.offer("job_1", 2, "llm", "y" * 100_000, CHAT)
        unknown = await peer.expect(wire.Decline)
        assert unknown.code == "unknown_model"
        assert max(len(declined.reason), len(unknown.reason)) <= 500
        await peer.close()
        await r.session()
    said = [record for record in caplog.records if record.name == "supervisor.link.worker"]
    assert len(said) == AT_ONCE + 1
    assert all(len(record.getMessage()) < 1000 for record in said)


async def test_only_changes_are_announced(tmp_path):
    async with rig(tmp_path) as r:
        peer = await r.session()
        run = await r.offered(peer)
        r.worker.announce()
        r.worker.announce()
        r.offers = ()
        r.worker.announce()
        r.worker.announce()
        run.start()
        assert (await peer.expect(wire.Announce)).capabilities.models == ()
        body, _, _ = await peer.receive()
        assert isinstance(body, wire.Started), "nothing was announced twice"


# ---- cancelling -----------------------------------------------------------------------------------------------


async def test_a_cancel_reaches_the_engine_and_the_attempt_still_ends(tmp_path):
    async with rig(tmp_path) as r:
        peer = await r.session()
        await r.offered(peer)
        await peer.send(wire.Cancel(reason="the client hung up"), "job_1", 1)
        fail = await peer.expect(wire.Fail)
        assert fail.fault.code == "cancelled"
        assert "the client hung up" in fail.fault.message


async def test_an_engine_that_was_done_first_wins(tmp_path):
    async with rig(tmp_path) as r:
        r.host.heeds_cancel = False
        peer = await r.session()
        run = await r.offered(peer)
        await peer.send(wire.Cancel(), "job_1", 1)
        await peer.send(wire.Pause(reason="a fence: the cancel was heard before this"))
        await peer.expect(wire.Announce)
        assert run.cancelled
        run.done({"content": "too late to stop"})
        await peer.expect(wire.Complete)


async def test_a_cancel_during_the_upload_ends_it(tmp_path):
    async with rig(tmp_path) as r:
        r.transfer.gate = trio.Event()
        peer = await r.session()
        run = await r.offered(peer, upload="/{name}")
        (run.request.folder / "x").write_bytes(b"")
        run.done({}, [OutputFile("x", "x", 0, "0")])
        await r.transfer.uploading.wait()
        await peer.send(wire.Cancel(), "job_1", 1)
        assert (await peer.expect(wire.Fail)).fault.code == "cancelled"


async def test_a_deadline_goes_on_while_the_machine_sleeps(tmp_path):
    async with rig(tmp_path) as r:
        peer = await r.session()
        fetching, go_on = trio.Event(), trio.Event()

        async def fetch(*_: object) -> None:
            fetching.set()
            await go_on.wait()

        r.transfer.fetch = fetch
        files = (wire.FileRef(name="audio", url="/x", size=1, sha256=""),)
        await peer.offer("job_1", 1, "llm", "chat", CHAT, deadline_ms=60_000, inputs=files)
        await fetching.wait()
        r.worker.slept(50.0)
        go_on.set()
        run = await r.host.next_run()
        assert run.request.deadline_s <= 10.0


async def test_a_pause_ends_when_it_should_although_the_machine_slept(tmp_path):
    async with rig(tmp_path) as r:
        peer = await r.session()
        await peer.send(wire.Pause(reason="for an hour", for_ms=3_600_000))
        assert not (await peer.expect(wire.Announce)).capabilities.accepting
        r.worker.slept(3_600.0)
        assert (await peer.expect(wire.Announce)).capabilities.accepting


async def test_a_job_that_the_owner_of_the_box_ends_goes_on_elsewhere_and_not_here(tmp_path):
    async with rig(tmp_path) as r:
        peer = await r.session()
        run = await r.offered(peer)
        r.attempts.give_back("job_1", 1, "I need the machine")
        fail = await peer.expect(wire.Fail)
        assert (fail.fault.code, fail.fault.may_retry) == ("worker_stopping", True)
        assert "owner of the worker" in fail.fault.message
        assert "I need the machine" in fail.fault.message
        assert run.cancelled
        ended = 'bulkhead_jobs_total{kind="llm",model="chat",outcome="cancelled"} 1'
        assert {ended} <= {*r.tally.lines()}, "for the owner it is"
        await peer.send(wire.Ack(), "job_1", 1)
        await peer.offer("job_1", 2, "llm", "chat", CHAT)
        decline = await peer.expect(wire.Decline)
        assert (decline.code, decline.retry_after_ms) == ("unsupported", 0), "for good: it would come back for ever"
        (await r.offered(peer, "job_2")).done({})
        await peer.expect(wire.Complete)


async def test_a_cancel_of_something_unknown_is_nothing(tmp_path):
    async with rig(tmp_path) as r:
        peer = await r.session()
        await peer.send(wire.Cancel(), "job_77", 1)
        run = await r.offered(peer)
        run.done({})
        await peer.expect(wire.Complete)


async def test_a_stream_that_nobody_acknowledges_is_ended_before_memory_is(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "MAX_UNACKED_BYTES", 100 + ledger_module.CHUNK_BYTES)
    async with rig(tmp_path) as r:
        peer = await r.session()
        run = await r.offered(peer, stream=True)
        run.start()
        run.chunk("x" * 60)
        run.chunk("x" * 60)
        await peer.expect(wire.Started)
        await peer.expect(wire.Chunk)
        await peer.expect(wire.Chunk)
        fail = await peer.expect(wire.Fail)
        assert (fail.fault.code, fail.streamed) == ("worker_failed", True)


async def test_progress_is_thinned_out(tmp_path, monkeypatch):
    monkeypatch.setattr(attempts_module, "PROGRESS_EVERY_S", 3600.0)
    async with rig(tmp_path) as r:
        peer = await r.session()
        run = await r.offered(peer)
        for n in range(1000):
            run.progress(n)
        run.done({})
        assert (await peer.expect(wire.Progress)).n == 0
        await peer.expect(wire.Complete)


# ---- reconnecting ---------------------------------------------------------------------------------------------


async def test_work_goes_on_without_a_session_and_everything_is_said_again(tmp_path):
    async with rig(tmp_path) as r:
        peer = await r.session()
        run = await r.offered(peer, stream=True)
        other = await r.offered(peer, "job_2")
        run.start()
        run.chunk("a")
        run.chunk("b")
        for type_ in (wire.Started, wire.Chunk, wire.Chunk):
            await peer.expect(type_)
        await peer.send(wire.ChunkAck(seq=0), "job_1", 1)
        await peer.close(1001)
        run.chunk("c")
        other.done({"content": "done meanwhile"})

        again = await r.session()
        held = {(item.job, item.started) for item in again.hello.held}
        assert held == {("job_1", True), ("job_2", False)}
        heard = [await again.receive() for _ in range(4)]
        mine = [body for body, job, _ in heard if job == "job_1"]
        assert isinstance(mine[0], wire.Started)
        assert [body.seq for body in mine[1:]] in ([0, 1, 2], [1, 2])  # the ack may have crossed the close
        rest = heard if len(mine) == 3 else [*heard, await again.receive()]
        assert [job for body, job, _ in rest if isinstance(body, wire.Complete)] == ["job_2"]
        run.done({"content": "abc"})
        assert msgspec.msgpack.decode((await again.expect(wire.Complete)).result) == {"content": "abc"}


async def test_a_result_is_said_until_it_is_acknowledged(tmp_path):
    async with rig(tmp_path) as r:
        peer = await r.session()
        (await r.offered(peer)).done({"content": "x"})
        await peer.expect(wire.Complete)
        await peer.close()
        for _ in range(2):
            peer = await r.session()
            await peer.expect(wire.Complete)
            await peer.close()
        peer = await r.session()
        await peer.expect(wire.Complete)
        await peer.send(wire.Ack(), "job_1", 1)
        await r.gone("job_1.1")
        await peer.close()
        assert (await r.session()).hello.held == ()


async def test_a_fenced_attempt_is_dropped_and_its_run_ended(tmp_path):
    async with rig(tmp_path) as r:
        peer = await r.session()
        run = await r.offered(peer)
        await peer.close()
        peer = await r.session()
        await peer.send(wire.Ack(verdict="fenced"), "job_1", 1)
        await r.gone("job_1.1")
        assert run.cancelled
        assert not r.worker.holds("job_1", 1)
        await r.offered(peer, attempt=2)


async def test_stopping_tells_each_attempt_why(tmp_path):
    async with rig(tmp_path) as r:
        peer = await r.session()
        run = await r.offered(peer)
        r.attempts.stop_all(Fault("worker_stopping", "The worker stopped."))
        assert (await peer.expect(wire.Fail)).fault.code == "worker_stopping"
        assert run.cancelled


@pytest.mark.parametrize(
    ("code", "level", "words"),
    [
        ("", logging.INFO, "llm job done in T s"),
        ("cancelled", logging.INFO, "llm job cancelled after T s"),
        ("invalid_parameter", logging.INFO, "llm job failed after T s: invalid_parameter, the caller's fault"),
        ("engine_crashed", logging.WARNING, "llm job failed after T s: engine_crashed, the engine's fault"),
        ("worker_disk_full", logging.WARNING, "llm job failed after T s: worker_disk_full, the worker's fault"),
        ("worker_stopping", logging.INFO, "llm job failed after T s: worker_stopping, the worker's fault"),
    ],
)
async def test_a_job_is_one_line_that_says_who_is_at_fault_and_quotes_nobody(tmp_path, caplog, code, level, words):
    caplog.set_level(logging.INFO, "supervisor")
    async with rig(tmp_path) as r:
        peer = await r.session()
        run = await r.offered(peer)
        if code:
            run.fail(code, "my secret diary says")
            await peer.expect(wire.Fail)
        else:
            run.done({})
            await peer.expect(wire.Complete)
        lines = [record for record in caplog.records if record.name == "supervisor.link.attempts"]
        assert [(line.levelno, re.sub(r"[0-9.]+(?= s)", "T", line.getMessage())) for line in lines] == [(level, words)]
        assert "diary" not in caplog.text
