from __future__ import annotations

import logging
import threading

import msgspec
import pytest
import trio
import trio.testing

from supervisor.observe.ring import Ring


def add(ring: Ring, message: str = "said", level: int = logging.INFO, name: str = "supervisor.x", **extras: object):
    ring.add(logging.LogRecord(name, level, "", 0, message, (), None), dict(extras))


def test_lines_have_numbers_and_the_oldest_go() -> None:
    ring = Ring(size=3)
    assert (ring.oldest, ring.last, ring.since()) == (1, 0, [])
    for n in range(5):
        add(ring, f"line {n}")
    assert [entry.seq for entry in ring.since()] == [3, 4, 5]
    assert (ring.oldest, ring.last) == (3, 5)
    assert [entry.message for entry in ring.since(4)] == ["line 4"]
    assert ring.since(99) == []
    assert [entry.seq for entry in ring.since(limit=2)] == [4, 5]
    assert ring.since(limit=0) == []


def test_fields_are_sorted_into_their_places() -> None:
    ring = Ring()
    add(ring, "x", job="j", attempt=3, model="m", engine="e", code="declined")
    [entry] = ring.since()
    assert (entry.job, entry.attempt, entry.model, entry.engine) == ("j", 3, "m", "e")
    assert entry.fields == {"code": "declined"}
    assert msgspec.json.decode(msgspec.json.encode(entry))["job"] == "j"


def test_readers_choose() -> None:
    ring = Ring()
    add(ring, "Loading", logging.DEBUG, job="a")
    add(ring, "loaded", logging.INFO, job="b")
    add(ring, "slow", logging.WARNING, job="a", name="supervisor.loading")
    assert [e.seq for e in ring.since(level="info")] == [2, 3]
    assert [e.seq for e in ring.since(level="error")] == []
    assert [e.seq for e in ring.since(job="a")] == [1, 3]
    assert [e.seq for e in ring.since(query="LOADING")] == [1, 3]
    assert [e.seq for e in ring.since(1, query="load", job="a")] == [3]
    with pytest.raises(ValueError, match="level must be one of debug, info"):
        ring.since(level="loud")


async def test_waiting_for_the_next_line(autojump_clock) -> None:
    ring = Ring()
    seen = []

    async def follow() -> None:
        last = 0
        while last < 3:
            await ring.wait_after(last)
            seen.extend(entry.seq for entry in ring.since(last))
            last = ring.last

    async with trio.open_nursery() as nursery:
        nursery.start_soon(follow)
        for _ in range(3):
            await trio.sleep(1)
            add(ring)
    assert seen == [1, 2, 3]
    with trio.move_on_after(1) as scope:
        await ring.wait_after(3)
    assert scope.cancelled_caught
    assert ring._waiting == []
    await ring.wait_after(2)  # there already


async def test_a_line_of_another_thread_wakes_the_reader() -> None:
    ring = Ring()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ring.wait_after, 0)
        await trio.testing.wait_all_tasks_blocked()
        thread = threading.Thread(target=add, args=(ring,))
        thread.start()
    thread.join()
    assert ring.last == 1


def test_a_reader_whose_loop_is_gone_harms_nobody() -> None:
    ring = Ring()

    async def left() -> None:
        ring._waiting.append((trio.lowlevel.current_trio_token(), trio.Event()))

    trio.run(left)
    add(ring)
    assert ring.last == 1


def test_many_threads_lose_no_number() -> None:
    ring = Ring(size=10_000)
    threads = [threading.Thread(target=lambda: [add(ring) for _ in range(200)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [entry.seq for entry in ring.since()] == list(range(1, 1601))
