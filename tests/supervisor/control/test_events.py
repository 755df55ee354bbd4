"""What is told of what changes, and that a reader who comes and goes sees each event once, or that there is a gap."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from supervisor.control import events as module
from supervisor.control.events import REST_S, Events, differences, first
from supervisor.control.exchange import KEEP_ALIVE, KEEP_ALIVE_S
from supervisor.control.follow import Cursor, cursor
from supervisor.control.jobs_seen import MOST_CHANGES, JobBook
from supervisor.control.snapshot import GpuView, IncidentView, Link, ModelView, Snapshot
from supervisor.control.why import explained
from supervisor.intake.holds import Hold, Source

EMPTY = Snapshot(version="1", worker="box", pid=7)
CHAT = ModelView(name="chat", engine="llm", state="ready")
DRAW = ModelView(name="draw", engine="image", state="cold")
GPU = GpuView(uuid="GPU-1", name="H200")
HOLD = Hold(source=Source.OPERATOR, reason="a game", since=1.0)


def told(before: Snapshot, **changes: object) -> list[tuple[str, dict[str, Any]]]:
    return list(differences(before, msgspec.structs.replace(before, **changes)))


def test_nothing_is_told_of_what_stands_still():
    full = Snapshot(version="1", models=(CHAT, DRAW), gpus=(GPU,), holds=(HOLD,), link=Link(url="x", connected=True))
    later = msgspec.structs.replace(full, now=5.0, uptime_s=9.0, jobs=3)
    assert list(differences(full, later)) == []


def test_the_first_of_a_life():
    assert [kind for kind, _ in first(EMPTY)] == ["started", "status"]


def test_a_model_changes_comes_and_goes():
    seen = msgspec.structs.replace(EMPTY, models=(CHAT,))
    busy = msgspec.structs.replace(CHAT, state="busy", rss_bytes=5)
    assert told(seen, models=(busy,)) == [
        ("model", {"model": "chat", "before": "ready", "state": "busy", "reason": "", "waits": ""})
    ]
    assert told(seen, models=(msgspec.structs.replace(CHAT, rss_bytes=5, idle_s=3.0),)) == []
    (waits,) = told(seen, models=(msgspec.structs.replace(CHAT, waits="waits for 3 GiB"),))
    assert waits[1]["waits"] == "waits for 3 GiB"
    gone, come = told(seen, models=(DRAW,))
    assert gone == ("model", {"model": "chat", "before": "ready", "state": "gone"})
    assert (come[1]["model"], come[1]["before"], come[1]["state"]) == ("draw", "", "cold")


def test_holds_are_put_changed_and_lifted():
    (put,) = told(EMPTY, holds=(HOLD,))
    assert (put[0], put[1]["change"], put[1]["source"], put[1]["reason"]) == ("hold", "put", "operator", "a game")
    held = msgspec.structs.replace(EMPTY, holds=(HOLD,))
    (longer,) = told(held, holds=(msgspec.structs.replace(HOLD, until=9.0),))
    assert (longer[1]["change"], longer[1]["until"]) == ("put", 9.0)
    (lifted,) = told(held, holds=())
    assert (lifted[1]["change"], lifted[1]["source"]) == ("lifted", "operator")
    other = msgspec.structs.replace(HOLD, source=Source.PRESENCE)
    assert [one[1]["change"] for one in told(held, holds=(other,))] == ["lifted", "put"]


def test_the_link_a_gpu_and_an_incident():
    (up,) = told(EMPTY, link=Link(url="ws://c", connected=True))
    assert up == ("link", {"connected": True, "url": "ws://c", "reason": ""})
    seen = msgspec.structs.replace(EMPTY, gpus=(GPU,))
    changes = {}
    for gpu in (msgspec.structs.replace(GPU, fault="fell off"), msgspec.structs.replace(GPU, tainted="2 GiB")):
        ((kind, data),) = told(seen, gpus=(gpu,))
        assert kind == "gpu"
        changes[data["change"]] = data["fault"] or data["tainted"]
    assert changes == {"faulty": "fell off", "tainted": "2 GiB"}
    faulty = msgspec.structs.replace(EMPTY, gpus=(msgspec.structs.replace(GPU, fault="fell off"),))
    assert told(faulty, gpus=(GPU,))[0][1]["change"] == "well"
    assert told(seen, gpus=())[0][1]["change"] == "gone"
    assert told(EMPTY, gpus=(GPU,))[0][1]["change"] == "seen"
    assert told(seen, gpus=(msgspec.structs.replace(GPU, busy=0.5, free_bytes=3),)) == []
    old, new, newest = (IncidentView(time=f"2026-11-21T13:00:0{n}", model="chat") for n in range(3))
    before = msgspec.structs.replace(EMPTY, incidents=(old,))
    assert [data["time"][-1] for _, data in told(before, incidents=(newest, new, old))] == ["1", "2"]


def test_the_reason_for_standing_still():
    idle = explained(msgspec.structs.replace(EMPTY, models=(CHAT,), link=Link(connected=True)))
    paused = explained(msgspec.structs.replace(idle, holds=(HOLD,)))
    kinds = list(differences(idle, paused))
    assert [kind for kind, _ in kinds] == ["hold", "status"]
    assert kinds[1][1]["state"] == "paused"
    assert kinds[1][1]["before"] == "idle"
    assert "a game" in kinds[1][1]["why"]
    draining = explained(msgspec.structs.replace(idle, draining="moving"))
    ((kind, data),) = differences(idle, draining)
    assert (kind, data["state"], data["draining"]) == ("status", "draining", "moving")


# ---- looking


class Shown:
    """A supervisor's state, and how often it was looked at."""

    def __init__(self) -> None:
        self.now = EMPTY
        self.looks = 0
        self.link = False

    def snapshot(self) -> Snapshot:
        self.looks += 1
        return self.now


# Under a virtual clock a look costs nothing, however busy the machine is: `cost=float`.


@pytest.fixture
def shown():
    return Shown()


async def test_many_changes_are_one_look(shown, autojump_clock, nursery):
    events = Events(shown.snapshot, cost=float)
    nursery.start_soon(events.run)
    await trio.testing.wait_all_tasks_blocked()
    assert [one.kind for one in events.take(Cursor(0)).events] == ["started", "status"]
    began = trio.current_time()
    for number in range(1000):
        shown.now = msgspec.structs.replace(EMPTY, why=f"{number}")
        events.look()
        await trio.sleep(0.001)
    await trio.sleep(REST_S)
    seconds = trio.current_time() - began
    assert 2 <= shown.looks <= seconds / REST_S + 2
    assert msgspec.json.decode(events.take(Cursor(events.last - 1)).events[0].body)["why"] == "999"


async def test_nobody_is_looked_at_when_nothing_changes(shown, autojump_clock, nursery):
    events = Events(shown.snapshot, watched=lambda: shown.link, cost=float)
    nursery.start_soon(events.run)
    await trio.sleep(3600)
    assert shown.looks == 1
    shown.link = True
    shown.now = msgspec.structs.replace(EMPTY, link=Link(connected=True))
    with trio.fail_after(2):
        await events.wait_after(2)
    assert events.take(Cursor(2)).events[0].kind == "link"


async def test_a_look_that_costs_much_is_rare(shown, autojump_clock, nursery):
    clock = itertools.count(0.0, 0.2)  # a look takes 0.2 s
    events = Events(shown.snapshot, cost=lambda: next(clock))
    nursery.start_soon(events.run)
    for _ in range(1000):
        events.look()
        await trio.sleep(0.1)
    assert 5 <= shown.looks <= 11  # 100 s at a fiftieth


async def test_a_mistake_in_what_is_shown_ends_nothing(shown, autojump_clock, nursery, caplog):
    events = Events(lambda: 1 / 0 if shown.link else shown.snapshot(), cost=float)
    shown.link = True
    nursery.start_soon(events.run)
    await trio.testing.wait_all_tasks_blocked()
    assert "ZeroDivisionError" in caplog.text
    shown.link = False
    events.look()
    with trio.fail_after(5):
        await events.wait_after(1)


async def test_jobs_are_told_as_they_go_and_a_flood_is_counted(shown, autojump_clock, nursery):
    book = JobBook()
    events = Events(shown.snapshot, book.changes, cost=float)
    book.on_change = events.look
    nursery.start_soon(events.run)
    await trio.sleep(1)
    book.began("j", 1, "llm", "chat")
    await trio.sleep(1)
    book.entered("j", 1, "run")
    await trio.sleep(1)
    book.ended("j", 1, "succeeded", "", {"completion_tokens": 3})
    await trio.sleep(1)
    bodies = [msgspec.json.decode(one.body) for one in events.take(Cursor(2)).events]
    assert [(one["job"], one["state"]) for one in bodies] == [("j", "waiting"), ("j", "running"), ("j", "ended")]
    for number in range(1000):
        book.began(f"k{number}", 1, "llm", "chat")
    await trio.sleep(1)
    batch = events.take(Cursor(5))
    assert len(batch.events) == MOST_CHANGES + 1
    assert (batch.events[-1].kind, msgspec.json.decode(batch.events[-1].body)["more"]) == ("jobs", 1000 - MOST_CHANGES)


async def test_what_it_costs_at_a_thousand_jobs_a_second():
    """Of the loop's time, with its real cost and a generous bound: half a percent on a quiet core."""
    models = tuple(msgspec.structs.replace(CHAT, name=f"m{number}") for number in range(50))
    seen = msgspec.structs.replace(EMPTY, models=models)
    book = JobBook()
    events = Events(lambda: explained(seen), book.changes)
    book.on_change = events.look
    began = time.process_time()
    for look in range(10):  # one second: as many looks as there can be, and a thousand jobs with three changes each
        for number in range(look * 100, look * 100 + 100):
            book.began(f"j{number}", 1, "llm", "chat")
            book.entered(f"j{number}", 1, "run")
            book.ended(f"j{number}", 1, "succeeded", "", {})
        events._compare()
    assert time.process_time() - began < 0.2


# ---- reading


@st.composite
def stories(draw: st.DrawFn) -> list[tuple[str, int]]:
    steps = st.one_of(
        st.tuples(st.just("add"), st.integers(1, 9)),
        st.tuples(st.just("take"), st.integers(1, 7)),
        st.tuples(st.just("leave"), st.just(0)),
        st.tuples(st.just("restart"), st.just(0)),
    )
    return draw(st.lists(steps, max_size=60))


class Follower:
    """A reader that keeps nothing but the id of the last event that it saw."""

    def __init__(self, since: str) -> None:
        self.id = since
        self.cursor: Cursor | None = None
        self.saw: list[tuple[str, int]] = []  # (life, number)
        self.gaps: list[int | None] = []

    def takes(self, events: Events, most: int) -> None:
        if self.cursor is None:
            self.cursor = cursor(self.id, events.last, events.boot)
        missed, got, self.cursor = events.take(self.cursor, most)
        if missed is not None:
            self.gaps.append(missed.events)
            self.id = f"{events.boot}-{missed.oldest - 1}"
        for one in got:
            self.saw.append((events.boot, one.number))
            self.id = f"{events.boot}-{one.number}"


def _lives() -> Iterator[Events]:
    for number in itertools.count():
        yield Events(lambda: EMPTY, size=5, boot=f"a{number:x}")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(story=stories())
def test_each_event_is_seen_once_or_there_is_a_gap(story):
    lives = _lives()
    events = next(lives)
    reader = Follower(f"{events.boot}-0")
    happened: list[tuple[str, int]] = []
    restarts = 0
    for step, number in [*story, ("leave", 0), ("take", 1), ("take", 10**6)]:
        if step == "add":
            for _ in range(number):
                events.add("tick", {})
                happened.append((events.boot, events.last))
        elif step == "take":
            reader.takes(events, number)
        elif step == "leave":
            reader.cursor = None
        else:
            events, reader.cursor = next(lives), None
            restarts += 1
    assert len(set(reader.saw)) == len(reader.saw)
    order = {one: place for place, one in enumerate(happened)}
    places = [order[one] for one in reader.saw]
    assert places == sorted(places)
    missed = len(happened) - len(reader.saw)
    known = sum(count for count in reader.gaps if count is not None)
    lost = reader.gaps.count(None)
    assert lost <= restarts
    assert (lost > 0) == (restarts > 0)
    assert known <= missed if lost else known == missed  # it says how many, and there is none without need


async def test_a_stream_says_where_it_is_and_that_it_lives(autojump_clock):
    events = Events(lambda: EMPTY, boot="ab")
    events.add("tick", {})
    stream = events.stream(Cursor(1), hello=True)
    assert (await anext(stream)).startswith(b"id: ab-1\nevent: hello\n")
    began = trio.current_time()
    assert await anext(stream) == KEEP_ALIVE
    assert trio.current_time() - began == KEEP_ALIVE_S
    events.add("tock", {})
    assert (await anext(stream)).startswith(b"id: ab-2\nevent: tock\n")
    await stream.aclose()


async def test_all_who_wait_are_woken(nursery):
    events = Events(lambda: EMPTY)
    done = []

    async def wait(after: int) -> None:
        await events.wait_after(after)
        done.append(after)

    for after in (0, 0, 1, 2):
        nursery.start_soon(wait, after)
    await trio.testing.wait_all_tasks_blocked()
    events.add("tick", {})
    await trio.testing.wait_all_tasks_blocked()
    assert done == [0, 0]
    events.add("tick", {})
    events.add("tick", {})
    await trio.testing.wait_all_tasks_blocked()
    assert sorted(done) == [0, 0, 1, 2]


async def test_the_end_is_told_to_those_who_follow(shown, autojump_clock, nursery):
    events = Events(shown.snapshot, cost=float)
    got: list[bytes] = []

    async def follow() -> None:
        async with contextlib.aclosing(events.stream(Cursor(0))) as parts:
            got.extend([part async for part in parts])

    nursery.start_soon(events.run)
    nursery.start_soon(follow)
    await trio.testing.wait_all_tasks_blocked()
    shown.now = msgspec.structs.replace(EMPTY, draining="moving", state="draining")
    began = trio.current_time()
    await events.end("moving")
    assert trio.current_time() == began  # nobody is waited for who has it
    await trio.testing.wait_all_tasks_blocked()
    text = b"".join(got).decode()
    assert [line for line in text.splitlines() if line.startswith("event: ")][-2:] == ["event: status", "event: ended"]
    # Who comes after that gets what there is, and its end.
    assert [part async for part in events.stream(Cursor(events.last))] == []


async def test_the_end_waits_only_so_long_for_one_who_does_not_read(shown, autojump_clock):
    events = Events(shown.snapshot, cost=float)
    events.add("tick", {})
    stream = events.stream(Cursor(0))
    await anext(stream)
    began = trio.current_time()
    await events.end("moving")
    assert trio.current_time() - began == pytest.approx(module.FAREWELL_S)
    await stream.aclose()
