"""How answers are laid out: nothing is wider than the terminal, nothing is cut elsewhere."""

from __future__ import annotations

import io
import os
import pty
import termios

import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.columns import width
from supervisor.control.commands.layout import (
    Paper,
    Row,
    ago,
    count,
    cut,
    gib,
    hue_of,
    joined,
    now_of,
    paper_of,
    plain,
    span,
    table,
    until,
    wrapped,
)

WIDE = "模型" * 30
LONG = "It waits for 3.1 GiB on GPU-1: chat is working, and its memory is not free before that."


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, ""), (12.9, "12s"), (184, "3m 04s"), (4320, "1h 12m"), (183_600, "2d 03h")]
)
def test_spans(seconds, text):
    assert span(seconds) == text


def test_the_sentence_is_a_column_where_there_is_room_and_a_line_where_there_is_not():
    rows = [Row(["chat", "busy"], LONG), Row(["draw", "cold"])]
    assert table(("MODEL", "STATE"), rows, Paper()).splitlines()[1] == f"chat   busy   {LONG}"
    assert table(("MODEL", "STATE"), rows, Paper(140)).splitlines()[1] == f"chat   busy   {LONG}"
    assert table(("MODEL", "STATE"), rows, Paper(60)).splitlines() == [
        "MODEL  STATE",
        "chat   busy",
        "    It waits for 3.1 GiB on GPU-1: chat is working, and its",
        "    memory is not free before that.",
        "draw   cold",
    ]


cells = st.text(st.characters(codec="utf-8", categories=("L", "N", "P", "S", "Mn")), max_size=40)


@given(st.lists(st.tuples(cells, cells, cells), min_size=1, max_size=5), st.integers(40, 150))
def test_no_line_is_wider_than_the_terminal(texts, room):
    rows = [Row([name, state], why) for name, state, why in texts]
    text = table(("A", "B"), rows, Paper(room))
    assert all(width(line) <= room for line in text.split("\n"))


@given(cells, st.integers(1, 30))
def test_a_cut_text_fits(text, most):
    assert width(cut(text, most)) <= most


@given(st.text(max_size=200).map(plain), st.integers(20, 80))
def test_wrapping_loses_nothing(text, room):
    lines = wrapped(text, Paper(room), indent="  ")
    assert all(width(line) <= room for line in lines)
    assert "".join("".join(lines).split()) == "".join(text.split())


def test_wide_characters():
    lines = wrapped(WIDE, Paper(20))
    assert all(width(line) <= 20 for line in lines)
    assert "".join(lines) == WIDE


def test_columns_that_are_empty_are_left_out():
    text = table(("A", "B", "C"), [Row(["1", "", "3"]), Row(["4", "", "6"])], Paper(), right=(2,), state=1)
    assert text.splitlines()[0] == "A  C"


def test_what_people_copy_is_whole_and_what_is_spare_goes_first():
    rows = [Row(["j" * 30, "a-long-model", "llm", "running"])]
    head = ("JOB", "MODEL", "KIND", "STATE")
    assert table(head, rows, Paper(60), whole=(0,), spare=(2,)).splitlines()[1].split() == list(rows[0].cells)
    assert table(head, rows, Paper(55), whole=(0,), spare=(2,)).splitlines()[1].split() == [
        "j" * 30,
        "a-long-model",
        "running",
    ]
    assert table(head, rows, Paper(50), whole=(0,), spare=(2,)).splitlines()[1].split() == [
        "j" * 30,
        "a-long-m…",
        "running",
    ]


def test_colours_only_where_they_are_welcome():
    rows = [Row(["chat", "busy 3s"])]
    assert "\x1b" not in table(("MODEL", "STATE"), rows, Paper(80), state=1)
    assert "\x1b[32mbusy 3s\x1b[0m" in table(("MODEL", "STATE"), rows, Paper(80, colour=True), state=1)
    assert Paper(colour=True).paint("", "red") == ""
    states = ("quarantined", "ready 3m 04s", "paused.", "x")
    assert [hue_of(state) for state in states] == ["red", "green", "yellow", ""]


@pytest.mark.parametrize(
    ("environ", "colour", "cells_"),
    [
        ({"TERM": "xterm"}, True, 90),
        ({"TERM": "xterm", "NO_COLOR": "1"}, False, 90),
        ({"TERM": "xterm", "NO_COLOR": ""}, True, 90),
        ({"TERM": "dumb"}, False, 90),
        ({"TERM": "xterm", "COLUMNS": "60"}, True, 60),
        ({"TERM": "xterm", "COLUMNS": "x"}, True, 90),
        ({"TERM": "xterm", "COLUMNS": "1"}, True, 20),
    ],
)
def test_the_paper_of_a_terminal(environ, colour, cells_):
    master, slave = pty.openpty()
    try:
        termios.tcsetwinsize(slave, (30, 90))
        with os.fdopen(os.dup(slave), "w") as stream:
            assert paper_of(stream, environ) == Paper(cells_, colour, 30)
    finally:
        os.close(master)
        os.close(slave)


def test_the_paper_of_a_pipe():
    assert paper_of(io.StringIO()) == Paper()


def test_words():
    assert [count(number, "job") for number in (0, 1, 2)] == ["no jobs", "1 job", "2 jobs"]
    assert (ago(100.0, 190.0), ago(200.0, 100.0)) == ("1m 30s ago", "0s ago")
    assert (until(None, 0, "resume"), until(160.0, 100.0, ""), until(1.0, 2.0, "")) == ("resume", "in 1m 00s", "now")
    assert (gib(None), gib(0), gib(3 * 2**29)) == ("?", "-", "1.5G")
    assert joined(["a", "", "b"]) == "a · b"
    assert plain("a\x1b[2J\nb") == "a [2J b"
    assert plain("abcdef", 4) == "abc…"
    assert now_of({"now": 5.0}) == 5.0
    assert now_of({}) > 1e9
