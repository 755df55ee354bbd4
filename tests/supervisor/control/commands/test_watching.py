"""`--watch` on a terminal, into a pipe, and across the end of a supervisor."""

from __future__ import annotations

import argparse
import io
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from supervisor.control.client import NotRunning
from supervisor.control.commands.layout import Paper
from supervisor.control.commands.watching import frame, watch

PEOPLE, PROGRAMS = argparse.Namespace(json=False), argparse.Namespace(json=True)


class Terminal(io.StringIO):
    """One that has no size of its own."""

    def isatty(self) -> bool:
        return True


def looks(*seen: Any) -> Callable[[], Any]:
    """One answer after the other, then Ctrl-C."""
    rest: Iterator[Any] = iter(seen)

    def look() -> Any:
        found = next(rest, KeyboardInterrupt())
        if isinstance(found, BaseException):
            raise found
        return found

    return look


def show(seen: Any, _paper: Paper) -> str:
    return f"state {seen['state']} at {seen['now']}"


def watched(stream: io.StringIO, arguments: argparse.Namespace, *seen: Any) -> str:
    assert watch(arguments, looks(*seen), show, out=stream, sleep=lambda _s: None) == 0
    return stream.getvalue()


IDLE, LATER, BUSY = {"state": "idle", "now": 1}, {"state": "idle", "now": 2}, {"state": "busy", "now": 3}


def test_into_a_pipe_a_block_for_each_change():
    assert watched(io.StringIO(), PEOPLE, IDLE, LATER, BUSY, IDLE) == (
        "state idle at 1\n\nstate busy at 3\n\nstate idle at 1\n"
    )


def test_into_a_pipe_for_programs_a_line_for_each_change():
    lines = watched(io.StringIO(), PROGRAMS, IDLE, LATER, BUSY).splitlines()
    assert [json.loads(line) for line in lines] == [IDLE, BUSY]


def test_for_programs_also_on_a_terminal():
    assert json.loads(watched(Terminal(), PROGRAMS, IDLE)) == IDLE


def test_a_supervisor_that_ends_is_waited_for():
    gone = NotRunning("nobody")
    assert watched(io.StringIO(), PEOPLE, IDLE, gone, gone, BUSY) == "state idle at 1\n\nnobody\n\nstate busy at 3\n"
    text = watched(Terminal(), PEOPLE, IDLE, gone, BUSY)
    assert "The supervisor is gone; waiting" in text
    assert "state busy" in text


def test_nobody_there_at_the_beginning_is_an_error():
    for stream in (io.StringIO(), Terminal()):
        with pytest.raises(NotRunning):
            watch(PEOPLE, looks(NotRunning("nobody")), show, out=stream, sleep=lambda _s: None)
        assert stream.getvalue() == ""


def test_the_terminal_is_left_as_it_was(monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    text = watched(Terminal(), PEOPLE, IDLE, BUSY)
    assert text.startswith("\x1b[?1049h\x1b[?25l")
    assert text.endswith("\x1b[?25h\x1b[?1049l")
    assert text.count("\x1b[H") == 2
    assert "\x1b[2J" not in text  # clearing the screen first is what flickers

    def broken(_seen: Any, _paper: Paper) -> str:
        raise ValueError("a mistake of ours")

    stream = Terminal()
    with pytest.raises(ValueError, match="mistake"):
        watch(PEOPLE, looks(IDLE), broken, out=stream, sleep=lambda _s: None)
    assert stream.getvalue().endswith("\x1b[?25h\x1b[?1049l")


def test_what_does_not_fit_is_counted():
    text = frame("\n".join(f"line {number}" for number in range(50)), "foot", Paper(40, False, 12))
    lines = re.sub(r"\x1b\[[?0-9]*[A-Za-z]", "", text).split("\r\n")
    assert len(lines) == 12
    assert lines[9] == "line 9"
    assert lines[-1] == "40 more lines; foot"
    assert len(frame("x", "y" * 100, Paper(40, False, 12)).split("y")) - 1 == 40
