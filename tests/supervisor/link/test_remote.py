"""Orders of the coordinator: carried out, refused with a reason, and answered once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import trio
import trio.testing

from protocol import link_wire as wire
from supervisor.link.remote import MOST_ORDERS, Refused, Remote
from supervisor.observe.paced import AT_ONCE


class Box:
    def __init__(self, nursery: trio.Nursery) -> None:
        self.levels: list[tuple[str, float]] = []
        self.probed: list[str] = []
        self.written: list[dict[str, Any]] = []
        self.allow = ["worker.labels", "limits.*"]
        self.answers, self._answers = trio.open_memory_channel[wire.OrderDone](10)
        self.remote = Remote(
            nursery,
            set_level=lambda level, for_s: self.levels.append((level, for_s)),
            probe=self.probe,
            configure=self.configure,
            allow=lambda: self.allow,
        )

    async def probe(self, model: str) -> dict[str, str]:
        self.probed.append(model)
        if model == "gone":
            raise Refused("There is no model 'gone' here.")
        return {model or "chat": "it works"}

    async def configure(self, changes: Mapping[str, Any]) -> dict[str, str]:
        self.written.append(dict(changes))
        return dict.fromkeys(changes, "in force")

    async def order(self, verb: str, **arguments: object) -> wire.OrderDone:
        self.remote.begin(wire.Order(id="7", verb=verb, arguments=arguments), self.answers.send_nowait)
        with trio.fail_after(20):
            done = await self._answers.receive()
        assert done.id == "7"
        return done


@pytest.fixture
async def box(nursery):
    return Box(nursery)


async def test_what_is_ordered_is_done_and_answered(box):
    assert (await box.order("log_level", level="debug", for_s=60)).ok
    assert box.levels == [("debug", 60.0)]
    done = await box.order("probe")
    assert (done.ok, done.detail, done.message) == (True, {"chat": "it works"}, "1 model was proved again.")
    done = await box.order("configure", changes={"worker.labels": {"rack": "3"}, "limits.drain_s": 5})
    assert done.detail == {"worker.labels": "in force", "limits.drain_s": "in force"}
    assert box.written == [{"worker.labels": {"rack": "3"}, "limits.drain_s": 5}]


@pytest.mark.parametrize(
    ("verb", "arguments", "word"),
    [
        ("dance", {}, "does not know"),
        ("log_level", {"level": "loud"}, "level must be one of"),
        ("log_level", {"level": "debug", "for_s": 1e9}, "for_s"),
        ("log_level", {}, "level"),
        ("probe", {"model": "gone"}, "no model"),
        ("probe", {"mdoel": "x"}, "mdoel"),
        ("configure", {"changes": {}}, "no change"),
        ("configure", {"changes": {"coordinator.url": "wss://elsewhere"}}, "does not let a coordinator change"),
        ("configure", {"changes": {"worker.labels": {}, "engines.x.argv": ["rm"]}}, "engines.x.argv"),
    ],
)
async def test_what_is_not_done_says_why_and_changes_nothing(box, verb, arguments, word):
    done = await box.order(verb, **arguments)
    assert not done.ok
    assert word in done.message
    assert box.levels == box.written == []


async def test_without_a_word_of_the_owner_nothing_may_be_pushed(box):
    box.allow = []
    done = await box.order("configure", changes={"worker.labels": {}})
    assert "coordinator.allow has nothing" in done.message


async def test_a_mistake_of_ours_ends_one_order_and_nothing_else(box, monkeypatch, caplog):
    async def configure(changes: Mapping[str, Any]) -> dict[str, str]:
        raise RecursionError("nobody thought of this")

    monkeypatch.setattr(box.remote, "_configure", configure)
    done = await box.order("configure", changes={"limits.drain_s": 5})
    assert (done.ok, done.message) == (False, "The worker made a mistake of its own: RecursionError.")
    assert "nobody thought of this" in caplog.text
    assert (await box.order("probe")).ok


async def test_more_orders_than_anybody_needs_are_refused_and_fill_no_log(nursery, caplog, monkeypatch):
    caplog.set_level("INFO", "supervisor")
    box = Box(nursery)
    free = trio.Event()

    async def probe(model: str) -> dict[str, str]:
        await free.wait()
        return {}

    monkeypatch.setattr(box.remote, "_probe", probe)
    answers: list[wire.OrderDone] = []
    for number in range(MOST_ORDERS + 50):
        box.remote.begin(wire.Order(id=str(number), verb="probe"), answers.append)
    assert [done.ok for done in answers] == [False] * 50
    assert "are under way here already" in answers[0].message
    free.set()
    await trio.testing.wait_all_tasks_blocked()
    assert [done.ok for done in answers[50:]] == [True] * MOST_ORDERS
    assert len(caplog.records) <= AT_ONCE
    assert (await box.order("dance" * 10_000)).message.startswith("This worker does not know the order")
    assert all(len(record.getMessage()) < 2000 for record in caplog.records)
