"""Usage is counted once per ended job, whatever ends it, and outlives the job: on every store."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from coordinator.records import JobRecord, Submission
from coordinator.store import Store
from coordinator.store.base import Done, Outcome, Want
from coordinator.store.sql_usage import FOLD
from coordinator.usage.report import AMOUNTS, DAY_MS, GROUPS, OUTCOMES
from protocol.faults import Fault

WAIT_S = 60.0
STEP_MS = 150_000  # a quarter of the silence that makes a store of these tests one that is gone
CRASH = Fault("engine_crashed", "The engine crashed.", retryable=True)
WRONG = Fault("invalid_parameter", "The grammar is wrong.")
CANCEL = Fault("cancelled", "The client left.")
EVERYTHING = tuple(GROUPS)
MEASURED = {"tokens_in": "prompt_tokens", "tokens_out": "completion_tokens", "images": "images", "frames": "frames"}


def submit(store: Store, name: str, **options: Any) -> None:
    store.insert(name, Submission(**{"kind": "llm", "model": "chat", "params": b"\x80", "key_id": "k", **options}))


def start(store: Store, worker: str = "w", model: str = "chat") -> JobRecord:
    ((claimed, _),) = store.claim([Want(model, ("llm", "image"), 1)])
    assert store.accept(claimed.id, claimed.attempt, worker)
    return claimed


def total(store: Store, tenant: str | None = None) -> dict[str, int]:
    today = store.now_ms() // DAY_MS
    rows = store.usage(today - 10, today, (), tenant)
    return rows[0] if rows else dict.fromkeys(AMOUNTS, 0)


def counts(store: Store) -> tuple[int, ...]:
    found = total(store)
    return tuple(found[name] for name in OUTCOMES)


def test_a_job_that_succeeds_is_counted_with_what_it_used(store: Store) -> None:
    today = store.now_ms() // DAY_MS
    submit(store, "a", tenant="t")
    one = start(store, "box")
    usage = {"prompt_tokens": 3.0, "completion_tokens": 4.0, "audio_seconds": 1.2345, "compute_ms": 70.0, "mine": 9.0}
    store.shift_clock(250)
    assert store.complete("a", one.attempt, "box", Outcome(b"\x80", (), usage)).verdict == "stored"
    (row,) = store.usage(0, 10**6, EVERYTHING)
    assert (row["tenant"], row["key_id"], row["worker"], row["kind"], row["model"]) == ("t", "k", "box", "llm", "chat")
    assert today <= row["day"] <= store.now_ms() // DAY_MS
    assert (row["succeeded"], row["failed"], row["cancelled"]) == (1, 0, 0)
    assert (row["tokens_in"], row["tokens_out"], row["audio_ms"], row["gpu_ms"]) == (3, 4, 1234, 70)
    assert 250 <= row["busy_ms"] < 60_000


def test_without_compute_time_the_time_in_the_slot_counts(store: Store) -> None:
    submit(store, "a")
    one = start(store)
    store.shift_clock(500)
    store.complete("a", one.attempt, "w", Outcome(b"\x80"))
    assert total(store)["gpu_ms"] == total(store)["busy_ms"] >= 500


def test_said_again_it_is_counted_once(store: Store) -> None:
    submit(store, "a")
    one = start(store)
    outcome = Outcome(b"\x80", (), {"images": 2.0})
    twice = [Done("a", one.attempt, "w", outcome), Done("a", one.attempt, "w", outcome)]
    assert [ending.verdict for ending in store.complete_many(twice)] == ["stored", "again"]
    assert store.complete("a", one.attempt, "w", outcome).verdict == "again"
    assert store.fail("a", one.attempt, "w", WRONG).verdict == "fenced"
    assert (total(store)["succeeded"], total(store)["images"]) == (1, 2)


def test_every_other_end_is_counted(store: Store) -> None:
    for name in ("wrong", "unserved", "left", "late"):
        submit(store, name, deadline_ms=1000 if name == "late" else 0)
    wrong, unserved = start(store), start(store)
    store.fail("wrong", wrong.attempt, "w", WRONG)
    store.end("unserved", unserved.attempt, WRONG)
    assert store.cancel("left", "default", CANCEL) is not None
    store.cancel("left", "default", CANCEL)
    store.shift_clock(2000)
    assert [record.id for record in store.expire(0)] == ["late"]
    assert counts(store) == (0, 3, 1)


def test_a_failed_attempt_that_is_tried_again_is_no_end(store: Store) -> None:
    submit(store, "a")
    one = start(store)
    store.shift_clock(600_000)
    assert store.fail("a", one.attempt, "w", CRASH).requeued
    assert store.fail("a", one.attempt, "w", CRASH).verdict == "fenced"
    assert counts(store) == (0, 0, 0)
    used = total(store)["busy_ms"]
    assert 600_000 <= used == total(store)["gpu_ms"]
    store.shift_clock(3_600_000)
    store.cancel("a", "default", CANCEL)  # it waited for an hour, and held no slot
    assert counts(store) == (0, 0, 1)
    assert total(store)["busy_ms"] == used


def test_each_attempt_counts_for_the_worker_that_had_it(store: Store) -> None:
    submit(store, "a")
    one = start(store, "w1")
    store.shift_clock(600_000)
    assert store.fail("a", one.attempt, "w1", CRASH).requeued
    store.shift_clock(5000)
    two = start(store, "w2")
    store.shift_clock(1000)
    store.complete("a", two.attempt, "w2", Outcome(b"\x80", (), {"compute_ms": 70.0}))
    today = store.now_ms() // DAY_MS
    first, second = store.usage(today - 1, today, ("worker",))
    assert (first["worker"], first["succeeded"], first["failed"]) == ("w1", 0, 0)
    assert first["busy_ms"] == first["gpu_ms"] >= 600_000
    assert (second["worker"], second["succeeded"], second["gpu_ms"]) == ("w2", 1, 70)
    assert 1000 <= second["busy_ms"] < 600_000


def test_an_attempt_that_goes_on_after_all_counts_once_from_its_beginning(store: Store) -> None:
    submit(store, "a")
    one = start(store)
    begun = store.get("a")
    store.shift_clock(600_000)
    assert store.fail("a", one.attempt, "w", CRASH).requeued
    adopted = store.adopt("a", one.attempt, "w")
    assert (adopted.verdict, adopted.record) == ("adopted", store.get("a"))
    assert adopted.record is not None
    assert begun is not None
    assert adopted.record.started_ms == begun.started_ms
    assert (total(store)["busy_ms"], total(store)["gpu_ms"]) == (0, 0)
    store.shift_clock(1000)
    store.complete("a", one.attempt, "w", Outcome(b"\x80", (), {"compute_ms": 601_000.0}))
    found = total(store)
    assert counts(store) == (1, 0, 0)
    assert found["gpu_ms"] == 601_000
    assert 601_000 <= found["busy_ms"] < 1_200_000


def test_a_failed_job_that_is_tried_again_is_one_job(store: Store) -> None:
    submit(store, "a")
    one = start(store)
    store.shift_clock(300)
    store.fail("a", one.attempt, "w", WRONG)
    store.fold_usage()
    store.shift_clock(2 * DAY_MS)
    assert store.retry("a", "default") is not None
    assert counts(store) == (0, 0, 0)
    assert total(store)["busy_ms"] >= 300  # that time was used
    two = start(store)
    store.complete("a", two.attempt, "w", Outcome(b"\x80"))
    assert counts(store) == (1, 0, 0)


def test_what_a_cancelled_job_used_is_counted_late_and_once(store: Store) -> None:
    submit(store, "a")
    one = start(store)
    store.shift_clock(400)
    store.cancel("a", "default", CANCEL)
    outcome = Outcome(b"\x80", (), {"completion_tokens": 5.0, "compute_ms": 90.0})
    verdicts = [store.complete("a", one.attempt, "w", outcome).verdict for _ in range(3)]
    assert verdicts == ["late", "again", "again"]
    found = total(store)
    assert counts(store) == (0, 0, 1)
    assert (found["tokens_out"], found["gpu_ms"]) == (5, 90)
    assert found["busy_ms"] >= 400


def test_unattended_jobs_are_counted(make: Callable[[], Store]) -> None:
    first = make()
    submit(first, "a", attended=True)
    submit(first, "b")
    first.close()
    second = make()
    found = second.leave_unattended(CANCEL)
    end = time.monotonic() + WAIT_S
    while not found and time.monotonic() < end:  # over PostgreSQL, the first one is gone when it was silent for a while
        second.shift_clock(STEP_MS)
        found = list(second.beat().left)
    assert [record.id for record in found] == ["a"]
    assert counts(second) == (0, 0, 1)


def test_nonsense_of_a_worker_does_not_break_a_sum(store: Store) -> None:
    for name in ("a", "b"):
        submit(store, name)
        one = start(store)
        usage = {"prompt_tokens": 1e308, "images": -5.0, "audio_seconds": float("inf"), "frames": float("nan")}
        store.complete(name, one.attempt, "w", Outcome(b"\x80", (), usage))
    found = total(store)
    assert (found["tokens_in"], found["images"], found["audio_ms"], found["frames"]) == (2 * 10**12, 0, 0, 0)


def test_sums_outlive_the_jobs_and_do_not_change_when_they_are_added_up(store: Store) -> None:
    for n in range(6):
        submit(store, f"j{n}", tenant=f"t{n % 2}")
        one = start(store, f"w{n % 3}")
        store.complete(one.id, one.attempt, f"w{n % 3}", Outcome(b"\x80", (), {"images": float(n)}))
    before = store.usage(0, 10**6, EVERYTHING)
    assert store.fold_usage() == 6
    assert store.fold_usage() == 0
    assert store.usage(0, 10**6, EVERYTHING) == before
    submit(store, "more", tenant="t0")
    one = start(store, "w0")
    store.complete("more", one.attempt, "w0", Outcome(b"\x80", (), {"images": 100.0}))
    store.shift_clock(DAY_MS)
    assert len(store.purge(1000)) == 7
    assert store.fold_usage() == 1
    after = store.usage(0, 10**6, ("tenant", "worker"))
    found = {(row["tenant"], row["worker"]): row["images"] for row in after}
    assert found == {
        ("t0", "w0"): 100,
        ("t0", "w1"): 4,
        ("t0", "w2"): 2,
        ("t1", "w0"): 3,
        ("t1", "w1"): 1,
        ("t1", "w2"): 5,
    }


def test_only_these_days_and_only_this_tenant(store: Store) -> None:
    today = store.now_ms() // DAY_MS
    for n in range(3):
        submit(store, f"j{n}", tenant=f"t{n}")
        store.cancel(f"j{n}", f"t{n}", CANCEL)
        store.shift_clock(DAY_MS)
    days = [row["day"] for row in store.usage(0, 10**6, ("day",))]
    assert len(days) == 3
    assert days == sorted(days)
    assert days[0] in (today, today + 1)  # midnight may have passed
    assert [row["tenant"] for row in store.usage(days[1], days[2], ("tenant",))] == ["t1", "t2"]
    assert store.usage(0, 10**6, (), "t1")[0]["cancelled"] == 1
    assert store.usage(0, 10**6, (), "nobody") == []


def test_a_move_is_bounded(store: Store) -> None:
    assert FOLD >= 1000
    for n in range(4):
        submit(store, f"j{n}")
        store.cancel(f"j{n}", "default", CANCEL)
    assert store.fold_usage() == 4


@pytest.mark.parametrize("seed", range(3))
def test_sums_match_the_jobs_exactly(store: Store, seed: int) -> None:
    """Eight threads end jobs in all ways while a ninth adds up; the sums are those over the rows of the jobs."""
    dice = random.Random(seed)
    names = [f"j{n}" for n in range(48)]
    for name in names:
        submit(
            store, name, model=dice.choice(("chat", "draw")), tenant=dice.choice(("a", "b")), key_id=dice.choice("xy")
        )
    problems: list[BaseException] = []
    over = threading.Event()

    def work(number: int) -> None:
        own = random.Random(seed * 100 + number)
        try:
            for _ in range(30):
                _step(store, own, f"w{number % 3}", names)
        except BaseException as error:
            problems.append(error)

    def add_up() -> None:
        try:
            while not over.is_set():
                store.fold_usage()
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    adding = threading.Thread(target=add_up)
    for thread in [adding, *threads]:
        thread.start()
    for thread in threads:
        thread.join(120)
    over.set()
    adding.join(120)
    assert not problems, problems
    expected: dict[tuple[str, ...], dict[str, int]] = {}
    for name in names:
        record = store.get(name)
        assert record is not None
        if record.ended:
            _expect(expected, record)
        for attempt in store.attempts_of(record):
            if attempt.outcome == "failed" and (record.started_ms is None or attempt.n != record.attempt):
                assert attempt.began_ms is not None
                assert attempt.ended_ms is not None
                if took := attempt.ended_ms - attempt.began_ms:
                    _sums(expected, record, attempt.worker)["busy_ms"] += took
    assert expected
    found = {}
    for row in store.usage(0, 10**6, ("tenant", "key", "worker", "model")):
        owner = (row["tenant"], row["key_id"], row["worker"], row["model"])
        found[owner] = {name: row[name] for name in expected[owner]}
    assert found == expected


def _step(store: Store, dice: random.Random, worker: str, names: list[str]) -> None:
    if dice.random() < 0.1:
        name = dice.choice(names)
        for tenant in ("a", "b"):
            store.cancel(name, tenant, CANCEL)
    claimed = store.claim([Want(dice.choice(("chat", "draw")), ("llm",), dice.randint(1, 3))])
    done = []
    for record, _ in claimed:
        store.accept(record.id, record.attempt, worker)
        if dice.random() < 0.15:
            store.cancel(record.id, record.tenant, CANCEL)
        if dice.random() < 0.3:
            store.fail(record.id, record.attempt, worker, dice.choice((CRASH, WRONG)))
        else:
            usage = {"prompt_tokens": float(dice.randint(0, 99)), "images": float(dice.randint(0, 9))}
            done.append(Done(record.id, record.attempt, worker, Outcome(b"\x80", (), usage)))
    store.complete_many(done)
    for one in done[:1]:
        store.complete(one.job, one.attempt, one.worker, one.outcome)  # its acknowledgement was lost


def _sums(expected: dict[tuple[str, ...], dict[str, int]], record: JobRecord, worker: str) -> dict[str, int]:
    owner = (record.tenant, record.key_id, worker, record.model)
    return expected.setdefault(owner, dict.fromkeys((*OUTCOMES, *MEASURED, "busy_ms"), 0))


def _expect(expected: dict[tuple[str, ...], dict[str, int]], record: JobRecord) -> None:
    sums = _sums(expected, record, record.worker)
    sums[record.state] += 1
    for column, key in MEASURED.items():
        sums[column] += int(record.usage.get(key, 0))
    if record.started_ms is not None and record.finished_ms is not None:
        sums["busy_ms"] += record.finished_ms - record.started_ms


def test_what_waits_is_told_with_its_age(store: Store) -> None:
    submit(store, "a", model="slow")
    store.shift_clock(5000)
    submit(store, "b", model="slow")
    submit(store, "c", model="quick")
    store.cancel("c", "default", CANCEL)
    found = store.vitals()
    (waiting,) = found.waiting
    assert (waiting.kind, waiting.model, waiting.jobs) == ("llm", "slow", 2)
    assert 5.0 <= waiting.oldest_s < 60.0
    assert found.usage_pending == 1
    assert found.batches == {}
    assert found.gauges["bytes"] > 0
