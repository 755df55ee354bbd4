"""What the current task works for, so that every line of its log says so.

trio copies the context into tasks and threads that it starts, so one `with about(job=…)` around a job covers all of
them.
"""

from __future__ import annotations

import contextlib
import contextvars
import logging
from collections.abc import Iterator, Mapping
from types import MappingProxyType

FIELDS = ("job", "attempt", "model", "engine")
_NOTHING: Mapping[str, str | int] = MappingProxyType({})
_current: contextvars.ContextVar[Mapping[str, str | int]] = contextvars.ContextVar("bulkhead_about", default=_NOTHING)


@contextlib.contextmanager
def about(
    *, job: str | None = None, attempt: int | None = None, model: str | None = None, engine: str | None = None
) -> Iterator[None]:
    """Log lines inside carry these fields, and those of the spans around it."""
    given = {"job": job, "attempt": attempt, "model": model, "engine": engine}
    token = _current.set({**_current.get(), **{name: value for name, value in given.items() if value is not None}})
    try:
        yield
    finally:
        _current.reset(token)


def current() -> Mapping[str, str | int]:
    """The fields in force here."""
    return _current.get()


class Context(logging.Filter):
    """Puts the fields in force on every record; what the line itself says goes before."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Always True."""
        for name, value in _current.get().items():
            if not hasattr(record, name):
                setattr(record, name, value)
        return True
