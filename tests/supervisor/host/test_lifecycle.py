"""The life of an instance as one table."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.host.lifecycle import ALIVE, LOADED, TABLE, Event, IllegalStep, Life, State, diagram

STORIES = [
    ("demand greeted loaded take emptied end gone", "cold starting loading ready busy ready stopping cold"),
    ("demand greeted loaded take drain end gone", "cold starting loading ready busy draining stopping cold"),
    ("demand end pause retry demand", "cold starting stopping backoff cold starting"),
    ("demand greeted end bar lift demand", "cold starting loading stopping quarantined cold starting"),
    ("bar lift", "cold quarantined cold"),
    ("demand greeted loaded take take shut", "cold starting loading ready busy busy cold"),
]


@pytest.mark.parametrize(("events", "states"), STORIES)
def test_stories(events, states):
    life = Life()
    seen = [life.state.value]
    seen += [life.step(Event(word)).value for word in events.split()]
    assert " ".join(seen) == states


@given(st.lists(st.sampled_from(list(Event)), max_size=30))
def test_an_illegal_step_raises_and_changes_nothing(events):
    life = Life()
    for event in events:
        before = life.state
        if (before, event) in TABLE:
            assert life.step(event) is TABLE[before, event]
        else:
            with pytest.raises(IllegalStep, match=f"{event.value} is illegal while {before.value}"):
                life.step(event)
            assert life.state is before


def test_every_state_is_reached_and_left_and_a_process_ends_through_stopping():
    steps = {(state, event): after for (state, event), after in TABLE.items() if event is not Event.SHUT}
    assert set(steps.values()) == set(State)
    assert {state for state, _ in steps} == set(State)
    for (state, _), after in steps.items():
        if state in ALIVE:
            assert after in ALIVE | {State.STOPPING}
    assert LOADED < ALIVE


def test_the_diagram_shows_every_step_but_the_lane_s_own_end():
    text = diagram()
    assert text.startswith("stateDiagram-v2\n    [*] --> cold\n")
    for (state, event), after in TABLE.items():
        assert (f"    {state.value} --> {after.value}: {event.value}\n" in text) is (event is not Event.SHUT)
