"""What is remembered of jobs."""

from __future__ import annotations

import itertools

import pytest

from supervisor.control.jobs_seen import MOST_CHANGES, JobBook


@pytest.fixture
def book():
    ticks = itertools.count(1)
    return JobBook(kept=3, now=lambda: float(next(ticks)))


def test_the_life_of_an_attempt(book):
    book.began("j", 1, "llm", "chat")
    (seen,) = book.all()
    assert (seen.state, seen.phase, seen.accepted, seen.started) == ("waiting", "accept", 1.0, None)
    for phase in ("fetch", "queue", "load"):
        book.entered("j", 1, phase)
        assert book.all()[0].state == "waiting"
    book.progressed("j", 1, 2, 4)
    assert (book.all()[0].phase, book.all()[0].done) == ("load", 2)
    book.entered("j", 1, "run")
    assert (book.all()[0].phase, book.all()[0].done) == ("run", None)
    book.entered("j", 1, "run")
    book.progressed("j", 1, 3, 20)
    book.streamed("j", 1)
    book.streamed("j", 1)
    (seen,) = book.all()
    assert (seen.state, seen.started, seen.done, seen.total, seen.chunks) == ("running", 2.0, 3, 20, 2)
    book.entered("j", 1, "upload")
    assert book.all()[0].state == "running"
    book.ended("j", 1, "succeeded", "", {"completion_tokens": 7})
    (seen,) = book.all()
    assert (seen.state, seen.phase, seen.outcome, seen.fault, seen.owner) == ("ended", "upload", "succeeded", "", "")
    assert (seen.usage, seen.ended) == ({"completion_tokens": 7}, 3.0)


def test_what_failed_says_where_and_whose_fault_it_was(book):
    book.began("j", 2, "image", "draw")
    book.entered("j", 2, "load")
    book.ended("j", 2, "failed", "load_failed", {})
    (seen,) = book.attempts("j")
    assert (seen.phase, seen.outcome, seen.fault, seen.owner) == ("load", "failed", "load_failed", "engine")


def test_what_is_told_of_an_attempt_that_is_not_open_changes_nothing(book):
    book.entered("j", 1, "run")
    book.progressed("j", 1, 1, 2)
    book.streamed("j", 1)
    book.ended("j", 1, "failed", "engine_crashed", {})
    assert book.all() == []
    book.began("j", 1, "llm", "chat")
    book.ended("j", 1, "cancelled", "cancelled", {})
    book.ended("j", 1, "succeeded", "", {})
    book.entered("j", 1, "run")
    assert [seen.outcome for seen in book.all()] == ["cancelled"]
    assert book.counts() == {"waiting": 0, "running": 0, "succeeded": 0, "failed": 0, "cancelled": 1}


def test_the_latest_are_kept_and_the_totals_of_all(book):
    for number in range(5):
        book.began(f"j{number}", 1, "llm", "chat")
        book.ended(f"j{number}", 1, "succeeded", "", {})
    assert [seen.job for seen in book.all()] == ["j4", "j3", "j2"]
    assert book.attempts("j0") == []
    assert book.counts()["succeeded"] == 5


def test_open_ones_come_first_and_all_of_them_can_be_asked_for_apart(book):
    for number, model in enumerate(("chat", "chat", "draw", "draw")):
        book.began(f"j{number}", 1, "llm" if model == "chat" else "image", model)
    book.entered("j1", 1, "run")
    book.ended("j0", 1, "failed", "engine_crashed", {})
    assert [seen.job for seen in book.all()] == ["j1", "j2", "j3", "j0"]
    assert [seen.job for seen in book.all(limit=2)] == ["j1", "j2"]
    for asked, jobs in (
        ({"state": "waiting"}, ["j2", "j3"]),
        ({"state": "running"}, ["j1"]),
        ({"state": "ended"}, ["j0"]),
        ({"state": "failed"}, ["j0"]),
        ({"state": "cancelled"}, []),
        ({"model": "draw"}, ["j2", "j3"]),
        ({"kind": "llm", "state": "ended"}, ["j0"]),
        ({"model": "chat", "limit": 1}, ["j1"]),
    ):
        assert [seen.job for seen in book.all(**asked)] == jobs, asked
    assert (book.counts()["waiting"], book.counts()["running"]) == (2, 1)


def test_a_second_attempt_of_a_job_stands_beside_the_first(book):
    book.began("j", 1, "llm", "chat")
    book.ended("j", 1, "failed", "engine_crashed", {})
    book.began("j", 2, "llm", "chat")
    assert [(seen.attempt, seen.state) for seen in book.attempts("j")] == [(2, "waiting"), (1, "ended")]


def test_changes_are_told_once_each_as_they_are_now(book):
    called = []
    book.on_change = lambda: called.append(1)
    book.began("a", 1, "llm", "chat")
    book.began("b", 1, "llm", "chat")
    book.entered("a", 1, "queue")  # no change of state
    book.entered("a", 1, "run")
    book.ended("a", 1, "succeeded", "", {})
    changes = book.changes()
    assert [(seen.job, seen.state) for seen in changes.jobs] == [("a", "ended"), ("b", "waiting")]
    assert changes.more == 0
    assert len(called) == 4
    assert book.changes() == ((), 0)


def test_a_flood_of_changes_is_counted(book):
    for number in range(MOST_CHANGES + 10):
        book.began(f"j{number}", 1, "llm", "chat")
    book.entered("j0", 1, "run")  # it is among those that are told
    changes = book.changes()
    assert (len(changes.jobs), changes.more) == (MOST_CHANGES, 10)
    assert changes.jobs[0].state == "running"


def test_nothing_of_what_a_job_says_can_be_kept():
    """Its fields are names, numbers and words of ours; there is none for a sentence."""
    book = JobBook()
    book.began("j", 1, "llm", "chat")
    book.ended("j", 1, "failed", "invalid_parameter", {})
    (seen,) = book.all()
    texts = {name for name in seen.__struct_fields__ if isinstance(getattr(seen, name), str)}
    assert texts == {"job", "kind", "model", "state", "phase", "outcome", "fault", "owner"}
