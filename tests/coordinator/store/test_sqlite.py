"""What is SQLite's own: the file, its lock, its schema, a full disk."""

from __future__ import annotations

import shutil
import sqlite3
import stat
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from coordinator.records import LotRecord, StoredInput, Submission
from coordinator.store import SqliteStore, StoreBusy, StoreError, StoreTooNew
from coordinator.store.base import Outcome, Want
from coordinator.store.sqlite_file import translated
from coordinator.store.sqlite_schema import MIGRATIONS
from protocol.faults import Fault, FaultError


def test_the_file_is_private_and_durable(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "jobs.sqlite")
    try:
        assert stat.S_IMODE((tmp_path / "jobs.sqlite").stat().st_mode) == 0o600
        assert store._writer.execute("PRAGMA journal_mode").fetchone()["journal_mode"] == "wal"
        assert store._writer.execute("PRAGMA synchronous").fetchone()["synchronous"] == 2
        assert store._writer.execute("PRAGMA user_version").fetchone()["user_version"] == len(MIGRATIONS)
    finally:
        store.close()
    store.close()


def test_every_step_but_an_accept_is_synced(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "jobs.sqlite")
    said: list[str] = []
    store._writer.set_trace_callback(said.append)

    def synced() -> bool:
        """Whether all that was committed since the last call was."""
        modes = [line.split()[-1] for line in said if line.startswith("PRAGMA synchronous")]
        assert modes
        assert len(modes) == said.count("COMMIT")
        said.clear()
        return set(modes) == {"FULL"}

    wanted = Submission(kind="llm", model="chat", params=b"\x80", stream=True)
    try:
        store.insert_and_claim("job_1", wanted, [Want("chat", ("llm",), 1)])
        assert synced()
        assert store.accept("job_1", 1, "w1")
        assert not synced()
        assert store.mark_streamed("job_1", 1, "w1")
        assert synced()
        assert store.complete("job_1", 1, "w1", Outcome(b"\x80")).verdict == "stored"
        assert synced()
    finally:
        store.close()


def test_a_second_coordinator_is_refused(tmp_path: Path) -> None:
    first = SqliteStore(tmp_path / "jobs.sqlite")
    with pytest.raises(StoreBusy, match="another coordinator"):
        SqliteStore(tmp_path / "jobs.sqlite")
    first.close()
    SqliteStore(tmp_path / "jobs.sqlite").close()


def test_a_store_of_a_later_version_is_left_alone(tmp_path: Path) -> None:
    SqliteStore(tmp_path / "jobs.sqlite").close()
    connection = sqlite3.connect(tmp_path / "jobs.sqlite")
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StoreTooNew, match="later version"):
        SqliteStore(tmp_path / "jobs.sqlite")


@pytest.mark.parametrize("version", range(1, len(MIGRATIONS)))
def test_a_store_of_an_earlier_version_goes_on(tmp_path: Path, version: int) -> None:
    connection = sqlite3.connect(tmp_path / "jobs.sqlite", isolation_level=None)
    for number, script in enumerate(MIGRATIONS[:version], 1):
        connection.executescript(f"BEGIN; {script}; PRAGMA user_version = {number}; COMMIT;")
    for n, (state, worker) in enumerate([("queued", ""), ("running", "w1"), ("queued", "")]):
        connection.execute(
            "INSERT INTO jobs (id, tenant, key_id, idempotency_key, fingerprint, kind, model, state, attempt, "
            "max_attempts, priority, deadline_at_ms, created_ms, worker, stream, vram_gb_estimate, traceparent, "
            "labels, params, inputs) "
            "VALUES (?, 't', '', '', x'', 'llm', 'chat', ?, 1, 3, 0, 0, 1, ?, 0, 0, '', x'80', x'80', x'90')",
            (f"job_{n}", state, worker),
        )
    connection.close()
    store = SqliteStore(tmp_path / "jobs.sqlite")
    try:
        store.insert("job_new", Submission(kind="llm", model="chat", params=b"\x80", tenant="t"))
        assert [(one.job, one.worker) for one in store.open_attempts()] == [("job_1", "w1")]
        assert [record.id for record, _ in store.claim([Want("chat", ("llm",), 9)])] == ["job_0", "job_2", "job_new"]
        assert store.complete("job_1", 1, "w1", Outcome(b"\x80")).verdict == "stored"
    finally:
        store.close()


def test_what_is_no_store_says_so(tmp_path: Path) -> None:
    (tmp_path / "jobs.sqlite").write_bytes(b"this is a letter to my aunt" * 100)
    with pytest.raises(StoreError, match="cannot be opened"):
        SqliteStore(tmp_path / "jobs.sqlite")
    with pytest.raises(StoreError, match="No such file"):
        SqliteStore(tmp_path / "missing" / "jobs.sqlite")


def test_a_full_disk_is_a_typed_refusal_and_passes(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "jobs.sqlite")
    try:
        pages = store._writer.execute("PRAGMA page_count").fetchone()["page_count"]
        store._writer.execute(f"PRAGMA max_page_count = {pages + 4}")
        big = Submission(kind="llm", model="chat", params=b"x" * 200_000)
        with pytest.raises(FaultError) as caught:
            store.insert("job_1", big)
        assert (caught.value.fault.code, caught.value.fault.http_status) == ("storage_full", 507)
        assert store.get("job_1") is None
        store._writer.execute(f"PRAGMA max_page_count = {pages + 400}")
        assert store.insert("job_1", big)[1]
    finally:
        store.close()


@pytest.mark.parametrize(("free", "said"), [(4096, "disk is full"), (2**30, "disk I/O error")])
def test_an_index_of_the_journal_that_cannot_grow_is_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, said: str
) -> None:
    """SQLite says SQLITE_IOERR_SHMSIZE where the journal itself had room left from a transaction before."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: SimpleNamespace(free=free))
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_SHMSIZE
    with pytest.raises((FaultError, StoreError), match=said), translated(tmp_path / "jobs.sqlite"):
        raise error
    monkeypatch.undo()
    with pytest.raises(StoreError, match="disk I/O error"), translated(tmp_path / "unmounted" / "jobs.sqlite"):
        raise error


def test_the_reader_cannot_write(tmp_path: Path) -> None:
    store = SqliteStore(tmp_path / "jobs.sqlite")
    try:
        with pytest.raises(StoreError, match="readonly"):
            store._read("DELETE FROM jobs")
    finally:
        store.close()


def test_no_statement_scans_the_table(tmp_path: Path) -> None:
    """A queue that scans its table is fast until it is long. Judges the statements that are really run."""
    store = SqliteStore(tmp_path / "jobs.sqlite")
    said: list[str] = []
    asked = Submission(
        kind="llm", model="chat", params=b"", idempotency_key="k", inputs=(StoredInput("a", "b", 1, ""),)
    )
    fault = Fault("engine_crashed", "It crashed.")
    try:
        for connection in (store._writer, store._reader):
            connection.set_trace_callback(said.append)
        store.insert("job_1", asked)
        store.by_key(asked)
        store.get("job_1", "default")
        store.recent("default", 5, "queued")
        store.videos("default", 5)
        store.insert("job_0", msgspec.structs.replace(asked, idempotency_key="", run_after_ms=store.now_ms() + 1000))
        store.shift_clock(2000)
        store.claim([Want("chat", ("llm", "embedding"), 3)])
        store.release("job_1", 1)
        store.accept("job_1", 1, "w1")
        store.mark_streamed("job_1", 1, "w1")
        store.adopt("job_1", 1, "w1")
        store.fail("job_1", 1, "w1", fault)
        store.complete("job_1", 1, "w1", Outcome(b""))
        store.end("job_1", 1, fault)
        store.expire(5)
        store.cancel("job_1", "default", fault)
        with pytest.raises(FaultError, match="only one that failed"):
            store.retry("job_1", None)
        store.insert_lot(LotRecord(id="lot_1", tenant="t", created_ms=0, total=1, refused=0), [])
        store.get_lot("lot_1", "t")
        store.cancel_lot("lot_1", "t", fault)
        store.recent("default", 5, dead=True)
        store.asked_labels()
        store.purge(-1000)
        for call in (store.open_attempts, store.queued, store.waiting):
            call()
        store.has_blob("b")
        store.has_job("job_1")
        for connection in (store._writer, store._reader):
            connection.set_trace_callback(None)
        words = ("SELECT", "INSERT", "UPDATE", "DELETE", "WITH")
        statements = {text for text in said if "jobs" in text and text.split()[0] in words}
        assert len(statements) > 20
        for text in statements:
            plan = [row["detail"] for row in store._reader.execute(f"EXPLAIN QUERY PLAN {text}")]
            assert not {"SCAN jobs", "SCAN jobs USING INDEX jobs_recent"} & set(plan), (text, plan)
            assert not any("TEMP B-TREE FOR ORDER" in step for step in plan), (text, plan)
    finally:
        store.close()


def test_only_a_broken_file_may_be_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "jobs.sqlite"
    path.write_bytes(b"not a database, by no means" * 100)
    with pytest.raises(StoreError, match="Move it away to start empty"):
        SqliteStore(path)
    path.unlink()

    def unreadable(*_: object, **_more: object) -> sqlite3.Connection:
        raise sqlite3.OperationalError("disk I/O error")

    monkeypatch.setattr(sqlite3, "connect", unreadable)
    with pytest.raises(StoreError, match="Look at the disk"):
        SqliteStore(path)
    full = shutil.disk_usage(tmp_path)._replace(free=0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: full)
    with pytest.raises(StoreError, match="The disk is full: make room"):
        SqliteStore(path)
