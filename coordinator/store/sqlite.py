"""The store in one SQLite file: one writer connection, one reader connection, WAL, `synchronous=FULL`.

Functions block for a commit (about 0.2 ms on an SSD), so callers on an event loop run them in a worker thread.
A transaction cannot be half-cancelled that way.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec

from coordinator.records import JobRecord, Submission
from coordinator.store.base import (
    Adoption,
    Cancelled,
    Claimed,
    Ending,
    OpenAttempt,
    Outcome,
    Purged,
    StoreError,
    Want,
    after_failure,
    deadline_fault,
)
from coordinator.store.sqlite_file import connect, cure, migrate, take_file, translated
from coordinator.store.sqlite_rows import LIGHT, columns, failing, record, same_request
from coordinator.store.sqlite_schema import NOW
from coordinator.store.sqlite_shelf import SqliteShelf
from protocol.faults import Fault

Row = sqlite3.Row
_pack = msgspec.msgpack.encode

_THIS_ATTEMPT = "id = :id AND attempt = :attempt AND worker = :worker"
_RUNNING = f"{_THIS_ATTEMPT} AND state = 'running'"


class SqliteStore(SqliteShelf):
    """`Store` over one file, created with mode 0600 because prompts lie in it.

    Raises:
        StoreBusy: another process has it open.
        StoreTooNew: its schema is newer than this program's.
        StoreError: it cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._lock_file = take_file(path)
        self._writing, self._reading = threading.Lock(), threading.Lock()
        try:
            self._writer, self._reader = connect(path), connect(path)
            with self._writing:
                migrate(self._writer, path)
            self._reader.execute("PRAGMA query_only = ON")
        except sqlite3.Error as error:
            os.close(self._lock_file)
            raise StoreError(f"{path} cannot be opened as a job store: {error}. {cure(path, error)}") from None
        except StoreError:
            os.close(self._lock_file)
            raise

    def close(self) -> None:
        """Release the store; later calls raise StoreError. Calling it again does nothing."""
        with self._writing, self._reading:
            if self._lock_file < 0:
                return
            self._writer.close()
            self._reader.close()
            os.close(self._lock_file)
            self._lock_file = -1

    # ---- reading -------------------------------------------------------------------------------------------

    def now_ms(self) -> int:
        """The store's clock, milliseconds since the epoch."""
        return int(self._read(NOW)[0]["now"])

    def get(self, job_id: str, tenant: str | None = None) -> JobRecord | None:
        """The row; with a tenant only when it is the tenant's."""
        rows = self._read("SELECT * FROM jobs WHERE id = ? AND (? IS NULL OR tenant = ?)", job_id, tenant, tenant)
        return record(rows[0]) if rows else None

    def by_key(self, submission: Submission) -> JobRecord | None:
        """The job that the submission's idempotency key names."""
        if not submission.idempotency_key:
            return None
        rows = self._read(
            "SELECT * FROM jobs WHERE tenant = ? AND idempotency_key = ? AND idempotency_key <> ''",
            submission.tenant,
            submission.idempotency_key,
        )
        return same_request(rows[0], submission) if rows else None

    def recent(self, tenant: str, limit: int, state: str | None = None) -> list[JobRecord]:
        """Newest first, without params and result."""
        states = {"queued": ("queued", "offered")}.get(state or "", (state, state))
        rows = self._read(
            f"SELECT {LIGHT} FROM jobs WHERE tenant = ? AND (? IS NULL OR state IN (?, ?)) ORDER BY seq DESC LIMIT ?",
            tenant,
            state,
            *states,
            limit,
        )
        return [record(row, light=True) for row in rows]

    def open_attempts(self) -> list[OpenAttempt]:
        """All rows that are offered or running."""
        rows = self._read(
            "SELECT id, attempt, state, worker, kind, model, streamed FROM jobs WHERE state IN ('offered', 'running')"
        )
        return [
            OpenAttempt(r["id"], r["attempt"], r["state"], r["worker"], r["kind"], r["model"], bool(r["streamed"]))
            for r in rows
        ]

    def queued(self) -> dict[tuple[str, str], int]:
        """(kind, model) -> jobs that wait."""
        rows = self._read("SELECT kind, model, count(*) AS n FROM jobs WHERE state = 'queued' GROUP BY kind, model")
        return {(row["kind"], row["model"]): row["n"] for row in rows}

    def has_blob(self, key: str) -> bool:
        """Whether a job's input or a kept file has this key."""
        sql = "SELECT 1 FROM input_blobs WHERE key = ? UNION ALL SELECT 1 FROM files WHERE blob = ? LIMIT 1"
        return bool(self._read(sql, key, key))

    def has_job(self, job_id: str) -> bool:
        """Whether there is such a row."""
        return bool(self._read("SELECT 1 FROM jobs WHERE id = ?", job_id))

    # ---- the queue -----------------------------------------------------------------------------------------

    def insert(self, job_id: str, submission: Submission) -> tuple[JobRecord, bool]:
        """Queue a job, or find the one that its idempotency key names."""
        with self._transaction() as now:
            return self._insert(job_id, submission, now)

    def insert_and_claim(
        self, job_id: str, submission: Submission, wants: Sequence[Want]
    ) -> tuple[JobRecord, bool, list[Claimed]]:
        """`insert`, and when that made a row `claim`, in one transaction."""
        with self._transaction() as now:
            row, created = self._insert(job_id, submission, now)
            return row, created, self._claim(wants, now) if created else []

    def _insert(self, job_id: str, submission: Submission, now: int) -> tuple[JobRecord, bool]:
        if submission.idempotency_key:
            known = self._one(
                "SELECT * FROM jobs WHERE tenant = :tenant AND idempotency_key = :key AND idempotency_key <> ''",
                tenant=submission.tenant,
                key=submission.idempotency_key,
            )
            if known is not None:
                return same_request(known, submission), False
        values = columns(job_id, submission, now)
        names, places = ", ".join(values), ", ".join(f":{name}" for name in values)
        row = self._one(f"INSERT INTO jobs ({names}) VALUES ({places}) RETURNING *", **values)
        assert row is not None
        for file in submission.inputs:
            self._one("INSERT OR IGNORE INTO input_blobs VALUES (:key, :job)", key=file.blob, job=job_id)
        return record(row), True

    def claim(self, wants: Sequence[Want]) -> list[Claimed]:
        """Take due jobs as offered, each with a new attempt number and its time left, in the order they are due."""
        with self._transaction() as now:
            return self._claim(wants, now)

    def _claim(self, wants: Sequence[Want], now: int) -> list[Claimed]:
        claimed: list[Row] = []
        for want in wants:
            kinds = {f"kind{n}": kind for n, kind in enumerate(want.kinds)}
            claimed += self._all(
                "UPDATE jobs SET state = 'offered', attempt = attempt + 1, worker = '' WHERE seq IN ("
                "  SELECT seq FROM jobs WHERE state = 'queued' AND model = :model"
                f"   AND kind IN ({', '.join(':' + name for name in kinds)})"
                "    AND run_after_ms <= :now AND (deadline_at_ms = 0 OR deadline_at_ms > :now)"
                "  ORDER BY priority DESC, seq LIMIT :limit) RETURNING *",
                model=want.model,
                limit=want.limit,
                now=now,
                **kinds,
            )
        claimed.sort(key=lambda row: (-row["priority"], row["seq"]))  # RETURNING has no order of its own
        return [(record(row), row["deadline_at_ms"] - now if row["deadline_at_ms"] else 0) for row in claimed]

    def release(self, job_id: str, attempt: int, delay_ms: int = 0) -> bool:
        """Offered back to queued; uncounted."""
        with self._transaction() as now:
            row = self._one(
                "UPDATE jobs SET state = 'queued', run_after_ms = :due "
                "WHERE id = :id AND attempt = :attempt AND state = 'offered' RETURNING id",
                id=job_id,
                attempt=attempt,
                due=now + delay_ms if delay_ms else 0,
            )
            return row is not None

    def accept(self, job_id: str, attempt: int, worker: str) -> bool:
        """Offered to running; counts a try. Not synced."""
        with self._transaction(synced=False) as now:
            row = self._one(
                "UPDATE jobs SET state = 'running', worker = :worker, tries = tries + 1, started_ms = :now "
                "WHERE id = :id AND attempt = :attempt AND state = 'offered' RETURNING id",
                id=job_id,
                attempt=attempt,
                worker=worker,
                now=now,
            )
            return row is not None

    def mark_streamed(self, job_id: str, attempt: int, worker: str) -> bool:
        """Note that a chunk is about to be forwarded; False when fenced."""
        with self._transaction():
            row = self._one(
                f"UPDATE jobs SET streamed = 1 WHERE {_RUNNING} RETURNING id",
                id=job_id,
                attempt=attempt,
                worker=worker,
            )
            return row is not None

    def adopt(self, job_id: str, attempt: int, worker: str) -> Adoption:
        """A worker came back with an attempt.

        A row that waits for its next try is still this worker's as long as no new number was minted for it.
        """
        names = {"id": job_id, "attempt": attempt, "worker": worker}
        with self._transaction() as now:
            row = self._one(
                "UPDATE jobs SET tries = tries + (state = 'offered'), state = 'running', worker = :worker, "
                "    started_ms = coalesce(started_ms, :now) "
                "WHERE id = :id AND attempt = :attempt AND ((state = 'offered' AND worker IN ('', :worker)) "
                "    OR (state IN ('running', 'queued') AND worker = :worker)) RETURNING *",
                now=now,
                **names,
            )
            if row is not None:
                return Adoption("adopted", record(row))
            row = self._one("SELECT * FROM jobs WHERE id = :id AND attempt = :attempt", id=job_id, attempt=attempt)
        if row is None or row["worker"] not in ("", worker):
            return Adoption("fenced")
        if row["state"] == "succeeded":
            return Adoption("stored", record(row))
        return Adoption("cancelled" if row["state"] == "cancelled" else "fenced", record(row))

    # ---- endings -------------------------------------------------------------------------------------------

    def complete(self, job_id: str, attempt: int, worker: str, outcome: Outcome) -> Ending:
        """Running to succeeded, with result, files and usage, in one transaction."""
        names: dict[str, Any] = {"id": job_id, "attempt": attempt, "worker": worker, "usage": _pack(outcome.usage)}
        with self._transaction() as now:
            row = self._one(
                "UPDATE jobs SET state = 'succeeded', result = :result, files = :files, usage = :usage, "
                f"finished_ms = :now, fault = NULL WHERE {_RUNNING} RETURNING *",
                result=outcome.result,
                files=_pack(outcome.files),
                now=now,
                **names,
            )
            if row is not None:
                return Ending("stored", record(row))
            # Cancelled while it ran: no result is kept, but the work was done and is counted, once.
            row = self._one(
                f"UPDATE jobs SET usage = :usage WHERE {_THIS_ATTEMPT} AND state = 'cancelled' AND usage IS NULL "
                "RETURNING *",
                **names,
            )
            return Ending("late", record(row)) if row is not None else self._not_ours(names, "succeeded")

    def fail(self, job_id: str, attempt: int, worker: str, fault: Fault, streamed: bool = False) -> Ending:
        """Running to queued or failed, as `after_failure` says."""
        names = {"id": job_id, "attempt": attempt, "worker": worker}
        with self._transaction() as now:
            row = self._one(f"SELECT * FROM jobs WHERE {_RUNNING}", **names)
            if row is None:
                return self._not_ours(names, "failed")
            decided = after_failure(failing(row, streamed=streamed), fault, now)
            if isinstance(decided, Fault):
                return Ending("stored", self._fail_row(job_id, decided, now))
            row = self._one(
                "UPDATE jobs SET state = 'queued', run_after_ms = :due, fault = :fault, alone = :alone, "
                "crashes = :crashes, spared = :spared WHERE id = :id RETURNING *",
                id=job_id,
                due=now + decided.delay_ms,
                fault=_pack(fault),
                alone=decided.alone,
                crashes=decided.crashes,
                spared=decided.spared,
            )
            assert row is not None
            return Ending("stored", record(row), requeued=True)

    def end(self, job_id: str, attempt: int, fault: Fault) -> Ending:
        """Offered or running to failed, without any retry."""
        with self._transaction() as now:
            row = self._one(
                "SELECT id FROM jobs WHERE id = :id AND attempt = :attempt AND state IN ('offered', 'running')",
                id=job_id,
                attempt=attempt,
            )
            return Ending("stored", self._fail_row(job_id, fault, now)) if row is not None else Ending("fenced")

    def cancel(self, job_id: str, tenant: str, fault: Fault) -> Cancelled | None:
        """To cancelled from any state that is not terminal."""
        with self._transaction() as now:
            row = self._one(
                "UPDATE jobs SET state = 'cancelled', finished_ms = :now, fault = :fault WHERE id = :id "
                "AND tenant = :tenant AND state IN ('queued', 'offered', 'running') RETURNING *",
                id=job_id,
                tenant=tenant,
                now=now,
                fault=_pack(fault),
            )
            if row is not None:
                return Cancelled(record(row), won=True)
            row = self._one("SELECT * FROM jobs WHERE id = :id AND tenant = :tenant", id=job_id, tenant=tenant)
            return Cancelled(record(row), won=False) if row is not None else None

    def leave_unattended(self, fault: Fault) -> list[JobRecord]:
        """To cancelled: all jobs whose clients waited on connections of an earlier life."""
        with self._transaction() as now:
            rows = self._all(
                "UPDATE jobs SET state = 'cancelled', finished_ms = :now, fault = :fault "
                "WHERE attended = 1 AND state IN ('queued', 'offered', 'running') RETURNING *",
                now=now,
                fault=_pack(fault),
            )
            return [record(row) for row in rows]

    def expire(self, slack_ms: int) -> list[JobRecord]:
        """Fail what is past its deadline: waiting jobs at once, running ones `slack_ms` after it."""
        with self._transaction() as now:
            rows = self._all(
                "SELECT id FROM jobs WHERE deadline_at_ms > 0 AND deadline_at_ms <= :now "
                "AND state IN ('queued', 'offered', 'running') AND "  # as the partial index says it
                "(state IN ('queued', 'offered') OR (state = 'running' AND deadline_at_ms + :slack <= :now))",
                now=now,
                slack=slack_ms,
            )
            return [self._fail_row(row["id"], deadline_fault(), now) for row in rows]

    def purge(self, retention_ms: int, limit: int = 500) -> list[Purged]:
        """Delete jobs that ended more than `retention_ms` ago and that no open batch needs."""
        with self._transaction() as now:
            rows = self._all(
                "SELECT id FROM jobs WHERE finished_ms <= :before "
                "AND NOT EXISTS (SELECT 1 FROM batch_items WHERE job = jobs.id) ORDER BY finished_ms LIMIT :limit",
                before=now - retention_ms,
                limit=limit,
            )
            return [self._delete(row["id"]) for row in rows]

    def remove(self, job_id: str, tenant: str) -> Purged | None:
        """Delete one job of the tenant's that has ended."""
        with self._transaction():
            row = self._one(
                "SELECT id FROM jobs WHERE id = :id AND tenant = :tenant AND finished_ms IS NOT NULL",
                id=job_id,
                tenant=tenant,
            )
            return self._delete(job_id) if row is not None else None

    def _delete(self, job_id: str) -> Purged:
        keys = self._all(
            "SELECT key FROM input_blobs AS mine WHERE job = :id AND NOT EXISTS ("
            "  SELECT 1 FROM input_blobs AS other WHERE other.key = mine.key AND other.job <> :id)",
            id=job_id,
        )
        self._one("DELETE FROM jobs WHERE id = :id", id=job_id)
        return Purged(job_id, tuple(key["key"] for key in keys))

    def shift_clock(self, ms: int) -> None:
        """Move the store's clock by `ms` from now on; for tests."""
        with self._transaction():
            self._one("UPDATE clock SET shift_ms = shift_ms + :ms", ms=ms)

    # ---- inside --------------------------------------------------------------------------------------------

    def _not_ours(self, names: dict[str, Any], same_end: str) -> Ending:
        """Judge an end that changed no row: an ack that was lost, a cancelled job, or a fenced attempt."""
        row = self._one(
            f"SELECT * FROM jobs WHERE {_THIS_ATTEMPT}",
            id=names["id"],
            attempt=names["attempt"],
            worker=names["worker"],
        )
        if row is None:
            return Ending("fenced")
        return Ending("again" if row["state"] in (same_end, "cancelled") else "fenced", record(row))

    def _fail_row(self, job_id: str, fault: Fault, now: int) -> JobRecord:
        row = self._one(
            "UPDATE jobs SET state = 'failed', finished_ms = :now, fault = :fault WHERE id = :id RETURNING *",
            id=job_id,
            now=now,
            fault=_pack(fault),
        )
        assert row is not None
        return record(row)

    @contextlib.contextmanager
    def _transaction(self, *, synced: bool = True) -> Iterator[int]:
        """One write transaction; yields the store's clock. Rolls back on any exception.

        Without `synced` it outlives any end of this process at once, and a loss of power from the next one that is.
        """
        with self._writing, translated(self._path):
            if self._lock_file < 0:
                raise StoreError("The job store is closed.")
            self._writer.execute(f"PRAGMA synchronous = {'FULL' if synced else 'NORMAL'}")
            self._writer.execute("BEGIN IMMEDIATE")
            try:
                yield int(self._writer.execute(NOW).fetchone()["now"])
                self._writer.execute("COMMIT")
            except BaseException:
                if self._writer.in_transaction:
                    self._writer.execute("ROLLBACK")
                raise

    def _one(self, sql: str, **names: Any) -> Row | None:
        rows = self._all(sql, **names)
        return rows[0] if rows else None

    def _all(self, sql: str, **names: Any) -> list[Row]:
        return self._writer.execute(sql, names).fetchall()

    def _read(self, sql: str, *values: Any) -> list[Row]:
        with self._reading, translated(self._path):
            if self._lock_file < 0:
                raise StoreError("The job store is closed.")
            return self._reader.execute(sql, values).fetchall()
