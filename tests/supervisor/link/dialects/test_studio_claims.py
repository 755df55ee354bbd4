"""What the suites do not reach: time that passes, answers that never come, results that are too large to be posted."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from protocol import link_wire as wire
from protocol.faults import Fault
from protocol.ids import is_safe_id
from supervisor.link.dialects import studio_frames as frames
from supervisor.link.dialects.studio_claims import MANY_OFFERS, Claims
from supervisor.link.dialects.studio_offers import Facts, Slip
from supervisor.link.dialects.studio_uploads import TRIES
from supervisor.observe.paced import AT_ONCE
from tests.supervisor.link.dialects.studio_rig import RESULTS, TASKS

MODELS = tuple(wire.ModelOffer(name="m", kinds=(kind,), engine="synthetic") for kind in TASKS)


class FakeSide:
    """Holds what it was offered until it is acknowledged."""

    def __init__(self) -> None:
        self.held: dict[tuple[str, int], Any] = {}
        self.acks: list[tuple[str, str, int]] = []
        self.again: list[tuple[wire.Body, str, int]] = []
        self.left: list[tuple[str, int]] = []
        self.leaving = True  # results are on disk
        self.running = 0
        self.post: Any = None

    def hello(self) -> wire.Hello:
        held = tuple(wire.Held(job=job, attempt=attempt) for job, attempt in self.held)
        return wire.Hello(worker="w", low=1, high=1, capabilities=wire.Capabilities(models=MODELS), held=held)

    def opened(self, post: Any) -> None:
        self.post = post
        for body, job, attempt in self.again:
            if (job, attempt) in self.held:
                post(body, job, attempt)

    def heard(self, body: wire.Body, job: str, attempt: int) -> None:
        if isinstance(body, wire.Ack):
            self.acks.append((body.verdict, job, attempt))
            self.held.pop((job, attempt), None)
        else:
            self.held[job, attempt] = body

    def broken_offer(self, job: str, attempt: int, reason: str) -> None:
        raise AssertionError

    def leave(self, job: str, attempt: int) -> bool:
        if self.leaving:
            self.left.append((job, attempt))
            self.held.pop((job, attempt), None)
        return self.leaving

    def closed(self) -> None:
        self.post = None

    def holds(self, job: str, attempt: int) -> bool:
        return (job, attempt) in self.held


class Desk:
    """A side, its claims, and what a server would have read in each session."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.side = FakeSide()
        self.sent: list[frames.Up] = []
        self.claims = Claims(
            Facts(machine="b", user=""),
            clock=lambda: self.now,
            utc=lambda: "now",
            aside_s=600.0,
            answer_s=5.0,
            ack_s=60.0,
        )

    def session(self) -> None:
        self.sent = []
        self.claims.begin(self.side, self.sent.append, self.side.hello())

    def offer(self, job: str = "j", kind: str = "llm") -> None:
        claim = {"jobId": job, "model": "m", "task": TASKS[kind], "modelSource": {"engine": "synthetic"}}
        self.claims.hear(frames.read(json.dumps({"type": "offer", "claim": claim})))

    def complete(self, job: str = "j", attempt: int = 1, kind: str = "llm") -> None:
        end = wire.Complete(result=msgspec.Raw(msgspec.msgpack.encode(RESULTS[kind])))
        self.side.again.append((end, job, attempt))
        if self.side.post:
            self.side.post(end, job, attempt)

    def away(self) -> None:
        """A chat that was accepted, and ended while there was no session."""
        self.session()
        self.offer()
        self.side.post(wire.Accept(), "j", 1)
        self.claims.finish(violated=False)
        self.complete()

    def types(self) -> list[str]:
        return [type(frame).__name__ for frame in self.sent]


def test_what_waits_for_its_job_is_given_up_in_the_end():
    desk = Desk()
    desk.away()
    desk.session()
    assert desk.types() == ["CompleteJson"]
    desk.claims.finish(violated=True)
    desk.session()
    assert desk.types() == []
    desk.now += 599
    desk.claims.tick()
    assert desk.side.acks == []
    desk.now += 1
    desk.claims.tick()
    assert desk.side.acks == [("fenced", "j", 1)]


def test_a_lost_session_is_no_verdict_on_a_result():
    desk = Desk()
    desk.away()
    for _ in range(3):
        desk.session()
        assert desk.types() == ["CompleteJson"]
        desk.claims.finish(violated=False)
    desk.session()
    desk.claims.hear(frames.CompleteAck(job_id="j"))
    assert desk.side.acks == [("stored", "j", 1)]


def test_offers_wait_behind_a_result_of_an_earlier_session_but_not_for_ever():
    desk = Desk()
    desk.away()
    desk.session()
    desk.offer("k")
    assert ("k", 1) not in desk.side.held, "nothing else is at stake while the session may break"
    desk.now += 5
    desk.claims.tick()
    assert ("k", 1) in desk.side.held
    desk.side.post(wire.Accept(), "k", 1)
    desk.claims.hear(frames.CompleteAck(job_id="j"))  # late, and heard all the same
    desk.claims.finish(violated=False)
    desk.session()
    assert "CompleteJson" not in desk.types()


def test_several_results_are_told_one_after_the_other():
    desk = Desk()
    desk.away()
    desk.side.held["i", 1] = None
    desk.claims.large(Slip(job="i", attempt=1, kind="llm", model="m"), b"")
    desk.complete("i")
    desk.session()
    assert [frame.job_id for frame in desk.sent] == ["j"]
    desk.claims.hear(frames.CompleteAck(job_id="j"))
    assert [frame.job_id for frame in desk.sent] == ["j", "i"]


def test_a_result_of_an_earlier_life_waits_for_the_offer_that_says_what_it_was_for():
    desk = Desk()
    desk.side.held["j", 4] = None
    desk.complete("j", 4)
    desk.session()
    assert desk.types() == []
    desk.offer()
    assert desk.types() == ["Accept", "CompleteJson"]
    assert desk.sent[1].result["model"] == "m"
    desk.claims.hear(frames.CompleteAck(job_id="j"))
    assert desk.side.acks == [("stored", "j", 4)]


@pytest.mark.parametrize("drained_first", [False, True])
@pytest.mark.parametrize("leaving", [True, False])
def test_a_drain_leaves_what_nobody_asks_for_to_the_next_life(leaving, drained_first):
    desk = Desk()
    desk.side.leaving = leaving
    desk.side.held["j", 4] = None
    if not drained_first:
        desk.complete("j", 4)
    desk.session()
    desk.side.post(wire.Draining(), "", 0)
    if drained_first:
        desk.complete("j", 4)
    assert desk.side.left == ([("j", 4)] if leaving else [])
    assert desk.side.acks == ([] if leaving else [("fenced", "j", 4)]), "only what is not on disk is lost"
    assert not desk.claims.capabilities.auto_enabled
    desk.now += 1000
    desk.claims.tick()
    assert len(desk.side.acks) == (0 if leaving else 1)


def test_a_result_that_costs_the_session_of_a_drain_is_left_to_the_next_life():
    desk = Desk()
    desk.away()
    desk.session()
    desk.side.post(wire.Draining(), "", 0)
    desk.claims.finish(violated=True)
    assert (desk.side.left, desk.side.acks) == ([("j", 1)], [])


@pytest.mark.parametrize("end", ["complete", "fail"])
def test_an_end_that_is_not_acknowledged_ends_the_session_and_is_told_again(end):
    desk = Desk()
    desk.session()
    desk.offer()
    desk.side.post(wire.Accept(), "j", 1)
    desk.now += 1000
    assert desk.claims.tick() == "", "the engine may take as long as it likes"
    if end == "complete":
        desk.complete()
    else:
        desk.side.post(wire.Fail(fault=Fault("out_of_memory", "x")), "j", 1)
    desk.now += 59
    assert desk.claims.tick() == ""
    desk.now += 1
    assert "does not acknowledge the end of job 'j'" in desk.claims.tick()
    desk.claims.finish(violated=False)
    desk.session()
    assert desk.types() == (["CompleteJson"] if end == "complete" else [])


def test_an_end_that_is_acknowledged_leaves_the_session_alone():
    desk = Desk()
    desk.session()
    for job, kind in (("j", "llm"), ("k", "image")):
        desk.offer(job, kind)
        desk.side.post(wire.Accept(), job, 1)
        if kind == "llm":
            desk.complete(job)
            desk.claims.hear(frames.CompleteAck(job_id=job))
        else:
            desk.side.post(wire.Fail(fault=Fault("out_of_memory", "x")), job, 1)
            desk.claims.hear(frames.FailAck(job_id=job))
        desk.now += 100
        assert desk.claims.tick() == ""


def test_that_a_job_failed_is_said_once():
    """Its owner may take it off this worker while the studio is being told; a second word would break its rules."""
    desk = Desk()
    desk.session()
    desk.offer()
    desk.side.post(wire.Accept(), "j", 1)
    for _ in range(2):
        desk.side.post(wire.Fail(fault=Fault("out_of_memory", "x")), "j", 1)
    assert desk.types() == ["Accept", "Fail"]


def test_a_failure_that_no_session_holds_is_nobodys():
    desk = Desk()
    desk.side.held["j", 4] = None
    desk.side.again.append((wire.Fail(fault=Fault("worker_lost", "x")), "j", 4))
    desk.session()
    assert desk.types() == []
    assert desk.side.acks == [("fenced", "j", 4)]
    desk.offer()
    assert ("j", 5) in desk.side.held, "a number of its own"


def test_a_result_that_is_too_large_to_be_posted():
    desk = Desk()
    desk.session()
    desk.offer()
    desk.side.post(wire.Accept(), "j", 1)
    slip = Slip.read(desk.side.held["j", 1].upload)
    desk.claims.large(slip, msgspec.msgpack.encode({"content": "x" * 100_000}))
    desk.side.post(wire.Complete(), "j", 1)
    assert desk.sent[-1].result["choices"][0]["message"]["content"] == "x" * 100_000


def test_a_result_that_is_not_of_its_kind_fails_the_job():
    desk = Desk()
    desk.session()
    desk.offer()
    desk.side.post(wire.Accept(), "j", 1)
    desk.side.post(wire.Complete(result=msgspec.Raw(msgspec.msgpack.encode([]))), "j", 1)
    assert desk.types() == ["Accept", "Fail"]
    desk.claims.hear(frames.FailAck(job_id="j"))
    assert desk.side.acks == [("stored", "j", 1)]


def test_the_next_offer_may_overtake_the_answer_to_an_upload():
    desk = Desk()
    desk.session()
    desk.offer(kind="image")
    desk.side.post(wire.Accept(), "j", 1)
    slip = Slip.read(desk.side.held["j", 1].upload)
    desk.claims.uploads.uploading(slip, True)
    desk.offer("k", "image")
    assert desk.types() == ["Accept"]
    desk.side.post(wire.Complete(), "j", 1)
    assert desk.side.acks == [("stored", "j", 1)]
    assert ("k", 1) in desk.side.held


def test_an_upload_that_did_not_succeed_leaves_no_offer_without_an_answer():
    desk = Desk()
    desk.session()
    desk.offer(kind="image")
    desk.side.post(wire.Accept(), "j", 1)
    slip = Slip.read(desk.side.held["j", 1].upload)
    desk.claims.uploads.uploading(slip, True)
    desk.offer("k", "image")
    desk.claims.uploads.uploading(slip, False)
    assert desk.sent[-1] == frames.Reject(job_id="k", reason="worker already has an in-flight job", code="busy")


@pytest.mark.parametrize("accepted", [False, True])
def test_the_same_offer_twice_is_heard_once(accepted):
    desk = Desk()
    desk.session()
    desk.offer()
    if accepted:
        desk.side.post(wire.Accept(), "j", 1)
    desk.offer()
    assert "Reject" not in desk.types()
    assert list(desk.side.held) == [("j", 1)]


def test_work_of_an_earlier_session_keeps_others_away():
    desk = Desk()
    desk.session()
    desk.side.running = 1
    desk.offer()
    assert desk.sent == [frames.Reject(job_id="j", reason="worker already has an in-flight job", code="busy")]


@pytest.mark.parametrize(
    ("code", "told"),
    [("busy", "busy"), ("paused", "paused"), ("draining", "paused"), ("unknown_model", msgspec.UNSET)],
)
def test_declining(code, told):
    desk = Desk()
    desk.session()
    desk.offer()
    desk.side.post(wire.Decline(code=code, reason="because"), "j", 1)
    assert desk.sent == [frames.Reject(job_id="j", reason="because", code=told)]
    desk.offer("k")
    assert ("k", 1) in desk.side.held


def test_what_will_be_over_by_itself_is_told_as_busy():
    """A model that is still being checked after a start: any other refusal would send the job elsewhere for good."""
    desk = Desk()
    desk.session()
    desk.offer()
    desk.side.post(wire.Decline(code="unknown_model", reason="not yet", retry_after_ms=1000), "j", 1)
    assert desk.sent == [frames.Reject(job_id="j", reason="not yet", code="busy")]


def test_what_a_studio_has_no_word_for_is_not_said():
    desk = Desk()
    desk.session()
    for body in (wire.Started(), wire.Progress(n=1), wire.OrderDone(id="x", ok=True)):
        desk.side.post(body, "j", 1)
    assert desk.sent == []


async def test_a_conflict_that_the_offer_has_overtaken_is_asked_about_once_more():
    desk = Desk()
    desk.session()
    desk.offer(kind="image")
    desk.side.post(wire.Accept(), "j", 1)
    slip = Slip.read(desk.side.held["j", 1].upload)
    assert await desk.claims.uploads.taken_up(slip)
    assert not await desk.claims.uploads.taken_up(slip)


async def test_a_result_that_the_studio_never_takes_keeps_other_jobs_away_for_a_few_tries_only():
    """Its job has ended elsewhere, and the studio answers 500 to it: no offer was accepted any more, in any life."""
    desk = Desk()
    desk.side.held["j", 1] = None
    desk.side.running = 1
    desk.session()
    slip = Slip(job="j", attempt=1, kind="image", model="m")
    desk.offer("k")
    assert desk.types() == ["Reject"]
    for _ in range(TRIES):
        assert not await desk.claims.uploads.refused(slip, "HTTP 500.", False), "it is tried on"
    desk.offer("k")
    assert ("k", 1) in desk.side.held


@pytest.mark.parametrize("drained", [True, False])
async def test_a_conflict_waits_for_the_job_until_nobody_will_offer_it(drained, nursery, autojump_clock):
    desk = Desk()
    desk.side.held["j", 1] = None
    desk.session()
    verdicts: list[bool] = []

    async def wait() -> None:
        verdicts.append(await desk.claims.uploads.taken_up(Slip(job="j", attempt=1, kind="image", model="m")))

    nursery.start_soon(wait)
    await trio.testing.wait_all_tasks_blocked()
    desk.side.running = 1
    desk.offer("k")
    assert ("k", 1) in desk.side.held, "it is in nobody's way"
    if drained:
        desk.side.leaving = False
        desk.side.post(wire.Draining(), "", 0)
    else:
        await trio.sleep(601)
    await trio.testing.wait_all_tasks_blocked()
    assert verdicts == [False]


def test_offers_without_end_are_declined_and_fill_neither_memory_nor_log(caplog: pytest.LogCaptureFixture):
    caplog.set_level("INFO", "supervisor")
    desk = Desk()
    desk.away()
    desk.session()  # offers wait for the answer to the result
    for number in range(300):
        desk.offer(f"k{number}" + "x" * 5000)
    assert desk.types() == ["CompleteJson", *["Reject"] * (300 - MANY_OFFERS)]
    assert len(caplog.records) <= AT_ONCE
    assert all(len(str(record.__dict__)) < 3000 for record in caplog.records)


@pytest.mark.parametrize(
    ("result", "usage"),
    [
        ({"content": "x", "tool_calls": [{"a": msgspec.msgpack.Ext(5, b"x")}]}, {}),
        ({"content": "x", "tool_calls": [{"a": {None: 1}}]}, {}),
        ({"content": "x"}, {"prompt_tokens": float("nan")}),
        ({"content": "x"}, {"compute_ms": float("inf")}),
    ],
)
def test_a_result_that_cannot_be_said_fails_its_job_alone(result: Any, usage: dict[str, float]):
    desk = Desk()
    desk.session()
    desk.offer()
    desk.side.post(wire.Accept(), "j", 1)
    desk.side.post(wire.Complete(result=msgspec.Raw(msgspec.msgpack.encode(result)), usage=usage), "j", 1)
    assert desk.types() == ["Accept", "Fail"]


def test_lines_of_the_log_name_a_job_as_the_studio_does():
    desk = Desk()
    desk.session()
    desk.offer("game/asset/1")
    [(job, attempt)] = desk.side.held
    assert is_safe_id(job)
    lines = tuple(wire.LogLine(ts="now", level="info", message="x", job=name) for name in (job, "j", ""))
    desk.side.post(wire.LogBatch(lines=lines), "", 0)
    assert [entry.job_id for entry in desk.sent[-1].entries] == ["game/asset/1", "j", msgspec.UNSET]
    desk.side.post(wire.Decline(code="busy", reason="because"), job, attempt)
    assert desk.sent[-1] == frames.Reject(job_id="game/asset/1", reason="because", code="busy")


async def test_a_conflict_while_a_drain_has_no_session_is_left_when_it_has_one(nursery):
    desk = Desk()
    desk.side.held["j", 1] = None
    desk.session()
    desk.side.post(wire.Draining(), "", 0)
    desk.claims.finish(violated=False)
    verdicts: list[bool] = []

    async def wait() -> None:
        verdicts.append(await desk.claims.uploads.taken_up(Slip(job="j", attempt=1, kind="image", model="m")))

    nursery.start_soon(wait)
    await trio.testing.wait_all_tasks_blocked()
    desk.session()
    desk.side.post(wire.Draining(), "", 0)
    await trio.testing.wait_all_tasks_blocked()
    assert (desk.side.left, desk.side.acks, verdicts) == ([("j", 1)], [], [])
    nursery.cancel_scope.cancel()


async def test_a_failure_that_the_studio_knows_of_is_not_waited_for_again(nursery):
    """Its own end may take its time on a slow disk: the session is not to blame, and offers wait for it."""
    desk = Desk()
    desk.session()
    desk.offer(kind="image")
    desk.side.post(wire.Accept(), "j", 1)
    slip = Slip.read(desk.side.held["j", 1].upload)
    verdicts: list[bool] = []

    async def refuse() -> None:
        verdicts.append(await desk.claims.uploads.refused(slip, "HTTP 404.", True))

    nursery.start_soon(refuse)
    await trio.testing.wait_all_tasks_blocked()
    desk.claims.hear(frames.FailAck(job_id="j"))
    await trio.testing.wait_all_tasks_blocked()
    assert verdicts == [True]
    desk.now += 1000
    assert desk.claims.tick() == ""
    desk.offer(kind="image")
    assert desk.types() == ["Accept", "Fail"]
    desk.side.post(wire.Fail(fault=Fault("upload_failed", "HTTP 404.")), "j", 1)
    assert desk.side.acks == [("stored", "j", 1)]
    assert ("j", 2) in desk.side.held, "the same job is begun anew"
    assert desk.types() == ["Accept", "Fail"]
