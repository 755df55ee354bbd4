"""The reads behind `Store.vitals`."""

from __future__ import annotations

from collections.abc import Mapping

from coordinator.store.sql_steps import SqlSteps
from coordinator.store.vitals import MOST_MODELS, POSTGRES_GAUGES, POSTGRES_TABLE, StoreVitals, Waiting

# Since when they are due: a job that waits for its hour, or for its next try, is not late.
_QUEUE = """
    SELECT kind, model, count(*) AS n,
        min(CASE WHEN run_after_ms > created_ms THEN run_after_ms ELSE created_ms END) AS since_ms
    FROM jobs WHERE state = 'queued' GROUP BY kind, model ORDER BY count(*) DESC, model LIMIT :most
"""
_BATCHES = "SELECT state, count(*) AS n FROM batches WHERE ended_ms IS NULL GROUP BY state"
_UNFOLDED = "SELECT count(*) AS n FROM (SELECT seq FROM usage_fresh LIMIT 100000) AS pending"


class SqlVitals(SqlSteps):
    """The part of `Store` that says how it is."""

    def vitals(self) -> StoreVitals:
        """A few reads that look at no job that has ended."""
        now = int(self._read(f"SELECT {self.CLOCK} AS now")[0]["now"])
        rows = self._read(_QUEUE, most=MOST_MODELS)
        waiting = (Waiting(r["kind"], r["model"], r["n"], max(0.0, (now - r["since_ms"]) / 1000)) for r in rows)
        return StoreVitals(
            waiting=tuple(waiting),
            batches={row["state"]: row["n"] for row in self._read(_BATCHES)},
            usage_pending=self._read(_UNFOLDED)[0]["n"],
            gauges=self._gauges(),
        )

    def _gauges(self) -> dict[str, float]:
        raise NotImplementedError


def gauges_of_postgres(steps: SqlSteps, pool: Mapping[str, float], silent_ms: int) -> dict[str, float]:
    """What PostgreSQL says of itself, and the pool of our connections to it."""
    said, table = steps._read(POSTGRES_GAUGES)[0], steps._read(POSTGRES_TABLE)[0]
    beats = steps._read(f"SELECT count(*) AS n FROM gateways WHERE beat_ms > {steps.CLOCK} - :silent", silent=silent_ms)
    return {
        "oldest_transaction_seconds": said["oldest_transaction_seconds"],
        "idle_in_transaction_seconds": said["idle_in_transaction_seconds"],
        "connections": said["connections"],
        "dead_rows": table["dead"],
        "live_rows": table["live"],
        "bytes": table["bytes"],
        "replicas": beats[0]["n"],
        "pool_connections": pool.get("pool_size", 0),
        "pool_free": pool.get("pool_available", 0),
        "pool_waiting": pool.get("requests_waiting", 0),
    }
