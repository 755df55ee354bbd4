"""The life of an assignment: offered until it is taken or refused, tried again for memory, ended once."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from protocol import link_wire as wire
from protocol.faults import Fault
from supervisor.link.dialects.goliat_claims import MEMORY_RETRIES, Studies
from supervisor.link.dialects.goliat_wire import Slip
from supervisor.link.session import Post

CONFIG = wire.FileRef(name="config", url="assignment:a", size=1, sha256="0" * 64)
OFFER = wire.ModelOffer(name="m", kinds=("command",), engine="command")
MEMORY = Fault("out_of_memory", "It ended with 42.", detail={"exit_code": 42})


class Bench:
    """A side that only notes."""

    def __init__(self) -> None:
        self.now = 0.0
        self.told: list[dict[str, Any]] = []
        self.missed = 0
        self.heard_: list[tuple[wire.Body, str, int]] = []
        self.running = 0
        self.capabilities = wire.Capabilities(models=(OFFER,))
        self.held: tuple[wire.Held, ...] = ()
        self.studies = Studies(
            "m",
            env=("GOLIAT_ASSIGNMENT_ID", "GOLIAT_REUPLOAD_RESULTS"),
            reupload=True,
            tell=self.told.append,
            lost=self._lost,
            clock=lambda: self.now,
            utc=lambda: 0.0,
        )

    def _lost(self, count: int) -> None:
        self.missed += count

    def hello(self) -> wire.Hello:
        return wire.Hello(worker="w", low=1, high=1, capabilities=self.capabilities, held=self.held)

    def opened(self, _post: Post) -> None:
        pass

    def closed(self) -> None:
        pass

    def holds(self, _job: str, _attempt: int) -> bool:
        return False

    def broken_offer(self, job: str, attempt: int, reason: str) -> None:
        raise AssertionError(job, attempt, reason)

    def heartbeat(self, n: int) -> wire.Heartbeat:
        return wire.Heartbeat(n=n)

    def heard(self, body: wire.Body, job: str, attempt: int) -> None:
        self.heard_.append((body, job, attempt))

    def begin(self, **slips: Slip) -> None:
        self.studies.begin(self, self.hello(), slips)

    def keys(self, type_: type[wire.Body]) -> list[tuple[str, int]]:
        return [(job, attempt) for body, job, attempt in self.heard_ if isinstance(body, type_)]

    def take(self, id_: str = "a") -> None:
        slip = Slip(id=id_, attempt=self.studies.next_attempt(id_))
        self.studies.take(slip, CONFIG)

    def post(self, body: wire.Body, attempt: int = 1, job: str = "a") -> None:
        self.studies.post(body, job, attempt)

    def fail(self, fault: Fault, attempt: int = 1) -> None:
        self.post(wire.Fail(fault=fault), attempt)

    def ends(self) -> list[tuple[str, int, str]]:
        return [(end.slip.id, end.slip.attempt, end.fault.code if end.fault else "") for end in self.studies.endings()]

    def lines(self) -> list[str]:
        return [each["message"] for each in self.told if each["type"] == "status"]


@pytest.fixture
def bench() -> Bench:
    bench = Bench()
    bench.begin()
    return bench


def test_an_offer_has_what_a_study_needs(bench: Bench) -> None:
    bench.take()
    ((offer, job, attempt),) = bench.heard_
    assert isinstance(offer, wire.Offer)
    assert (offer.kind, offer.model, offer.inputs, job, attempt) == ("command", "m", (CONFIG,), "a", 1)
    assert Slip.read(offer.upload) == Slip(id="a")
    env = {"GOLIAT_ASSIGNMENT_ID": "a", "GOLIAT_REUPLOAD_RESULTS": "true"}
    assert msgspec.msgpack.decode(offer.params) == {"env": env}
    assert not bench.studies.free


@pytest.mark.parametrize(
    "capabilities",
    [
        wire.Capabilities(),
        wire.Capabilities(models=(OFFER,), accepting=False, reason="paused"),
        wire.Capabilities(models=(msgspec.structs.replace(OFFER, kinds=("llm",)),)),
    ],
)
def test_nothing_is_asked_for_that_could_not_be_run(bench: Bench, capabilities: wire.Capabilities) -> None:
    assert bench.studies.free
    bench.post(wire.Announce(capabilities=capabilities))
    assert not bench.studies.free
    assert bench.studies.why_not()
    bench.post(wire.Announce(capabilities=bench.capabilities))
    assert bench.studies.free
    bench.running = 1
    assert not bench.studies.free


def test_what_is_declined_for_now_waits_as_long_as_was_said(bench: Bench) -> None:
    bench.take()
    bench.post(wire.Decline(code="busy", reason="full", retry_after_ms=5000))
    for bench.now, count in ((4.9, 1), (5.0, 2), (5.5, 2)):
        bench.studies.remind()
        assert len(bench.keys(wire.Offer)) == count
    bench.post(wire.Accept())
    bench.now = 100.0
    bench.studies.remind()
    assert len(bench.keys(wire.Offer)) == 2


def test_what_was_declined_for_a_pause_need_not_wait_longer_than_that(bench: Bench) -> None:
    bench.take()
    bench.post(wire.Decline(code="paused", reason="paused", retry_after_ms=3_600_000))
    bench.post(wire.Announce(capabilities=wire.Capabilities(models=(OFFER,), accepting=False, reason="paused")))
    bench.now = 100.0
    bench.studies.remind()
    assert len(bench.keys(wire.Offer)) == 1
    bench.post(wire.Announce(capabilities=bench.capabilities))
    bench.now = 101.0
    bench.studies.remind()
    assert len(bench.keys(wire.Offer)) == 2


@pytest.mark.parametrize("code", ["bad_offer", "unsupported", "too_large"])
def test_what_is_declined_for_good_has_failed(bench: Bench, code: str) -> None:
    bench.take()
    bench.post(wire.Decline(code=code, reason="never"))
    assert bench.ends() == [("a", 1, "unsupported")]


def test_what_never_began_before_a_drain_has_failed(bench: Bench) -> None:
    bench.take()
    bench.post(wire.Decline(code="draining", reason="stopping"))
    bench.post(wire.Draining())
    bench.now = 100.0
    bench.studies.remind()
    assert bench.ends() == [("a", 1, "worker_stopping")]
    assert not bench.studies.free


def test_memory_is_tried_again_and_the_old_attempt_leaves_when_the_new_one_is_in(bench: Bench) -> None:
    bench.take()
    bench.post(wire.Accept())
    bench.fail(MEMORY)
    assert bench.keys(wire.Offer) == [("a", 1), ("a", 2)]
    assert bench.keys(wire.Ack) == []
    bench.fail(MEMORY)  # a new session says it again
    assert bench.keys(wire.Offer) == [("a", 1), ("a", 2)]
    bench.post(wire.Accept(), 2)
    assert bench.keys(wire.Ack) == [("a", 1)]
    for attempt in range(2, MEMORY_RETRIES + 2):
        bench.post(wire.Accept(), attempt)
        bench.fail(MEMORY, attempt)
    assert bench.keys(wire.Offer)[-1] == ("a", 4)
    assert bench.ends() == [("a", 4, "out_of_memory")]
    assert [each["type"] for each in bench.told].count("memory_error") == 4


def test_memory_of_an_earlier_life_or_in_a_drain_is_not_tried_again(bench: Bench) -> None:
    bench.fail(MEMORY)
    assert bench.ends() == [("a", 1, "out_of_memory")]
    other = Bench()
    other.begin()
    other.take()
    other.post(wire.Accept())
    other.post(wire.Draining())
    other.fail(MEMORY)
    assert other.ends() == [("a", 1, "out_of_memory")]


def test_an_end_that_is_said_again_is_the_same_and_is_acknowledged_once(bench: Bench) -> None:
    bench.take()
    bench.post(wire.Accept())
    bench.post(wire.Complete())
    bench.post(wire.Complete())
    bench.studies.finish()
    bench.begin()
    (ending,) = bench.studies.endings()
    bench.studies.told(ending, fenced=True)
    assert [body for body, _job, _attempt in bench.heard_ if isinstance(body, wire.Ack)] == [wire.Ack(verdict="fenced")]
    assert bench.studies.free
    assert bench.studies.next_attempt("a") == 2


def test_ends_of_an_earlier_life_know_their_slips() -> None:
    bench = Bench()
    bench.held = (wire.Held(job="a", attempt=3),)
    lost, old = Slip(id="b", study="s"), Slip(id="c", failed=True)
    bench.begin(a=Slip(id="a", study="s", index=4, worker="w"), b=lost, c=old)
    assert bench.ends() == [("b", 1, "worker_lost")]
    bench.post(wire.Complete(), 3)
    ending = bench.studies.endings()[-1]
    assert ending.slip == Slip(id="a", attempt=3, study="s", index=4, worker="w")
    assert bench.studies.next_attempt("a") == 4


def test_lines_that_were_left_out_are_counted_and_the_last_come_with_the_end(bench: Bench) -> None:
    bench.take()
    bench.post(wire.Accept())
    for number, text in ((1, "one"), (2, "two"), (9, "nine")):
        bench.post(wire.Progress(n=number, phase="output", text=text))
    assert bench.missed == 6
    tail = ["eight", "nine", "ten\x1b", "eleven"]
    bench.fail(Fault("command_failed", "no", detail={"exit_code": 1, "stderr_tail": tail}))
    assert bench.lines()[1:] == ["one", "two", "nine", "ten ", "eleven"]


def test_log_lines_of_the_study_alone_are_passed_on(bench: Bench) -> None:
    line = wire.LogLine(ts="t", level="warning", message="hot", job="a")
    bench.post(wire.LogBatch(lines=(line,)), 0, "")
    assert bench.told == []
    bench.take()
    bench.post(wire.Accept())
    other = wire.LogLine(ts="t", level="info", message="not yours", job="b")
    bench.post(wire.LogBatch(lines=(line, other)), 0, "")
    assert bench.lines()[1:] == ["hot"]
    assert bench.told[-1]["log_type"] == "warning"


def test_what_speaks_of_nothing_here_changes_nothing(bench: Bench) -> None:
    bench.post(wire.Accept())
    bench.post(wire.Decline(code="busy", reason="x"))
    bench.post(wire.Progress(n=1, phase="output", text="x"))
    bench.post(wire.Started())
    bench.studies.remind()
    assert bench.heard_ == []
    assert bench.studies.free
