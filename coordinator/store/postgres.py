"""The store in PostgreSQL 15 or later: many coordinators over one database, which does all the locking.

What the statements mean is in `sql`; this file says how due jobs are claimed when several claim at once.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import msgspec
import psycopg

from coordinator.records import JobRecord
from coordinator.store.base import (
    LEFT_BEHIND,
    SILENT_MS,
    Beat,
    Claimed,
    Done,
    Ending,
    Held,
    StoreError,
    StoreTooNew,
    Want,
)
from coordinator.store.doorbell import Doorbell
from coordinator.store.needs import NO_LIMIT_GB
from coordinator.store.postgres_link import Connection, PostgresLink
from coordinator.store.postgres_schema import MIGRATIONS
from coordinator.store.rows import LATER, LIGHT, Row, record
from coordinator.store.sql import SqlStore, in_turn, once_each
from coordinator.store.sql_steps import whole
from coordinator.store.sql_usage import APPEND, APPEND_ALL, FOLD, FOLD_ALL
from coordinator.store.sql_vitals import gauges_of_postgres
from protocol.faults import Fault

log = logging.getLogger(__name__)

T = TypeVar("T")
_pack = msgspec.msgpack.encode
LEAST_VERSION = 150_000
CONNECTIONS = 8
_MIGRATING = 0x62756C6B  # of the advisory lock, so that coordinators that start together do not migrate together
# For a step of the schema, which may write every row, or wait for another coordinator that takes it.
_PATIENT = "SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = '30min'"
_BETWEEN = "\x1f"
_FORGET_GATEWAY_MS = 3_600_000
_LIVE = "SELECT id FROM gateways WHERE beat_ms > :now - :silent"
# One index walk per want and line, and none waits for rows that another coordinator claims just now. `kind = ANY`
# filters what the walk finds; in the place of `model =` it would sort the whole queue. MATERIALIZED: it is run once,
# not per row. A want of several lines locks up to its limit in each and takes the first of them all: for the rest of
# this statement others pass over what it leaves, and find it when they look again.
_CLAIM = f"""
    WITH wants AS (
        SELECT model, needs, string_to_array(kinds, chr(31)) AS kinds, wanted, vram,
            string_to_array(but, chr(31)) AS but, waited
        FROM unnest(:models::text[], :needs::text[], :kinds::text[], :limits::int[], :vrams::float8[], :buts::text[],
            :waits::bigint[]) AS want (model, needs, kinds, wanted, vram, but, waited)
    ), due AS MATERIALIZED (
        SELECT picked.seq, wants.wanted,
            row_number() OVER (PARTITION BY wants.model ORDER BY picked.priority DESC, picked.vt, picked.seq) AS place
        FROM wants CROSS JOIN LATERAL (
            SELECT seq, priority, vt FROM jobs WHERE state = 'queued' AND model = wants.model AND needs = wants.needs
            AND kind = ANY (wants.kinds) AND run_after_ms <= :now AND (deadline_at_ms = 0 OR deadline_at_ms > :now)
            AND vt < {LATER} AND vram_gb_estimate <= wants.vram AND id <> ALL (wants.but)
            AND (wants.waited = 0 OR created_ms <= :now - wants.waited OR created_ms > :now + wants.waited)
            ORDER BY priority DESC, vt, seq LIMIT wants.wanted FOR UPDATE SKIP LOCKED
        ) AS picked
    )
    UPDATE jobs SET state = 'offered', attempt = attempt + 1, worker = '', gateway = :me
    FROM due WHERE jobs.seq = due.seq AND due.place <= due.wanted RETURNING jobs.*
"""
_ACCEPT = """
    UPDATE jobs SET state = 'running', worker = held.worker, tries = tries + 1, started_ms = :now
    FROM unnest(:ids::text[], :attempts::bigint[], :workers::text[]) AS held (id, attempt, worker)
    WHERE jobs.id = held.id AND jobs.attempt = held.attempt AND state = 'offered'
    RETURNING jobs.id, jobs.attempt, jobs.worker
"""
# Without the result, which may be megabytes and was just sent, and without what no `JobRecord` has.
_ENDED = ", ".join(f"jobs.{column}" for column in (*LIGHT.split(", "), "params", "origin", "gateway"))
_COMPLETE = f"""
    UPDATE jobs SET state = 'succeeded', result = done.result, files = done.files, usage = done.usage,
        finished_ms = :now, fault = NULL
    FROM unnest(:ids::text[], :attempts::bigint[], :workers::text[], :results::bytea[], :files::bytea[],
        :usages::bytea[]) AS done (id, attempt, worker, result, files, usage)
    WHERE jobs.id = done.id AND jobs.attempt = done.attempt AND jobs.worker = done.worker AND state = 'running'
    RETURNING {_ENDED}
"""


class PostgresStore(SqlStore):
    """`Store` over one database.

    Args:
        url: `postgres://user@host1,host2/database`; passwords are better kept in a pgpass file.
        pooled: connections go through a pooler in transaction mode (PgBouncer): no doorbell, only the poll.
        connections: at most so many; as many threads may write at once.
        silent_ms: coordinators that were silent for so long are gone.

    Raises:
        StoreTooNew: its schema is newer than this program's.
        StoreError: it cannot be reached, is too old, or a copy into it was not finished.
    """

    MOST, LEAST = "greatest", "least"
    LOCK, SKIP, CLOCK = " FOR UPDATE", " FOR UPDATE SKIP LOCKED", "now_ms()"
    ALIVE = "coalesce((SELECT beat_ms FROM gateways WHERE id = presence.gateway), 0)"
    # Who made a row lived then, whatever it has said since. From a clock that was ahead, it may be of any time.
    ORPHANED = (
        f"attended = 1 AND created_ms NOT BETWEEN :now - :silent + 1 AND :now + :silent AND origin NOT IN ({_LIVE})"
    )

    def __init__(
        self, url: str, *, pooled: bool = False, connections: int = CONNECTIONS, silent_ms: int = SILENT_MS
    ) -> None:
        self.gateway = f"gw_{secrets.token_hex(8)}"
        self.parallel, self.silent_ms = connections, silent_ms
        self.advertised = ""  # the URL of this replica's door, said with every beat
        self._link = PostgresLink(url, pooled=pooled, connections=connections)
        self._bell: Doorbell | None = None
        try:
            connection = self._link.connect()
            try:
                migrate(connection)
                _check_copies(connection)
            finally:
                connection.close()
            # Before this, silence of others is put down to the database: it may be back since a moment.
            self._judges_from = self._appear() + self.silent_ms
        except BaseException:
            self._link.close()
            raise

    # ---- many coordinators ---------------------------------------------------------------------------------

    @whole
    def beat(self) -> Beat:
        """Say that this coordinator lives, and take over what those that do not say so any more have held.

        Who is silent is judged only by who has beaten for as long without a break: in a break the database may have
        been away, and the others come back a little later, or beat a little earlier before it. Half of the silence is
        a break, so that nobody is judged by less than the other half.
        """
        with self._transaction() as now:
            before = self._one("SELECT beat_ms FROM gateways WHERE id = :me", me=self.gateway)
            self._say_alive(now)
            # Without a row the silence was so long that it is forgotten.
            silence_ms = self.silent_ms if before is None else now - before["beat_ms"]
            lapsed = silence_ms >= self.silent_ms
            if silence_ms >= self.silent_ms // 2:
                may = "others may have taken over" if lapsed else "whoever judges by it may be a moment too early"
                log.warning("No beat reached the database for %.1f s; %s", silence_ms / 1000, may)
                self._judges_from = now + self.silent_ms
            self._clock_went_back(now)
            if now < self._judges_from:
                return Beat(lapsed)
            silent = {"now": now, "silent": self.silent_ms}
            found = self._all(
                "SELECT id FROM jobs WHERE state IN ('offered', 'running') AND gateway <> :me "
                f"AND gateway NOT IN ({_LIVE}){self.SKIP}",
                me=self.gateway,
                **silent,
            )
            for row in found:
                self._all("UPDATE jobs SET gateway = :me WHERE id = :id RETURNING id", me=self.gateway, id=row["id"])
            self._all("DELETE FROM gateways WHERE beat_ms < :before RETURNING id", before=now - _FORGET_GATEWAY_MS)
            left = self._leave(LEFT_BEHIND, now)
            return Beat(False, len(found), tuple(left))

    def _clock_went_back(self, now: int) -> None:
        """From a clock that was ahead there may be instants that have not come yet; silence counts from now on."""
        self._judges_from = min(self._judges_from, now + self.silent_ms)
        self._all(
            "UPDATE gateways SET beat_ms = :now WHERE id IN "
            f"(SELECT id FROM gateways WHERE beat_ms > :now + :silent{self.SKIP}) RETURNING id",
            now=now,
            silent=self.silent_ms,
        )

    @whole
    def peers(self) -> list[tuple[str, str]]:
        """(name, URL) of the other coordinators that live and have a door for us."""
        rows = self._read(
            "SELECT id, url FROM gateways WHERE beat_ms > now_ms() - :silent AND id <> :me AND url <> '' ORDER BY id",
            silent=self.silent_ms,
            me=self.gateway,
        )
        return [(row["id"], row["url"]) for row in rows]

    @whole
    def ended_of(self, jobs: Sequence[str]) -> list[str]:
        """Those of these jobs that have ended, or are not there."""
        rows = self._read(
            "SELECT asked.id FROM unnest(:ids::text[]) AS asked (id) LEFT JOIN jobs ON jobs.id = asked.id "
            "WHERE jobs.id IS NULL OR jobs.finished_ms IS NOT NULL",
            ids=list(jobs),
        )
        return [row["id"] for row in rows]

    def _say_alive(self, now: int) -> None:
        self._all(
            "INSERT INTO gateways (id, beat_ms, url) VALUES (:me, :now, :url) "
            "ON CONFLICT (id) DO UPDATE SET beat_ms = :now, url = :url RETURNING id",
            me=self.gateway,
            now=now,
            url=self.advertised,
        )

    @whole
    def _appear(self) -> int:
        """From its first claim on, nobody may think that this coordinator is gone. Returns the store's clock."""
        with self._transaction() as now:
            self._say_alive(now)
            return now

    def leave_unattended(self, _fault: Fault) -> list[JobRecord]:
        """Nothing: an earlier life had another name, and `beat` finds it gone when it has been silent for so long."""
        return []

    def close(self) -> None:
        """Release the connections; later calls raise StoreError. Calling it again does nothing."""
        if self._bell is not None:
            self._bell.close()
        self._link.close()

    def listen(self, ring: Callable[[], None]) -> None:
        """Hear of work that other coordinators made; behind a pooler nothing is heard, and the poll finds it."""
        if self._bell is None and not self._link.pooled:
            self._bell = Doorbell(self._link.connect, self.gateway, ring)

    def _due_now(self) -> None:
        if self._bell is not None:
            self._bell.ring()

    def _claim(self, wants: Sequence[Want], now: int) -> list[Claimed]:
        self._ripen(now, sum(want.limit for want in wants))
        claimed: list[Row] = []
        lines: dict[str, list[str]] = {}
        for round_ in _rounds(wants):
            asked = [(want, needs) for want in round_ for needs in self._lines_for(want, lines)]
            if not asked:
                continue
            claimed += self._all(
                _CLAIM,
                models=[want.model for want, _ in asked],
                needs=[needs for _, needs in asked],
                kinds=[_BETWEEN.join(want.kinds) for want, _ in asked],
                limits=[want.limit for want, _ in asked],
                vrams=[NO_LIMIT_GB if want.vram_gb is None else want.vram_gb for want, _ in asked],
                buts=[_BETWEEN.join(want.but) for want, _ in asked],
                waits=[want.waited_ms for want, _ in asked],
                me=self.gateway,
                now=now,
            )
        return in_turn(claimed, now)

    def _accept_all(self, held: Sequence[Held], now: int) -> list[bool]:
        return once_each(held, self._all(_ACCEPT, now=now, **_names(held)))

    def _complete_all(self, done: Sequence[Done], now: int) -> list[Ending]:
        """All at once; what that did not change is looked at one by one."""
        first = {one.job: one for one in reversed(done)}
        changes = {
            "now": now,
            "results": [one.outcome.result for one in first.values()],
            "files": [_pack(one.outcome.files) for one in first.values()],
            "usages": [_pack(one.outcome.usage) for one in first.values()],
        }
        rows = self._link.all(_COMPLETE, changes | _names(list(first.values())))
        stored = {
            row["id"]: Ending("stored", record(row | {"result": first[row["id"]].outcome.result})) for row in rows
        }
        self._count([ending.record for ending in stored.values() if ending.record is not None], now)
        return [
            stored[one.job] if one.job in stored and first[one.job] is one else self._complete(one, now) for one in done
        ]

    def _append_usage(self, rows: Sequence[dict[str, Any]]) -> None:
        if len(rows) == 1:  # as nearly always: twenty arrays of one cost more than the row
            self._all(APPEND, **rows[0])
        elif rows:
            self._all(APPEND_ALL, **{f"all_{name}": [row[name] for row in rows] for name in rows[0]})

    def _gauges(self) -> dict[str, float]:
        return gauges_of_postgres(self, self._link.pool(), self.silent_ms)

    def _fold(self) -> int:
        return int(self._all(FOLD_ALL, most=FOLD)[0]["moved"])

    def _transaction(self, *, synced: bool = True) -> AbstractContextManager[int]:
        return self._link.transaction(synced=synced)

    def _to_the_end(self, call: Callable[[], T]) -> T:
        return self._link.to_the_end(call)

    def _hold(self, job_id: str) -> bool:
        return self._one("SELECT id FROM jobs WHERE id = :id FOR UPDATE", id=job_id) is not None

    def _one_by_one(self, name: str) -> None:
        self._one("SELECT pg_advisory_xact_lock(hashtextextended(:name, 0))::text AS taken", name=name)

    def _all(self, sql: str, **names: Any) -> Sequence[Row]:
        return self._link.all(sql, names)

    def _read(self, sql: str, **names: Any) -> Sequence[Row]:
        return self._link.to_the_end(lambda: self._link.read(sql, names))


def _names(held: Sequence[Held | Done]) -> dict[str, Any]:
    return {
        "ids": [one.job for one in held],
        "attempts": [one.attempt for one in held],
        "workers": [one.worker for one in held],
    }


def _rounds(wants: Sequence[Want]) -> list[list[Want]]:
    """The wants in rounds that name each model once: two walks of one statement would find the same rows."""
    rounds: list[list[Want]] = []
    for want in wants:
        free = next((one for one in rounds if all(other.model != want.model for other in one)), None)
        if free is None:
            rounds.append(free := [])
        free.append(want)
    return rounds


def migrate(connection: Connection) -> None:
    """Bring the schema up to date, one transaction per step. Raises StoreTooNew, StoreError."""
    if connection.info.server_version < LEAST_VERSION:
        raise StoreError(
            f"The database is PostgreSQL {connection.info.server_version // 10_000}; 15 or later is needed."
        )
    try:
        while _step(connection):
            pass
    except psycopg.Error as error:
        raise StoreError(f"The schema cannot be brought up to date: {str(error).strip()}") from None


def _step(connection: Connection) -> bool:
    """Take the next step; False when there is none left."""
    with connection.transaction():
        connection.execute(_PATIENT.encode())
        connection.execute("SELECT pg_advisory_xact_lock(%s)", (_MIGRATING,))
        connection.execute("CREATE TABLE IF NOT EXISTS schema_version (version INTEGER NOT NULL)")
        row = connection.execute("SELECT coalesce(max(version), 0) AS version FROM schema_version").fetchone()
        version = int(row["version"]) if row else 0
        if version > len(MIGRATIONS):
            raise StoreTooNew(
                f"A later version of the coordinator wrote this database (schema {version}, this program knows "
                f"{len(MIGRATIONS)}); install that version again or use another database."
            )
        if version == len(MIGRATIONS):
            return False
        if version and connection.execute("SELECT 1 FROM jobs LIMIT 1").fetchone() is not None:
            steps = (version, version + 1, len(MIGRATIONS))
            log.warning(
                "Bringing the database from schema %d to %d of %d; with millions of jobs this takes long", *steps
            )
        connection.execute(MIGRATIONS[version].encode(), prepare=False)
        connection.execute("INSERT INTO schema_version VALUES (%s)", (version + 1,))
        return True


def _check_copies(connection: Connection) -> None:
    row = connection.execute("SELECT source FROM copies WHERE NOT finished").fetchone()
    if row is not None:
        raise StoreError(
            f"A copy of {row['source']} into this database was not finished; run `coordinator migrate` again first."
        )
