from __future__ import annotations

import logging

import pytest

from supervisor.observe.levels import Levels


@pytest.fixture(autouse=True)
def _restore():
    root = logging.getLogger()
    level = root.level
    yield
    root.setLevel(level)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def record(level: int, name: str = "supervisor.x") -> logging.LogRecord:
    return logging.LogRecord(name, level, "", 0, "", (), None)


def test_a_level_for_a_while_ends_by_itself() -> None:
    clock = Clock()
    levels = Levels("info", clock)
    assert not levels.admits(record(logging.DEBUG))
    levels.set("debug", 60)
    assert logging.getLogger("anything").isEnabledFor(logging.DEBUG)
    assert levels.admits(record(logging.DEBUG))
    assert levels.now == "debug"
    clock.now = 60
    assert not levels.admits(record(logging.DEBUG))
    assert levels.now == "info"
    assert not logging.getLogger("anything").isEnabledFor(logging.DEBUG)


def test_a_quieter_level_for_a_while_ends_by_itself_too() -> None:
    clock = Clock()
    levels = Levels("info", clock)
    levels.set("error", 60)
    assert not levels.admits(record(logging.WARNING))
    clock.now = 61
    assert levels.admits(record(logging.INFO))


def test_a_change_for_good_ends_one_for_a_while() -> None:
    levels = Levels("info", Clock())
    levels.set("debug", 60)
    levels.set("warning")
    assert levels.now == "warning"
    assert not levels.admits(record(logging.INFO))


def test_chatty_libraries_speak_at_debug_only() -> None:
    levels = Levels("info", Clock())
    levels.set("debug", 60)
    levels.set("info", 60)
    assert not levels.admits(record(logging.INFO, "httpx"))
    assert levels.admits(record(logging.WARNING, "httpx"))
    levels.set("debug")
    assert levels.admits(record(logging.INFO, "httpx"))


@pytest.mark.parametrize(("level", "for_s"), [("loud", None), ("", None), ("INFO", None), ("info", 0), ("info", -1)])
def test_nonsense_is_refused_and_changes_nothing(level: str, for_s: float | None) -> None:
    levels = Levels("info", Clock())
    with pytest.raises(ValueError, match="must be"):
        levels.set(level, for_s)
    assert levels.now == "info"
