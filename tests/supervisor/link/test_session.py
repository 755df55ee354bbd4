from __future__ import annotations

import contextlib
import logging
from typing import Any

import msgspec
import pytest
import trio
from trio_websocket import ConnectionClosed

from protocol import link_wire as wire
from supervisor.link import session as subject
from supervisor.link.session import Address, SessionEnd, Why, converse
from supervisor.observe.paced import AT_ONCE
from supervisor.suspend import Clocks
from supervisor.testing import FakeCoordinator, open_coordinator


class FakeSide:
    """Records what a session tells it."""

    def __init__(self) -> None:
        self.posts: list = []
        self.log: list = []
        self.post = None
        self.held: set = set()
        self.running = 3
        self.heard_one = trio.Event()

    def hello(self) -> wire.Hello:
        return wire.Hello(worker="w", low=1, high=1, boot="b")

    def opened(self, post) -> None:
        self.post = post
        self.log.append("opened")

    def heard(self, body, job, attempt) -> None:
        self.log.append((body, job, attempt))
        self.heard_one.set()

    def broken_offer(self, job, attempt, reason) -> None:
        self.log.append(("broken", job, attempt))
        self.post(wire.Decline(code="bad_offer", reason=reason), job, attempt)

    def closed(self) -> None:
        self.log.append("closed")

    def heartbeat(self, n: int) -> wire.Heartbeat:
        return wire.Heartbeat(n=n, running=self.running, gpus=(wire.GpuState(uuid="GPU-a", busy=0.5),))

    def holds(self, job, attempt) -> bool:
        return (job, attempt) in self.held


@contextlib.asynccontextmanager
async def talking(side: FakeSide, coordinator: FakeCoordinator, clocks: Clocks | None = None, **fields: Any):
    """A session in the background; yields the list that gets its end."""
    ends: list[SessionEnd] = []
    over = trio.Event()

    async def talk() -> None:
        ends.append(await converse(Address(url=coordinator.url, token="t0ken", **fields), side, clocks))
        over.set()

    async def wait() -> SessionEnd:
        with trio.fail_after(20):
            await over.wait()
        return ends[0]

    async with trio.open_nursery() as nursery:
        nursery.start_soon(talk)
        yield wait
        nursery.cancel_scope.cancel()


async def test_it_greets_with_token_and_subprotocol_and_nothing_before_welcome(monkeypatch):
    monkeypatch.setattr(subject, "SILENT_BEATS", 1000)
    monkeypatch.setattr(subject, "UNANSWERED_BEATS", 1000)
    side = FakeSide()
    async with open_coordinator() as coordinator, talking(side, coordinator):
        peer = await coordinator.connection()
        hello = await peer.expect(wire.Hello)
        assert hello.worker == "w"
        assert peer.headers["authorization"] == "Bearer t0ken"
        assert peer.socket.path == "/v1/worker"
        assert side.log == []
        await peer.send(wire.Welcome(session="s", revision=1, heartbeat_ms=100))
        while peer.heartbeats < 2:  # heartbeats are the first thing after welcome, and are counted by receive
            with trio.move_on_after(0.3):
                await peer.receive()
        assert side.log[0] == "opened"


@pytest.mark.parametrize(
    ("code", "why"),
    [
        (4001, Why.REFUSED),
        (4002, Why.PROTOCOL),
        (4003, Why.DUPLICATE),
        (4004, Why.DELETED),
        (4005, Why.REVISION),
        (1001, Why.LOST),
        (1011, Why.LOST),
    ],
)
async def test_close_codes_are_endings(code, why):
    side = FakeSide()
    async with open_coordinator() as coordinator, talking(side, coordinator) as end:
        peer = await coordinator.session()
        await peer.close(code, "because")
        ended = await end()
        assert ended.why is why
        assert "because" in ended.sentence
        assert ended.sent_on is (code == 1001)
        assert side.log == ["opened", "closed"]


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("auth_failed", Why.REFUSED),
        ("duplicate_worker", Why.DUPLICATE),
        ("worker_deleted", Why.DELETED),
        ("bad_revision", Why.REVISION),
        ("internal_error", Why.LOST),
        ("unheard_of", Why.LOST),
    ],
)
@pytest.mark.parametrize("before_welcome", [True, False])
async def test_error_messages_are_endings(code, why, before_welcome):
    async with open_coordinator() as coordinator, talking(FakeSide(), coordinator) as end:
        peer = await coordinator.connection()
        if before_welcome:
            await peer.expect(wire.Hello)
        else:
            await peer.welcome()
        await peer.send(wire.Error(code=code, message="go away"))
        ended = await end()
        assert (ended.why, "go away" in ended.sentence) == (why, True)


@pytest.mark.parametrize(("status", "why"), [(401, Why.REFUSED), (403, Why.REFUSED), (404, Why.LOST), (503, Why.LOST)])
async def test_rejected_upgrades(status, why):
    async with open_coordinator() as coordinator:
        coordinator.reject_with = status
        end = await converse(Address(url=coordinator.url, token="x"), FakeSide())
        assert (end.why, end.lasted_s) == (why, 0)
        assert f"HTTP {status}: no entry" in end.sentence


async def test_a_stranger_at_its_port_costs_the_fake_coordinator_nothing():
    side = FakeSide()
    async with open_coordinator() as coordinator:
        async with await trio.open_tcp_stream("127.0.0.1", int(coordinator.url.rpartition(":")[2])) as stranger:
            await stranger.send_all(
                b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
            )
            assert b" 400 " in await stranger.receive_some()
        async with talking(side, coordinator):
            assert (await coordinator.session()).headers["authorization"] == "Bearer t0ken"


async def test_a_peer_without_our_subprotocol_is_of_another_revision():
    async with open_coordinator() as coordinator:
        coordinator.subprotocol = None
        end = await converse(Address(url=coordinator.url, token="x"), FakeSide())
        assert end.why is Why.REVISION


async def test_nobody_there():
    end = await converse(Address(url="ws://127.0.0.1:9", token="x"), FakeSide())
    assert end.why is Why.LOST
    assert "cannot be reached" in end.sentence
    assert "refused" in end.sentence.lower()


async def test_a_server_that_is_no_tls_server():
    async with open_coordinator() as coordinator:
        end = await converse(Address(url=coordinator.url.replace("ws:", "wss:"), token="x"), FakeSide())
        assert end.why is Why.LOST
        assert "ssl" in end.sentence.lower() or "tls" in end.sentence.lower()


@pytest.mark.parametrize("stage", ["tls", "upgrade", "welcome"])
async def test_one_deadline_covers_the_whole_way_to_welcome(stage):
    connect_s = 1.5 if stage == "welcome" else 0.2  # the connection is made within it
    if stage in ("tls", "upgrade"):
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        where = f"{'wss' if stage == 'tls' else 'ws'}://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        with trio.fail_after(20):
            end = await converse(Address(url=where, token="x", connect_s=connect_s), FakeSide())
        await listeners[0].aclose()
    else:
        async with (
            open_coordinator() as coordinator,
            talking(FakeSide(), coordinator, connect_s=connect_s) as wait,
        ):
            await coordinator.connection()
            end = await wait()
    assert end.why is Why.LOST
    assert f"did not welcome us in {connect_s:g} s" in end.sentence


async def test_silence_is_the_end_whatever_tcp_thinks(monkeypatch):
    monkeypatch.setattr(subject, "CLOSE_PATIENCE_S", 0.05)
    async with open_coordinator() as coordinator, talking(FakeSide(), coordinator) as end:
        await coordinator.session(heartbeat_ms=100)
        ended = await end()
        assert ended.why is Why.LOST
        assert "silent for 0.3 s" in ended.sentence
        assert ended.lasted_s >= 0.3


async def test_a_peer_that_talks_and_answers_no_heartbeat_is_left(monkeypatch):
    monkeypatch.setattr(subject, "SILENT_BEATS", 1000)
    async with open_coordinator() as coordinator, talking(FakeSide(), coordinator) as end:
        peer = await coordinator.session(heartbeat_ms=100)
        peer.answers_heartbeats = False

        async def talk() -> None:
            with contextlib.suppress(ConnectionClosed):
                while True:
                    await peer.send(wire.Cancel(), "job_1", 1)
                    await trio.sleep(0.02)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(talk)
            ended = await end()
            nursery.cancel_scope.cancel()
        assert (ended.why, "did not answer the last 6 heartbeats" in ended.sentence) == (Why.LOST, True)


async def test_a_heart_that_beats_while_the_session_closes_does_not_hide_why(monkeypatch, caplog):
    """The peer does not answer the closing handshake, which so lasts for several beats."""
    monkeypatch.setattr(subject, "CLOSE_PATIENCE_S", 0.6)
    monkeypatch.setattr(subject, "SILENT_BEATS", 1000)
    monkeypatch.setattr(subject, "UNANSWERED_BEATS", 1000)
    side, beaten = FakeSide(), trio.Event()

    def heartbeat(n: int) -> wire.Heartbeat:
        side.log.append("beat")
        if side.log.count("beat") == 2:
            beaten.set()
        return wire.Heartbeat(n=n)

    side.heartbeat = heartbeat
    async with open_coordinator() as coordinator, talking(side, coordinator) as end:
        peer = await coordinator.session(heartbeat_ms=200)
        with trio.fail_after(20):
            await beaten.wait()  # nobody takes them from the peer's inbox, which is full now
        await peer.send(wire.Error(code="auth_failed", message="no"))
        assert (await end()).why is Why.REFUSED
    assert not [record for record in caplog.records if "we broke" in record.message]


class Nap:
    """Clocks of a machine that the test puts to sleep."""

    def __init__(self) -> None:
        self.slept_s = 0.0
        self.watched = trio.Event()

    def always(self) -> float:
        self.watched.set()
        return self.slept_s

    def clocks(self) -> Clocks:
        return Clocks(lambda: 0.0, self.always)


@pytest.mark.parametrize("there", [True, False])
async def test_after_a_sleep_the_peer_has_one_beat_to_answer(there, monkeypatch):
    monkeypatch.setattr(subject, "SLEEP_LOOK_S", 0.02)
    monkeypatch.setattr(subject, "CLOSE_PATIENCE_S", 0.05)
    monkeypatch.setattr(subject, "SILENT_BEATS", 1000)
    nap, side = Nap(), FakeSide()
    async with open_coordinator() as coordinator, talking(side, coordinator, clocks=nap.clocks()) as end:
        peer = await coordinator.session(heartbeat_ms=60_000 if there else 500)
        peer.answers_heartbeats = there
        await nap.watched.wait()
        nap.slept_s = 3600
        if there:
            with trio.fail_after(20):  # a minute before the next beat is due
                while not peer.heartbeats:
                    with trio.move_on_after(0.05):
                        await peer.receive()
            await peer.send(wire.Cancel(), "job_1", 1)
            with trio.fail_after(20):
                await side.heard_one.wait()
        else:
            ended = await end()
            assert (ended.why, "silent after the machine slept" in ended.sentence) == (Why.LOST, True)


async def test_a_body_that_cannot_be_read_costs_that_job_and_not_the_session():
    side = FakeSide()
    async with open_coordinator() as coordinator, talking(side, coordinator):
        peer = await coordinator.session()
        peer.session.sending(wire.Offer(kind="", model="", params=msgspec.Raw(b"\x80")), "job_1", 1)
        broken = wire.Envelope("offer", "job_1", 1, msgspec.Raw(msgspec.msgpack.encode({"kind": 5})))
        await peer.send_raw(msgspec.msgpack.encode(broken))
        await peer.send_raw(msgspec.msgpack.encode(wire.Envelope("frobnicate", "job_2", 1)))
        decline = await peer.expect(wire.Decline)
        assert decline.code == "bad_offer"
        await peer.send(wire.Pause(reason="still here"))
        with trio.fail_after(20):
            await side.heard_one.wait()
        assert side.log[1:] == [("broken", "job_1", 1), (wire.Pause(reason="still here"), "", 0)]


@pytest.mark.parametrize("data", [b"\xc1", b"\x90", "text"])
async def test_something_without_an_envelope_ends_the_session(data):
    async with open_coordinator() as coordinator, talking(FakeSide(), coordinator) as end:
        peer = await coordinator.session()
        await peer.send_raw(data)
        assert (await end()).why is Why.PROTOCOL


async def test_an_illegal_message_ends_the_session():
    async with open_coordinator() as coordinator, talking(FakeSide(), coordinator) as end:
        peer = await coordinator.session()
        await peer.send_raw(wire.encode(wire.Ack(), "job_1", 1))
        ended = await end()
        assert ended.why is Why.PROTOCOL
        assert "ack is illegal for job_1#1" in ended.sentence


async def test_an_offer_of_what_is_held_already_is_passed_over(caplog):
    side = FakeSide()
    side.held.add(("job_1", 1))
    async with open_coordinator() as coordinator, talking(side, coordinator):
        peer = await coordinator.session()
        await peer.offer("job_1", 1, "llm", "m", {})
        await peer.send(wire.Resume())
        with trio.fail_after(20):
            await side.heard_one.wait()
        assert side.log[1:] == [(wire.Resume(), "", 0)]
    assert "offered again" in caplog.text


async def test_our_own_mistake_is_logged_and_ends_only_the_session(caplog):
    class Clumsy(FakeSide):
        def heard(self, body, job, attempt) -> None:
            self.post(wire.Complete(), "never_offered", 1)

    async with open_coordinator() as coordinator, talking(Clumsy(), coordinator) as end:
        peer = await coordinator.session()
        await peer.send(wire.Resume())
        assert (await end()).why is Why.PROTOCOL
    assert [record.levelno for record in caplog.records if "we broke" in record.message] == [logging.ERROR]


async def test_our_own_mistake_costs_the_session_and_not_the_task_that_made_it():
    side = FakeSide()
    async with open_coordinator() as coordinator, talking(side, coordinator) as end:
        peer = await coordinator.session()
        await peer.send(wire.Resume())
        with trio.fail_after(20):
            await side.heard_one.wait()
        side.post(wire.Complete(), "never_offered", 1)
        assert (await end()).why is Why.PROTOCOL


async def test_cancelling_closes_the_connection_properly():
    side = FakeSide()
    async with open_coordinator() as coordinator:
        async with talking(side, coordinator):
            peer = await coordinator.session()
            await peer.send(wire.Resume())
            await side.heard_one.wait()
        with trio.fail_after(20), pytest.raises(Exception, match="1000"):
            await peer.socket.get_message()
        assert [side.log[0], side.log[-1]] == ["opened", "closed"]


def test_addresses():
    assert Address(url="ws://h:1", token="t").worker_url == "ws://h:1/v1/worker"
    deep = Address(url="wss://h/pre/fix/", token="t")
    assert deep.worker_url == "wss://h/pre/fix/v1/worker"
    assert deep.http_url == "https://h/pre/fix/"
    assert Address(url="ws://h/v1/worker", token="t").http_url == "http://h/"
    assert "t0ken" not in repr(Address(url="ws://h", token="t0ken"))


async def test_a_peer_that_floods_what_means_nothing_fills_no_log(caplog):
    side = FakeSide()
    async with open_coordinator() as coordinator, talking(side, coordinator) as over:
        peer = await coordinator.session(heartbeat_ms=300_000)
        for number in range(200):
            await peer.send_raw(msgspec.msgpack.encode({"t": f"{number}" + "x" * 10_000, "body": {}}))
        await peer.socket.aclose(1001)
        assert (await over()).why is Why.LOST
    odd = [record for record in caplog.records if record.name == subject.log.name and record.levelno == logging.WARNING]
    assert len(odd) == AT_ONCE + 1
    assert all(len(record.getMessage()) < 1000 for record in odd)
    assert f"{200 - AT_ONCE} more messages that meant nothing" in odd[-1].getMessage()


async def test_a_peer_that_talks_and_does_not_read_is_left(monkeypatch):
    monkeypatch.setattr(subject, "MAX_WAITING", 100)
    side = FakeSide()

    def answer(body, job, attempt) -> None:  # all at once: none of it can have gone out in between
        for number in range(101):
            side.post(wire.OrderDone(id=str(number), ok=True))

    monkeypatch.setattr(side, "heard", answer)
    async with open_coordinator() as coordinator, talking(side, coordinator) as over:
        peer = await coordinator.session()
        await peer.send(wire.Resume())
        end = await over()
    assert (end.why, "does not read what it is answered" in end.sentence) == (Why.LOST, True)


async def test_a_cancel_that_meets_the_end_of_a_session_is_a_cancel_and_nothing_else(monkeypatch):
    side = FakeSide()
    original = subject._Span._close
    async with open_coordinator() as coordinator:
        async with trio.open_nursery() as nursery:

            async def close(span, socket) -> None:
                nursery.cancel_scope.cancel()
                await original(span, socket)

            monkeypatch.setattr(subject._Span, "_close", close)
            monkeypatch.setattr(subject, "UNANSWERED_BEATS", 0)  # the heart ends it, while the reader waits
            nursery.start_soon(converse, Address(url=coordinator.url, token="t"), side)
            await coordinator.session(heartbeat_ms=100)
    assert side.log[-1] == "closed"
