"""Which attempt at a job is open, and what outputs the job has: on every store."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from coordinator.records import StoredFile
from coordinator.store import Store
from coordinator.store.base import Done, Held, JobFiles, Outcome, Want
from coordinator.testing_link import submission
from protocol.faults import Fault


def claimed(store: Store) -> int:
    [(record, _left)] = store.claim([Want("chat", ("llm",), 1)])
    return record.attempt


def test_an_attempt_is_open_from_its_offer_until_no_worker_can_come_back_with_it(make: Callable[[], Store]) -> None:
    store = make()
    assert store.job_files("job_1") == JobFiles(0, frozenset())
    store.insert("job_1", submission())
    assert store.job_files("job_1") == JobFiles()
    first = claimed(store)
    assert store.job_files("job_1").attempt == first
    store.release("job_1", first)
    assert store.job_files("job_1") == JobFiles()
    second = claimed(store)
    store.accept_many([Held("job_1", second, "w")])
    assert store.job_files("job_1").attempt == second
    store.fail("job_1", second, "w", Fault("worker_lost", "It is gone."))
    assert store.job_files("job_1").attempt == second, "its worker may come back with it"
    assert store.adopt("job_1", second, "w").verdict == "adopted"
    store.fail("job_1", second, "w", Fault("worker_lost", "It is gone."))
    store.shift_clock(60_000)
    third = claimed(store)
    assert store.job_files("job_1").attempt == third
    store.release("job_1", third)
    assert store.job_files("job_1") == JobFiles()
    fourth = claimed(store)
    store.accept_many([Held("job_1", fourth, "w")])
    store.end("job_1", fourth, Fault("worker_lost", "It is gone."))
    assert store.job_files("job_1") == JobFiles()


def test_a_job_that_succeeded_has_its_outputs(make: Callable[[], Store]) -> None:
    store = make()
    store.insert("job_1", submission())
    attempt = claimed(store)
    store.accept_many([Held("job_1", attempt, "w")])
    file = StoredFile("a", f"job_1/{attempt}/key", "text/plain", 1, "0" * 64)
    result = msgspec.msgpack.encode({"content": "done"})
    store.complete_many([Done("job_1", attempt, "w", Outcome(result, (file,), {}))])
    assert store.job_files("job_1") == JobFiles(0, frozenset({file.blob}))
