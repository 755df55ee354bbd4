"""What became of the attempts of a job, and a new start for one that failed.

The latest attempt is in the job's own row; a row of `attempts` is written when the job goes on without it. So a job
that succeeds at once, as nearly all do, costs no row here.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from coordinator.records import AttemptRecord, JobRecord
from coordinator.store.rows import FORGOTTEN, Row, record, turn_step
from coordinator.store.sql_steps import whole
from coordinator.store.sql_turns import SqlTurns
from coordinator.store.sql_usage import SqlUsage
from protocol.faults import Fault, refuse

MOST_ATTEMPTS = 100  # in one answer

_pack = msgspec.msgpack.encode
_fault = msgspec.msgpack.Decoder(Fault).decode


class SqlHistory(SqlUsage, SqlTurns):
    """The part of a store that remembers attempts."""

    def _keep_attempt(
        self, row: Row, outcome: Literal["succeeded", "failed", "cancelled"], fault: Fault | None, now: int
    ) -> None:
        """Write down how the row's present attempt ended; what is written already stays."""
        self._all(
            "INSERT INTO attempts (job, n, worker, began_ms, ended_ms, outcome, fault) "
            "VALUES (:job, :n, :worker, :began, :now, :outcome, :fault) ON CONFLICT (job, n) DO NOTHING RETURNING n",
            job=row["id"],
            n=row["attempt"],
            worker=row["worker"],
            began=row["started_ms"],
            now=now,
            outcome=outcome,
            fault=_pack(fault) if fault else None,
        )

    def _reopened(self, adopted: JobRecord, now: int) -> JobRecord:
        """The row of an attempt that its worker still has; one that was given up goes on from its own beginning."""
        kept = self._one(
            "DELETE FROM attempts WHERE job = :id AND n = :attempt RETURNING began_ms, ended_ms",
            id=adopted.id,
            attempt=adopted.attempt,
        )
        if kept is None or kept["began_ms"] is None:
            return adopted
        row = self._one(
            "UPDATE jobs SET started_ms = :began WHERE id = :id RETURNING *", id=adopted.id, began=kept["began_ms"]
        )
        assert row is not None
        self._uncount_attempt(reopened := record(row), kept["ended_ms"], now)
        return reopened

    def attempts_of(self, record: JobRecord) -> list[AttemptRecord]:
        """The attempts that workers accepted, in their order; of very many the latest."""
        rows = self._read(
            "SELECT * FROM attempts WHERE job = :id ORDER BY n DESC LIMIT :most", id=record.id, most=MOST_ATTEMPTS
        )
        kept = [_attempt(row) for row in reversed(rows)]
        if not record.worker or record.state == "queued" or any(one.n == record.attempt for one in kept):
            return kept
        latest = AttemptRecord(
            n=record.attempt,
            worker=record.worker,
            began_ms=record.started_ms,
            ended_ms=record.finished_ms,
            outcome=record.state,
            fault=record.fault,
        )
        return [*kept, latest]

    @whole
    def retry(self, job_id: str, tenant: str | None) -> JobRecord | None:
        """Failed back to queued, with all its tries, and its whole time; what became of earlier attempts is kept.

        An engine that it has crashed is spared: a job that had to run alone still has to.
        """
        mine = "" if tenant is None else " AND tenant = :tenant"
        with self._transaction() as now:
            row = self._one(f"SELECT * FROM jobs WHERE id = :id{mine}{self.LOCK}", id=job_id, tenant=tenant or "")
            if row is None:
                return None
            if row["state"] != "failed":
                state = record(row).state
                raise refuse("conflict", f"The job is {state}; only one that failed can be tried again.", "id")
            if row["fingerprint"] == FORGOTTEN:
                raise refuse("conflict", "The job's content was deleted, so there is nothing to try again.", "id")
            if row["worker"] and row["started_ms"] is not None:
                self._keep_attempt(row, "failed", _fault(row["fault"]), row["finished_ms"])
            self._uncount(record(row))
            return record(self._again(row, now))

    def _again(self, row: Row, now: int) -> Row:
        names: dict[str, Any] = {name: row[name] for name in ("id", "model", "needs", "kind", "priority", "tenant")}
        again = self._one(
            "UPDATE jobs SET state = 'queued', tries = 0, crashes = 0, spared = 0, streamed = 0, attended = 0, "
            "dead = 0, run_after_ms = 0, worker = '', fault = NULL, started_ms = NULL, finished_ms = NULL, "
            "deadline_at_ms = CASE WHEN deadline_at_ms > 0 THEN deadline_at_ms - created_ms + :now ELSE 0 END, "
            f"vt = {self._turn} WHERE id = :id RETURNING *",
            now=now,
            step=turn_step(),
            **names,
        )
        assert again is not None
        return again


def _attempt(row: Row) -> AttemptRecord:
    return AttemptRecord(
        n=row["n"],
        worker=row["worker"],
        began_ms=row["began_ms"],
        ended_ms=row["ended_ms"],
        outcome=row["outcome"],
        fault=_fault(row["fault"]) if row["fault"] is not None else None,
    )
