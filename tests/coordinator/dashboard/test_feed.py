"""The feed by itself: what is built, how often, for whom, and how a watcher goes on."""

from __future__ import annotations

import json
from contextlib import aclosing
from typing import Any

import anyio
import pytest

from coordinator.dashboard import feed as module
from coordinator.dashboard.feed import Feed, Picture, difference
from coordinator.store import StoreError
from protocol.faults import FaultError

PATIENCE_S = 60


class World:
    """What the feed looks at."""

    def __init__(self) -> None:
        self.picture: Picture = {"workers": {"w1": {"n": 1}}, "jobs": {}}
        self.broken = False

    async def look(self) -> Picture:
        if self.broken:
            raise StoreError("away")
        return {section: dict(rows) for section, rows in self.picture.items()}


def told(piece: bytes) -> list[tuple[str, str, dict[str, Any]]]:
    """(id, name, data) of every event."""
    found = []
    for block in piece.decode().split("\n\n"):
        if block:
            fields = dict(line.split(": ", 1) for line in block.split("\n"))
            data = json.loads(fields["data"])
            assert data.pop("now_ms") > 0
            found.append((fields["id"], fields["event"], data))
    return found


async def news(source: Any) -> list[tuple[str, str, dict[str, Any]]]:
    """The next events."""
    while not (piece := await anext(source)):
        pass
    return told(piece)


def run(test: Any, **options: Any) -> None:
    """Run with a feed that looks often, on the loop that the server uses."""

    async def bounded() -> None:
        world = World()
        feed = Feed(world.look, **{"tick_s": 0.01, **options})
        with anyio.fail_after(PATIENCE_S):
            async with anyio.create_task_group() as group:
                group.start_soon(feed.run)
                await test(feed, world)
                group.cancel_scope.cancel()

    anyio.run(bounded)


def test_a_difference_has_what_is_new_changed_and_gone() -> None:
    old: Picture = {"a": {"1": {"x": 1}, "2": {"x": 2}}, "b": {}}
    new: Picture = {"a": {"1": {"x": 1}, "3": {"x": 3}}, "b": {"4": {}}}
    assert difference(old, new) == {"set": {"a": {"3": {"x": 3}}, "b": {"4": {}}}, "gone": {"a": ["2"]}}
    assert difference(old, old) == {}


def test_a_watcher_gets_the_picture_and_then_what_changes() -> None:
    async def test(feed: Feed, world: World) -> None:
        async with aclosing(feed.follow()) as source:
            ((_, name, data),) = await news(source)
            assert (name, data) == ("snapshot", {"all": world.picture})
            world.picture["jobs"]["j"] = {"state": "queued"}
            ((_, name, data),) = await news(source)
            assert (name, data) == ("change", {"set": {"jobs": {"j": {"state": "queued"}}}, "gone": {}})
            world.picture["workers"] = {}
            ((_, name, data),) = await news(source)
            assert (name, data) == ("change", {"set": {}, "gone": {"workers": ["w1"]}})
            assert await anext(source) == b""  # a tick without news is a tick all the same

    run(test)


def test_who_was_away_goes_on_where_it_was_and_who_is_unknown_begins_anew() -> None:
    async def test(feed: Feed, world: World) -> None:
        async with aclosing(feed.follow()) as source:
            ((first, _, _),) = await news(source)
            world.picture["jobs"] = {"j": {"n": 1}}
            ((second, _, _),) = await news(source)
        world.picture["jobs"] = {"k": {"n": 1}}  # while nobody watches
        async with aclosing(feed.follow(first)) as source:
            names = [(name, data["set"].get("jobs")) for _, name, data in await news(source)]
            assert names == [("change", {"j": {"n": 1}}), ("change", {"k": {"n": 1}})]
        async with aclosing(feed.follow(second)) as source:
            ((_, name, data),) = await news(source)
            assert (name, data["gone"]) == ("change", {"jobs": ["j"]})
        for stranger in ("", "nonsense", "00000000-1", second.rpartition("-")[0] + "-999999"):
            async with aclosing(feed.follow(stranger)) as source:
                ((_, name, _),) = await news(source)
                assert name == "snapshot"

    run(test)


def test_who_was_away_for_too_long_gets_the_whole_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", 2)

    async def test(feed: Feed, world: World) -> None:
        async with aclosing(feed.follow()) as source:
            ((first, _, _),) = await news(source)
            for n in range(4):
                world.picture["jobs"] = {"j": {"n": n}}
                await news(source)
        async with aclosing(feed.follow(first)) as source:
            ((_, name, data),) = await news(source)
            assert (name, data["all"]["jobs"]) == ("snapshot", {"j": {"n": 3}})

    run(test)


def test_however_many_watch_it_is_built_once_and_not_at_all_for_nobody() -> None:
    async def test(feed: Feed, world: World) -> None:
        got: list[bytes] = []

        async def watch() -> None:
            async with aclosing(feed.follow()) as source:
                got.append(await anext(source))

        assert feed.built == 0
        async with anyio.create_task_group() as group:
            for _ in range(20):
                group.start_soon(watch)
        assert len(got) == 20
        assert len(set(map(id, got))) == 1  # the very same bytes
        assert feed.built == 1
        assert feed.watchers == 0

    run(test, tick_s=60.0)


def test_looks_keep_their_distance() -> None:
    async def test(feed: Feed, world: World) -> None:
        began = anyio.current_time()
        async with aclosing(feed.follow()) as source:
            for _ in range(4):
                await anext(source)
        assert anyio.current_time() - began >= 3 * feed.tick_s * 0.99

    run(test, tick_s=0.05)


def test_a_store_that_is_away_is_said_and_ends_nothing() -> None:
    async def test(feed: Feed, world: World) -> None:
        async with aclosing(feed.follow()) as source:
            await news(source)
            world.broken = True
            ((_, _, data),) = await news(source)
            assert "does not answer" in data["set"]["trouble"][""]["message"]
            assert data["gone"] == {}
            world.broken = False
            ((_, _, data),) = await news(source)
            assert data["gone"] == {"trouble": [""]}

    run(test)


def test_watchers_are_bounded_and_all_end_with_the_coordinator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_WATCHERS", 1)

    async def test(feed: Feed, world: World) -> None:
        async with aclosing(feed.follow()) as source:
            await news(source)
            with pytest.raises(FaultError, match="1 dashboards are open here already"):
                await anext(feed.follow())
            feed.end()
            with pytest.raises(StopAsyncIteration):
                await news(source)
        with pytest.raises(StopAsyncIteration):
            await anext(feed.follow())

    run(test)
