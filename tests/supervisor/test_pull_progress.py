"""What people see of a pull."""

from __future__ import annotations

import io
import json

import pytest

from supervisor.pull_progress import EventLines, ProgressLine, size
from supervisor.pull_wire import Note, Plan, Progress, PullFailed

MIB = 2**20


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def at(done: int, total: int | None = 100 * MIB, phase: str = "fetch") -> Progress:
    return Progress(done_bytes=done, total_bytes=total, file="m.gguf", phase=phase)


def test_a_terminal_gets_a_bar_with_speed_and_time_left():
    stream, clock = Terminal(), Clock()
    line = ProgressLine(stream, clock)
    line.show(at(0))
    clock.now = 2.0
    line.show(at(50 * MIB))
    text = stream.getvalue().rsplit("\r", 1)[1]
    assert "50%" in text
    assert "50.0 MiB of 100.0 MiB" in text
    assert "25.0 MiB/s" in text
    assert "0:02 left" in text
    assert "████████████░░░░░░░░░░░░" in text
    line.close()
    assert stream.getvalue().endswith("\r\033[K")


def test_a_pipe_gets_a_line_every_two_seconds():
    stream, clock = io.StringIO(), Clock()
    line = ProgressLine(stream, clock)
    for tenth in range(45):
        clock.now = tenth / 10
        line.show(at(tenth * MIB))
    line.close()
    assert stream.getvalue().count("\n") == 2
    assert "\r" not in stream.getvalue()


def test_a_new_phase_has_its_own_speed():
    stream, clock = Terminal(), Clock()
    line = ProgressLine(stream, clock)
    line.show(at(90 * MIB))
    clock.now = 1.0
    line.show(at(MIB, phase="hash"))
    assert "/s" not in stream.getvalue().rsplit("\r", 1)[1]


def test_an_unknown_total_shows_bytes_only():
    stream = Terminal()
    ProgressLine(stream, Clock()).show(at(3 * MIB, None))
    assert "3.0 MiB" in stream.getvalue()
    assert "%" not in stream.getvalue()


@pytest.mark.parametrize(
    ("count", "text"), [(None, "size unknown"), (0, "0 B"), (1536, "1.5 KiB"), (5 * 2**40, "5.0 TiB")]
)
def test_sizes(count: int | None, text: str):
    assert size(count) == text


def test_a_note_takes_a_line_of_its_own():
    stream = Terminal()
    line = ProgressLine(stream, Clock())
    line.show(at(1))
    line.note("resuming")
    assert stream.getvalue().endswith("\r\033[Kresuming\n")


def test_events_are_shown_to_people():
    stream = io.StringIO()
    line = ProgressLine(stream, Clock())
    line.say(Plan(files=("a", "b"), total_bytes=2048, origin="hf:o/r@c"))
    line.say(Note(text="resuming"))
    line.say(PullFailed(message="the command says it when it ends"))
    assert stream.getvalue() == "hf:o/r@c: 2 files, 2.0 KiB\nresuming\n"


def test_events_are_lines_for_programs():
    stream = io.StringIO()
    lines = EventLines(stream)
    lines.say(Plan(files=("a",), total_bytes=None, origin="x"))
    lines.say(at(5))
    lines.say(PullFailed(message="no"))
    lines.done(name="m")
    lines.close()
    found = [json.loads(text) for text in stream.getvalue().splitlines()]
    assert [event["t"] for event in found] == ["plan", "progress", "failed", "done"]
    assert found[1]["done_bytes"] == 5
