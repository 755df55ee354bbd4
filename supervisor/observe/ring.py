"""The latest log lines in memory, for `supervisor logs` and the page.

Lines come from any thread; readers are on the trio thread. Each line has a number that never repeats in the life of
the process, so a reader asks for what came after the last one it has seen, and sees by the number what it missed.
"""

from __future__ import annotations

import logging
import threading
from collections import deque
from typing import Any

import msgspec
import trio

SIZE = 2000
_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "critical": 50}


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One line, redacted.

    Attributes:
        seq: from 1, without gaps.
        time: seconds since the epoch.
        level: debug, info, warning, error, critical.
        fields: what else the line carried.
    """

    seq: int
    time: float
    level: str
    logger: str
    message: str
    job: str = ""
    attempt: int | None = None
    model: str = ""
    engine: str = ""
    fields: dict[str, Any] = {}
    traceback: str = ""


class Ring:
    """The latest `size` lines."""

    def __init__(self, size: int = SIZE) -> None:
        self._entries: deque[Entry] = deque(maxlen=size)
        self._lock = threading.Lock()
        self._last = 0
        self._waiting: list[tuple[trio.lowlevel.TrioToken, trio.Event]] = []

    @property
    def last(self) -> int:
        """Number of the latest line; 0 when there was none."""
        return self._last

    @property
    def oldest(self) -> int:
        """Number of the oldest line that is kept; one more than `last` when there is none."""
        with self._lock:
            return self._entries[0].seq if self._entries else self._last + 1

    def since(
        self, seq: int = 0, *, level: str = "", query: str = "", job: str = "", limit: int | None = None
    ) -> list[Entry]:
        """Lines after `seq`, the oldest first.

        Args:
            level: this one and worse; "" means all.
            query: part of the message, the logger or the traceback, in either case.
            job: only lines of this job.
            limit: only the latest that many.

        Raises:
            ValueError: there is no such level.
        """
        if level and level not in _LEVELS:
            raise ValueError(f"level must be one of {', '.join(_LEVELS)}, not {level!r}")
        least, wanted = _LEVELS.get(level, 0), query.casefold()
        with self._lock:
            entries = list(self._entries)
        found = [
            entry
            for entry in entries
            if entry.seq > seq
            and _LEVELS.get(entry.level, 20) >= least
            and (not job or entry.job == job)
            and (not wanted or wanted in f"{entry.logger}\n{entry.message}\n{entry.traceback}".casefold())
        ]
        return found if limit is None else found[max(0, len(found) - limit) :]

    def add(self, record: logging.LogRecord, extras: dict[str, Any]) -> None:
        """Keep a record that was redacted already; from any thread."""
        fields = dict(extras)
        named = {name: str(fields.pop(name)) for name in ("job", "model", "engine") if name in fields}
        attempt = fields.pop("attempt", None)
        with self._lock:
            self._last += 1
            self._entries.append(
                Entry(
                    seq=self._last,
                    time=record.created,
                    level=record.levelname.lower(),
                    logger=record.name,
                    message=record.getMessage(),
                    attempt=attempt if isinstance(attempt, int) else None,
                    fields=fields,
                    traceback=record.exc_text or "",
                    **named,
                )
            )
            waiting, self._waiting = self._waiting, []
        for token, event in waiting:
            try:
                token.run_sync_soon(event.set)
            except trio.RunFinishedError:
                continue

    async def wait_after(self, seq: int) -> None:
        """Return when there is a line after `seq`.

        Cancellation: nothing is lost.
        """
        while True:
            with self._lock:
                if self._last > seq:
                    break
                entry = trio.lowlevel.current_trio_token(), trio.Event()
                self._waiting.append(entry)
            try:
                await entry[1].wait()
            finally:
                with self._lock:
                    self._waiting = [each for each in self._waiting if each is not entry]
        await trio.lowlevel.checkpoint()
