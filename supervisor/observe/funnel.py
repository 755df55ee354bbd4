"""The one way from a logger to every sink: level, context, redaction, repeats, then the sinks.

It is the only handler of the root logger. Sinks get a copy of the record that is redacted already, so no sink can
forget to do it. A sink that fails loses its line; the others and the caller do not notice.
"""

from __future__ import annotations

import contextlib
import copy
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

from supervisor.observe.context import Context
from supervisor.observe.figures import counted
from supervisor.observe.levels import Levels
from supervisor.observe.redact import STANDARD, Redaction
from supervisor.observe.repeats import Held, Line, Repeats


class Sink(Protocol):
    """Where lines go."""

    def take(self, record: logging.LogRecord) -> None:
        """Take a redacted record; must not block and must not log at the level of every line."""


def extras(record: logging.LogRecord) -> dict[str, object]:
    """What a caller added with `extra=`, and the context."""
    return {key: value for key, value in vars(record).items() if key not in STANDARD}


class Funnel(logging.Handler):
    """See the module.

    Attributes:
        lines: level -> lines that reached the sinks.
        repeated: lines held back because they said the same.
        failed: lines that a sink could not take.
    """

    def __init__(
        self,
        levels: Levels,
        sinks: Sequence[Sink],
        repeats: Repeats | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        super().__init__()
        self.lines: Counter[str] = Counter()
        self.repeated = 0
        self.failed = 0
        self._levels, self._sinks, self._clock = levels, sinks, clock
        self._repeats = repeats or Repeats()
        self.addFilter(Context())
        self.addFilter(Redaction())

    def handle(self, record: logging.LogRecord) -> bool:
        """Take one record; the caller's own stays as it is."""
        if not self._levels.admits(record):
            return False
        mine = copy.copy(record)
        self.filter(mine)
        with self._locked():
            now = self._clock()
            self._tell_held(self._repeats.due(now))
            if self._repeats.admit(_line(mine), now):
                self._pour(mine)
            else:
                self.repeated += 1
        return True

    def flush(self) -> None:
        """Say what is still held back as a count."""
        with self._locked():
            self._tell_held(self._repeats.rest())

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        self.acquire()
        try:
            yield
        finally:
            self.release()

    def _pour(self, record: logging.LogRecord) -> None:
        self.lines[record.levelname.lower()] += 1
        for sink in self._sinks:
            try:
                sink.take(record)
            except Exception:  # a broken sink must not end what was logging
                self.failed += 1

    def _tell_held(self, held: Sequence[Held]) -> None:
        for line, times in held:
            again = f"said {counted(times, 'time')} more: {line.message}"
            record = logging.LogRecord(line.logger, line.level, "", 0, again, None, None)
            vars(record).update(line.about)
            self._pour(record)


def _line(record: logging.LogRecord) -> Line:
    about = tuple((name, str(value)) for name, value in extras(record).items())
    return Line(record.name, record.levelno, record.getMessage(), record.exc_text or "", about)
