"""One run as the host follows it."""

from __future__ import annotations

from pathlib import Path

import trio
import trio.testing

from protocol.faults import Fault
from supervisor.host.ticket import Ticket
from supervisor.host.work import Chunk, Done, Failed, Progress, RunRequest, Started

REQUEST = RunRequest(model="m", kind="llm", params=b"", folder=Path("/nowhere"))


def ticket(deadline: float = 100.0) -> tuple[Ticket, list[object]]:
    told: list[object] = []
    return Ticket(REQUEST, told.append, deadline), told


async def test_events_tell_what_they_prove(autojump_clock):
    run, told = ticket()
    run.tell(Started())
    assert (run.started, run.produced, run.streamed) == (True, False, False)
    run.tell(Progress(1))
    assert run.produced
    run.tell(Chunk(0, b""))
    assert run.streamed
    run.fail(Fault("cancelled", "Gone."))
    run.tell(Chunk(1, b""))
    assert told == [Started(), Progress(1), Chunk(0, b"")]
    assert run.end == Failed(fault=Fault("cancelled", "Gone."), streamed=True)


async def test_the_first_end_and_the_first_wish_count(autojump_clock):
    run, _ = ticket()
    run.ask_cancel(Fault("deadline_exceeded", "Late."))
    run.ask_cancel(Fault("cancelled", "Gone."))
    assert run.wanted_end == Fault("deadline_exceeded", "Late.")
    run.finish(Done(body=b""))
    run.fail(Fault("engine_crashed", "Later."))
    assert run.end == Done(body=b"")
    assert await run.wait()


async def test_the_wait_ends_at_the_deadline(autojump_clock):
    run, _ = ticket(7.0)
    assert not await run.wait()
    assert trio.current_time() == 7


async def test_a_sleep_of_the_machine_brings_the_deadline_nearer_while_it_is_waited_for(autojump_clock):
    run, _ = ticket(100.0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(run.wait)
        await trio.sleep(10)
        run.hasten(60, least_s=5)
        assert run.deadline == 40
    assert trio.current_time() == 40


async def test_a_deadline_that_passed_in_the_sleep_leaves_time_for_a_cancel(autojump_clock):
    run, _ = ticket(100.0)
    run.hasten(5000, least_s=5)
    assert run.deadline == 5
    soon, _ = ticket(2.0)
    soon.hasten(5000, least_s=5)
    assert soon.deadline == 2  # never later than it was
