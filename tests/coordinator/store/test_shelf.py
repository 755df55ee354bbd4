"""The contract of files and batches in a store: every implementation passes these."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import msgspec
import pytest

from coordinator.records import JobRecord, Submission
from coordinator.store import Store
from coordinator.store.base import Outcome, Want
from coordinator.store.shelf import BatchItem, BatchRecord, FileRecord
from protocol.faults import Fault, FaultError

DAY_MS = 86_400_000
ANY = Want("chat", ("llm",), 100)
WRONG = Fault("invalid_parameter", "n: Expected 1.", "n")
_ids = itertools.count()


def file(store: Store, tenant: str = "a", keep_ms: int = 0, **more: Any) -> FileRecord:
    number = next(_ids)
    values = {"purpose": "batch", "name": "in.jsonl", "blob": f"blob_{number}", "size": 7, "sha256": "0" * 64, **more}
    return store.add_file(FileRecord(id=f"file-{number:06}", tenant=tenant, **values), keep_ms)


def batch(store: Store, read: FileRecord, **more: Any) -> BatchRecord:
    made = BatchRecord(
        id=f"batch_{next(_ids):06}", tenant=read.tenant, endpoint="/v1/embeddings", input_file=read.id, **more
    )
    return store.add_batch(made, DAY_MS)


def job(store: Store, **options: Any) -> JobRecord:
    wanted = Submission(**{"kind": "llm", "model": "chat", "params": b"\x80", **options})
    return store.insert(f"job_{next(_ids):06}", wanted)[0]


def finish(store: Store) -> None:
    """Run all jobs that wait."""
    for record, _ in store.claim([ANY]):
        assert store.accept(record.id, record.attempt, "w")
        store.complete(record.id, record.attempt, "w", Outcome(b"\x80"))


def moved(store: Store, record: BatchRecord, state: Any, **more: Any) -> BatchRecord:
    saved = store.save_batch(msgspec.structs.replace(record, state=state, **more))
    assert saved is not None
    return saved


# ---- files


def test_a_file_is_its_tenants_alone(store: Store) -> None:
    kept = file(store)
    assert kept.created_ms > 0
    assert store.get_file(kept.id, "a") == kept
    assert store.get_file(kept.id, "b") is None
    assert store.list_files("b", 10) == []
    assert store.remove_file(kept.id, "b") is None
    assert store.has_blob(kept.blob)
    assert store.remove_file(kept.id, "a") == kept
    assert store.get_file(kept.id, "a") is None
    assert not store.has_blob(kept.blob)


def test_files_are_listed_in_pages(store: Store) -> None:
    files = [file(store, purpose=purpose) for purpose in ("batch", "user_data", "batch", "batch")]
    file(store, tenant="b")
    newest = files[::-1]
    assert store.list_files("a", 10) == newest
    assert store.list_files("a", 2) == newest[:2]
    assert store.list_files("a", 2, after=newest[1].id) == newest[2:]
    assert store.list_files("a", 10, oldest_first=True) == files
    assert store.list_files("a", 10, after=files[0].id, oldest_first=True) == files[1:]
    assert store.list_files("a", 10, purpose="user_data") == [files[1]]
    assert store.stored_bytes("a") == 28
    assert store.stored_bytes("nobody") == 0


def test_a_file_whose_time_has_passed_is_gone(store: Store) -> None:
    short, long = file(store, keep_ms=600_000), file(store)
    assert short.expires_ms == short.created_ms + 600_000
    store.shift_clock(600_000)
    assert store.get_file(short.id, "a") is None
    assert store.list_files("a", 10) == [long]
    assert store.has_blob(short.blob), "until it is purged, its bytes are its own"
    assert store.purge_files() == [short]
    assert store.purge_files() == []
    assert store.get_file(long.id, "a") == long


def test_what_an_open_batch_reads_stays(store: Store) -> None:
    read = file(store, keep_ms=600_000)
    made = batch(store, read)
    store.shift_clock(600_000)
    assert store.purge_files() == []
    with pytest.raises(FaultError, match=made.id) as refused:
        store.remove_file(read.id, "a")
    assert refused.value.fault.code == "conflict"
    moved(store, made, "failed")
    assert store.purge_files() == [read]


# ---- batches


def test_a_batch_needs_a_file_of_its_tenant(store: Store) -> None:
    theirs, late = file(store, tenant="b"), file(store, keep_ms=10)
    store.shift_clock(20)
    for read in (theirs, late):
        with pytest.raises(FaultError) as refused:
            batch(store, msgspec.structs.replace(read, tenant="a"))
        assert (refused.value.fault.code, refused.value.fault.field) == ("not_found", "input_file_id")
    assert store.list_batches("a", 10) == []


def test_a_batch_survives_a_restart_as_it_was(make: Callable[[], Store]) -> None:
    store = make()
    made = batch(store, file(store), metadata={"k": "v"}, keep_s=5)
    made = moved(store, made, "in_progress", total=3, errors=((2, WRONG),), usage={"prompt_tokens": 2.0})
    store.close()
    store = make()
    assert store.get_batch(made.id, "a") == made
    assert store.get_batch(made.id, "b") is None
    assert store.open_batches() == [made]
    assert made.expires_ms == made.created_ms + DAY_MS


def test_batches_are_listed_in_pages(store: Store) -> None:
    made = [batch(store, file(store)) for _ in range(3)][::-1]
    batch(store, file(store, tenant="b"))
    assert store.list_batches("a", 2) == made[:2]
    assert store.list_batches("a", 2, after=made[1].id) == made[2:]


def test_every_state_notes_when_it_was_entered(store: Store) -> None:
    made = batch(store, file(store))
    store.shift_clock(10)
    made = moved(store, made, "in_progress")
    store.shift_clock(10)
    made = moved(store, made, "in_progress", completed=1)
    made = moved(store, made, "completed")
    times = made.moved
    assert times["validating"] == made.created_ms
    assert times["validating"] + 10 <= times["in_progress"] <= times["completed"] - 10
    assert store.open_batches() == []


def test_only_who_saw_the_latest_version_changes_a_batch(store: Store) -> None:
    made = batch(store, file(store))
    won: list[BatchRecord] = []

    def change() -> None:
        if saved := store.save_batch(msgspec.structs.replace(made, state="in_progress")):
            won.append(saved)

    threads = [threading.Thread(target=change) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1
    ended = moved(store, won[0], "cancelled")
    assert store.save_batch(ended) is None, "what has ended stays as it is"


def test_lines_know_their_jobs(store: Store) -> None:
    made = batch(store, file(store))
    jobs = [job(store) for _ in range(3)]
    items = [BatchItem(n, record.id) for n, record in zip((0, 2, 3), jobs, strict=True)]
    store.note_items(made.id, [*items, BatchItem(1, fault=WRONG)])
    store.note_items(made.id, [BatchItem(1, "job_other"), BatchItem(0, "job_other")])
    store.note_items("batch_unknown", [BatchItem(0, jobs[0].id)])
    assert store.batch_counts(made.id) == {"queued": 3, "refused": 1}
    store.claim([Want("chat", ("llm",), 1)])
    assert store.batch_counts(made.id) == {"queued": 3, "refused": 1}, "an offer is not seen outside"
    store.release(jobs[0].id, 1)
    finish(store)
    assert store.batch_counts(made.id) == {"succeeded": 3, "refused": 1}
    found = store.batch_items(made.id, 0, 10)
    assert [item for item, _ in found] == [items[0], BatchItem(1, fault=WRONG), *items[1:]]
    assert [record and record.state for _, record in found] == ["succeeded", None, "succeeded", "succeeded"]
    assert found[0][1] is not None
    assert found[0][1].result == b"\x80"
    assert [item.n for item, _ in store.batch_items(made.id, 1, 2)] == [1, 2]


def test_jobs_of_an_open_batch_are_kept(store: Store) -> None:
    made = batch(store, file(store))
    mine, other = job(store), job(store)
    store.note_items(made.id, [BatchItem(0, mine.id)])
    finish(store)
    store.shift_clock(600_000)
    assert [purged.job for purged in store.purge(300_000)] == [other.id]
    moved(store, made, "completed")
    assert store.batch_items(made.id, 0, 10) == []
    assert [purged.job for purged in store.purge(300_000)] == [mine.id]


def test_old_batches_are_forgotten(store: Store) -> None:
    ended, open_ = batch(store, file(store)), batch(store, file(store))
    moved(store, ended, "completed")
    store.shift_clock(600_000)
    assert store.purge_batches(1_200_000) == 0
    assert store.purge_batches(300_000) == 1
    assert store.list_batches("a", 10) == [open_]
