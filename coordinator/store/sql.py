"""The store in SQL that SQLite and PostgreSQL both understand: every write is here once, and so is its meaning.

A database's own module brings the connection, the transaction, and how due jobs are claimed. Statements name their
parameters (`:id`); all times come from the clock that a transaction begins with. Where several coordinators write
at once (`LOCK`, `SKIP`), what is looked at before it is changed is locked first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from coordinator.records import JobRecord, Submission
from coordinator.store.base import (
    Adoption,
    Cancelled,
    Claimed,
    Done,
    Ending,
    Held,
    Outcome,
    Purged,
    Want,
    after_failure,
    deadline_fault,
)
from coordinator.store.needs import may_fit
from coordinator.store.open_limits import check_open
from coordinator.store.rows import LATER, Row, columns, failing, record, same_request, turn_step
from coordinator.store.sql_deploy import SqlDeploy
from coordinator.store.sql_history import SqlHistory
from coordinator.store.sql_lots import SqlLots
from coordinator.store.sql_reads import SqlReads
from coordinator.store.sql_shelf import SqlShelf
from coordinator.store.sql_steps import whole
from coordinator.store.sql_usage import SqlUsage
from coordinator.store.sql_vitals import SqlVitals
from protocol.faults import Fault, Owner

_pack = msgspec.msgpack.encode

_THIS_ATTEMPT = "id = :id AND attempt = :attempt AND worker = :worker"
_RUNNING = f"{_THIS_ATTEMPT} AND state = 'running'"
_OPEN = "state IN ('offered', 'running')"
_UNENDED = "state IN ('queued', 'offered', 'running')"
_LONGEST_PAUSE_MS = 60_000  # before a next try, whoever asked for it


def in_turn(rows: Sequence[Row], now: int) -> list[Claimed]:
    """Claimed rows in the order they were due, with the time left; RETURNING has no order of its own."""
    ordered = sorted(rows, key=lambda row: (-row["priority"], row["vt"], row["seq"]))
    return [(record(row), row["deadline_at_ms"] - now if row["deadline_at_ms"] else 0) for row in ordered]


def once_each(held: Sequence[Held], accepted: Sequence[Row]) -> list[bool]:
    """Which were accepted, by the rows that changed; what is said twice was accepted once."""
    left = {(row["id"], row["attempt"], row["worker"]) for row in accepted}
    answers = []
    for one in held:
        key = (one.job, one.attempt, one.worker)
        answers.append(key in left)
        left.discard(key)
    return answers


class SqlStore(SqlHistory, SqlShelf, SqlDeploy, SqlReads, SqlUsage, SqlVitals, SqlLots):
    """What both databases share of `Store`. Subclasses fill in the methods that raise NotImplementedError."""

    ORPHANED = "attended = 1"  # whose client's coordinator is gone; with one coordinator: each, at its start
    _latest_ms = 2**63  # the clock at the last look for what is over; before the first, any has gone back

    def _claim(self, wants: Sequence[Want], now: int) -> list[Claimed]:
        raise NotImplementedError

    def _lines(self, model: str) -> list[str]:
        """What the model's waiting jobs need, each once: a step of the index per line, however many jobs wait."""
        first = "SELECT min(needs) FROM jobs WHERE state = 'queued' AND model = :model"
        rows = self._all(
            f"WITH RECURSIVE line (needs) AS ({first} UNION ALL SELECT ({first} AND needs > line.needs) FROM line "
            "WHERE line.needs IS NOT NULL) SELECT needs FROM line WHERE needs IS NOT NULL",
            model=model,
        )
        return [row["needs"] for row in rows]

    def _lines_for(self, want: Want, lines: dict[str, list[str]]) -> list[str]:
        """Those of the model's lines whose jobs a want may take; `lines` keeps what was looked up."""
        if want.model not in lines:
            lines[want.model] = self._lines(want.model)
        return [needs for needs in lines[want.model] if may_fit(needs, want.labels, want.vram_gb)]

    def _due_now(self) -> None:
        """There is work that was not claimed in the same breath: other coordinators may want to know."""

    # ---- the queue -----------------------------------------------------------------------------------------

    @whole
    def insert(self, job_id: str, submission: Submission) -> tuple[JobRecord, bool]:
        """Queue a job, or find the one that its idempotency key names."""
        with self._transaction() as now:
            row, created = self._insert(job_id, submission, now)
        if created:
            self._due_now()
        return row, created

    @whole
    def insert_and_claim(
        self, job_id: str, submission: Submission, wants: Sequence[Want]
    ) -> tuple[JobRecord, bool, list[Claimed]]:
        """`insert`, and when that made a row `claim`, in one transaction."""
        with self._transaction() as now:
            row, created = self._insert(job_id, submission, now)
            claimed = self._claim(wants, now) if created else []
        if created and all(job.id != job_id for job, _ in claimed):
            self._due_now()
        return row, created, claimed

    def _insert(self, job_id: str, submission: Submission, now: int) -> tuple[JobRecord, bool]:
        check_open(self, submission)
        values, step = columns(job_id, submission, now, self.gateway), turn_step(submission.cost, submission.weight)
        names, places = ", ".join(values), ", ".join(f":{name}" for name in values)
        turn = f"{LATER} + :step" if values["run_after_ms"] else self._turn
        statement = (
            f"INSERT INTO jobs ({names}, vt) VALUES ({places}, {turn}) "
            "ON CONFLICT (tenant, idempotency_key) WHERE idempotency_key <> '' DO NOTHING RETURNING *"
        )
        # A row that was in the way may be deleted before it is read; then there is nothing in the way any more.
        while (row := self._one(statement, step=step, **values)) is None:
            known = self._one(
                "SELECT * FROM jobs WHERE tenant = :tenant AND idempotency_key = :key AND idempotency_key <> ''",
                tenant=submission.tenant,
                key=submission.idempotency_key,
            )
            if known is not None:
                return same_request(known, submission), False
        for file in submission.inputs:
            self._all(
                "INSERT INTO input_blobs (key, job) VALUES (:key, :job) ON CONFLICT DO NOTHING RETURNING key",
                key=file.blob,
                job=job_id,
            )
        return record(row), True

    @whole
    def claim(self, wants: Sequence[Want]) -> list[Claimed]:
        """Take due jobs as offered, each with a new attempt number and its time left, in the order they are due."""
        with self._transaction() as now:
            return self._claim(wants, now)

    @whole
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
        if row is not None and not delay_ms:
            self._due_now()
        return row is not None

    def accept(self, job_id: str, attempt: int, worker: str) -> bool:
        """Offered to running; counts a try. Not synced."""
        return self.accept_many([Held(job_id, attempt, worker)])[0]

    @whole
    def accept_many(self, held: Sequence[Held]) -> list[bool]:
        """`accept` of each, in one transaction."""
        with self._transaction(synced=False) as now:
            return self._accept_all(held, now)

    def _accept_all(self, held: Sequence[Held], now: int) -> list[bool]:
        return [
            self._one(
                "UPDATE jobs SET state = 'running', worker = :worker, tries = tries + 1, started_ms = :now "
                "WHERE id = :id AND attempt = :attempt AND state = 'offered' RETURNING id",
                id=one.job,
                attempt=one.attempt,
                worker=one.worker,
                now=now,
            )
            is not None
            for one in held
        ]

    @whole
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

    @whole
    def adopt(self, job_id: str, attempt: int, worker: str) -> Adoption:
        """A worker came back with an attempt; from now on it is held here.

        A row that waits for its next try is still this worker's as long as no new number was minted for it.
        """
        names = {"id": job_id, "attempt": attempt, "worker": worker}
        with self._transaction() as now:
            row = self._changed(
                "UPDATE jobs SET tries = tries + CASE WHEN state = 'offered' THEN 1 ELSE 0 END, state = 'running', "
                "    worker = :worker, gateway = :me, started_ms = coalesce(started_ms, :now) "
                "WHERE id = :id AND attempt = :attempt AND ((state = 'offered' AND worker IN ('', :worker)) "
                "    OR (state IN ('running', 'queued') AND worker = :worker)) RETURNING *",
                now=now,
                me=self.gateway,
                **names,
            )
            if row is not None:
                return Adoption("adopted", self._reopened(record(row), now))
            row = self._one("SELECT * FROM jobs WHERE id = :id AND attempt = :attempt", id=job_id, attempt=attempt)
        if row is None or row["worker"] not in ("", worker):
            return Adoption("fenced")
        if row["state"] == "succeeded":
            return Adoption("stored", record(row))
        return Adoption("cancelled" if row["state"] == "cancelled" else "fenced", record(row))

    # ---- endings -------------------------------------------------------------------------------------------

    def complete(self, job_id: str, attempt: int, worker: str, outcome: Outcome) -> Ending:
        """Running to succeeded, with result, files and usage, in one transaction."""
        return self.complete_many([Done(job_id, attempt, worker, outcome)])[0]

    @whole
    def complete_many(self, done: Sequence[Done]) -> list[Ending]:
        """`complete` of each, in one transaction: many results cost one sync of the disk."""
        with self._transaction() as now:
            return self._complete_all(done, now)

    def _complete_all(self, done: Sequence[Done], now: int) -> list[Ending]:
        return [self._complete(one, now) for one in done]

    def _complete(self, done: Done, now: int) -> Ending:
        names = {"id": done.job, "attempt": done.attempt, "worker": done.worker, "usage": _pack(done.outcome.usage)}
        row = self._changed(
            "UPDATE jobs SET state = 'succeeded', result = :result, files = :files, usage = :usage, "
            f"finished_ms = :now, fault = NULL WHERE {_RUNNING} RETURNING *",
            result=done.outcome.result,
            files=_pack(done.outcome.files),
            now=now,
            **names,
        )
        if row is not None:
            self._count([ended := record(row)], now)
            return Ending("stored", ended)
        # Cancelled while it ran: no result is kept, but the work was done and is counted, once.
        row = self._one(
            f"UPDATE jobs SET usage = :usage WHERE {_THIS_ATTEMPT} AND state = 'cancelled' AND usage IS NULL "
            "RETURNING *",
            **names,
        )
        if row is None:
            return self._not_ours(names, "succeeded")
        self._count_late(cancelled := record(row), now)
        return Ending("late", cancelled)

    @whole
    def fail(self, job_id: str, attempt: int, worker: str, fault: Fault, streamed: bool = False) -> Ending:
        """Running to queued or failed, as `after_failure` says."""
        names = {"id": job_id, "attempt": attempt, "worker": worker}
        with self._transaction() as now:
            row = self._one(f"SELECT * FROM jobs WHERE {_RUNNING}{self.LOCK}", **names)
            if row is None:
                return self._not_ours(names, "failed")
            self._keep_attempt(row, "failed", fault, now)
            decided = after_failure(failing(row, streamed=streamed), fault, now)
            if isinstance(decided, Fault):
                self._count([ended := self._fail_row(job_id, decided, now)], now)
                return Ending("stored", ended)
            self._count_attempt(record(row), now)
            row = self._one(
                "UPDATE jobs SET state = 'queued', run_after_ms = :due, fault = :fault, alone = :alone, "
                "crashes = :crashes, spared = :spared, started_ms = NULL WHERE id = :id RETURNING *",
                id=job_id,
                due=now + decided.delay_ms,
                fault=_pack(fault),
                alone=int(decided.alone),
                crashes=decided.crashes,
                spared=decided.spared,
            )
            assert row is not None
            return Ending("stored", record(row), requeued=True)

    @whole
    def end(self, job_id: str, attempt: int, fault: Fault) -> Ending:
        """Offered or running to failed, without any retry."""
        with self._transaction() as now:
            row = self._one(
                f"SELECT id FROM jobs WHERE id = :id AND attempt = :attempt AND {_OPEN}{self.LOCK}",
                id=job_id,
                attempt=attempt,
            )
            if row is None:
                return Ending("fenced")
            self._count([ended := self._fail_row(job_id, fault, now)], now)
            return Ending("stored", ended)

    @whole
    def cancel(self, job_id: str, tenant: str, fault: Fault) -> Cancelled | None:
        """To cancelled from any state that is not terminal."""
        with self._transaction() as now:
            row = self._changed(
                "UPDATE jobs SET state = 'cancelled', finished_ms = :now, fault = :fault WHERE id = :id "
                f"AND tenant = :tenant AND {_UNENDED} RETURNING *",
                id=job_id,
                tenant=tenant,
                now=now,
                fault=_pack(fault),
            )
            if row is not None:
                self._count([cancelled := record(row)], now)
                return Cancelled(cancelled, won=True)
            row = self._one("SELECT * FROM jobs WHERE id = :id AND tenant = :tenant", id=job_id, tenant=tenant)
            return Cancelled(record(row), won=False) if row is not None else None

    @whole
    def leave_unattended(self, fault: Fault) -> list[JobRecord]:
        """To cancelled: all jobs whose clients waited on connections of a coordinator that is gone."""
        with self._transaction() as now:
            return self._leave(fault, now)

    def _leave(self, fault: Fault, now: int) -> list[JobRecord]:
        rows = self._all(
            f"SELECT id FROM jobs WHERE {self.ORPHANED} AND {_UNENDED}{self.SKIP}", now=now, silent=self.silent_ms
        )
        left = [
            record(row)
            for found in rows
            for row in self._all(
                "UPDATE jobs SET state = 'cancelled', finished_ms = :now, fault = :fault WHERE id = :id RETURNING *",
                id=found["id"],
                now=now,
                fault=_pack(fault),
            )
        ]
        self._count(left, now)
        return left

    @whole
    def expire(self, slack_ms: int) -> list[JobRecord]:
        """Fail what is past its deadline: waiting jobs at once, running ones `slack_ms` after it."""
        with self._transaction() as now:
            self._end_false_pauses(now)
            rows = self._all(
                f"SELECT id FROM jobs WHERE deadline_at_ms > 0 AND deadline_at_ms <= :now AND {_UNENDED} "  # the index
                "AND (state IN ('queued', 'offered') OR (state = 'running' AND deadline_at_ms + :slack <= :now))"
                f"{self.SKIP}",
                now=now,
                slack=slack_ms,
            )
            failed = [self._fail_row(row["id"], deadline_fault(), now) for row in rows]
            self._count(failed, now)
        self._latest_ms = now
        return failed

    def _end_false_pauses(self, now: int) -> None:
        """When the clock went back, as of a machine that started with a wrong one: let no job that was claimed before
        wait for its next try until that clock's time comes again. Those that wait for a start of their own still do."""
        if now < self._latest_ms:
            self._all(
                "UPDATE jobs SET run_after_ms = :now WHERE state = 'queued' AND attempt > 0 AND run_after_ms > :most "
                "RETURNING id",
                now=now,
                most=now + _LONGEST_PAUSE_MS,
            )

    @whole
    def purge(self, retention_ms: int, limit: int = 500) -> list[Purged]:
        """Delete jobs that ended more than `retention_ms` ago and that no open batch needs."""
        with self._transaction() as now:
            self._purge_lots(now - retention_ms, limit)
            rows = self._all(
                "SELECT id FROM jobs WHERE finished_ms <= :before AND NOT EXISTS "
                f"(SELECT 1 FROM batch_items WHERE job = jobs.id) ORDER BY finished_ms LIMIT :limit{self.SKIP}",
                before=now - retention_ms,
                limit=limit,
            )
            return self._delete([row["id"] for row in rows])

    @whole
    def remove(self, job_id: str, tenant: str) -> Purged | None:
        """Delete one job of the tenant's that has ended."""
        with self._transaction():
            row = self._one(
                f"SELECT id FROM jobs WHERE id = :id AND tenant = :tenant AND finished_ms IS NOT NULL{self.LOCK}",
                id=job_id,
                tenant=tenant,
            )
            return self._delete([job_id])[0] if row is not None else None

    def _delete(self, jobs: Sequence[str]) -> list[Purged]:
        purged: list[Purged] = []
        gone: list[Row] = []
        for job_id in jobs:
            keys = self._all(
                "SELECT key FROM input_blobs AS mine WHERE job = :id AND NOT EXISTS ("
                "  SELECT 1 FROM input_blobs AS other WHERE other.key = mine.key AND other.job <> :id)",
                id=job_id,
            )
            gone += self._all("DELETE FROM jobs WHERE id = :id RETURNING model, priority, tries, vt", id=job_id)
            purged.append(Purged(job_id, tuple(key["key"] for key in keys)))
        self._keep_turns(gone)
        return purged

    @whole
    def shift_clock(self, ms: int) -> None:
        """Move the store's clock by `ms` from now on; for tests."""
        with self._transaction():
            self._all("UPDATE clock SET shift_ms = shift_ms + :ms RETURNING shift_ms", ms=ms)

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
            "UPDATE jobs SET state = 'failed', finished_ms = :now, fault = :fault, dead = :dead WHERE id = :id "
            "RETURNING *",
            id=job_id,
            now=now,
            fault=_pack(fault),
            dead=int(fault.owner != Owner.CALLER),
        )
        assert row is not None
        return record(row)
