"""Usage in the store: counted in the transaction that ends a job, added up later, read at any time.

Whoever ends jobs appends rows to `usage_fresh`, one per owner and transaction; nobody waits for anybody, because no
row is changed. A sweep moves them into `usage_days`, one row per day and owner. A sum is over both tables, and a move
is one transaction, so it is right at any moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from coordinator.records import JobRecord
from coordinator.store.sql_steps import SqlSteps, whole
from coordinator.usage.report import (
    AMOUNTS,
    DIMENSIONS,
    GROUPS,
    added_up,
    attempt_amounts,
    counted,
    late_amounts,
    whose,
)

NAMES = ", ".join((*DIMENSIONS, *AMOUNTS))
FOLD = 5000  # rows of one move
_PLACES = ", ".join(f":{name}" for name in (*DIMENSIONS, *AMOUNTS))
_OWNER = ", ".join(DIMENSIONS)
SUMS = ", ".join(f"CAST(sum({name}) AS BIGINT) AS {name}" for name in AMOUNTS)
ADD = ", ".join(f"{name} = usage_days.{name} + excluded.{name}" for name in AMOUNTS)
APPEND_ONE = f"INSERT INTO usage_fresh ({NAMES}) VALUES ({_PLACES})"
APPEND = f"{APPEND_ONE} RETURNING seq"
_LAST = "SELECT max(seq) AS last FROM (SELECT seq FROM usage_fresh ORDER BY seq LIMIT :most) AS due"
_MOVE = (
    f"INSERT INTO usage_days ({NAMES}) SELECT {_OWNER}, {SUMS} FROM usage_fresh WHERE seq <= :last "
    f"GROUP BY {_OWNER} ORDER BY {_OWNER} ON CONFLICT ({_OWNER}) DO UPDATE SET {ADD} RETURNING day"
)
# The same in PostgreSQL, where others append meanwhile: one statement each, so one snapshot. Two that move at once take
# different rows, and change the sums in the same order.
_ARRAYS = ", ".join(
    f":all_{name}::{'bigint' if name == 'day' or name in AMOUNTS else 'text'}[]" for name in (*DIMENSIONS, *AMOUNTS)
)
APPEND_ALL = f"INSERT INTO usage_fresh ({NAMES}) SELECT * FROM unnest({_ARRAYS}) RETURNING seq"
FOLD_ALL = f"""
    WITH due AS MATERIALIZED (SELECT seq FROM usage_fresh ORDER BY seq LIMIT :most FOR UPDATE SKIP LOCKED),
    gone AS (DELETE FROM usage_fresh USING due WHERE usage_fresh.seq = due.seq RETURNING usage_fresh.*),
    moved AS (
        INSERT INTO usage_days ({NAMES}) SELECT {_OWNER}, {SUMS} FROM gone GROUP BY {_OWNER} ORDER BY {_OWNER}
        ON CONFLICT ({_OWNER}) DO UPDATE SET {ADD} RETURNING day
    )
    SELECT (SELECT count(*) FROM gone) AS moved, (SELECT count(*) FROM moved) AS sums
"""
_EVERYTHING = f"SELECT {NAMES} FROM usage_days UNION ALL SELECT {NAMES} FROM usage_fresh"


class SqlUsage(SqlSteps):
    """The part of `Store` that counts."""

    def _count(self, ended: Sequence[JobRecord], now: int) -> None:
        """Count jobs that this transaction ends."""
        self._append_usage(added_up((whose(record, now), counted(record)) for record in ended))

    def _count_late(self, cancelled: JobRecord, now: int) -> None:
        """Count what a job that was cancelled before had used, as its worker says now."""
        self._append_usage(added_up([(whose(cancelled, now), late_amounts(cancelled))]))

    def _uncount(self, failed: JobRecord) -> None:
        """A job that failed is tried again, so it has not ended. The time that it held a slot was used, and stays."""
        self._append_usage(added_up([(whose(failed, failed.finished_ms or 0), {"failed": -1})]))

    def _count_attempt(self, failed: JobRecord, now: int) -> None:
        """Count the time of an attempt that failed, of a job that is tried again."""
        if used := attempt_amounts(failed.started_ms, now):
            self._append_usage(added_up([(whose(failed, now), used)]))

    def _uncount_attempt(self, adopted: JobRecord, ended_ms: int, now: int) -> None:
        """An attempt that was counted as failed goes on, and is counted when it ends, from its beginning."""
        if used := attempt_amounts(adopted.started_ms, ended_ms):
            self._append_usage(added_up([(whose(adopted, now), {name: -value for name, value in used.items()})]))

    def _append_usage(self, rows: Sequence[dict[str, Any]]) -> None:
        for row in rows:
            self._all(APPEND, **row)

    @whole
    def fold_usage(self) -> int:
        """Add up what was appended since the last time; how many rows went, at most `FOLD`."""
        with self._transaction():
            return self._fold()

    def _fold(self) -> int:
        """For a database with one writer: nobody appends between these statements."""
        last = self._all(_LAST, most=FOLD)[0]["last"]
        if last is None:
            return 0
        self._all(_MOVE, last=last)
        return len(self._all("DELETE FROM usage_fresh WHERE seq <= :last RETURNING seq", last=last))

    def usage(self, first: int, last: int, group_by: Sequence[str], tenant: str | None = None) -> list[dict[str, Any]]:
        """Sums over these days (counted since the epoch, both ends included), a row per group, in its order.

        Args:
            group_by: names of `coordinator.usage.GROUPS`; none gives one row, or no row when nothing ended.
            tenant: only this one's.
        """
        columns = ", ".join(GROUPS[name] for name in group_by)
        mine = "" if tenant is None else " AND tenant = :tenant"
        grouped = f" GROUP BY {columns} ORDER BY {columns}" if columns else " HAVING count(*) > 0"
        rows = self._read(
            f"SELECT {columns}{', ' if columns else ''}{SUMS} FROM ({_EVERYTHING}) AS used "
            f"WHERE day >= :first AND day <= :last{mine}{grouped}",
            first=first,
            last=last,
            tenant=tenant or "",
        )
        names = [GROUPS[name] for name in group_by]
        return [{name: row[name] for name in (*names, *AMOUNTS)} for row in rows]
