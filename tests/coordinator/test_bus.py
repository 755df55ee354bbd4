"""The in-process bus."""

from __future__ import annotations

import pytest
import trio

from coordinator.bus import BusClosed, Lagged, LocalBus
from coordinator.records import JobChunk, JobProgress, JobStarted


async def test_events_reach_every_subscriber_of_the_topic_in_order() -> None:
    bus = LocalBus()
    bus.publish("j", JobStarted())  # nobody listens yet
    with bus.subscribe("j") as one, bus.subscribe("j") as two, bus.subscribe("other") as other:
        events = [JobChunk(n, b"x") for n in range(3)]
        for event in events:
            bus.publish("j", event)
        assert [await one.receive() for _ in events] == events
        assert [await two.receive() for _ in events] == events
        with trio.move_on_after(0.01) as nothing:
            await other.receive()
        assert nothing.cancelled_caught
    assert not bus.watched("j")
    assert not bus.watched("other")


async def test_receive_wakes_for_an_event_and_loses_none_when_cancelled() -> None:
    bus = LocalBus()
    with bus.subscribe("j") as mine:
        with trio.move_on_after(0.01):
            await mine.receive()
        bus.publish("j", JobStarted())
        assert await mine.receive() == JobStarted()


async def test_a_slow_subscriber_is_told_and_others_are_not_held_up() -> None:
    bus = LocalBus(max_events=3)
    with bus.subscribe("j") as slow, bus.subscribe("j") as quick:
        for n in range(5):
            bus.publish("j", JobChunk(n, b""))
            assert await quick.receive() == JobChunk(n, b"")
        with pytest.raises(Lagged):
            await slow.receive()
        bus.publish("j", JobChunk(9, b""))
        assert await slow.receive() == JobChunk(9, b"")


async def test_bytes_are_bounded_as_well() -> None:
    bus = LocalBus(max_bytes=1000)
    with bus.subscribe("j") as slow:
        for n in range(3):
            bus.publish("j", JobChunk(n, b"x" * 400))
        with pytest.raises(Lagged):
            await slow.receive()


async def test_progress_is_dropped_before_anything_is_lost() -> None:
    bus = LocalBus(max_events=2)
    with bus.subscribe("j") as slow:
        bus.publish("j", JobChunk(0, b""))
        for n in range(5):
            bus.publish("j", JobProgress(n))
        assert [await slow.receive(), await slow.receive()] == [JobChunk(0, b""), JobProgress(0)]


async def test_closing_ends_subscriptions_after_what_they_have() -> None:
    bus = LocalBus()
    with bus.subscribe("j") as mine:
        bus.publish("j", JobStarted())
        bus.close()
        assert await mine.receive() == JobStarted()
        with pytest.raises(BusClosed):
            await mine.receive()
    with bus.subscribe("late") as late, pytest.raises(BusClosed):
        await late.receive()
