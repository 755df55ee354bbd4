"""Lines of workers' logs in ours."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterable, Iterator

import msgspec
import pytest

from coordinator import worker_lines
from coordinator.kept_lines import KeptLines
from coordinator.logs import JsonFormatter
from coordinator.worker_lines import LOST_LINES, MOST_LOST, Ear, Ears, Line, Pace


@pytest.fixture
def told() -> Iterator[io.StringIO]:
    """What a coordinator with `log_format = "json"` writes."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonFormatter())
    worker_lines.log.addHandler(handler)
    before = worker_lines.log.level
    worker_lines.log.setLevel(logging.INFO)
    yield stream
    worker_lines.log.setLevel(before)
    worker_lines.log.removeHandler(handler)


def tell(worker: str, lines: Iterable[Line], dropped: int = 0) -> KeptLines:
    kept = KeptLines()
    worker_lines.tell(worker, lines, dropped, kept=kept, ear=Ear())
    return kept


def fields(told: io.StringIO) -> list[dict[str, object]]:
    return [msgspec.json.decode(line) for line in told.getvalue().splitlines()]


def test_the_lines_of_a_job_are_found_by_its_id(told: io.StringIO) -> None:
    tell("box", [Line("2026-11-21T10:00:00Z", "warning", "two\nlines", "job_1"), Line("later", "info", "of nobody")])
    first, second = fields(told)
    assert (first["worker"], first["job"], first["at"]) == ("box", "job_1", "2026-11-21T10:00:00Z")
    assert (first["level"], first["message"]) == ("warning", "box: 'two\\nlines'")
    assert "job" not in second


@pytest.mark.parametrize(
    ("word", "level"), [("warn", "warning"), ("ERROR", "error"), ("critical", "critical"), ("silly", "info")]
)
def test_levels_of_all_dialects(told: io.StringIO, word: str, level: str) -> None:
    tell("box", [Line("", word, "x")])
    assert fields(told)[0]["level"] == level


def test_what_was_lost_is_told_as_a_number(told: io.StringIO) -> None:
    tell("box", [], dropped=7)
    tell("box", [Line("", "info", "x")], dropped=-1)
    first, second = fields(told)
    assert (first["level"], first["dropped"], first["message"]) == ("warning", 7, "box: 7 lines of its log were lost")
    assert "dropped" not in second


def test_a_flood_is_cut(told: io.StringIO) -> None:
    tell("box", (Line("x" * 999, "info", "x" * 99_999, "j" * 999) for _ in range(worker_lines.MOST_LINES + 5)), 2)
    lost, first, *rest = fields(told)
    assert (lost["dropped"], len(rest)) == (7, worker_lines.MOST_LINES - 1)
    assert len(str(first)) < worker_lines.MOST_CHARS + 1000


def test_lines_of_jobs_are_kept_for_who_asks_and_others_are_not(told: io.StringIO) -> None:
    kept = tell("box", [Line("then", "WARN", "slow", "job_1"), Line("then", "error", "of nobody")], 3)
    found = kept.of("job_1")
    assert [(one.worker, one.at, one.level, one.message) for one in found.lines] == [("box", "then", "warning", "slow")]
    assert found.lost == {"box": 3}
    assert kept.of("").lines == []


def test_what_is_kept_of_a_line_is_cut_too(told: io.StringIO) -> None:
    kept = tell("box", [Line("x" * 999, "info", "y" * 99_999, "j" * 999)])
    (line,) = kept.of("j" * 128).lines
    assert (len(line.at), len(line.message)) == (128, worker_lines.MOST_CHARS)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_worker_that_talks_without_end_is_heard_so_often_and_counted(told: io.StringIO) -> None:
    clock, kept = Clock(), KeptLines()
    ear = Ear(clock, Pace(at_once=5, a_second=2.0, clock=clock))
    lines = [Line("", "info", str(number)) for number in range(8)]
    worker_lines.tell("box", lines, kept=kept, ear=ear)
    lost, *shown = fields(told)
    assert (lost["dropped"], [line["message"] for line in shown]) == (3, [f"box: '{number}'" for number in range(5)])
    clock.now += 1.0
    worker_lines.tell("box", lines, dropped=1, kept=kept, ear=ear)
    lost, *shown = fields(told)[6:]
    assert (lost["dropped"], [line["message"] for line in shown]) == (7, ["box: '0'", "box: '1'"])
    clock.now += 1000.0
    assert ear.lines.take(100) == 5, "what was not used does not add up for ever"


@pytest.mark.parametrize("lines", [[], [Line("", "info", "x")]], ids=["empty", "small"])
def test_how_many_lines_were_lost_is_told_so_often_and_none_is_forgotten(told: io.StringIO, lines: list[Line]) -> None:
    clock, kept = Clock(), KeptLines()
    ear = Ear(clock)
    for _ in range(1000):
        worker_lines.tell("box", lines, dropped=1, kept=kept, ear=ear)
    at_once, a_second = LOST_LINES
    assert len([line for line in fields(told) if "dropped" in line]) == at_once
    clock.now += 1 / a_second
    worker_lines.tell("box", lines, kept=kept, ear=ear)
    counts = [int(str(line["dropped"])) for line in fields(told) if "dropped" in line]
    assert (len(counts), sum(counts)) == (at_once + 1, 1000)
    assert kept.of("", "box").lost == {"box": 1000}, "who asks knows them all at once"


def test_a_number_that_no_log_can_write_is_cut(told: io.StringIO) -> None:
    ear = Ear(Clock())
    for _ in range(5):
        worker_lines.tell("box", [], dropped=2**64 - 1, kept=KeptLines(), ear=ear)
    assert fields(told)[0]["dropped"] == MOST_LOST
    assert ear.lost == 2 * MOST_LOST


def test_a_worker_that_comes_again_is_heard_no_more_often() -> None:
    clock = Clock()
    ears = Ears(most=2, clock=clock)
    assert ears.of("box").lines.take(10**6) == worker_lines.AT_ONCE
    assert ears.of("box").lines.take(10**6) == 0
    assert ears.of("other").lines.take(1) == 1
    ears.of("box")
    ears.of("third")
    assert ears.of("box").lines.take(1) == 0, "the one that was silent for the longest is forgotten"
    assert ears.of("other").lines.take(10**6) == worker_lines.AT_ONCE
