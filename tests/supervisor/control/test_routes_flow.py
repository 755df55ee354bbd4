"""Events and the log over real sockets: clients that leave, come back, read slowly, ask nonsense."""

from __future__ import annotations

import contextlib
import logging
import random
import threading
from collections.abc import AsyncIterator

import h11
import pytest
import trio

from supervisor.control import conversation, routes_flow
from supervisor.control.events import Events
from supervisor.control.follow import BOOT, Cursor
from supervisor.control.server import open_control
from supervisor.control.snapshot import Snapshot
from supervisor.control.surface import Surface
from supervisor.observe.ring import Ring
from tests.supervisor.control.reader import Told, asked, reading

SEEN = Snapshot(version="1")


def line(ring: Ring, text: str, level: int = logging.INFO, **extras: object) -> None:
    ring.add(logging.LogRecord("supervisor.x", level, "", 0, text, (), None), extras)


class Watched(Events):
    """Tells when a stream of it was closed."""

    closed: trio.Event

    async def stream(self, cursor: Cursor, *, hello: bool = False) -> AsyncIterator[bytes]:
        try:
            async with contextlib.aclosing(super().stream(cursor, hello=hello)) as parts:
                async for part in parts:
                    yield part
        finally:
            self.closed.set()


class Flow:
    """A served socket with events and a log."""

    def __init__(self, path, acts, size: int = 50) -> None:
        self.path = path
        self.events = Watched(lambda: SEEN, size=size, boot="a1")
        self.events.closed = trio.Event()
        self.ring = Ring(size)
        self.surface = Surface(lambda: SEEN, acts, events=self.events, lines=self.ring)

    def happen(self, count: int) -> None:
        for _ in range(count):
            self.events.add("tick", {"n": self.events.last + 1})


@pytest.fixture
async def flow(tmp_path, box):
    made = Flow(tmp_path / "flow.sock", box.acts)
    async with open_control(made.path, made.surface):
        yield made


async def take(path, target: str, count: int, headers: dict[str, str] | None = None, size: int = 65_536) -> list[Told]:
    """Read so many events, and leave."""
    async with reading(path, target, headers, size=size) as reader:
        assert reader.status == 200
        return [await reader.next() for _ in range(count)]


# ---- events


async def test_from_now_on(flow):
    flow.happen(3)
    async with reading(flow.path, "/v1/events") as reader:
        hello = await reader.next()
        assert (hello.name, hello.id, hello.data) == ("hello", "a1-3", {"boot": "a1", "oldest": 1})
        assert reader.headers["content-type"] == "text/event-stream"
        flow.happen(2)
        assert [(await reader.next()).data["n"] for _ in range(2)] == [4, 5]


@pytest.mark.parametrize("header", [False, True])
async def test_who_left_goes_on_where_it_was(flow, header):
    flow.happen(4)
    first = await take(flow.path, "/v1/events?since=0", 2)
    assert [one.id for one in first] == ["a1-1", "a1-2"]
    flow.happen(1)
    since = first[-1].id
    again = {"Last-Event-ID": since} if header else None
    rest = await take(flow.path, "/v1/events" if header else f"/v1/events?since={since}", 3, again)
    assert [one.number for one in rest] == [3, 4, 5]


async def test_what_is_older_than_the_ring_is_a_gap(flow):
    flow.happen(60)
    gap, oldest = await take(flow.path, "/v1/events?since=a1-4", 2)
    assert (gap.name, gap.data, gap.id) == ("gap", {"missed": 6, "oldest": 11}, "a1-10")
    assert oldest.id == "a1-11"
    # The gap's own id is one to go on from, too.
    assert (await take(flow.path, f"/v1/events?since={gap.id}", 1))[0].id == "a1-11"


async def test_what_is_of_an_earlier_life_is_a_gap(flow):
    flow.happen(2)
    gap, oldest = await take(flow.path, "/v1/events?since=b7-1", 2)
    assert (gap.name, gap.data["missed"], oldest.id) == ("gap", None, "a1-1")


@pytest.mark.parametrize(
    ("target", "word"),
    [
        ("/v1/events?since=yesterday", "yesterday"),
        ("/v1/events?sinec=3", "sinec"),
        ("/v1/logs?since=-1", "since"),
        ("/v1/logs?level=loud", "level"),
        ("/v1/logs?limit=0", "limit"),
        ("/v1/logs?limit=9999999", "limit"),
        ("/v1/logs?follow=2", "follow"),
        ("/v1/logs?grep=x", "grep"),
        ("/v1/logs?q=" + "x" * 201, "q"),
    ],
)
async def test_nonsense_is_named(flow, target, word):
    status, _headers, answer = await asked(flow.path, "GET", target)
    assert status == 400
    assert word in answer["error"]["message"]


async def test_one_who_reads_in_sips_misses_nothing(flow):
    async with reading(flow.path, "/v1/events?since=0", size=7) as reader:
        seen = []
        for _ in range(30):
            flow.happen(1)
            seen.append((await reader.next()).data["n"])
    assert seen == list(range(1, 31))


async def test_one_who_does_not_read_is_dropped_and_may_come_back(flow, monkeypatch):
    seen = [0]
    async with reading(flow.path, "/v1/events?since=0") as reader:
        with monkeypatch.context() as hurry:
            hurry.setattr(conversation, "PATIENCE_S", 0.2)
            for _ in range(50):  # more than the buffers of a socket hold
                flow.events.add("big", {"text": "x" * 100_000})
            with trio.fail_after(30):
                await flow.events.closed.wait()
        with contextlib.suppress(EOFError, h11.RemoteProtocolError, trio.BrokenResourceError):
            while (one := await reader.next()).number < 50:
                seen.append(one.number)
    assert seen == list(range(len(seen)))
    assert seen[-1] < 50
    (rest,) = await take(flow.path, f"/v1/events?since=a1-{seen[-1]}", 1)
    assert rest.number == seen[-1] + 1


@pytest.mark.parametrize("seed", range(4))
async def test_whoever_comes_and_goes_sees_each_event_once_or_a_gap(flow, seed):
    dice = random.Random(seed)
    seen: list[int] = []
    missed = 0
    since = "0"
    for _ in range(12):
        flow.happen(dice.choice([0, 1, 5, 40, 70]))
        async with reading(flow.path, f"/v1/events?since={since}", size=dice.choice([5, 100, 65_536])) as reader:
            for _ in range(dice.randrange(60)):
                if int(since.rpartition("-")[2]) == flow.events.last:
                    flow.happen(1)
                one = await reader.next()
                since = one.id
                if one.name == "gap":
                    missed += one.data["missed"]
                else:
                    seen.append(one.data["n"])
    assert seen == sorted(set(seen))
    assert len(seen) + missed == int(since.rpartition("-")[2])


# ---- the log


async def test_lines_with_filters(flow):
    line(flow.ring, "a model was loaded", model="chat", job="j1")
    line(flow.ring, "it broke", logging.ERROR)
    line(flow.ring, "chatter", logging.DEBUG)
    status, _headers, seen = await asked(flow.path, "GET", "/v1/logs")
    assert status == 200
    assert (seen["last"], seen["dropped"], seen["boot"]) == (3, None, BOOT)
    assert [one["seq"] for one in seen["lines"]] == [1, 2, 3]
    assert seen["lines"][0]["model"] == "chat"
    for query, numbers in (
        ("since=1", [2, 3]),
        (f"since={BOOT}-2", [3]),
        ("level=info", [1, 2]),
        ("level=error", [2]),
        ("q=BROKE", [2]),
        ("job=j1", [1]),
        ("limit=1", [3]),
        ("level=info&limit=1", [2]),
        ("q=nowhere", []),
    ):
        found = (await asked(flow.path, "GET", f"/v1/logs?{query}"))[2]["lines"]
        assert [one["seq"] for one in found] == numbers, query


async def test_lines_that_went_are_counted(flow):
    for number in range(60):
        line(flow.ring, f"line {number}")
    seen = (await asked(flow.path, "GET", "/v1/logs?since=4"))[2]
    assert seen["dropped"] == {"lines": 6, "oldest": 11}
    assert len(seen["lines"]) == 50
    assert (await asked(flow.path, "GET", "/v1/logs?since=10"))[2]["dropped"] is None
    seen = (await asked(flow.path, "GET", "/v1/logs?since=b7-4"))[2]
    assert (seen["dropped"], len(seen["lines"])) == ({"lines": None, "oldest": 11}, 50)


async def test_the_log_is_followed_from_other_threads_and_resumed(flow):
    line(flow.ring, "old")
    async with reading(flow.path, "/v1/logs?follow=1&q=new") as reader:
        line(flow.ring, "new 2")
        thread = threading.Thread(target=lambda: [line(flow.ring, text) for text in ("other", "new 4")])
        thread.start()
        seen = [await reader.until("line") for _ in range(2)]
        await trio.to_thread.run_sync(thread.join)
    assert [one.data["message"] for one in seen] == ["new 2", "new 4"]
    line(flow.ring, "new 5")
    (again,) = await take(flow.path, f"/v1/logs?follow=1&q=new&since={seen[-1].id}", 1)
    assert (again.name, again.id, again.data["message"]) == ("line", f"{BOOT}-5", "new 5")


async def test_following_begins_with_the_latest_lines_when_asked(flow):
    for number in range(5):
        line(flow.ring, f"line {number}")
    hello, *seen = await take(flow.path, "/v1/logs?follow=1&limit=2", 3)
    assert [one.data["seq"] for one in seen] == [4, 5]
    assert (hello.name, hello.id) == ("hello", f"{BOOT}-3")
    # Who leaves before the first line goes on with it.
    assert (await take(flow.path, f"/v1/logs?follow=1&since={hello.id}", 1))[0].data["seq"] == 4


async def test_a_follower_who_is_overrun_is_told_how_many_it_missed(flow, monkeypatch):
    monkeypatch.setattr(routes_flow, "REST_S", 0.0)
    async with reading(flow.path, "/v1/logs?follow=1&since=0") as reader:
        line(flow.ring, "first")
        assert (await reader.next()).data["seq"] == 1
        for number in range(80):  # at once: the stream gets its turn after them
            line(flow.ring, f"line {number}")
        dropped, oldest = await reader.next(), await reader.next()
    assert (dropped.name, dropped.data, dropped.number) == ("dropped", {"lines": 30, "oldest": 32}, 31)
    assert oldest.data["seq"] == 32
