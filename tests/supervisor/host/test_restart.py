"""Pauses and quarantines, as tables."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.host.restart import LONGEST_QUARANTINE_S, Record, after_bad_end, barred, lifted, pause_s
from supervisor.settings import RestartTable

TABLE = RestartTable(first_pause_s=1, longest_pause_s=60, healthy_s=60, quarantine_after=5, reprobe_s=60)


@pytest.mark.parametrize(("bad_ends", "pause"), [(0, 0), (1, 0), (2, 1), (3, 2), (4, 4), (8, 60), (500, 60)])
def test_pauses_double_from_the_second_on(bad_ends, pause):
    assert pause_s(bad_ends, TABLE, 0.5) == pause


@given(st.integers(2, 50), st.floats(0, 1, exclude_max=True))
def test_jitter_stays_within_a_quarter(bad_ends, jitter):
    middle = pause_s(bad_ends, TABLE, 0.5)
    assert 0.75 * middle <= pause_s(bad_ends, TABLE, jitter) <= 1.25 * middle


def run_of(count: int, *, loading: bool = False) -> list[tuple[float, bool]]:
    record, seen = Record(), []
    for _ in range(count):
        following = after_bad_end(record, TABLE, well=False, loading=loading, jitter=0.5)
        record = following.record
        seen.append((following.pause_s, following.quarantined))
    return seen


def test_a_crash_loop_ends_in_quarantine():
    assert run_of(5) == [(0, False), (1, False), (2, False), (4, False), (60, True)]


def test_what_cannot_load_pauses_from_the_first_time_on():
    assert run_of(5, loading=True) == [(1, False), (2, False), (4, False), (8, False), (60, True)]


def test_a_healthy_life_clears_the_record():
    following = after_bad_end(Record(4, 3), TABLE, well=True, loading=False, jitter=0.5)
    assert (following.record, following.pause_s, following.quarantined) == (Record(1, 0), 0, False)


def test_a_return_is_on_probation_and_the_next_quarantine_is_twice_as_long():
    first = barred(Record(5, 0), TABLE, 0.5)
    assert (first.pause_s, first.quarantined) == (60, True)
    again = after_bad_end(lifted(first.record, TABLE), TABLE, well=False, loading=True, jitter=0.5)
    assert (again.pause_s, again.quarantined) == (120, True)
    healed = after_bad_end(lifted(first.record, TABLE), TABLE, well=True, loading=False, jitter=0.5)
    assert not healed.quarantined


def test_quarantines_are_bounded():
    assert barred(Record(5, 200), TABLE, 0.5).pause_s == LONGEST_QUARANTINE_S
    patient = RestartTable(reprobe_s=86_400)
    assert barred(Record(5, 9), patient, 0.5).pause_s == 86_400
