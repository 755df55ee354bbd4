"""The contract of a store that forgets: content goes, rows stay; on every store."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from coordinator.records import StoredFile, StoredInput, Submission
from coordinator.store import SqliteStore, Store
from coordinator.store.base import Outcome, Want
from coordinator.store.forgetting import WORDS, bare
from coordinator.store.shelf import BatchItem, BatchRecord, FileRecord
from protocol.faults import Fault, FaultError

CANARY = "canary-of-this-test"
ANY = Want("chat", ("llm",), 100)
FILE = StoredFile(CANARY, "job/1/x", "text/plain", 1, "0" * 64)
FAULT = Fault("engine_failed", f"It said {CANARY}", f"messages.{0}", detail={"stderr_tail": [CANARY]})


def asked(**more: Any) -> Submission:
    values = {"kind": "llm", "model": "chat", "tenant": "a", "params": msgspec.msgpack.encode(CANARY), **more}
    return Submission(**values)


def run(store: Store, job: str, fault: Fault | None = None, **more: Any) -> None:
    store.insert(job, asked(**more))
    for row, _ in store.claim([ANY]):
        assert store.accept(row.id, row.attempt, "w")
        if fault is not None:
            store.fail(row.id, row.attempt, "w", fault)
        else:
            result = msgspec.msgpack.encode(CANARY)
            store.complete(row.id, row.attempt, "w", Outcome(result, (FILE,), {"prompt_tokens": 3.0}))


def test_a_forgotten_job_keeps_its_row_and_nothing_of_its_content(store: Store) -> None:
    mine, shared = (StoredInput(CANARY, f"blob_{n}", 1, "0" * 64, "text/plain") for n in "12")
    store.insert("job_other", asked(inputs=(shared,), tenant="b", model="else"))
    run(store, "job_1", inputs=(mine, shared), idempotency_key="k")
    before = store.get("job_1")
    assert before is not None
    assert store.forgettable(["job_1", "job_other", "job_none"]) == ["job_1"]
    [left] = store.forget(["job_1", "job_other", "job_none"])
    assert (left.job, left.blobs) == ("job_1", ("blob_1",)), "the other belongs to a job that waits"
    assert store.forget(["job_1"]) == []
    after = store.get("job_1")
    assert after is not None
    assert after == msgspec.structs.replace(before, params=b"\x80", inputs=(), result=None, files=())
    assert CANARY not in repr(after)
    assert not store.has_blob("blob_1")
    assert not store.has_job("job_1")
    assert store.has_job("job_other")


def test_a_retry_with_the_key_of_a_forgotten_job_is_told_so(store: Store) -> None:
    run(store, "job_1", idempotency_key="k")
    assert store.insert("job_2", asked(idempotency_key="k"))[0].id == "job_1"
    store.forget(["job_1"])
    for again in (asked(idempotency_key="k"), asked(idempotency_key="k", params=b"\x81")):
        for call in (lambda: store.by_key(again), lambda: store.insert("job_2", again)):  # noqa: B023
            with pytest.raises(FaultError, match="job_1 is succeeded, and its content was deleted") as caught:
                call()
            assert caught.value.fault.code == "conflict"


def test_faults_lose_their_words_in_the_job_and_in_its_attempts(store: Store) -> None:
    store.insert("job_1", asked())
    for _ in range(3):
        store.shift_clock(60_000)
        [(row, _)] = store.claim([ANY])
        assert store.accept("job_1", row.attempt, "w")
        store.fail("job_1", row.attempt, "w", Fault("engine_crashed", CANARY, detail={"stderr_tail": [CANARY]}))
    store.forget(["job_1"])
    row = store.get("job_1")
    assert row is not None
    assert row.fault is not None
    assert (row.fault.code, row.fault.message, row.fault.detail) == ("engine_crashed", WORDS, {})
    assert CANARY not in repr(store.attempts_of(row))
    with pytest.raises(FaultError, match="nothing to try again"):
        store.retry("job_1", "a")
    assert bare(row.fault) == row.fault


def test_only_what_has_ended_and_no_open_batch_needs_is_forgotten(store: Store) -> None:
    file = store.add_file(
        FileRecord(id="file-1", tenant="a", name="in", purpose="batch", blob="blob_1", size=1, sha256="0" * 64)
    )
    made = BatchRecord(id="batch_1", tenant="a", endpoint="/v1/embeddings", input_file=file.id)
    batch = store.add_batch(made, 1000)
    run(store, "job_1", idempotency_key="batch_1/0")
    run(store, "job_2", FAULT, idempotency_key="batch_10/0")
    store.insert("job_3", asked(idempotency_key="batch_1/1"))
    store.note_items("batch_1", [BatchItem(0, "job_1")])
    assert store.forget(["job_1", "job_3"]) == []
    saved = store.save_batch(msgspec.structs.replace(batch, state="failed", errors=((1, FAULT),)))
    assert saved is not None
    assert sorted(store.batch_jobs("batch_1", "a")) == ["job_1", "job_3"]
    assert store.batch_jobs("batch_1", "b") == []
    assert [left.job for left in store.forget(["job_1", "job_3"])] == ["job_1"], "one still waits"
    assert store.batch_jobs("batch_1", "a") == ["job_3"]
    assert store.forget_batch("batch_1")
    assert not store.forget_batch("batch_1")
    told = store.get_batch("batch_1", "a")
    assert told is not None
    assert told.errors == ((1, bare(FAULT)),)


def test_what_ended_long_ago_is_found_by_tenant(store: Store) -> None:
    run(store, "job_1")
    run(store, "job_2", tenant="b")
    run(store, "job_3", FAULT)
    now = store.now_ms()
    assert sorted(store.unforgotten(["a"], 0, now + 1)) == ["job_1", "job_3"]
    assert len(store.unforgotten(["a", "b"], 0, now + 1, 2)) == 2
    assert store.unforgotten(["a"], 0, now - 60_000) == []
    assert store.unforgotten(["a"], now + 1, now + 2) == []
    assert store.unforgotten([], 0, now + 1) == []
    store.forget(["job_1"])
    assert store.unforgotten(["a"], 0, now + 1) == ["job_3"]
    assert store.settle()


def test_what_was_cancelled_under_a_connection_is_left_behind(store: Store) -> None:
    gone = Fault("cancelled", CANARY)
    for n, attended in enumerate((True, False)):
        store.insert(f"job_{n}", asked(attended=attended))
        assert f"job_{n}" not in store.left_behind(["a"], 0), "it may still be answered"
        assert store.cancel(f"job_{n}", "a", gone)
    run(store, "job_3", attended=True)
    assert store.left_behind(["a", "b"], 0) == ["job_0"], "the others have something to deliver, or somebody may come"
    assert store.left_behind(["b"], 0) == []
    assert store.left_behind([], 0) == []
    assert store.left_behind(["a"], store.now_ms() + 1) == []
    store.forget(["job_0"])
    assert store.left_behind(["a"], 0) == []


def test_nothing_of_it_is_left_in_the_files_of_sqlite(tmp_path: Path) -> None:
    """Small content, which lies within pages that others share, and large, which has pages of its own."""
    store = SqliteStore(tmp_path / "jobs.sqlite")
    try:
        for n in range(60):
            text = f"{CANARY}-{n} " * (1 + n * n)
            store.insert(f"job_{n}", asked(params=msgspec.msgpack.encode(text), idempotency_key=f"k{n}"))
        for row, _ in store.claim([ANY]):
            store.accept(row.id, row.attempt, "w")
            store.complete(row.id, row.attempt, "w", Outcome(row.params, (FILE,)))
        jobs = [f"job_{n}" for n in range(60)]
        assert len(store.forget(jobs)) == 60
        assert store.settle()
        assert [file.name for file in tmp_path.iterdir() if CANARY.encode() in file.read_bytes()] == []
    finally:
        store.close()
