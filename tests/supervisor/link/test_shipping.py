"""Log lines for the coordinator: bounded, with what was lost told as a number."""

from __future__ import annotations

import logging

import pytest

from protocol import link_wire as wire
from supervisor.link import shipping as shippings
from supervisor.link.shipping import Shipping
from supervisor.observe.ring import Ring


class Coordinator:
    def __init__(self) -> None:
        self.here = True
        self.batches: list[wire.LogBatch] = []

    def take(self, body: wire.Body) -> bool:
        assert isinstance(body, wire.LogBatch)
        if self.here:
            self.batches.append(body)
        return self.here


def add(ring: Ring, message: str, level: int = logging.INFO, **extras: object) -> None:
    ring.add(logging.LogRecord("host.lane", level, __file__, 1, message, None, None), extras)


@pytest.fixture
def parts():
    ring, coordinator = Ring(50), Coordinator()
    return ring, coordinator, Shipping(ring, coordinator.take)


def test_lines_of_jobs_and_warnings_go_out_once(parts):
    ring, coordinator, shipping = parts
    add(ring, "the owner's own business")
    add(ring, "it ended", job="job_1")
    add(ring, "the disk is full", logging.WARNING)
    shipping.ship()
    shipping.ship()
    (batch,) = coordinator.batches
    assert [(line.message, line.job, line.level) for line in batch.lines] == [
        ("host.lane: it ended", "job_1", "info"),
        ("host.lane: the disk is full", "", "warning"),
    ]
    assert batch.lines[0].ts.endswith("Z")
    assert batch.dropped == 0


def test_what_nobody_was_there_to_take_waits(parts):
    ring, coordinator, shipping = parts
    coordinator.here = False
    for number in range(3):
        add(ring, f"line {number}", job="j")
        shipping.ship()
    coordinator.here = True
    shipping.ship()
    shipping.ship()
    (batch,) = coordinator.batches
    assert ([line.message[-1] for line in batch.lines], batch.dropped) == (["0", "1", "2"], 0)


def test_what_the_ring_has_lost_meanwhile_is_told_as_a_number(parts):
    ring, coordinator, shipping = parts
    coordinator.here = False
    for number in range(53):  # it has room for 50
        add(ring, f"line {number}", job="j")
    shipping.ship()
    coordinator.here = True
    shipping.ship()
    assert (len(coordinator.batches[0].lines), coordinator.batches.pop().dropped) == (50, 3)
    add(ring, "again", job="j")
    shipping.ship()
    assert coordinator.batches.pop().dropped == 0


def test_a_flood_is_cut_from_its_beginning_and_the_ring_knows_what_it_lost(parts, monkeypatch):
    monkeypatch.setattr(shippings, "MOST_LINES", 20)
    ring, coordinator, shipping = parts
    for number in range(80):  # the ring has room for 50
        add(ring, f"line {number}", job="j")
    shipping.ship()
    (batch,) = coordinator.batches
    assert batch.lines[-1].message == "host.lane: line 79"
    assert (len(batch.lines), batch.dropped) == (20, 60)


def test_a_long_line_is_cut(parts):
    ring, coordinator, shipping = parts
    add(ring, "x" * 10_000, job="j")
    shipping.ship()
    assert len(coordinator.batches[0].lines[0].message) < 2100


async def test_it_ships_once_a_second_and_waits_for_lines(parts, autojump_clock, nursery):
    import trio

    ring, coordinator, shipping = parts
    nursery.start_soon(shipping.run)
    await trio.sleep(10)
    assert coordinator.batches == []
    for _ in range(5):
        add(ring, "a line", job="j")
        await trio.sleep(0.4)
    await trio.sleep(2)
    assert 2 <= len(coordinator.batches) <= 3
    assert sum(len(batch.lines) for batch in coordinator.batches) == 5
