"""Fair turns of tenants: the same scenes for every store."""

from __future__ import annotations

import itertools
import sqlite3
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from coordinator.records import JobRecord, LotRecord, Submission
from coordinator.store import SqliteStore, Store, sqlite_schema
from coordinator.store.base import Held, Outcome, Want
from coordinator.store.rows import LATER
from coordinator.store.sql_turns import RIPEN
from protocol.faults import Fault

ONE = Want("m", ("llm",), 1)
MANY = Want("m", ("llm",), 10_000)
DAY_MS = 86_400_000
CANCEL = Fault("cancelled", "Enough.")
_ids = itertools.count()


def asked(tenant: str, **options: Any) -> Submission:
    return Submission(**{"kind": "llm", "model": "m", "params": b"\x80", "tenant": tenant, **options})


def submit(store: Store, tenant: str, **options: Any) -> str:
    return store.insert(f"job_{next(_ids):06}", asked(tenant, **options))[0].id


def backlog(store: Store, tenant: str, count: int, **options: Any) -> list[str]:
    """Submit so many in one transaction."""
    names = [f"job_{next(_ids):06}" for _ in range(count)]
    lot = LotRecord(id=f"lot_{next(_ids)}", tenant=tenant, created_ms=0, total=count, refused=0)
    store.insert_lot(lot, [(name, asked(tenant, **options)) for name in names])
    return names


def serve(store: Store, want: Want = ONE, worker: str = "w") -> list[JobRecord]:
    """Claim, accept and complete."""
    claimed = [record for record, _ in store.claim([want])]
    assert all(store.accept_many([Held(record.id, record.attempt, worker) for record in claimed]))
    for record in claimed:
        assert store.complete(record.id, record.attempt, worker, Outcome(b"\x80")).verdict == "stored"
    return claimed


def shares(store: Store, looped: dict[str, dict[str, Any]], turns: int, want: Want = ONE) -> Counter[str]:
    """Whose jobs were served, when each of `looped` has one job waiting at any time."""
    for tenant, options in looped.items():
        submit(store, tenant, **options)
    served: Counter[str] = Counter()
    for _ in range(turns):
        for record in serve(store, want):
            served[record.tenant] += 1
            if record.tenant in looped:
                submit(store, record.tenant, **looped[record.tenant])
    return served


def busy(store: Store, tenant: str = "b") -> None:
    """A tenant that has a long queue, and was served for a while."""
    backlog(store, tenant, 150)
    for _ in range(10):
        serve(store)


def test_one_that_asks_again_and_again_shares_evenly_with_a_long_queue(store: Store) -> None:
    busy(store)
    served = shares(store, {"c": {}}, 40)
    assert abs(served["b"] - served["c"]) <= 2


def test_ten_times_the_weight_is_ten_times_the_turns(store: Store) -> None:
    busy(store)
    served = shares(store, {"c": {"weight": 10.0}}, 110)
    assert 98 <= served["c"] <= 101
    assert served["b"] == 110 - served["c"]


def test_ten_times_the_cost_is_a_tenth_of_the_turns(store: Store) -> None:
    backlog(store, "b", 40, cost=10.0)
    for _ in range(5):
        serve(store)
    served = shares(store, {"c": {"cost": 1.0}}, 110)
    assert 98 <= served["c"] <= 101


@pytest.mark.parametrize(
    "stale",
    [
        {"run_after_ms": 4_000_000_000_000},
        {"labels": {"site": "nowhere"}},
        {"kind": "embedding"},
        {"vram_gb_estimate": 900.0},
    ],
    ids=["next year", "a label nobody has", "a kind nobody has", "memory nobody has"],
)
def test_what_nobody_can_take_now_holds_nobody_up(store: Store, stale: dict[str, Any]) -> None:
    submit(store, "a", **stale)
    busy(store)
    served = shares(store, {"c": {}}, 40, Want("m", ("llm",), 1, vram_gb=8.0))
    assert abs(served["b"] - served["c"]) <= 2


def test_one_that_a_worker_declined_holds_nobody_up(store: Store) -> None:
    name = submit(store, "a")
    busy_want = Want("m", ("llm",), 1, but=(name,))
    backlog(store, "b", 100)
    for _ in range(20):
        serve(store, busy_want)
    served = shares(store, {"c": {}}, 40, busy_want)
    assert abs(served["b"] - served["c"]) <= 2


def test_those_that_were_declined_hold_nobody_up(store: Store) -> None:
    """A small worker was offered all that one tenant has, and could not take any of it."""
    backlog(store, "b", 150)
    for _ in range(10):
        serve(store)
    for record, _ in store.claim([MANY]):
        assert store.release(record.id, record.attempt)
    served = shares(store, {"c": {}}, 40)
    assert abs(served["b"] - served["c"]) <= 2


def test_one_that_is_tried_again_by_hand_holds_nobody_up(store: Store) -> None:
    failed = submit(store, "b", max_attempts=1)
    [(claimed, _)] = store.claim([ONE])
    assert store.accept(failed, claimed.attempt, "w")
    assert not store.fail(failed, claimed.attempt, "w", Fault("engine_crashed", "It crashed.")).requeued
    busy(store)
    assert store.retry(failed, "b") is not None
    served = shares(store, {"c": {}}, 40)
    assert abs(served["b"] - served["c"]) <= 2


def test_one_of_another_kind_that_goes_first_moves_nobody_else(store: Store) -> None:
    """A worker for embeddings alone takes the one that stands behind a long queue of its tenant's."""
    busy(store)
    submit(store, "b", kind="embedding")
    assert [record.tenant for record in serve(store, Want("m", ("embedding",), 1))] == ["b"]
    served = shares(store, {"c": {}}, 40)
    assert abs(served["b"] - served["c"]) <= 2
    both = Want("m", ("llm", "embedding"), 1)
    served = shares(store, {"d": {"kind": "embedding"}}, 40, both)
    assert served["d"] >= 12


def test_what_starts_later_takes_no_turn_of_its_tenants_before(store: Store) -> None:
    later = backlog(store, "c", 100, run_after_ms=store.now_ms() + DAY_MS)
    busy(store)
    served = shares(store, {"c": {}}, 20)
    assert abs(served["b"] - served["c"]) <= 2
    assert store.waiting() == {"b": (150 - 10 - served["b"], 0), "c": (1, len(later))}


def test_jobs_that_are_due_at_once_stand_behind_each_other(store: Store) -> None:
    """A day ago they were asked to start now: they are not older than all that came since."""
    due = store.now_ms() + DAY_MS
    backlog(store, "a", RIPEN + 20, run_after_ms=due)
    busy(store)
    store.shift_clock(DAY_MS + 1000)
    served = Counter(record.tenant for _ in range(30) for record in serve(store))
    assert abs(served["a"] - served["b"]) <= 2
    served += Counter(record.tenant for record in serve(store, MANY))
    while more := serve(store, MANY):
        served += Counter(record.tenant for record in more)
    assert served == {"a": RIPEN + 20, "b": 140}
    assert store.waiting() == {}


def test_as_many_start_at_their_hour_as_are_wanted(store: Store) -> None:
    names = backlog(store, "a", 3 * RIPEN, run_after_ms=store.now_ms() + DAY_MS)
    store.shift_clock(DAY_MS + 1000)
    assert sorted(record.id for record in serve(store, Want("m", ("llm",), 3 * RIPEN))) == names


def test_what_starts_later_costs_what_was_said(store: Store) -> None:
    backlog(store, "a", 30, run_after_ms=store.now_ms() + DAY_MS, cost=10.0)
    busy(store)
    store.shift_clock(DAY_MS + 1000)
    served = Counter(record.tenant for _ in range(33) for record in serve(store))
    assert 2 <= served["a"] <= 4


def test_one_that_is_scheduled_still_starts_by_its_priority_and_never_before(store: Store) -> None:
    now = store.now_ms()
    late = submit(store, "a", run_after_ms=now + DAY_MS, priority=5)
    plain = submit(store, "b")
    assert [record.id for record in serve(store, MANY)] == [plain]
    store.shift_clock(DAY_MS + 1000)
    other = submit(store, "b")
    assert [record.id for record in serve(store, MANY)] == [late, other]


def test_one_that_was_cancelled_is_no_debt(store: Store) -> None:
    busy(store)
    wrong = backlog(store, "c", 200)
    for name in wrong:
        store.cancel(name, "c", CANCEL)
    served = shares(store, {"c": {}}, 40)
    assert abs(served["b"] - served["c"]) <= 2


def test_a_job_of_another_line_does_not_move_the_whole_model(store: Store) -> None:
    """A small worker takes the one small job of a tenant at once, however many large ones it has waiting."""
    backlog(store, "a", 200)
    submit(store, "a", labels={"pool": "small"})
    small = Want("m", ("llm",), 1, labels=frozenset({("pool", "small")}))
    for _ in range(10):
        serve(store)
    assert serve(store, small)[0].tenant == "a"
    served = shares(store, {"c": {"labels": {"pool": "eu"}}}, 40, Want("m", ("llm",), 1, frozenset({("pool", "eu")})))
    assert abs(served["a"] - served["c"]) <= 2


def test_a_slow_line_is_shared_however_fast_another_one_goes(store: Store) -> None:
    slow = {"labels": {"pool": "slow"}}
    worker = Want("m", ("llm",), 1, labels=frozenset({("pool", "slow")}))
    backlog(store, "a", 60, **slow)
    serve(store, worker)
    backlog(store, "b", 300)
    only_plain = Want("m", ("llm",), 100)
    for _ in range(3):
        serve(store, only_plain)
    served = shares(store, {"c": slow}, 40, worker)
    assert abs(served["a"] - served["c"]) <= 3


def test_a_line_that_was_idle_does_not_go_before_the_others(store: Store) -> None:
    eu = {"labels": {"pool": "eu"}}
    both = Want("m", ("llm",), 1, labels=frozenset({("pool", "eu")}))
    submit(store, "a", **eu)
    serve(store, both)
    backlog(store, "b", 250)
    for _ in range(150):
        serve(store)
    served = shares(store, {"a": eu}, 40, both)
    assert abs(served["a"] - served["b"]) <= 2


def test_turns_go_on_when_ended_jobs_are_deleted(store: Store) -> None:
    backlog(store, "b", 300)
    for _ in range(4):
        for record in serve(store, Want("m", ("llm",), 20)):
            if record.id.endswith(("1", "3", "5", "7", "9")):
                assert store.remove(record.id, "b") is not None
    store.shift_clock(1000)
    while store.purge(0):
        pass
    served = shares(store, {"c": {}}, 40)
    assert abs(served["b"] - served["c"]) <= 2


def test_turns_survive_a_restart(make: Callable[[], Store]) -> None:
    store = make()
    busy(store)
    store.close()
    served = shares(make(), {"c": {}}, 40)
    assert abs(served["b"] - served["c"]) <= 2


def test_a_job_that_is_tried_again_keeps_its_turn(store: Store) -> None:
    first = submit(store, "b")
    (claimed,) = [record for record, _ in store.claim([ONE])]
    backlog(store, "b", 20)
    assert store.accept(first, claimed.attempt, "w")
    assert store.fail(first, claimed.attempt, "w", Fault("engine_crashed", "It crashed.")).requeued
    store.shift_clock(60_000)
    assert [record.id for record in serve(store)] == [first]


def test_a_failed_job_that_is_tried_again_stands_behind_its_tenants(store: Store) -> None:
    first = submit(store, "b", max_attempts=1)
    (claimed,) = [record for record, _ in store.claim([ONE])]
    store.accept(first, claimed.attempt, "w")
    assert not store.fail(first, claimed.attempt, "w", Fault("engine_crashed", "It crashed.")).requeued
    waiting = backlog(store, "b", 3)
    assert store.retry(first, "b") is not None
    assert [record.id for record in serve(store, MANY)] == [*waiting, first]


def test_many_threads_share_evenly_and_lock_nobody_out(make: Callable[[], Store]) -> None:
    """Eight threads over one store, or over two of one database: each tenant asks again when its job is done."""
    first = make()
    stores = [first, make()] if first.parallel > 1 else [first, first]
    tenants = [f"t{n}" for n in range(4)]
    for tenant in tenants:
        backlog(first, tenant, 5)
    backlog(first, "big", 400)
    served: Counter[str] = Counter()

    def work(number: int) -> list[str]:
        store, mine = stores[number % 2], []
        for _ in range(25):
            for record in serve(store, ONE, f"w{number}"):
                mine.append(record.tenant)
                submit(store, record.tenant)
        return mine

    with ThreadPoolExecutor(8) as pool:
        for mine in pool.map(work, range(8)):
            served.update(mine)
    assert sum(served.values()) == 200
    assert set(served) == {*tenants, "big"}
    assert max(served.values()) <= 2 * min(served.values()) + 16


def test_turns_are_given_once_when_several_look_at_once(make: Callable[[], Store]) -> None:
    first = make()
    stores = [first, make()] if first.parallel > 1 else [first, first]
    names = backlog(first, "a", 60, run_after_ms=first.now_ms() + 1000) + backlog(first, "b", 20)
    first.shift_clock(5000)

    def work(number: int) -> list[str]:
        mine: list[str] = []
        while got := serve(stores[number % 2], Want("m", ("llm",), 3), f"w{number}"):
            mine += [record.id for record in got]
        return mine

    with ThreadPoolExecutor(8) as pool:
        done = [name for mine in pool.map(work, range(8)) for name in mine]
    done += [record.id for record in serve(first, MANY)]
    assert sorted(done) == sorted(names)


def test_no_tag_of_a_job_that_was_claimed_is_one_of_later(store: Any) -> None:
    submit(store, "a", run_after_ms=store.now_ms() + 1000)
    store.shift_clock(5000)
    assert len(serve(store)) == 1
    submit(store, "a")
    tags = [row["vt"] for row in store._read("SELECT vt FROM jobs ORDER BY seq")]
    assert tags == [1000, 2000]
    assert max(tags) < LATER


# ---- databases of before ----------------------------------------------------------------------------------

_OLD = (
    "INSERT INTO jobs (id, tenant, key_id, idempotency_key, fingerprint, kind, model, state, attempt, max_attempts, "
    "tries, priority, deadline_at_ms, created_ms, stream, vram_gb_estimate, traceparent, labels, params, inputs, vt, "
    "run_after_ms) VALUES "
)
_OLD_ROWS = [
    ("job_served", "b", "succeeded", 1, 5000, 0),
    ("job_paused", "b", "queued", 1, 6000, 1),
    ("job_next", "b", "queued", 0, 7000, 0),
    ("job_due", "a", "queued", 0, 1, 1),
    ("job_later", "a", "queued", 0, 1, 4_000_000_000_000),
]


def old_rows(nothing: str) -> str:
    """The rows as text, with the database's own word for no bytes."""
    rows = (
        f"('{name}', '{tenant}', '', '', {nothing}, 'llm', 'm', '{state}', {attempt}, 3, {attempt}, 0, 0, 1, 0, 0, '', "
        f"{nothing}, {nothing}, {nothing}, {vt}, {after})"
        for name, tenant, state, attempt, vt, after in _OLD_ROWS
    )
    return _OLD + ", ".join(rows)


def before(migrations: tuple[str, ...]) -> int:
    return next(n for n, script in enumerate(migrations) if "CREATE TABLE turns" in script)


def assert_goes_on(store: Any) -> None:
    tags = {row["id"]: row["vt"] for row in store._read("SELECT id, vt FROM jobs")}
    assert tags == {
        "job_served": 5000,
        "job_paused": 6000,
        "job_next": 7000,
        "job_due": LATER + 1000,
        "job_later": LATER + 1000,
    }
    assert store.waiting() == {"a": (0, 2), "b": (2, 0)}
    with store._transaction() as now:
        store._ripen(now)
    assert store.waiting() == {"a": (1, 1), "b": (2, 0)}
    (due,) = store._read("SELECT vt FROM jobs WHERE id = 'job_due'")
    assert due["vt"] == 7000


def test_a_file_of_an_earlier_version_goes_on(tmp_path: Path) -> None:
    migrations = sqlite_schema.MIGRATIONS[: before(sqlite_schema.MIGRATIONS)]
    connection = sqlite3.connect(tmp_path / "jobs.sqlite", isolation_level=None)
    for number, script in enumerate(migrations, 1):
        connection.executescript(f"BEGIN; {script}; PRAGMA user_version = {number}; COMMIT;")
    connection.execute(old_rows("x'90'"))
    connection.close()
    store = SqliteStore(tmp_path / "jobs.sqlite")
    try:
        assert_goes_on(store)
    finally:
        store.close()


def test_a_database_of_an_earlier_version_goes_on(space: str) -> None:
    import psycopg

    from coordinator.store import postgres_schema
    from coordinator.store.postgres import PostgresStore

    migrations = postgres_schema.MIGRATIONS[: before(postgres_schema.MIGRATIONS)]
    with psycopg.connect(space, autocommit=True) as connection:
        connection.execute("CREATE TABLE schema_version (version INTEGER NOT NULL)")
        for number, script in enumerate(migrations, 1):
            connection.execute(script.encode())
            connection.execute("INSERT INTO schema_version VALUES (%s)", (number,))
        connection.execute(old_rows("'\\x90'").encode())
    store = PostgresStore(space)
    try:
        assert_goes_on(store)
    finally:
        store.close()


def test_a_turn_is_looked_up_by_index_before_there_are_statistics(space: str) -> None:
    from coordinator.store.postgres import PostgresStore

    store = PostgresStore(space)
    try:
        backlog(store, "b", 300)
        for _ in range(3):
            serve(store, Want("m", ("llm",), 50))
        names = {"model": "m", "needs": "", "kind": "llm", "priority": 0, "tenant": "t", "step": 1}
        rows = store._read(f"EXPLAIN SELECT {store._turn} AS turn", **names)
        plan = "\n".join(row["QUERY PLAN"] for row in rows)
    finally:
        store.close()
    for index in ("jobs_served_line", "jobs_served", "jobs_waiting", "jobs_turns"):
        assert f"using {index} on jobs" in plan, plan
    assert "Sort" not in plan
    assert plan.count("Limit") == 4
