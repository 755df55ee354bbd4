"""Many jobs submitted in one call: one transaction in, and how far they are."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from coordinator.records import JobRecord, LotRecord, Submission
from coordinator.store.rows import record
from coordinator.store.sql_steps import SqlSteps, whole
from protocol.faults import Fault, FaultError

_pack = msgspec.msgpack.encode
_OF_A_LINE = ("conflict", "rate_limited")  # said before anything was changed: the other lines may go on


class SqlLots(SqlSteps):
    """The part of a store that takes many jobs at once. `SqlStore` fills in what raises NotImplementedError."""

    def _insert(self, job_id: str, submission: Submission, now: int) -> tuple[JobRecord, bool]:
        raise NotImplementedError

    def _due_now(self) -> None:
        raise NotImplementedError

    def _count(self, ended: Sequence[JobRecord], now: int) -> None:
        raise NotImplementedError

    @whole
    def insert_lot(
        self, lot: LotRecord, jobs: Sequence[tuple[str, Submission]]
    ) -> tuple[LotRecord, list[tuple[JobRecord, bool] | Fault]]:
        """`insert` of each, in one transaction; one that is refused by its key, or as too many, gets its fault."""
        answers: list[tuple[JobRecord, bool] | Fault] = []
        with self._transaction() as now:
            if any(submission.idempotency_key for _, submission in jobs):
                # Two calls with the same keys in other orders would lock each other out, again and again.
                self._one_by_one(f"keys of {lot.tenant}")
            for job_id, submission in jobs:
                try:
                    answers.append(self._insert(job_id, submission, now))
                except FaultError as error:
                    if error.fault.code not in _OF_A_LINE:
                        raise
                    answers.append(error.fault)
            refused = lot.refused + sum(isinstance(answer, Fault) for answer in answers)
            # Lines whose keys were known count where their jobs were first submitted, as in `get_lot`.
            queued = sum(not isinstance(answer, Fault) and answer[1] for answer in answers)
            counts = {"queued": queued} if queued else {}
            made = msgspec.structs.replace(lot, created_ms=now, refused=refused, counts=counts)
            self._all(
                "INSERT INTO lots (id, tenant, created_ms, total, refused) "
                "VALUES (:id, :tenant, :now, :total, :refused) RETURNING id",
                id=made.id,
                tenant=made.tenant,
                now=now,
                total=made.total,
                refused=refused,
            )
        self._due_now()
        return made, answers

    def get_lot(self, lot_id: str, tenant: str) -> LotRecord | None:
        """The tenant's lot, with its jobs counted by state."""
        rows = self._read("SELECT * FROM lots WHERE id = :id AND tenant = :tenant", id=lot_id, tenant=tenant)
        if not rows:
            return None
        counts = self._read(
            "SELECT CASE state WHEN 'offered' THEN 'queued' ELSE state END AS state, count(*) AS n FROM jobs "
            "WHERE lot = :lot AND lot <> '' GROUP BY 1",
            lot=lot_id,
        )
        row = rows[0]
        return LotRecord(
            id=row["id"],
            tenant=row["tenant"],
            created_ms=row["created_ms"],
            total=row["total"],
            refused=row["refused"],
            counts={one["state"]: one["n"] for one in counts},
        )

    @whole
    def cancel_lot(self, lot_id: str, tenant: str, fault: Fault) -> list[JobRecord]:
        """To cancelled: all jobs of the lot that are not over; those that this call cancelled."""
        with self._transaction() as now:
            rows = self._all(
                "UPDATE jobs SET state = 'cancelled', finished_ms = :now, fault = :fault "
                "WHERE lot = :lot AND lot <> '' AND tenant = :tenant "
                "AND state IN ('queued', 'offered', 'running') RETURNING *",
                lot=lot_id,
                tenant=tenant,
                now=now,
                fault=_pack(fault),
            )
            cancelled = [record(row) for row in rows]
            self._count(cancelled, now)
            return cancelled

    def _purge_lots(self, before: int, limit: int) -> None:
        """Forget lots as old as this whose jobs are gone."""
        self._all(
            "DELETE FROM lots WHERE id IN (SELECT id FROM lots WHERE created_ms <= :before AND NOT EXISTS "
            "(SELECT 1 FROM jobs WHERE lot = lots.id AND lot <> '') ORDER BY created_ms LIMIT :limit) RETURNING id",
            before=before,
            limit=limit,
        )
