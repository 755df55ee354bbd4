"""What a store in SQL answers without changing anything. Reads see what was committed, and wait for nobody."""

from __future__ import annotations

from coordinator.records import JobRecord, Submission
from coordinator.store.base import SILENT_MS, JobFiles, OpenAttempt
from coordinator.store.needs import Labels, asked_labels
from coordinator.store.rows import LATER, LIGHT, files_of, record, same_request
from coordinator.store.sql_watch import SqlWatch


class SqlReads(SqlWatch):
    """The reading half of `Store`, for both databases.

    Attributes:
        gateway: this coordinator's name in the rows it holds.
        parallel: how many threads may write at once.
        silent_ms: a coordinator that has said nothing for so long is gone.
    """

    gateway: str = ""
    parallel: int = 1
    silent_ms: int = SILENT_MS

    def now_ms(self) -> int:
        """The store's clock, milliseconds since the epoch."""
        return int(self._read(f"SELECT {self.CLOCK} AS now")[0]["now"])

    def get(self, job_id: str, tenant: str | None = None) -> JobRecord | None:
        """The row; with a tenant only when it is the tenant's."""
        mine = "" if tenant is None else " AND tenant = :tenant"
        rows = self._read(f"SELECT * FROM jobs WHERE id = :id{mine}", id=job_id, tenant=tenant or "")
        return record(rows[0]) if rows else None

    def by_key(self, submission: Submission) -> JobRecord | None:
        """The job that the submission's idempotency key names."""
        if not submission.idempotency_key:
            return None
        rows = self._read(
            "SELECT * FROM jobs WHERE tenant = :tenant AND idempotency_key = :key AND idempotency_key <> ''",
            tenant=submission.tenant,
            key=submission.idempotency_key,
        )
        return same_request(rows[0], submission) if rows else None

    def recent(self, tenant: str, limit: int, state: str | None = None, dead: bool = False) -> list[JobRecord]:
        """Newest first, without params and result; with `dead` only those that somebody may want to try again."""
        inside = {None: "", "queued": " AND state IN ('queued', 'offered')"}.get(state, " AND state = :state")
        inside += " AND dead = 1" if dead else ""
        rows = self._read(
            f"SELECT {LIGHT} FROM jobs WHERE tenant = :tenant{inside} ORDER BY seq DESC LIMIT :limit",
            tenant=tenant,
            state=state or "",
            limit=limit,
        )
        return [record(row, light=True) for row in rows]

    def videos(self, tenant: str, limit: int, after: str = "", oldest_first: bool = False) -> list[JobRecord]:
        """The tenant's jobs of videos behind the one with the id `after`, without those that were cancelled."""
        step, order = (">", "ASC") if oldest_first else ("<", "DESC")
        rows = self._read(
            "SELECT * FROM jobs WHERE tenant = :tenant AND kind = 'video' AND state <> 'cancelled' AND (:after = '' OR "
            f"seq {step} (SELECT seq FROM jobs AS last WHERE last.id = :after AND last.tenant = :tenant)) "
            f"ORDER BY seq {order} LIMIT :limit",
            tenant=tenant,
            after=after,
            limit=limit,
        )
        return [record(row) for row in rows]

    def open_attempts(self) -> list[OpenAttempt]:
        """All rows that are offered or running and held by this coordinator."""
        rows = self._read(
            "SELECT id, attempt, state, worker, kind, model, streamed FROM jobs "
            "WHERE state IN ('offered', 'running') AND gateway = :me",
            me=self.gateway,
        )
        return [
            OpenAttempt(r["id"], r["attempt"], r["state"], r["worker"], r["kind"], r["model"], bool(r["streamed"]))
            for r in rows
        ]

    def job_files(self, job_id: str) -> JobFiles:
        """Which attempt is open, whoever holds it, and what outputs the job has; nothing of one that is unknown."""
        rows = self._read("SELECT state, attempt, worker, files FROM jobs WHERE id = :id", id=job_id)
        if not rows:
            return JobFiles()
        [row] = rows
        waits = row["state"] == "queued" and row["worker"] != ""  # `adopt` opens it again
        attempt = row["attempt"] if waits or row["state"] in ("offered", "running") else 0
        return JobFiles(attempt, frozenset(file.blob for file in files_of(row["files"])))

    def queued(self) -> dict[tuple[str, str], int]:
        """(kind, model) -> jobs that wait."""
        rows = self._read("SELECT kind, model, count(*) AS n FROM jobs WHERE state = 'queued' GROUP BY kind, model")
        return {(row["kind"], row["model"]): row["n"] for row in rows}

    def waiting(self) -> dict[str, tuple[int, int]]:
        """Tenant -> its jobs that wait and are due, or pause before their next try; and those that were asked to start
        later."""
        rows = self._read(
            # By an expression: by the column, SQLite would go through all jobs there are, in the order of tenants.
            f"SELECT tenant || '' AS whose, count(*) AS n, sum(CASE WHEN vt >= {LATER} THEN 1 ELSE 0 END) AS later "
            "FROM jobs WHERE state = 'queued' GROUP BY whose"
        )
        return {row["whose"]: (row["n"] - row["later"], row["later"]) for row in rows}

    def asked_labels(self) -> Labels:
        """All labels that waiting jobs ask for."""
        rows = self._read("SELECT DISTINCT needs FROM jobs WHERE state = 'queued' AND needs <> ''")
        return frozenset().union(*(asked_labels(row["needs"]) for row in rows))

    def has_blob(self, key: str) -> bool:
        """Whether a job's input or a kept file has this key."""
        owners = "SELECT 1 AS found FROM input_blobs WHERE key = :key UNION ALL SELECT 1 FROM files WHERE blob = :key"
        return bool(self._read(f"{owners} LIMIT 1", key=key))

    def has_job(self, job_id: str) -> bool:
        """Whether there is such a row, and its content was not deleted: what a late upload left would be nobody's."""
        return bool(self._read("SELECT 1 AS found FROM jobs WHERE id = :id AND length(fingerprint) > 0", id=job_id))
