"""Lines of workers' logs by job, within bounds."""

from __future__ import annotations

import itertools

import pytest

from coordinator import kept_lines
from coordinator.kept_lines import KeptLine, KeptLines, Lines, merged


def ring(most_bytes: int = kept_lines.MOST_BYTES) -> KeptLines:
    """One whose clock goes on by a second with every look."""
    seconds = itertools.count(1)
    return KeptLines(most_bytes, lambda: float(next(seconds)))


def says(lines: Lines) -> list[str]:
    return [line.message for line in lines.lines]


def test_lines_are_found_by_job_and_by_worker_in_their_order() -> None:
    kept = ring()
    for worker, job, text in (("a", "j1", "1"), ("b", "j1", "2"), ("a", "j2", "3"), ("a", "j1", "4")):
        kept.keep(worker, "then", "info", text, job)
    assert says(kept.of("j1")) == ["1", "2", "4"]
    assert says(kept.of("j1", "a")) == ["1", "4"]
    assert kept.of("j2").lines == [KeptLine("then", 4000, "a", "info", "3", "j2")]
    assert kept.of("nobody") == Lines(since_ms=1000)


def test_of_many_lines_the_latest_are_shown_and_the_others_counted() -> None:
    kept = ring()
    for number in range(7):
        kept.keep("a", "", "info", str(number), "j")
    found = kept.of("j", limit=3)
    assert (says(found), found.more, found.since_ms) == (["4", "5", "6"], 4, 1000)


def test_an_answer_is_bounded_however_long_its_lines_are() -> None:
    kept = ring(2**30)
    for _ in range(kept_lines.MOST_LINES + 5):
        kept.keep("a", "", "info", "x" * 4000, "j")
    found = kept.of("j", limit=10**9)
    assert len(found.lines) == kept_lines.MOST_CHARS // 4000
    assert len(found.lines) + found.more == kept_lines.MOST_LINES + 5


def test_the_oldest_go_when_there_is_no_room_and_since_when_nothing_is_missing_is_told() -> None:
    kept = ring(100_000)
    for number in range(1000):
        kept.keep(f"w{number % 10}", "", "info", "x" * 500, f"j{number}")
        assert kept.bytes <= 100_000
    assert kept.of("j0").lines == []
    assert len(kept.of("j999").lines) == 1
    # The clock was read once before the first line: line n came at n + 2 seconds.
    assert (kept.of("j0").since_ms, kept.of("j7").since_ms) == (2001, 9001)
    assert kept.of("j999").since_ms == 1000


def test_a_worker_that_talks_without_end_displaces_its_own_lines_first() -> None:
    kept = ring(100_000)
    kept.keep("quiet", "", "info", "what matters", "j")
    for _ in range(1000):
        kept.keep("loud", "", "info", "x" * 500, "j")
    assert says(kept.of("j", "quiet")) == ["what matters"]
    assert kept.bytes <= 100_000 // kept_lines.SHARE + 1000


def test_of_a_job_whose_lines_were_not_displaced_none_is_missing() -> None:
    kept = ring(100_000)
    kept.keep("quiet", "", "info", "what matters", "j")
    for _ in range(1000):
        kept.keep("loud", "", "info", "x" * 500, "other")
    left = kept.of("other")
    assert kept.of("j").since_ms == 1000
    assert left.since_ms == left.lines[0].told_ms - 1000 + 1


def test_of_jobs_beyond_those_that_are_remembered_the_newest_mark_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_lines, "MOST_MARKED", 2)
    kept = ring(1)  # every line is displaced at once
    for job in ("j1", "j2", "j1", "j3"):  # at 2, 3, 4 and 5 seconds
        kept.keep("a", "", "info", "x", job)
    assert [kept.of(job).since_ms for job in ("j1", "j2", "j3", "j4")] == [4001, 3001, 5001, 3001]


def test_lines_of_a_job_that_was_dropped_are_gone_and_stay_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_lines, "MOST_MARKED", 2)
    kept = ring()
    for job in ("j1", "j2", "j1"):  # the last of them at 4 seconds
        kept.keep("a", "", "info", "x", job)
    before = kept.bytes
    kept.drop(["j1"])  # at 5 seconds
    assert (kept.of("j1"), says(kept.of("j2"))) == (Lines(since_ms=5001), ["x"])
    assert kept.bytes * 3 == before
    kept.keep("a", "", "info", "late", "j1")
    assert kept.of("j1") == Lines(since_ms=6001)
    kept.drop(["j2", "nobody"])
    assert (kept.of("j2").lines, kept.bytes, len(kept._dropped)) == ([], 0, 2)


@pytest.mark.parametrize("limit", [0, -1])
def test_who_asks_for_no_line_gets_none(limit: int) -> None:
    kept = ring()
    kept.keep("a", "", "info", "x", "j")
    assert kept.of("j", limit=limit) == Lines(since_ms=1000, more=1)


def test_a_line_that_is_too_long_for_everything_leaves_nothing_behind() -> None:
    kept = ring(1000)
    kept.keep("a", "", "info", "x" * 4000, "j")
    assert (kept.of("j").lines, kept.bytes) == ([], 0)
    kept.keep("a", "", "info", "x", "j")


def test_what_was_lost_on_its_way_is_told_of_the_workers_that_speak_of_the_job() -> None:
    kept = ring()
    kept.lose("a", 3)
    kept.lose("a", 4)
    kept.lose("b", 1)
    kept.keep("a", "", "info", "x", "j")
    assert kept.of("j").lost == {"a": 7}
    assert kept.of("elsewhere", "b").lost == {"b": 1}


def test_what_two_replicas_know_is_one_story() -> None:
    def line(ms: int) -> KeptLine:
        return KeptLine("", ms, "a", "info", str(ms), "j")

    here = Lines(lines=[line(10), line(30)], more=2, since_ms=5, lost={"a": 1})
    there = Lines(lines=[line(20)], more=1, since_ms=7, lost={"a": 2, "b": 3})
    both = merged([here, there], limit=2)
    assert both == Lines(lines=[line(20), line(30)], more=4, since_ms=7, lost={"a": 3, "b": 3})
    assert merged([], 5) == Lines()
