"""The workers' WebSocket: who may open it, what ends it, and what does not."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from starlette.websockets import WebSocket
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from coordinator.blobs.folder import FolderBlobs
from coordinator.dispatch import Dispatcher
from coordinator.dispatch_settings import DispatchSettings
from coordinator.gateway import GatewaySettings, worker_endpoint
from coordinator.records import JobEnded, WorkerScope
from coordinator.store import SqliteStore
from coordinator.testing_link import CHAT, PATIENCE_S, TOKEN, Desk, RawWorker, running_desk
from protocol import link_wire as wire
from protocol.revision import LINK_SUBPROTOCOL, LINK_WIRE

FAST = DispatchSettings(poll_s=0.05, sweep_s=0.05, worker_grace_s=0.5, startup_grace_s=0.5)
HELLO = wire.Hello(worker="w1", low=1, high=1, capabilities=wire.Capabilities(models=(CHAT,)))


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Desk]:
    with running_desk(tmp_path, FAST) as desk:
        yield desk


@pytest.fixture
def worker(desk: Desk) -> Iterator[RawWorker]:
    with desk.worker() as worker:
        yield worker


@pytest.fixture
def raw(desk: Desk) -> Iterator[RawWorker]:
    """Connected, not greeted, and free to send anything."""
    with RawWorker(desk.port, judge=False) as worker:
        yield worker


# ---- getting in --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers",
    [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {TOKEN}"}, {"Authorization": "Bearer "}],
)
def test_without_a_good_token_the_upgrade_is_refused_with_401(desk: Desk, headers: dict[str, str]) -> None:
    url, subprotocols = f"ws://127.0.0.1:{desk.port}/v1/worker", [LINK_SUBPROTOCOL]
    with (
        pytest.raises(InvalidStatus) as caught,
        connect(url, subprotocols=subprotocols, additional_headers=headers, proxy=None),
    ):
        pass
    response = caught.value.response
    assert response.status_code == 401
    assert response.body is not None
    assert msgspec.json.decode(response.body)["error"]["code"] == "unauthorized"


def test_without_our_subprotocol_the_upgrade_is_refused(desk: Desk) -> None:
    headers = {"Authorization": f"Bearer {TOKEN}"}
    with (
        pytest.raises(InvalidStatus) as caught,
        connect(f"ws://127.0.0.1:{desk.port}/v1/worker", additional_headers=headers, proxy=None),
    ):
        pass
    assert caught.value.response.status_code == 400


def test_the_subprotocol_is_echoed_and_nothing_is_compressed(worker: RawWorker) -> None:
    assert worker.socket.subprotocol == LINK_SUBPROTOCOL
    assert worker.socket.protocol.extensions == []


def test_welcome_names_session_revision_and_heartbeat(desk: Desk) -> None:
    with RawWorker(desk.port) as one, RawWorker(desk.port, "w2") as two:
        first, second = one.hello(), two.hello()
        assert (first.revision, first.heartbeat_ms) == (LINK_WIRE.high, 5000)
        assert first.session != second.session


def test_a_pinned_token_admits_its_own_worker_only(desk: Desk) -> None:
    with RawWorker(desk.port, "w1", "pinned:w1") as good:
        good.hello()
    with RawWorker(desk.port, "w2", "pinned:w1") as bad:
        bad.send(msgspec.structs.replace(HELLO, worker="w2"))
        error, code = bad.expect_close()
        assert error is not None
        assert (error.code, code) == ("auth_failed", wire.CLOSE_AUTH)


def test_no_common_revision(raw: RawWorker) -> None:
    raw.send(msgspec.structs.replace(HELLO, low=7, high=9))
    error, code = raw.expect_close()
    assert error is not None
    assert (error.code, code) == ("bad_revision", wire.CLOSE_REVISION)
    assert "7 to 9" in error.message


def test_the_newer_session_of_a_worker_wins(desk: Desk) -> None:
    with desk.worker() as older:
        record = desk.submit()
        offer = older.take()
        desk.until(lambda: desk.get(record.id).state == "running")
        claims = (wire.Held(job=offer.job, attempt=offer.attempt, started=True),)
        with desk.worker(held=claims) as newer:
            error, code = older.expect_close()
            assert error is not None
            assert (error.code, code) == ("duplicate_worker", wire.CLOSE_DUPLICATE)
            assert len(desk.dispatcher.workers()) == 1
            assert newer.complete(offer).verdict == "stored"
            desk.submit()
            newer.expect(wire.Offer)


# ---- what ends a session -----------------------------------------------------------------------------------


BAD_FIRST = {
    "not hello": wire.encode(wire.Heartbeat(n=1)),
    "no envelope": b"\xc1",
    "empty": b"",
    "an array": msgspec.msgpack.encode([1, 2]),
    "unknown tag": msgspec.msgpack.encode(wire.Envelope("hallo")),
    "broken hello": msgspec.msgpack.encode(wire.Envelope("hello", body=msgspec.Raw(b"\x80"))),
    "a slash in the id": wire.encode(msgspec.structs.replace(HELLO, worker="../x")),
    "an attempt 0": wire.encode(msgspec.structs.replace(HELLO, held=(wire.Held(job="j", attempt=0),))),
    "an attempt beyond SQL": wire.encode(msgspec.structs.replace(HELLO, held=(wire.Held(job="j", attempt=2**63),))),
    "too many held": wire.encode(msgspec.structs.replace(HELLO, held=(wire.Held(job="j", attempt=1),) * 5000)),
}


@pytest.mark.parametrize("data", BAD_FIRST.values(), ids=BAD_FIRST)
def test_a_bad_first_message_ends_the_session(desk: Desk, raw: RawWorker, data: bytes) -> None:
    raw.socket.send(data)
    error, code = raw.expect_close()
    assert error is not None
    assert (error.code, code) == ("protocol_violation", wire.CLOSE_PROTOCOL)
    assert desk.dispatcher.workers() == []


BAD_LATER = {
    "no envelope": b"\xc1",
    "a second hello": wire.encode(HELLO),
    "an end of nothing": wire.encode(wire.Complete(), "job_x", 1),
    "an accept of nothing": wire.encode(wire.Accept(), "job_x", 1),
    "an accept without a job": wire.encode(wire.Accept()),
    "a large attempt": wire.encode(wire.Accept(), "job_x", 2**63),
    "a small attempt": wire.encode(wire.Accept(), "job_x", -1),
}


@pytest.mark.parametrize("data", BAD_LATER.values(), ids=BAD_LATER)
def test_an_illegal_message_ends_the_session(desk: Desk, raw: RawWorker, data: bytes) -> None:
    raw.hello()
    raw.socket.send(data)
    error, code = raw.expect_close()
    assert error is not None
    assert (error.code, code) == ("protocol_violation", wire.CLOSE_PROTOCOL)
    desk.until(lambda: desk.dispatcher.workers() == [])


def test_text_is_no_message(raw: RawWorker) -> None:
    raw.hello()
    raw.socket.send('{"t":"heartbeat"}')
    assert raw.expect_close()[1] == wire.CLOSE_PROTOCOL


def test_a_message_beyond_the_limit_ends_the_session(desk: Desk, raw: RawWorker) -> None:
    raw.hello()
    with contextlib.suppress(ConnectionClosed):  # the refusal may come while it is still sending
        raw.socket.send(b"\x00" * (wire.MAX_MESSAGE_BYTES + 1))
    assert raw.expect_close()[1] in (1009, 1006)  # a reset may overtake the close frame
    desk.until(lambda: desk.dispatcher.workers() == [])


def test_a_gap_in_the_chunks_ends_the_session(desk: Desk, raw: RawWorker) -> None:
    raw.hello()
    desk.submit(stream=True)
    offer = raw.take()
    raw.chunk(offer, 1)
    assert raw.expect_close()[1] == wire.CLOSE_PROTOCOL


def test_silence_ends_the_session(tmp_path: Path) -> None:
    with running_desk(tmp_path, FAST, GatewaySettings(heartbeat_ms=200)) as desk, desk.worker() as worker:
        error, code = worker.expect_close()
        assert error is not None
        assert (error.code, code) == ("internal_error", 1011)
        desk.until(lambda: desk.dispatcher.workers() == [])


async def test_heartbeats_prevent_that(tmp_path: Path, autojump_clock: trio.testing.MockClock) -> None:
    """By a clock that stands still while the machine is busy: 0.6 s of silence are allowed."""
    up_in, up = trio.open_memory_channel[Any](math.inf)
    down_in, down = trio.open_memory_channel[Any](math.inf)
    scope = {
        "type": "websocket",
        "headers": [(b"authorization", f"Bearer {TOKEN}".encode())],
        "subprotocols": [LINK_SUBPROTOCOL],
    }
    store = SqliteStore(tmp_path / "jobs.sqlite")
    try:
        dispatcher = Dispatcher(store, FolderBlobs(tmp_path / "blobs"), settings=FAST)
        endpoint = worker_endpoint(dispatcher, lambda _token: WorkerScope(), GatewaySettings(heartbeat_ms=200))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(endpoint, WebSocket(scope, up.receive, down_in.send))
            await up_in.send({"type": "websocket.connect"})
            assert (await down.receive())["type"] == "websocket.accept"
            await up_in.send({"type": "websocket.receive", "bytes": wire.encode(HELLO)})
            assert said(await down.receive()) == "welcome"
            for n in range(8):
                await trio.sleep(0.5)
                await up_in.send({"type": "websocket.receive", "bytes": wire.encode(wire.Heartbeat(n=n))})
                assert said(await down.receive()) == "heartbeat_ack"
            heard_at = trio.current_time()
            assert said(await down.receive()) == "error"
            assert trio.current_time() - heard_at == pytest.approx(0.6)
            closing = await down.receive()
            assert (closing["type"], closing["code"]) == ("websocket.close", 1011)
        assert dispatcher.workers() == []
    finally:
        store.close()


def said(message: dict[str, Any]) -> str:
    return wire.decode_envelope(message["bytes"]).t


def test_who_never_says_hello_is_sent_away(tmp_path: Path) -> None:
    with running_desk(tmp_path, FAST, GatewaySettings(hello_s=0.5)) as desk, RawWorker(desk.port) as worker:
        assert worker.expect_close()[1] == wire.CLOSE_PROTOCOL


def test_a_worker_that_does_not_read_holds_nobody_up(tmp_path: Path) -> None:
    """Its socket is full, its queue is full: it is disconnected, and its jobs wait for another worker."""
    gateway = GatewaySettings(queued_bytes=2**20, close_s=0.2)
    with running_desk(tmp_path, FAST, gateway) as desk:
        deaf = desk.worker("deaf", msgspec.structs.replace(CHAT, slots=2000))
        params = msgspec.msgpack.encode({"prompt": "x" * 100_000})
        jobs = []
        while desk.dispatcher.workers():
            jobs.append(desk.submit(params=params, wait_for_worker=True))
            assert len(jobs) < 1000
        assert desk.get(jobs[0].id).attempt >= 1
        desk.until(lambda: not desk.store.open_attempts())
        with desk.worker("w2") as other:
            while (offer := other.take()).job != jobs[0].id:  # one that was claimed meanwhile is due a little later
                other.complete(offer)
        deaf.drop()


# ---- what does not -----------------------------------------------------------------------------------------


UNREADABLE = {
    "chunk": ("chunk", b"\x81\xa3seq\xa1x"),
    "progress": ("progress", b"\x81\xa1n\xa1x"),
    "unknown": ("from_the_future", b"\x80"),
    "complete": ("complete", b"\x81\xa5files\x05"),
    "fail": ("fail", b"\x80"),
    "chunk that JSON cannot say": ("chunk", b"\x82\xa3seq\x01\xa4data\xd4\x05x"),
    "chunk with odd keys": ("chunk", b"\x82\xa3seq\x01\xa4data\x81\xc0\x01"),
    "fault that JSON cannot say": (
        "fail",
        b"\x81\xa5fault\x83\xa4code\xabload_failed\xa7message\xa1x\xa6detail\x81\xa1k\xd4\x05x",
    ),
    "bad utf-8": ("fail", b"\x81\xa5fault\x82\xa4code\xa2\xff\xff\xa7message\xa1x"),
}


@pytest.mark.parametrize(("tag", "body"), UNREADABLE.values(), ids=UNREADABLE)
def test_an_unreadable_body_fails_its_attempt_and_keeps_the_session(
    desk: Desk, raw: RawWorker, tag: str, body: bytes
) -> None:
    raw.hello()
    record, events = desk.follow(max_attempts=1, stream=True)
    offer = raw.take()
    raw.chunk(offer, 0)
    raw.send_raw(tag, body, offer.job, offer.attempt)
    end = events.result(PATIENCE_S)[-1]
    assert isinstance(end, JobEnded)
    assert end.record.fault is not None
    assert (end.record.id, end.record.state, end.record.fault.code) == (record.id, "failed", "engine_protocol")
    assert raw.expect(wire.Cancel).job == record.id
    if tag not in ("complete", "fail"):
        raw.chunk(offer, 1)  # it may not have seen the cancel yet
        raw.send(wire.Complete(), offer.job, offer.attempt)
    assert raw.expect(wire.Ack).body.verdict in ("fenced", "stored")
    desk.submit()
    raw.complete(raw.take())  # the slot is free, the session lives


@pytest.mark.parametrize("tag", ["accept", "decline"])
def test_an_unreadable_answer_to_an_offer_requeues_it(desk: Desk, raw: RawWorker, tag: str) -> None:
    raw.hello()
    record = desk.submit(max_attempts=1)
    offer = raw.expect(wire.Offer)
    raw.send_raw(tag, b"\x90", offer.job, offer.attempt)
    if tag == "accept":
        assert raw.expect(wire.Cancel).job == record.id
        raw.send(wire.Started(), offer.job, offer.attempt)
        raw.send(wire.Complete(), offer.job, offer.attempt)
        assert raw.expect(wire.Ack).body.verdict == "fenced"
    again = raw.take()
    assert (again.job, again.attempt) == (record.id, 2)
    raw.complete(again)
    assert desk.get(record.id).tries == 1


def test_an_unreadable_message_without_a_job_is_passed_over(desk: Desk, raw: RawWorker) -> None:
    raw.hello()
    raw.send_raw("from_the_future", b"\x80")
    raw.send_raw("heartbeat", b"\x81\xa1n\xa1x")
    raw.send_raw("complete", b"\x05", "job_unknown", 3)
    raw.send(wire.Heartbeat(n=7))
    assert raw.expect(wire.HeartbeatAck).body.n == 7
    assert desk.dispatcher.counters.events["unreadable"] == 3


def test_messages_that_cannot_be_read_fill_no_log(desk: Desk, raw: RawWorker, caplog: pytest.LogCaptureFixture) -> None:
    raw.hello()
    for number in range(200):
        raw.send_raw(f"from_the_future_{number}" + "x" * 10_000, b"\x80")
    raw.send(wire.Heartbeat(n=1))
    assert raw.expect(wire.HeartbeatAck).body.n == 1
    said = [record.getMessage() for record in caplog.records if "cannot be read" in record.getMessage()]
    assert 20 <= len(said) < 60
    assert max(map(len, said)) < 5000


def test_chunks_are_acknowledged_in_bunches(desk: Desk, worker: RawWorker) -> None:
    desk.submit(stream=True)
    offer = worker.take()
    for seq in range(50):
        worker.chunk(offer, seq)
    acks = []
    while not acks or acks[-1] < 49:
        said = worker.receive()
        assert isinstance(said.body, wire.ChunkAck)
        acks.append(said.body.seq)
    assert acks == sorted(acks)
    assert len(acks) < 50
    worker.complete(offer)


def test_a_draining_worker_finishes_and_gets_nothing_new(desk: Desk, worker: RawWorker) -> None:
    desk.submit()
    offer = worker.take()
    worker.send(wire.Draining(reason="asked to stop"))
    desk.until(lambda: not desk.dispatcher.workers()[0].accepting)
    desk.submit(wait_for_worker=True)
    assert worker.complete(offer).verdict == "stored"
    assert worker.quiet()


def test_log_lines_go_to_the_log(desk: Desk, worker: RawWorker, caplog: pytest.LogCaptureFixture) -> None:
    line = wire.LogLine(ts="2026-11-21T10:00:00Z", level="warning", message="two\nlines", job="job_1")
    worker.send(wire.LogBatch(lines=(line,), dropped=3))
    worker.send(wire.Heartbeat(n=1))
    worker.expect(wire.HeartbeatAck)
    lost, record = [record for record in caplog.records if record.name == "coordinator.worker"]
    assert lost.getMessage() == "w1: 3 lines of its log were lost"
    assert vars(record)["job"] == "job_1"
    assert record.levelname == "WARNING"
    assert "two\\nlines" in record.getMessage()  # one entry stays one line


def test_a_worker_that_comes_again_and_again_fills_no_log(desk: Desk, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(20):
        with desk.worker() as worker:
            worker.send(wire.LogBatch(lines=(), dropped=1))
            worker.send(wire.Heartbeat(n=1))
            worker.expect(wire.HeartbeatAck)
    lost = [record for record in caplog.records if "lines of its log were lost" in record.getMessage()]
    assert 1 <= len(lost) < 15  # some at once, then one in ten seconds


def test_a_full_disk_keeps_the_result_with_the_worker(tmp_path: Path) -> None:
    """Nothing is acknowledged that was not stored: the session ends, the worker brings it again."""
    patient = msgspec.structs.replace(FAST, worker_grace_s=60.0)
    with running_desk(tmp_path, patient) as desk, desk.worker() as worker:
        record, events = desk.follow()
        offer = worker.take()
        desk.until(lambda: desk.get(record.id).state == "running")
        pages = desk.store._writer.execute("PRAGMA page_count").fetchone()["page_count"]
        desk.store._writer.execute(f"PRAGMA max_page_count = {pages}")
        result = {"content": "x" * 200_000}
        worker.send(wire.Complete(result=msgspec.Raw(msgspec.msgpack.encode(result))), offer.job, offer.attempt)
        error, code = worker.expect_close()
        assert error is not None
        assert (error.code, code) == ("internal_error", 1011)
        desk.store._writer.execute("PRAGMA max_page_count = 1000000")
        with desk.worker(held=(wire.Held(job=offer.job, attempt=offer.attempt, started=True),)) as again:
            assert again.complete(offer, result).verdict == "stored"
        end = events.result(PATIENCE_S)[-1]
        assert isinstance(end, JobEnded)
        assert (end.record.state, end.record.attempt) == ("succeeded", 1)
