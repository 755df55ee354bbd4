"""One line said a thousand times is one line and a count.

A line that is the same as an earlier one (logger, level, sentence, fields) passes `AT_ONCE` times in `EVERY_S`; what
comes above that is counted, and the count is told by one line when the span is over.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import NamedTuple

AT_ONCE = 5
EVERY_S = 10.0
KNOWN = 512  # lines remembered; the oldest is forgotten, and its count told


class Line(NamedTuple):
    """What makes two lines the same; `about` are its fields."""

    logger: str
    level: int
    message: str
    traceback: str = ""
    about: tuple[tuple[str, str], ...] = ()


class Held(NamedTuple):
    """Lines that were not said: which, and how many."""

    key: Line
    times: int


class _Span:
    __slots__ = ("began", "held", "passed")

    def __init__(self, began: float) -> None:
        self.began, self.passed, self.held = began, 0, 0


class Repeats:
    """Pure; the time comes in, in seconds."""

    def __init__(self, at_once: int = AT_ONCE, every_s: float = EVERY_S, known: int = KNOWN) -> None:
        self._at_once, self._every_s, self._known = at_once, every_s, known
        self._spans: OrderedDict[Line, _Span] = OrderedDict()  # by the time at which they began

    def admit(self, key: Line, now: float) -> bool:
        """Whether the line passes. Ask `due` first, so that spans which are over do not count."""
        span = self._spans.get(key)
        if span is None:
            span = self._spans[key] = _Span(now)
        if span.passed < self._at_once:
            span.passed += 1
            return True
        span.held += 1
        return False

    def due(self, now: float) -> list[Held]:
        """Forget the spans that are over; what they held back."""
        told = []
        while self._spans:
            key, span = next(iter(self._spans.items()))
            # A clock that went backwards must not keep a span for ever.
            if 0 <= now - span.began < self._every_s and len(self._spans) <= self._known:
                break
            del self._spans[key]
            if span.held:
                told.append(Held(key, span.held))
        return told

    def rest(self) -> list[Held]:
        """Forget everything; what was held back."""
        told = [Held(key, span.held) for key, span in self._spans.items() if span.held]
        self._spans.clear()
        return told
