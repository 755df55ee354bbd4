from __future__ import annotations

import logging

import pytest

from supervisor.observe.context import about
from supervisor.observe.funnel import Funnel, extras
from supervisor.observe.levels import Levels
from supervisor.observe.repeats import Repeats

TOKEN = "bhw_8hQ3vXk29LmZpR7tYw4cNfB6sJd1gAe5uKi0oTqVxWy"


class Kept:
    def __init__(self) -> None:
        self.records: list[logging.LogRecord] = []

    def take(self, record: logging.LogRecord) -> None:
        self.records.append(record)

    @property
    def said(self) -> list[str]:
        return [record.getMessage() for record in self.records]


class Broken:
    def take(self, record: logging.LogRecord) -> None:
        raise OSError("no")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture(autouse=True)
def _restore():
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)


def record(message: str, *args: object, level: int = logging.INFO, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("supervisor.x", level, "", 0, message, args, None)
    vars(made).update(extra)
    return made


def funnel(clock: Clock, *sinks: object) -> Funnel:
    return Funnel(Levels("info", clock), sinks, Repeats(at_once=2, every_s=10), clock)  # type: ignore[arg-type]


def test_every_sink_gets_the_redacted_line_with_its_context(clock: Clock) -> None:
    one, two = Kept(), Kept()
    mine = record("got %s", TOKEN, prompt="words")
    with about(job="j", attempt=1):
        assert funnel(clock, one, two).handle(mine)
    for sink in (one, two):
        [got] = sink.records
        assert got.getMessage() == "got bhw_[hidden]"
        assert extras(got) == {"prompt": "[hidden, 5 long]", "job": "j", "attempt": 1}
    assert mine.args == (TOKEN,)  # others, a debugger say, still have the caller's own


def test_a_broken_sink_harms_nobody(clock: Clock) -> None:
    kept = Kept()
    made = funnel(clock, Broken(), kept)
    made.handle(record("one"))
    assert kept.said == ["one"]
    assert made.failed == 1


def test_the_level_decides(clock: Clock) -> None:
    kept = Kept()
    made = funnel(clock, kept)
    assert not made.handle(record("quiet", level=logging.DEBUG))
    made.handle(record("loud", level=logging.ERROR))
    assert kept.said == ["loud"]
    assert made.lines == {"error": 1}


def test_repeats_become_a_count_with_the_fields_of_the_line(clock: Clock) -> None:
    kept = Kept()
    made = funnel(clock, kept)
    for _ in range(100):
        made.handle(record("again %s", TOKEN, level=logging.WARNING, model="m"))
    made.handle(record("again %s", TOKEN, level=logging.WARNING, model="other"))
    assert len(kept.said) == 3
    clock.now = 11
    made.handle(record("later"))
    assert kept.said[3:] == ["said 98 times more: again bhw_[hidden]", "later"]
    assert extras(kept.records[3]) == {"model": "m"}
    assert kept.records[3].levelno == logging.WARNING
    assert made.repeated == 98


def test_what_is_held_back_at_the_end_is_told(clock: Clock) -> None:
    kept = Kept()
    made = funnel(clock, kept)
    for _ in range(5):
        made.handle(record("again"))
    made.flush()
    assert kept.said == ["again", "again", "said 3 times more: again"]
