from __future__ import annotations

from supervisor.observe.repeats import Line, Repeats


def line(text: str, **about: str) -> Line:
    return Line("x", 30, text, about=tuple(about.items()))


def test_a_few_pass_the_rest_is_counted_and_told_once() -> None:
    repeats = Repeats(at_once=3, every_s=10)
    assert [repeats.admit(line("a"), 0.1 * n) for n in range(10)] == [True] * 3 + [False] * 7
    assert repeats.due(9.9) == []
    assert repeats.due(10.0) == [(line("a"), 7)]
    assert repeats.due(20.0) == []
    assert repeats.admit(line("a"), 20.0)


def test_lines_of_other_jobs_and_other_sentences_are_others() -> None:
    repeats = Repeats(at_once=1, every_s=10)
    assert all(repeats.admit(line("a", job=str(n)), 0) for n in range(5))
    assert repeats.admit(line("b"), 0)


def test_memory_is_bounded_and_a_forgotten_count_is_told() -> None:
    repeats = Repeats(at_once=1, every_s=1e9, known=3)
    told = []
    for text in "aabcdefg":
        told += repeats.due(0)
        repeats.admit(line(text), 0)
    assert told == [(line("a"), 1)]
    assert len(repeats._spans) <= 4


def test_a_clock_that_goes_backwards_keeps_nothing_for_ever() -> None:
    repeats = Repeats(at_once=1, every_s=10)
    repeats.admit(line("a"), 1000)
    repeats.admit(line("a"), 1000)
    assert repeats.due(5) == [(line("a"), 1)]


def test_the_rest_at_the_end() -> None:
    repeats = Repeats(at_once=1)
    for _ in range(4):
        repeats.admit(line("a"), 0)
    repeats.admit(line("b"), 0)
    assert repeats.rest() == [(line("a"), 3)]
    assert repeats.rest() == []
