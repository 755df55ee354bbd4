"""From SQLite to PostgreSQL: whole, counted, resumable, and into an empty target only."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from coordinator.deploy.plan import plan
from coordinator.deploy.spec import Asked, Deployment
from coordinator.records import LotRecord, StoredInput, Submission
from coordinator.store import SqliteStore, StoreBusy, StoreError
from coordinator.store.base import Outcome, Want
from coordinator.store.shelf import BatchItem, BatchRecord, FileRecord
from protocol.faults import Fault
from protocol.link_wire import Capabilities

pytest.importorskip("psycopg", reason="psycopg is not installed (extra: postgres)")

from coordinator.store import moving
from coordinator.store.postgres import PostgresStore

JOBS = 23
SILENT_MS = 600_000  # only the shifted clock makes anybody silent, never a slow machine


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A file with jobs in every state, a kept file, and an open batch."""
    path = tmp_path / "jobs.sqlite"
    store = SqliteStore(path)
    for n in range(JOBS):
        file = StoredInput("audio", f"blob_{n % 3}", 5, "f" * 64)
        asked = Submission(kind="llm", model="chat", params=b"\x80" * n, idempotency_key=f"k{n}", inputs=(file,))
        store.insert(f"job_{n:02}", asked)
    for record, _ in store.claim([Want("chat", ("llm",), 12)]):
        if record.id != "job_11":
            store.accept(record.id, record.attempt, "w1")
    for n in range(4):
        store.complete(f"job_{n:02}", 1, "w1", Outcome(b"\x80", (), {"images": 1.0}))
    store.fail("job_04", 1, "w1", Fault("engine_crashed", "It crashed."))
    store.fail("job_05", 1, "w1", Fault("invalid_parameter", "Wrong."))
    store.cancel("job_06", "default", Fault("cancelled", "Gone."))
    store.insert_lot(LotRecord(id="lot_1", tenant="default", created_ms=0, total=1, refused=1), [])
    kept = FileRecord(id="file-1", tenant="default", name="a", purpose="batch", blob="b", size=1, sha256="0" * 64)
    store.add_file(kept)
    store.add_batch(BatchRecord(id="batch_1", tenant="default", endpoint="/v1/x", input_file="file-1"), 1000)
    store.note_items("batch_1", [BatchItem(0, "job_03"), BatchItem(1, fault=Fault("invalid_request", "No."))])
    store.close()
    return path


def silent(_: str) -> None: ...


def test_everything_is_there_afterwards_and_goes_on(source: Path, space: str) -> None:
    before = SqliteStore(source)
    assert before.fold_usage() > 0
    before.cancel("job_13", "default", Fault("cancelled", "Gone."))  # counted, and not yet added up
    rows = [before.get(f"job_{n:02}") for n in range(JOBS)]
    used = before.usage(0, 10**6, ("tenant", "worker", "model"))
    before.close()
    counts = moving.move(source, space, silent)
    assert counts.pop("usage_days") > 0
    expected = {
        "jobs": JOBS,
        "input_blobs": JOBS,
        "attempts": 2,
        "lots": 1,
        "turns": 0,
        "files": 1,
        "batches": 1,
        "batch_items": 2,
        "usage_fresh": 1,
        "deployments": 0,
        "placements": 0,
    }
    assert counts == expected
    store = PostgresStore(space, silent_ms=SILENT_MS)
    try:
        assert [store.get(f"job_{n:02}") for n in range(JOBS)] == rows
        assert store.usage(0, 10**6, ("tenant", "worker", "model")) == used
        assert store.get_file("file-1", "default") is not None
        assert [(one.n, one.outcome) for one in store.attempts_of(rows[4])] == [(1, "failed")]
        assert store.get_lot("lot_1", "default") is not None
        assert store.batch_counts("batch_1") == {"succeeded": 1, "refused": 1}
        # What was held is held by whoever has been there for a while, and the attempt is still the fence.
        store.shift_clock(SILENT_MS)
        store._appear()
        assert store.beat().taken == 5
        assert store.complete("job_07", 1, "w2", Outcome(b"")).verdict == "fenced"
        assert store.complete("job_07", 1, "w1", Outcome(b"\x80")).verdict == "stored"
        # New rows stand behind the old ones, under new numbers.
        asked = Submission(kind="llm", model="chat", params=b"\x80")
        assert store.insert("job_new", asked)[1]
        assert store.claim([Want("chat", ("llm",), 100)])[-1][0].id == "job_new"
        file = StoredInput("audio", "blob_1", 5, "f" * 64)
        again = Submission(kind="llm", model="chat", params=b"\x80", idempotency_key="k1", inputs=(file,))
        assert store.insert("job_other", again) == (rows[1], False)
    finally:
        store.close()


def asked(name: str, _known: Deployment | None) -> Asked:
    return Asked(name=name, source="https://models.test/a.gguf", sha256="a" * 64)


def test_what_is_deployed_goes_along(tmp_path: Path, space: str) -> None:
    path = tmp_path / "jobs.sqlite"
    source = SqliteStore(path)
    for name in ("kept", "gone"):
        source.deploy(name, partial(asked, name))
    source.seen("box", Capabilities(deploys=True), draining=False)
    source.replan(plan)
    source.undeploy("gone")
    source.replan(plan)
    deployments, placements = source.deployments(), source.placements()
    assert {one.state for one in placements} == {"wanted", "leaving"}
    source.close()
    counts = moving.move(path, space, silent)
    assert (counts["deployments"], counts["placements"]) == (2, 2)
    store = PostgresStore(space)
    try:
        assert store.deployments() == deployments
        store.seen("box", Capabilities(deploys=True), draining=False)
        assert store.placements() == placements
    finally:
        store.close()


def test_an_interrupted_copy_goes_on_and_nobody_serves_before(
    source: Path, space: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(moving, "PIECE", 5)

    class Interrupted(Exception):
        """As a kill: nothing is cleaned up."""

    def interrupt(text: str) -> None:
        if text.startswith("15 of"):
            raise Interrupted

    with pytest.raises(Interrupted):
        moving.move(source, space, interrupt)
    with pytest.raises(StoreError, match="not finished"):
        PostgresStore(space)
    said: list[str] = []
    assert moving.move(source, space, said.append)["jobs"] == JOBS
    assert said == [
        "An earlier copy got as far as 15 of 23 jobs; it goes on there.",
        "20 of 23 jobs",
        "23 of 23 jobs",
    ]
    PostgresStore(space).close()


def test_a_source_that_changed_meanwhile_is_found_out(source: Path, space: str) -> None:
    class Interrupted(Exception):
        pass

    def interrupt(_: str) -> None:
        raise Interrupted

    with pytest.raises(Interrupted):
        moving.move(source, space, interrupt)
    store = SqliteStore(source)
    store.cancel("job_20", "default", Fault("cancelled", "Gone."))
    store.close()
    with pytest.raises(StoreError, match="source changed"):
        moving.move(source, space, silent)
    with pytest.raises(StoreError, match="not finished"):
        PostgresStore(space)


def test_what_is_in_the_way_is_said(source: Path, space: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no such file"):
        moving.move(tmp_path / "nothing.sqlite", space, silent)
    serving = SqliteStore(source)
    with pytest.raises(StoreBusy):
        moving.move(source, space, silent)
    serving.close()
    target = PostgresStore(space)
    with pytest.raises(StoreError, match="serves from the target"):
        moving.move(source, space, silent)
    target.insert("job_1", Submission(kind="llm", model="chat", params=b""))
    target.close()
    with pytest.raises(StoreError, match="not empty: it has jobs"):
        moving.move(source, space, silent)
