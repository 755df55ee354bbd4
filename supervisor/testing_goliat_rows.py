"""What a GOLIAT dashboard for tests keeps: assignments, and workers, which it finds again as its contract says.

A machine is known by a name that may change, so the contract guesses: the row of that name that is not stale; else one
that was made just now and has something running, whosever it is; else one of the same host name; else a new one. So a
machine that was silent for long gets a new row, and what it was running stays with the old one.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import msgspec

OFFLINE_S = 30.0
STALE_S, STALE_IDLE_S = 300.0, 600.0
CREATED_S = 120.0  # a row so young, with something running, is taken for anybody's
SAME_HOST_S = 300.0
SHOWN_S, SHOWN_FREE_S = 60.0, 15.0  # so long a silent row is shown as RUNNING, with an assignment and without


class Part(msgspec.Struct, kw_only=True):
    """An assignment as the dashboard has it."""

    id: str
    index: int = 0
    config: Any = None
    status: str = "PENDING"
    worker: str | None = None
    files: dict[str, bytes] = {}
    relative_path: str = ""
    uploads: int = 0

    def row(self) -> dict[str, Any]:
        """As it is listed."""
        return {
            "id": self.id,
            "index": self.index,
            "workerId": self.worker,
            "splitConfig": self.config,
            "status": self.status,
            "progress": 100 if self.status == "COMPLETED" else 0,
        }


class WorkerRow(msgspec.Struct, kw_only=True):
    """A worker as the dashboard has it. `created` and `seen` are times of its clock; `beats` counts heartbeats."""

    id: str
    machine: str
    created: float
    seen: float
    hostname: str = ""
    status: str = "IDLE"
    beats: int = 0


class Workers:
    """See the module.

    Args:
        clock: seconds.
        runs: whether the worker of this id has an assignment that runs.

    Attributes:
        rows: all of them, the oldest first.
    """

    def __init__(self, clock: Callable[[], float], runs: Callable[[str], bool]) -> None:
        self._clock, self._runs = clock, runs
        self._numbers = itertools.count(1)
        self.rows: list[WorkerRow] = []

    def meet(self, machine: str, hostname: str = "") -> WorkerRow:
        """A machine has said something: its row, which is a new one where none fits."""
        now = self._clock()
        row = self._match(machine, hostname, now)
        if row is None:
            row = WorkerRow(id=f"w-{next(self._numbers)}", machine=machine, created=now, seen=now)
            self.rows.append(row)
        row.machine, row.hostname, row.seen = machine, hostname or row.hostname, now
        return row

    def _match(self, machine: str, hostname: str, now: float) -> WorkerRow | None:
        fresh = sorted((row for row in self.rows if not self.stale(row)), key=lambda row: row.seen, reverse=True)
        for row in fresh:
            if row.machine == machine:
                return row
        for row in fresh:
            if now - row.created <= CREATED_S and self._runs(row.id):
                return row
        for row in fresh:
            if hostname and row.hostname == hostname and now - row.seen <= SAME_HOST_S:
                return row
        return None

    def of(self, machine: str) -> WorkerRow | None:
        """The newest row of a machine."""
        return next((row for row in reversed(self.rows) if row.machine == machine), None)

    def stale(self, row: WorkerRow) -> bool:
        """Whether it was silent for so long that it is nobody's any more."""
        return self._clock() - row.seen > (STALE_IDLE_S if row.status == "IDLE" else STALE_S)

    def shown(self, row: WorkerRow) -> dict[str, Any]:
        """As it is listed."""
        silent_s = self._clock() - row.seen
        fallen = row.status == "RUNNING" and silent_s > (SHOWN_S if self._runs(row.id) else SHOWN_FREE_S)
        return {
            "id": row.id,
            "ipAddress": row.machine,
            "hostname": row.hostname or None,
            "status": "IDLE" if fallen else row.status,
            "isStale": self.stale(row),
            "isOffline": silent_s > OFFLINE_S,
        }
