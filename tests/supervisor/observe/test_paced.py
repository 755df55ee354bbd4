from __future__ import annotations

import logging

import pytest
import trio

from supervisor.observe import paced as subject
from supervisor.observe.paced import AT_ONCE, EVERY_S, Paced

log = logging.getLogger("supervisor.link.tried")


async def test_a_flood_is_some_lines_and_a_count(autojump_clock: trio.abc.Clock, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, "supervisor")
    lines = Paced(log, "orders")
    for number in range(1000):
        lines.say(logging.INFO, "order %d", number, extra={"job": "j"})
    assert [record.getMessage() for record in caplog.records] == [f"order {number}" for number in range(AT_ONCE)]
    assert caplog.records[0].__dict__["job"] == "j"
    caplog.clear()
    await trio.sleep(EVERY_S)
    lines.say(logging.INFO, "one more")
    lines.flush()
    told = [record.getMessage() for record in caplog.records]
    assert told == [f"{1000 - AT_ONCE} more orders in {EVERY_S:g} s or more were left out here", "one more"]


async def test_what_was_left_out_is_told_at_the_end(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(subject, "AT_ONCE", 1)
    lines = Paced(log, "orders")
    for _ in range(3):
        lines.say(logging.WARNING, "an order")
    lines.flush()
    lines.flush()
    assert [record.getMessage().split(" in ")[0] for record in caplog.records] == ["an order", "2 more orders"]
