"""What a dashboard asks of a store: every implementation passes these."""

from __future__ import annotations

import itertools
from typing import Any

from coordinator.records import JobRecord, Submission
from coordinator.store import Store
from coordinator.store.base import Want
from coordinator.store.sql_watch import MOST_SESSIONS
from coordinator.store.watch import JobFilter, QueueLoad
from protocol.faults import Fault

_ids = itertools.count()
HOUR_MS = 3_600_000


def job(store: Store, **options: Any) -> JobRecord:
    wanted = Submission(**{"kind": "llm", "model": "chat", "params": b"\x81\xa6prompt\xa6secret", **options})
    return store.insert(f"job_{next(_ids):06}", wanted)[0]


def ids(jobs: list[JobRecord]) -> list[str]:
    return [each.id for each in jobs]


def test_jobs_of_all_tenants_are_paged_newest_first_without_what_was_asked(store: Store) -> None:
    made = [job(store, tenant=f"t{n % 2}") for n in range(5)]
    newest = made[::-1]
    first = store.jobs_of_all(JobFilter(), 2)
    assert ids(first) == ids(newest[:2])
    assert {each.params for each in first} == {b""}
    assert ids(store.jobs_of_all(JobFilter(), 10, first[-1].id)) == ids(newest[2:])
    assert store.jobs_of_all(JobFilter(), 10, made[0].id) == []
    assert store.jobs_of_all(JobFilter(), 10, "job_that_is_gone") == []


def test_jobs_are_filtered(store: Store) -> None:
    other = job(store, model="draw", kind="image", tenant="art")
    chat = job(store)
    late = job(store)
    ((taken, _),) = store.claim([Want("chat", ("llm",), 1)])
    assert taken.id == chat.id
    assert ids(store.jobs_of_all(JobFilter(state="queued"), 9)) == [late.id, chat.id, other.id]
    assert store.accept(chat.id, taken.attempt, "w1")
    assert ids(store.jobs_of_all(JobFilter(state="running"), 9)) == [chat.id]
    assert ids(store.jobs_of_all(JobFilter(worker="w1"), 9)) == [chat.id]
    assert ids(store.jobs_of_all(JobFilter(model="draw"), 9)) == [other.id]
    assert ids(store.jobs_of_all(JobFilter(tenant="art", model="chat"), 9)) == []
    store.cancel(late.id, "default", Fault("cancelled", "Enough."))
    assert ids(store.jobs_of_all(JobFilter(state="cancelled", tenant="default"), 9)) == [late.id]


def test_what_waits_and_runs_is_counted_by_kind_and_model(store: Store) -> None:
    assert store.load() == []
    first = job(store)
    store.shift_clock(1000)
    for _ in range(2):
        job(store)
    job(store, model="draw", kind="image")
    assert store.load() == [
        QueueLoad(kind="image", model="draw", waiting=1, oldest_ms=store.load()[0].oldest_ms),
        QueueLoad(kind="llm", model="chat", waiting=3, oldest_ms=first.created_ms),
    ]
    store.claim([Want("chat", ("llm",), 1), Want("draw", ("image",), 1)])
    draw, chat = store.load()
    assert (draw.waiting, draw.running, draw.oldest_ms) == (0, 1, 0)
    assert (chat.waiting, chat.running) == (2, 1)
    assert chat.oldest_ms >= first.created_ms + 1000


def test_a_session_names_its_key_until_its_time_has_passed(store: Store) -> None:
    store.add_session(b"one", b"key", HOUR_MS)
    store.add_session(b"two", b"key", 2 * HOUR_MS)
    assert store.session(b"one") == b"key"
    assert store.session(b"three") is None
    store.shift_clock(HOUR_MS)
    assert store.session(b"one") is None
    assert store.session(b"two") == b"key"
    store.end_session(b"two")
    store.end_session(b"two")
    assert store.session(b"two") is None


def test_a_key_has_so_many_sessions_and_the_oldest_make_room(store: Store) -> None:
    store.add_session(b"another's", b"another", HOUR_MS)
    for n in range(MOST_SESSIONS + 2):
        store.add_session(b"%d" % n, b"key", HOUR_MS + n)
    alive = [n for n in range(MOST_SESSIONS + 2) if store.session(b"%d" % n)]
    assert alive == list(range(2, MOST_SESSIONS + 2))
    assert store.session(b"another's") == b"another"
