"""What a dashboard asks of a store, in SQL that both databases understand."""

from __future__ import annotations

from coordinator.records import JobRecord
from coordinator.store.rows import LIGHT, record
from coordinator.store.sql_steps import SqlSteps, whole
from coordinator.store.watch import JobFilter, QueueLoad

MOST_SESSIONS = 50  # of one key; one more ends the one that is closest to its end
_STATES = {"queued": "state IN ('queued', 'offered')"}


class SqlWatch(SqlSteps):
    """The part of a store that a dashboard asks."""

    def jobs_of_all(self, wanted: JobFilter, limit: int, before: str = "") -> list[JobRecord]:
        """Newest first, those that are older than the job `before`, without params and result."""
        told = {name: value for name in ("model", "tenant", "worker") if (value := getattr(wanted, name))}
        where = [f"{name} = :{name}" for name in told]
        if wanted.state:
            where.append(_STATES.get(wanted.state, "state = :state"))
        if before:
            where.append("seq < (SELECT seq FROM jobs WHERE id = :before)")
        rows = self._read(
            f"SELECT {LIGHT} FROM jobs {'WHERE ' if where else ''}{' AND '.join(where)} ORDER BY seq DESC LIMIT :limit",
            **told,
            state=wanted.state,
            before=before,
            limit=limit,
        )
        return [record(row, light=True) for row in rows]

    def load(self) -> list[QueueLoad]:
        """What waits and runs now, over all tenants."""
        found: dict[tuple[str, str], QueueLoad] = {}
        for row in self._read(
            "SELECT kind, model, count(*) AS waiting, min(created_ms) AS oldest FROM jobs "
            "WHERE state = 'queued' GROUP BY kind, model"
        ):
            found[row["kind"], row["model"]] = QueueLoad(
                kind=row["kind"], model=row["model"], waiting=row["waiting"], oldest_ms=row["oldest"]
            )
        for row in self._read(
            "SELECT kind, model, count(*) AS running FROM jobs WHERE state IN ('offered', 'running') "
            "GROUP BY kind, model"
        ):
            known = found.get((row["kind"], row["model"]))
            found[row["kind"], row["model"]] = QueueLoad(
                kind=row["kind"],
                model=row["model"],
                waiting=known.waiting if known else 0,
                running=row["running"],
                oldest_ms=known.oldest_ms if known else 0,
            )
        return [found[name] for name in sorted(found)]

    @whole
    def add_session(self, hashed: bytes, key: bytes, keep_ms: int) -> None:
        """Open a session; those whose time has passed are forgotten, and of one key's only so many are kept."""
        with self._transaction() as now:
            self._all("DELETE FROM sessions WHERE expires_ms <= :now RETURNING expires_ms", now=now)
            self._all(
                "DELETE FROM sessions WHERE hash IN (SELECT hash FROM sessions WHERE key_hash = :key "
                "ORDER BY expires_ms DESC LIMIT 1000 OFFSET :most) RETURNING expires_ms",
                key=key,
                most=MOST_SESSIONS - 1,
            )
            self._all(
                "INSERT INTO sessions (hash, key_hash, expires_ms) VALUES (:hash, :key, :expires) RETURNING expires_ms",
                hash=hashed,
                key=key,
                expires=now + keep_ms,
            )

    def session(self, hashed: bytes) -> bytes | None:
        """The hash of the key of a session whose time has not passed."""
        rows = self._read(
            f"SELECT key_hash FROM sessions WHERE hash = :hash AND expires_ms > {self.CLOCK}", hash=hashed
        )
        return bytes(rows[0]["key_hash"]) if rows else None

    @whole
    def end_session(self, hashed: bytes) -> None:
        """Forget a session."""
        with self._transaction():
            self._all("DELETE FROM sessions WHERE hash = :hash RETURNING expires_ms", hash=hashed)
