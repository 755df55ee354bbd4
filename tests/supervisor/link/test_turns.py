"""Lines of waiting messages."""

from __future__ import annotations

import pytest

from protocol.link_wire import Accept, Complete, Heartbeat, Progress
from supervisor.link.turns import Turns


def test_each_attempt_has_its_order_and_nobody_waits_for_more_than_a_round():
    turns = Turns()
    for n in range(1000):
        turns.put(Progress(n=n), "flood", 1)
    turns.put(Accept(), "quiet", 1)
    turns.put(Complete(), "quiet", 1)
    turns.put(Heartbeat(n=1), "", 0)
    first = [turns.take() for _ in range(6)]
    assert [item[1] for item in first] == ["flood", "quiet", "", "flood", "quiet", "flood"]
    assert [type(item[0]) for item in first if item[1] == "quiet"] == [Accept, Complete]
    rest = [turns.take() for _ in range(997)]
    assert [item[0].n for item in [*first, *rest] if item[1] == "flood"] == list(range(1000))
    assert not turns


def test_dropping_a_line_leaves_the_others():
    turns = Turns()
    turns.put(Progress(n=1), "a", 1)
    turns.put(Progress(n=2), "a", 2)
    turns.drop("a", 1)
    turns.drop("unknown", 1)
    assert turns.take()[1:] == ("a", 2)
    assert not turns
    with pytest.raises(KeyError):
        turns.take()
