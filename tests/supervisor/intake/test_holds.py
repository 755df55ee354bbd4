"""The list of holds."""

from __future__ import annotations

import pytest

from supervisor.intake.holds import Hold, Holds, Mode, Source, decode, encode

PAUSE = Hold(source=Source.OPERATOR, reason="a game", since=100.0, until=200.0)
FOR_EVER = Hold(source=Source.OPERATOR, since=150.0, mode=Mode.UNLOAD)


def test_a_source_has_one_hold():
    assert Holds().put(PAUSE).put(FOR_EVER).items == (FOR_EVER,)


def test_lifting_takes_away_what_the_source_put():
    assert Holds().put(PAUSE).lift(Source.OPERATOR) == Holds()
    assert Holds().lift(Source.OPERATOR) == Holds()


@pytest.mark.parametrize(("now", "left"), [(199.9, (PAUSE,)), (200.0, ()), (1e12, ())])
def test_a_hold_runs_out_at_its_end(now, left):
    assert Holds().put(PAUSE).at(now).items == left


def test_a_hold_without_an_end_stays():
    holds = Holds().put(FOR_EVER)
    assert holds.at(1e12) == holds
    assert holds.until is None
    assert holds.next_end() is None


def test_when_work_may_be_taken_again():
    assert Holds().until is None
    assert Holds().put(PAUSE).until == 200.0
    assert Holds().put(PAUSE).next_end() == 200.0


@pytest.mark.parametrize(
    ("hold", "phrase"), [(PAUSE, "held by the operator (a game)"), (FOR_EVER, "held by the operator")]
)
def test_the_reason_is_a_phrase(hold, phrase):
    assert Holds().put(hold).reason() == phrase
    assert Holds().reason() == ""


@pytest.mark.parametrize("holds", [Holds(), Holds((PAUSE,)), Holds((FOR_EVER,))])
def test_what_is_written_is_read_back(holds):
    assert decode(encode(holds)) == (holds, "")


def test_one_broken_hold_costs_itself_only_and_is_named():
    data = encode(Holds((PAUSE,))).replace(b'"items": [', b'"items": [{"source": "the moon", "since": 1},')
    holds, problem = decode(data)
    assert holds == Holds((PAUSE,))
    assert "the moon" in problem


@pytest.mark.parametrize("data", [b"", b"[]", b"{", b'{"items": 5}', b"\xff\xfe"])
def test_a_broken_file_is_named(data):
    holds, problem = decode(data)
    assert holds == Holds()
    assert "cannot be read" in problem


def test_of_two_holds_of_one_source_the_last_counts():
    assert decode(encode(Holds((PAUSE, FOR_EVER))))[0] == Holds((FOR_EVER,))
