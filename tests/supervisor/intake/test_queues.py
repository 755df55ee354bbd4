"""Jobs by urgency, things by time."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from supervisor.intake.effects import Job
from supervisor.intake.queues import PRIORITY_S, STALE, Clock, Waiting


def job(name: str, at: float, priority: int = 0) -> Job:
    return Job(id=name, model="m", at=at, priority=priority)


def test_priority_overtakes_for_a_bounded_time():
    waiting = Waiting()
    waiting.push(job("low", 0.0))
    waiting.push(job("late", PRIORITY_S + 1, priority=1))
    waiting.push(job("soon", PRIORITY_S - 1, priority=1))
    assert [waiting.pop().id for _ in range(3)] == ["soon", "low", "late"]


def test_what_was_dropped_is_not_first_and_counts_no_more():
    waiting = Waiting()
    waiting.push(job("a", 1.0))
    waiting.push(job("b", 2.0))
    assert waiting.waited(5.0) == 7.0
    assert waiting.drop("a")
    assert not waiting.drop("a")
    assert waiting.urgency() == 2.0
    assert waiting.waited(5.0) == 3.0
    waiting.push(job("a", 4.0))  # the same id again
    assert [waiting.pop().id, waiting.pop().id] == ["b", "a"]
    assert len(waiting) == 0


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(-1, 2), st.booleans())))
def test_jobs_come_out_by_urgency(items):
    waiting = Waiting()
    kept = []
    for number, (at, priority, dropped) in enumerate(items):
        one = job(str(number), float(at), priority)
        waiting.push(one)
        if dropped:
            waiting.drop(one.id)
        else:
            kept.append((at - priority * PRIORITY_S, number, one.id))
    assert len(waiting) == len(kept)
    assert [waiting.pop().id for _ in kept] == [name for _at, _number, name in sorted(kept)]


def test_a_clock_keeps_the_last_time_set():
    clock: Clock[str] = Clock()
    clock.set("a", 1.0)
    clock.set("b", 2.0)
    clock.set("a", 3.0)
    assert clock.next() == 2.0
    assert clock.first() == "b"
    assert clock.pop(1.9) is None
    assert clock.pop(9.0) == "b"
    assert clock.time_of("a") == 3.0
    clock.unset("a")
    assert clock.next() is None
    assert clock.pop(9.0) is None


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 20)), max_size=600))
def test_a_clock_that_is_set_again_and_again_forgets_the_old_times_and_keeps_the_order(steps):
    clock, times = Clock[int](), {}
    for number, (what, at) in enumerate(steps):
        if at == 20:
            clock.unset(what)
            times.pop(what, None)
        else:
            clock.set(what, float(at))
            times[what] = (float(at), number)
    assert clock.size <= 2 * 10 + STALE
    assert [clock.pop(99.0) for _ in times] == sorted(times, key=lambda what: times[what])
    assert clock.pop(99.0) is None


def test_a_clock_does_not_grow_behind_one_that_stays_first():
    clock: Clock[str] = Clock()
    clock.set("first", 0.0)
    for _ in range(10_000):
        clock.set("other", 1.0)
        assert clock.first() == "first"
    assert clock.size <= 2 * 2 + STALE
