"""What is taken out of rows once nobody may know it any more: the content of jobs, and of what a batch says of itself.

A forgotten job keeps its row, so that it can be listed, counted and paid for, and so that its idempotency key is known;
what it was asked and what came of it is gone, and so is the digest of the request. Its fingerprint is empty then.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from coordinator.store.forgetting import Forgotten, bare
from coordinator.store.rows import FORGOTTEN, Row
from coordinator.store.shelf import BatchRecord
from coordinator.store.sql_steps import SqlSteps, whole
from protocol.faults import Fault

_pack = msgspec.msgpack.encode
_HAS_CONTENT = (
    "finished_ms IS NOT NULL AND length(fingerprint) > 0 AND NOT EXISTS (SELECT 1 FROM batch_items WHERE job = jobs.id)"
)
_fault = msgspec.msgpack.Decoder(Fault).decode


class SqlForget(SqlSteps):
    """`Forgets` for both databases.

    Attributes:
        SETTLE: the statement that empties the journal; "" where the database does that by itself.
    """

    SETTLE = ""

    def forgettable(self, jobs: Sequence[str]) -> list[str]:
        """See `Forgets`."""
        found = (self._read(f"SELECT id FROM jobs WHERE id = :id AND {_HAS_CONTENT}", id=job) for job in jobs)
        return [rows[0]["id"] for rows in found if rows]

    @whole
    def forget(self, jobs: Sequence[str]) -> list[Forgotten]:
        """See `Forgets`."""
        with self._transaction():
            return [left for job in jobs if (left := self._forget(job)) is not None]

    def _forget(self, job_id: str) -> Forgotten | None:
        row = self._one(
            f"SELECT id, fault FROM jobs WHERE id = :id AND {_HAS_CONTENT}{self.LOCK}",
            id=job_id,
        )
        if row is None:
            return None
        keys = self._all(
            "SELECT key FROM input_blobs AS mine WHERE job = :id AND NOT EXISTS ("
            "  SELECT 1 FROM input_blobs AS other WHERE other.key = mine.key AND other.job <> :id)",
            id=job_id,
        )
        self._all("DELETE FROM input_blobs WHERE job = :id RETURNING key", id=job_id)
        self._all(
            "UPDATE jobs SET fingerprint = :forgotten, params = :nothing, inputs = :none, result = NULL, files = NULL, "
            "fault = :fault WHERE id = :id RETURNING id",
            id=job_id,
            forgotten=FORGOTTEN,
            nothing=b"\x80",
            none=_pack(()),
            fault=_bare(row),
        )
        self._all("UPDATE attempts SET fault = NULL WHERE job = :id RETURNING n", id=job_id)
        return Forgotten(job_id, tuple(key["key"] for key in keys))

    def unforgotten(self, tenants: Sequence[str], ended_ms: int, before_ms: int, limit: int = 500) -> list[str]:
        """See `Forgets`."""
        return self._ended("finished_ms <= :before", tenants, ended_ms, limit, before=before_ms)

    def left_behind(self, tenants: Sequence[str], ended_ms: int, limit: int = 500) -> list[str]:
        """See `Forgets`."""
        return self._ended("attended = 1 AND state = 'cancelled'", tenants, ended_ms, limit)

    def _ended(self, which: str, tenants: Sequence[str], ended_ms: int, limit: int, **more: int) -> list[str]:
        """Jobs that ended after an instant, and have their content."""
        if not tenants:
            return []
        names = {f"tenant{n}": tenant for n, tenant in enumerate(tenants)}
        rows = self._read(
            f"SELECT id FROM jobs WHERE finished_ms > :ended AND {which} AND {_HAS_CONTENT} "
            f"AND tenant IN ({', '.join(':' + name for name in names)}) ORDER BY finished_ms LIMIT :limit",
            ended=ended_ms,
            limit=limit,
            **names,
            **more,
        )
        return [row["id"] for row in rows]

    def batch_jobs(self, batch_id: str, tenant: str) -> list[str]:
        """See `Forgets`; by the idempotency keys that a batch gives its lines."""
        rows = self._read(
            "SELECT id FROM jobs WHERE tenant = :tenant AND idempotency_key > :first AND idempotency_key < :last "
            "AND idempotency_key <> '' AND length(fingerprint) > 0",
            tenant=tenant,
            first=f"{batch_id}/",
            last=f"{batch_id}0",  # the character behind "/"
        )
        return [row["id"] for row in rows]

    @whole
    def forget_batch(self, batch_id: str) -> bool:
        """See `Forgets`."""
        with self._transaction():
            row = self._one(
                f"SELECT body FROM batches WHERE id = :id AND ended_ms IS NOT NULL{self.LOCK}",
                id=batch_id,
            )
            batch = msgspec.msgpack.decode(row["body"], type=BatchRecord) if row is not None else None
            if batch is None or all(fault == bare(fault) for _, fault in batch.errors):
                return False
            told = tuple((line, bare(fault)) for line, fault in batch.errors)
            body = _pack(msgspec.structs.replace(batch, errors=told))
            self._all("UPDATE batches SET body = :body WHERE id = :id RETURNING id", id=batch_id, body=body)
            return True

    def settle(self) -> bool:
        """See `Forgets`."""
        return not self.SETTLE or not self._read(self.SETTLE)[0]["busy"]


def _bare(row: Row) -> bytes | None:
    return _pack(bare(_fault(row["fault"]))) if row["fault"] else None
