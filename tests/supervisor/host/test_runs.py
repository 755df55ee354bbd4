"""Runs of one instance against an engine that is played call by call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio
import trio.testing

from protocol import engine_wire as wire
from protocol.faults import Fault
from supervisor.host.runs import ANSWER_S, Runs
from supervisor.host.ticket import Ticket
from supervisor.host.work import Done, EngineSpec, Failed, ModelSpec, RunRequest
from supervisor.settings import LimitsTable

LIMITS = LimitsTable(first_output_s=20, stall_s=10, cancel_grace_s=2)
SPEC = ModelSpec(name="m", engine=EngineSpec(name="e", module="", python=""), model=wire.Model(name="m"))


class Engine:
    """Keeps what it was told; `has` is set by the test; a deaf one never empties its pipe."""

    def __init__(self) -> None:
        self.told: list[wire.Down] = []
        self.has = 1
        self.deaf = False
        self._hears = trio.Event()
        self.story: list[str] = []

    async def tell(self, message: wire.Down) -> None:
        if self.deaf:
            await self._hears.wait()
        await trio.lowlevel.checkpoint()
        self.told.append(message)

    def hear(self) -> None:
        self._hears.set()

    async def take_stacks(self) -> None:
        await trio.lowlevel.checkpoint()
        self.story.append("stacks")

    def evidence(self, code: str) -> dict[str, Any]:
        return {"stderr_tail": ["a line"], "diagnosis": "deadlocked"} if code == "engine_hung" else {"stderr_tail": []}

    def moved(self) -> None:
        self.story.append("moved")

    def rested(self) -> None:
        self.story.append("rested")


def ticket(**more: object) -> Ticket:
    request = RunRequest(model="m", kind="llm", params=b"\xc0", folder=Path("/out"), label="J.1", **more)
    return Ticket(request, lambda _event: None, trio.current_time() + 1000)


def fault_of(run: Ticket) -> Fault:
    assert isinstance(run.end, Failed)
    return run.end.fault


class Stage:
    def __init__(self, nursery: trio.Nursery, spec: ModelSpec = SPEC) -> None:
        self.engine = Engine()
        self.runs = Runs(spec, LIMITS, self.engine)
        self.nursery = nursery

    async def begin(self, **more: object) -> Ticket:
        run = self.runs.admit(ticket(**more))
        self.nursery.start_soon(self.runs.serve, run)
        await trio.testing.wait_all_tasks_blocked()
        return run


@pytest.fixture
async def stage(autojump_clock):
    async with trio.open_nursery() as nursery:
        yield Stage(nursery)
        nursery.cancel_scope.cancel()


async def test_runs_are_numbered_in_the_order_in_which_they_were_served(stage, autojump_clock):
    await stage.begin()
    await stage.begin(stream=True)
    first, second = stage.engine.told
    assert (first.run, second.run, second.stream, second.folder, second.log) == (1, 2, True, "/out", "J.1")
    assert len(stage.runs.admitted) == 2


async def test_a_result_ends_a_run_and_the_quiet_after_the_last_is_told(stage, autojump_clock):
    run = await stage.begin()
    stage.engine.has = 0
    stage.runs.take(wire.Result(run=1, body=msgspec.Raw(b"\xc0"), usage={"n": 1}))
    assert run.end == Done(body=b"\xc0", usage={"n": 1, "compute_ms": 0})
    await trio.testing.wait_all_tasks_blocked()
    assert (stage.runs.admitted, stage.runs.succeeded, stage.runs.done) == ([], 1, 1)
    assert stage.engine.story[-2:] == ["rested", "moved"]


def usage_of(run: Ticket) -> dict[str, float]:
    assert isinstance(run.end, Done)
    return dict(run.end.usage)


async def test_a_run_is_timed_from_its_hand_over_to_its_end_and_not_while_it_waited(stage, autojump_clock):
    waited = ticket()
    await trio.sleep(7)
    stage.runs.admit(waited)
    stage.nursery.start_soon(stage.runs.serve, waited)
    await trio.testing.wait_all_tasks_blocked()
    beside = await stage.begin(stream=True)
    await trio.sleep(0.25)
    stage.runs.take(wire.Chunk(run=2, seq=0, data=msgspec.Raw(b"\xc0")))
    await trio.sleep(1)
    stage.runs.take(wire.Result(run=1, body=msgspec.Raw(b"\xc0"), usage={"images": 1}))
    await trio.sleep(0.1232)
    stage.runs.take(wire.Result(run=2, body=msgspec.Raw(b"\xc0")))
    # Runs of one engine count their own time each: these two overlap.
    assert usage_of(waited) == {"images": 1, "compute_ms": 1250}
    assert usage_of(beside) == {"compute_ms": pytest.approx(1373.2)}


async def test_an_engine_that_tells_its_own_time_knows_better(stage, autojump_clock):
    run = await stage.begin()
    await trio.sleep(3)
    stage.runs.take(wire.Result(run=1, body=msgspec.Raw(b"\xc0"), usage={"compute_ms": 40.5}))
    assert usage_of(run) == {"compute_ms": 40.5}


async def test_what_an_engine_tells_of_its_time_must_be_a_time(stage, autojump_clock):
    run = await stage.begin()
    await trio.sleep(3)
    stage.runs.take(wire.Result(run=1, body=msgspec.Raw(b"\xc0"), usage={"compute_ms": -1.0}))
    assert usage_of(run) == {"compute_ms": 3000}


async def test_a_silent_run_is_cancelled_and_given_up_with_what_is_known(stage, autojump_clock):
    run = await stage.begin()
    await run.ended.wait()
    assert trio.current_time() == LIMITS.first_output_s + ANSWER_S
    assert stage.runs.doubtful
    assert stage.engine.told[1:] == [wire.Cancel(run=1)]
    assert "stacks" in stage.engine.story
    fault = fault_of(run)
    assert fault.code == "engine_hung"
    assert fault.detail == {"alone": True, "diagnosis": "deadlocked", "stderr_tail": ["a line"]}
    assert stage.runs.stuck is None
    await trio.sleep(LIMITS.cancel_grace_s)
    assert not stage.runs.admitted
    assert stage.runs.stuck is not None
    assert stage.runs.stuck.code == "engine_hung"


async def test_a_cancel_that_cannot_even_be_written_is_bounded_too(stage, autojump_clock):
    run = await stage.begin()
    stage.engine.deaf = True
    run.ask_cancel(Fault("cancelled", "Gone."))
    await run.ended.wait()
    assert trio.current_time() == ANSWER_S
    assert fault_of(run).code == "cancelled"
    await trio.sleep(LIMITS.cancel_grace_s)
    assert stage.runs.stuck is not None


async def test_an_engine_that_obeys_late_keeps_its_life_and_its_slot_until_then(stage, autojump_clock):
    run = await stage.begin()
    run.ask_cancel(Fault("deadline_exceeded", "Too late."))
    await run.ended.wait()
    assert stage.runs.admitted == [run]
    stage.runs.take(wire.RunFault(run=1, fault=Fault("cancelled", "As asked.")))
    await trio.testing.wait_all_tasks_blocked()
    assert (stage.runs.admitted, stage.runs.doubtful, stage.runs.stuck) == ([], False, None)
    assert fault_of(run).code == "deadline_exceeded"


async def test_words_for_a_run_that_was_given_up_mean_nothing(stage, autojump_clock):
    run = await stage.begin()
    run.ask_cancel(Fault("cancelled", "Gone."))
    await run.ended.wait()
    await trio.testing.wait_all_tasks_blocked()
    stage.runs.take(wire.Progress(run=1, n=1))
    stage.runs.take(wire.Result(run=1, body=msgspec.Raw(b"\xc0")))
    assert fault_of(run).code == "cancelled"
    assert (stage.runs.succeeded, stage.runs.done) == (0, 1)


@pytest.mark.parametrize(("has", "detail"), [(0, {}), (1, {"alone": True}), (2, {"suspects": 2}), (9, {"suspects": 9})])
async def test_who_was_in_flight_is_told_beside_the_fault(stage, autojump_clock, has, detail):
    innocent, cancelled = await stage.begin(), await stage.begin()
    cancelled.ask_cancel(Fault("cancelled", "Gone."))
    stage.engine.has = has
    stage.runs.fail_all(Fault("engine_crashed", "It crashed.", detail={"signal": 11}))
    assert fault_of(innocent).detail == {"signal": 11, **detail}
    assert fault_of(cancelled) == Fault("cancelled", "Gone.")


async def test_beside_a_stuck_run_the_rest_is_hopeless_when_nobody_moves(stage, autojump_clock):
    stuck, other = await stage.begin(), await stage.begin()
    stuck.ask_cancel(Fault("cancelled", "Gone."))
    await trio.sleep(9.5)
    assert stage.runs.stuck is not None
    assert not stage.runs.hopeless
    stage.runs.take(wire.Started(run=2))
    await trio.sleep(9.5)
    assert not stage.runs.hopeless
    await trio.sleep(1)
    assert stage.runs.hopeless
    assert other.end is None


async def test_runs_that_may_be_silent_are_never_hopeless(autojump_clock):
    async with trio.open_nursery() as nursery:
        stage = Stage(nursery, msgspec.structs.replace(SPEC, stall_s=float("inf")))
        stuck = await stage.begin()
        await stage.begin()
        stuck.ask_cancel(Fault("cancelled", "Gone."))
        await trio.sleep(500)
        assert stage.runs.stuck is not None
        assert not stage.runs.hopeless
        nursery.cancel_scope.cancel()


async def test_a_cancelled_task_leaves_its_run_with_an_end(autojump_clock):
    async with trio.open_nursery() as nursery:
        stage = Stage(nursery)
        run = await stage.begin(alone=True)
        assert stage.runs.alone
        nursery.cancel_scope.cancel()
    assert fault_of(run).code == "worker_stopping"
    assert not stage.runs.alone


async def test_a_cancel_waits_for_a_pipe_that_is_full_for_a_moment(stage, autojump_clock):
    run = await stage.begin()
    stage.engine.deaf = True  # it computes, and reads in a second
    run.ask_cancel(Fault("cancelled", "Gone."))
    await trio.sleep(1)
    assert stage.engine.told[1:] == []
    stage.engine.hear()
    await trio.testing.wait_all_tasks_blocked()
    assert stage.engine.told[1:] == [wire.Cancel(run=1)]
    stage.runs.take(wire.RunFault(run=1, fault=Fault("cancelled", "As asked.")))
    await trio.testing.wait_all_tasks_blocked()
    assert (stage.runs.admitted, stage.runs.stuck) == ([], None)
