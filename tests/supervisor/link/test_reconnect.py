from __future__ import annotations

import itertools

import pytest
import trio

from supervisor.link.reconnect import Backoff, keep_link
from supervisor.link.session import SessionEnd, Why
from supervisor.suspend import Clocks


def test_pauses_double_up_to_a_ceiling_and_jitter_takes_up_to_half():
    highest = Backoff(chance=lambda: 1.0)
    assert [highest.pause_s() for _ in range(9)] == [1, 2, 4, 8, 16, 32, 64, 64, 64]
    lowest = Backoff(chance=lambda: 0.0)
    assert [lowest.pause_s() for _ in range(8)] == [0.5, 1, 2, 4, 8, 16, 32, 32]


def test_only_a_stable_span_forgets_the_failures():
    backoff = Backoff(stable_s=30, chance=lambda: 1.0)
    assert [backoff.pause_s(lasted) for lasted in (0, 5, 29.9, 30, 0)] == [1, 2, 4, 1, 2]


def test_a_thousand_failures_do_not_overflow():
    backoff = Backoff(chance=lambda: 1.0)
    assert {backoff.pause_s() for _ in range(2000)} == {1, 2, 4, 8, 16, 32, 64}


@pytest.mark.parametrize("why", [Why.REFUSED, Why.DUPLICATE, Why.DELETED, Why.REVISION])
async def test_it_goes_on_until_the_coordinator_refuses(autojump_clock, why):
    times: list[float] = []

    async def converse() -> SessionEnd:
        times.append(trio.current_time())
        if len(times) == 100:
            return SessionEnd(why, "refused")
        return SessionEnd(Why.LOST if len(times) % 2 else Why.PROTOCOL, "lost")

    end = await keep_link(converse, Backoff(chance=lambda: 1.0))
    assert end.why is why
    assert len(times) == 100
    assert [later - earlier for earlier, later in itertools.pairwise(times)][:8] == pytest.approx(
        [1, 2, 4, 8, 16, 32, 64, 64]
    )


async def test_a_peer_that_welcomes_and_drops_is_not_hammered(autojump_clock):
    times: list[float] = []

    async def converse() -> SessionEnd:
        times.append(trio.current_time())
        await trio.sleep(0.1)
        if len(times) == 10:
            return SessionEnd(Why.DELETED, "deleted")
        return SessionEnd(Why.LOST, "lost", 0.1)

    await keep_link(converse, Backoff(chance=lambda: 1.0))
    assert times[-1] > 200


async def test_one_who_is_sent_on_asks_again_within_a_moment_and_that_is_no_failure(autojump_clock):
    ends = [(6.0, True), (60.0, True), (6.0, False), (6.0, True), (1.0, True), (0.0, False)]
    times: list[float] = []

    async def converse() -> SessionEnd:
        times.append(trio.current_time())
        if len(times) > len(ends):
            return SessionEnd(Why.DELETED, "deleted")
        lasted_s, sent_on = ends[len(times) - 1]
        return SessionEnd(Why.LOST, "lost", lasted_s, sent_on)

    await keep_link(converse, Backoff(chance=lambda: 1.0))
    pauses = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert pauses == pytest.approx([0.5, 0.5, 1, 0.5, 2, 4])


async def test_cancelling_ends_the_pause(autojump_clock):
    with trio.move_on_after(0.4) as scope:

        async def converse() -> SessionEnd:
            return SessionEnd(Why.LOST, "lost")

        await keep_link(converse, Backoff(chance=lambda: 1.0))
    assert scope.cancelled_caught
    assert trio.current_time() == pytest.approx(0.4, abs=1e-6)


async def test_a_pause_is_over_when_the_machine_has_slept_and_earlier_failures_are_forgotten(autojump_clock):
    times: list[float] = []
    slept_s = [0.0]

    async def converse() -> SessionEnd:
        times.append(trio.current_time())
        if len(times) == 10:
            return SessionEnd(Why.DELETED, "deleted")
        return SessionEnd(Why.LOST, "lost")

    async def sleep_through_the_long_pause() -> None:
        await trio.sleep(140)
        slept_s[0] = 3600

    async with trio.open_nursery() as nursery:
        nursery.start_soon(sleep_through_the_long_pause)
        await keep_link(converse, Backoff(chance=lambda: 1.0), Clocks(lambda: 0.0, lambda: slept_s[0]))
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert gaps[:7] == pytest.approx([1, 2, 4, 8, 16, 32, 64])
    assert gaps[7] < 64 - 40
    assert gaps[8] == pytest.approx(1)


async def test_a_mistake_of_ours_costs_a_session_and_not_the_link(autojump_clock, caplog):
    ends: list[Exception | SessionEnd] = [
        KeyError("nobody thought of this"),
        ExceptionGroup("several", [ValueError("nor of that")]),
        SessionEnd(Why.DELETED, "gone"),
    ]

    async def converse() -> SessionEnd:
        await trio.lowlevel.checkpoint()
        end = ends.pop(0)
        if isinstance(end, Exception):
            raise end
        return end

    began = trio.current_time()
    end = await keep_link(converse, Backoff(chance=lambda: 1.0))
    assert end.why is Why.DELETED
    assert trio.current_time() - began == pytest.approx(1 + 2), "it is a failure like any other"
    assert "nobody thought of this" in caplog.text
    assert "nor of that" in caplog.text
