"""How a store's database is doing, in a few cheap reads: for `coordinator doctor` and for the gauges of /metrics.

Reads of system views and counters only, never of the jobs themselves. A column may be NULL where our role may not see.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

MOST_MODELS = 500
SLOW_TRANSACTION_S = 60.0  # measured: claims fell to a fifth after 20 s beside an open one
# What keeps dead rows alive: the oldest snapshot of anybody, a prepared transaction, or a replication slot.
POSTGRES_TRANSACTIONS = """
    SELECT pid, application_name AS who, state,
        CAST(extract(epoch FROM clock_timestamp() - xact_start) AS DOUBLE PRECISION) AS open_s
    FROM pg_stat_activity
    WHERE xact_start IS NOT NULL AND pid <> pg_backend_pid() AND datname = current_database()
        AND backend_type = 'client backend'
    ORDER BY xact_start LIMIT 5
"""
POSTGRES_LEFT_OPEN = """
    SELECT 'prepared transaction ' || gid AS what,
        CAST(extract(epoch FROM clock_timestamp() - prepared) AS DOUBLE PRECISION) AS open_s
    FROM pg_prepared_xacts WHERE database = current_database()
    UNION ALL
    SELECT 'replication slot ' || slot_name, NULL FROM pg_replication_slots
    WHERE NOT active AND (xmin IS NOT NULL OR catalog_xmin IS NOT NULL)
"""
POSTGRES_TABLE = """
    SELECT n_live_tup AS live, n_dead_tup AS dead, pg_total_relation_size(relid) AS bytes,
        CAST(extract(epoch FROM clock_timestamp() - greatest(last_vacuum, last_autovacuum)) AS DOUBLE PRECISION)
            AS vacuumed_s
    FROM pg_stat_user_tables WHERE relid = 'jobs'::regclass
"""
POSTGRES_SETTINGS = """
    SELECT name, setting FROM pg_settings WHERE name IN ('fsync', 'full_page_writes', 'synchronous_commit',
        'synchronous_standby_names', 'autovacuum', 'max_connections', 'idle_in_transaction_session_timeout',
        'data_directory', 'server_version_num', 'server_version', 'statement_timeout')
"""
# The server's settings without those that our own connections set for themselves.
POSTGRES_PRESET = "SELECT name, reset_val FROM pg_settings WHERE name = 'idle_in_transaction_session_timeout'"
POSTGRES_CONNECTIONS = "SELECT count(*) AS n FROM pg_stat_activity WHERE backend_type = 'client backend'"
POSTGRES_GATEWAYS = """
    SELECT id, (now_ms() - beat_ms) / 1000.0::DOUBLE PRECISION AS silent_s,
        (SELECT count(*) FROM jobs WHERE state IN ('offered', 'running') AND gateway = gateways.id) AS held
    FROM gateways ORDER BY beat_ms DESC
"""
POSTGRES_GAUGES = """
    SELECT CAST(coalesce(max(extract(epoch FROM clock_timestamp() - xact_start))
            FILTER (WHERE backend_type = 'client backend'), 0) AS DOUBLE PRECISION)
            AS oldest_transaction_seconds,
        CAST(coalesce(max(extract(epoch FROM clock_timestamp() - state_change))
            FILTER (WHERE starts_with(state, 'idle in transaction')), 0) AS DOUBLE PRECISION)
            AS idle_in_transaction_seconds,
        count(*) AS connections
    FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()
"""
POSTGRES_CLOCK = "SELECT CAST(extract(epoch FROM clock_timestamp()) AS DOUBLE PRECISION) AS now_s"


class Waiting(msgspec.Struct, frozen=True):
    """Jobs of one kind and model that wait, and for how long the oldest has been due."""

    kind: str
    model: str
    jobs: int
    oldest_s: float


class StoreVitals(msgspec.Struct, frozen=True, kw_only=True):
    """How a store is.

    Attributes:
        waiting: the longest queues first, at most `MOST_MODELS`.
        batches: open ones by state.
        usage_pending: rows of usage that are not added up yet.
        gauges: what the database says of itself, under names for /metrics.
    """

    waiting: tuple[Waiting, ...]
    batches: Mapping[str, int]
    usage_pending: int
    gauges: Mapping[str, float]
