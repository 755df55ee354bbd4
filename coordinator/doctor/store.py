"""What `coordinator doctor` looks at in the store: is it there, is it safe, and does it stay quick."""

from __future__ import annotations

import contextlib
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from coordinator.doctor.box import room
from coordinator.doctor.examine import Finding, Patient, bad, ok, warn
from coordinator.store import vitals
from coordinator.store.base import SILENT_MS, StoreError
from coordinator.store.opening import SQLITE, STORE_FILE, check_address, is_postgres, require_psycopg
from coordinator.store.sqlite_schema import MIGRATIONS as SQLITE_MIGRATIONS

SLOW_S, STUCK_S = vitals.SLOW_TRANSACTION_S, 600.0  # of one transaction
DEAD_LEAST, DEAD_SHARE = 10_000, 0.5
BIG_WAL_BYTES = 512 * 2**20
SKEW_S, WRONG_S = 2.0, 60.0
_SAFE = "ALTER SYSTEM SET {name} = on; then SELECT pg_reload_conf()."


def store(patient: Patient) -> Iterator[Finding]:
    """The store can be reached, has our schema, and keeps what it was given."""
    try:
        check_address(patient.store)
        if not is_postgres(patient.store):
            path = Path(patient.store.removeprefix(SQLITE)) if patient.store else patient.state / STORE_FILE
            yield from _of_file(path)
            return
        require_psycopg()
    except StoreError as error:
        yield bad("store", str(error), "Correct store in coordinator.toml, --store or COORDINATOR_STORE.")
        return
    yield from _of_postgres(patient)


def _of_file(path: Path) -> Iterator[Finding]:
    if not path.exists():
        yield ok("store", f"{path} does not exist yet; the first start makes it.")
        return
    try:
        with contextlib.closing(sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)) as file:
            version = int(file.execute("PRAGMA user_version").fetchone()[0])
            broken = [row[0] for row in file.execute("PRAGMA quick_check(1)") if row[0] != "ok"]
            shift = file.execute("SELECT shift_ms FROM clock").fetchone()[0] if version else 0
    except sqlite3.Error as error:
        cure = "Look at the disk and at the rights of the folder; restore a copy when the file is broken."
        yield bad("store", f"{path} cannot be read: {error}.", cure)
        return
    if broken:
        yield bad("store", f"{path} is broken: {broken[0]}.", "Stop the coordinator and restore a copy.")
    else:
        yield ok("store", f"{path} is whole.")
    yield _schema(version, len(SQLITE_MIGRATIONS))
    yield from _shifted(shift)
    wal = Path(f"{path}-wal")
    size = wal.stat().st_size if wal.exists() else 0
    if size > BIG_WAL_BYTES:
        cure = "Somebody reads the file for very long, a copy perhaps; end that, or restart the coordinator."
        yield warn("store log", f"{wal.name} has {size / 2**20:.0f} MiB.", cure)


def _schema(version: int, known: int) -> Finding:
    if version > known:
        cure = "Install that version again, or use another store."
        return bad("schema", f"A later version wrote this store: schema {version}, this one knows {known}.", cure)
    if version < known:
        return warn("schema", f"It has schema {version} of {known}.", "The next start of a coordinator brings it up.")
    return ok("schema", f"It is up to date ({version}).")


def _shifted(shift_ms: int) -> Iterator[Finding]:
    if shift_ms:
        cure = "Only tests move it: UPDATE clock SET shift_ms = 0, while no coordinator runs."
        yield bad("store clock", f"It was moved by {shift_ms / 1000:g} s.", cure)


# ---- PostgreSQL ---------------------------------------------------------------------------------------------


def _of_postgres(patient: Patient) -> Iterator[Finding]:
    from coordinator.store.postgres import LEAST_VERSION
    from coordinator.store.postgres_link import PostgresLink
    from coordinator.store.postgres_schema import MIGRATIONS

    try:
        link = PostgresLink(patient.store, pooled=patient.config.store_pooled, connections=1)
    except StoreError as error:
        yield bad("store", str(error).splitlines()[0], "Start the database; check host, user, pg_hba.conf and pgpass.")
        return
    try:
        database = _Database(link)
        settings = {row["name"]: row["setting"] for row in database.rows(vitals.POSTGRES_SETTINGS)}
        preset = database.rows(vitals.POSTGRES_PRESET)[0]["reset_val"]
        version = int(settings["server_version_num"])
        if version < LEAST_VERSION:
            yield bad("store", f"It is PostgreSQL {settings['server_version']}.", "Use 15 or later.")
            return
        yield ok("store", f"PostgreSQL {settings['server_version']} answers.")
        yield from _settings(settings, preset)
        yield from _connections(database, int(settings["max_connections"]))
        yield from _data_disk(settings)
        yield _clock(database)
        if not database.rows("SELECT 1 AS there WHERE to_regclass('schema_version') IS NOT NULL"):
            yield ok("schema", "There is none yet; the first start of a coordinator makes it.")
            return
        yield _schema(database.one("SELECT max(version) AS n FROM schema_version")["n"] or 0, len(MIGRATIONS))
        yield from _shifted(database.one("SELECT shift_ms FROM clock")["shift_ms"])
        yield from _transactions(database)
        yield _table(database)
        yield _replicas(database)
    finally:
        link.close()


class _Database:
    """Reads of one database."""

    def __init__(self, link: Any) -> None:
        self._link = link

    def rows(self, statement: str) -> list[dict[str, Any]]:
        """All rows. Raises StoreError."""
        found: list[dict[str, Any]] = self._link.read(statement, {})
        return found

    def one(self, statement: str) -> dict[str, Any]:
        """The only row."""
        return self.rows(statement)[0]


def _settings(settings: dict[str, str], idle_timeout: str) -> Iterator[Finding]:
    for name, lost in (("fsync", "all jobs"), ("full_page_writes", "all jobs"), ("synchronous_commit", "new jobs")):
        if settings[name] == "off":
            sentence = f"{name} is off: a crash or a loss of power may lose {lost} that were acknowledged."
            yield bad(name, sentence, _SAFE.format(name=name))
    if settings["autovacuum"] == "off":
        yield bad("autovacuum", "It is off: claims become slower with every job.", _SAFE.format(name="autovacuum"))
    if idle_timeout == "0":
        cure = "ALTER DATABASE … SET idle_in_transaction_session_timeout = '60s'."
        sentence = "idle_in_transaction_session_timeout is not set: one forgotten session may slow all claims down."
        yield warn("idle timeout", sentence, cure)


def _data_disk(settings: dict[str, str]) -> Iterator[Finding]:
    """Only where the database is on this machine, and tells us its folder (pg_read_all_settings)."""
    folder = Path(settings.get("data_directory") or "/nowhere")
    with contextlib.suppress(OSError):
        if folder.is_dir():
            yield room("disk of the database", folder)


def _connections(database: _Database, most: int) -> Iterator[Finding]:
    used = database.one(vitals.POSTGRES_CONNECTIONS)["n"]
    if used > 0.8 * most:
        cure = "Raise max_connections, or put PgBouncer in between (store_pooled = true)."
        yield warn("connections", f"{used} of {most} are taken.", cure)


def _clock(database: _Database) -> Finding:
    before = time.time()
    there = database.one(vitals.POSTGRES_CLOCK)["now_s"]
    after = time.time()
    ahead = there - (before + after) / 2
    off = max(0.0, abs(ahead) - (after - before) / 2)
    sentence = f"The database's clock is {abs(ahead):.1f} s {'ahead of' if ahead > 0 else 'behind'} this machine's."
    cure = "Let both machines follow the same time servers (chrony or systemd-timesyncd)."
    if off > WRONG_S:
        return bad("clock", sentence, cure)
    return warn("clock", sentence, cure) if off > SKEW_S else ok("clock", "Database and machine agree on the time.")


def _transactions(database: _Database) -> Iterator[Finding]:
    oldest = [row for row in database.rows(vitals.POSTGRES_TRANSACTIONS) if (row["open_s"] or 0.0) > SLOW_S]
    for row in oldest:
        what = "idle" if str(row["state"]).startswith("idle in transaction") else "at work"
        sentence = f"Session {row['pid']} ({_plain(row['who'])}) has had one open for {row['open_s']:.0f} s, {what}."
        cure = f"It keeps dead rows alive, and claims slow down: SELECT pg_terminate_backend({row['pid']})."
        yield (bad if row["open_s"] > STUCK_S else warn)("transactions", sentence, cure)
    for row in database.rows(vitals.POSTGRES_LEFT_OPEN):
        cure = "It keeps dead rows alive: ROLLBACK PREPARED it, or drop the slot, if nobody needs it."
        yield warn("transactions", f"There is a {_plain(row['what'])} that nobody uses.", cure)
    if not oldest:
        yield ok("transactions", f"None has been open for more than {SLOW_S:.0f} s.")


def _table(database: _Database) -> Finding:
    row = database.one(vitals.POSTGRES_TABLE)
    rows = f"{row['live']} rows and {row['dead']} dead ones"
    ago = f"vacuumed {row['vacuumed_s']:.0f} s ago" if row["vacuumed_s"] is not None else "never vacuumed"
    if row["dead"] > max(DEAD_LEAST, DEAD_SHARE * row["live"]):
        cure = "VACUUM jobs; if it stays so, a transaction holds it up, or autovacuum needs more workers."
        return warn("vacuum", f"jobs has {rows}, {ago}.", cure)
    return ok("vacuum", f"jobs has {rows}.")


def _replicas(database: _Database) -> Finding:
    rows = database.rows(vitals.POSTGRES_GATEWAYS)
    silent = [row for row in rows if row["silent_s"] * 1000 > SILENT_MS]
    held = sum(row["held"] for row in silent)
    live = len(rows) - len(silent)
    if held:
        sentence = f"Coordinators that are silent hold {held} open jobs, and {live} live."
        cure = "The next beat of a live one takes them over; start one." if not live else "Look at the live ones' logs."
        return (warn if live else bad)("replicas", sentence, cure)
    if silent:
        names = ", ".join(f"{row['id']} ({row['silent_s']:.0f} s)" for row in silent[:3])
        cure = "Nothing, if they were stopped; they are forgotten after an hour."
        return warn("replicas", f"{live} live, {len(silent)} fell silent: {names}.", cure)
    return ok("replicas", f"{live} live.")


def _plain(text: object) -> str:
    """What another program calls itself, fit for a terminal."""
    return "".join(letter if letter.isprintable() else "?" for letter in str(text or "unnamed"))[:60]
