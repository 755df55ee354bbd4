"""Many jobs in one call."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from coordinator.records import LotRecord, Submission
from coordinator.store import Store
from coordinator.store.base import Outcome, Want
from protocol.faults import Fault

ANY = Want("chat", ("llm",), 100)
CANCEL = Fault("cancelled", "Enough.")


def asked(lot: str, **options: object) -> Submission:
    return Submission(**{"kind": "llm", "model": "chat", "params": b"\x80", "lot": lot, **options})  # type: ignore[arg-type]


def lot(name: str, total: int, refused: int = 0) -> LotRecord:
    return LotRecord(id=name, tenant="default", created_ms=0, total=total, refused=refused)


def test_all_lines_go_in_together_and_each_has_its_answer(store: Store) -> None:
    store.insert("job_known", asked("", idempotency_key="k"))
    store.insert("job_other", asked("", idempotency_key="o", model="other"))
    made, answers = store.insert_lot(
        lot("lot_1", 5, refused=1),
        [
            ("job_1", asked("lot_1")),
            ("job_2", asked("lot_1", idempotency_key="k")),
            ("job_3", asked("lot_1", idempotency_key="o")),
            ("job_4", asked("lot_1", priority=3)),
        ],
    )
    got = [answer.code if isinstance(answer, Fault) else (answer[0].id, answer[1]) for answer in answers]
    assert got == [("job_1", True), ("job_known", False), "conflict", ("job_4", True)]
    assert (made.total, made.refused) == (5, 2)
    assert made.created_ms <= store.now_ms()
    assert made.counts == {"queued": 2}
    assert store.get_lot("lot_1", "default") == made
    assert [record.id for record, _ in store.claim([ANY])] == ["job_4", "job_known", "job_1"]


def test_lines_beyond_what_a_tenant_may_have_open_are_refused_one_by_one(store: Store) -> None:
    jobs = [(f"job_{n}", asked("lot_1", tenant_open=2, key_id="k")) for n in range(4)]
    made, answers = store.insert_lot(lot("lot_1", 4), jobs)
    got = [answer.code if isinstance(answer, Fault) else answer[0].id for answer in answers]
    assert got == ["job_0", "job_1", "rate_limited", "rate_limited"]
    assert made.refused == 2


def test_how_far_it_is_is_counted_by_state(store: Store) -> None:
    store.insert_lot(lot("lot_1", 4), [(f"job_{n}", asked("lot_1")) for n in range(4)])
    for record, _ in store.claim([Want("chat", ("llm",), 3)])[:2]:
        store.accept(record.id, record.attempt, "w")
    store.complete("job_0", 1, "w", Outcome(b"\x80"))
    found = store.get_lot("lot_1", "default")
    assert found is not None
    assert found.counts == {"succeeded": 1, "running": 1, "queued": 2}, "an offer is nobody's business outside"
    assert store.get_lot("lot_1", "other") is None
    assert store.get_lot("lot_2", "default") is None


def test_what_is_not_over_is_cancelled_and_nothing_of_others(store: Store) -> None:
    store.insert("job_single", asked(""))
    store.insert_lot(lot("lot_1", 3), [(f"job_{n}", asked("lot_1")) for n in range(3)])
    store.insert_lot(lot("lot_2", 1), [("job_else", asked("lot_2"))])
    for record, _ in store.claim([Want("chat", ("llm",), 3)]):
        store.accept(record.id, record.attempt, "w")
    store.complete("job_0", 1, "w", Outcome(b"\x80"))
    assert store.cancel_lot("lot_1", "other", CANCEL) == []
    assert store.cancel_lot("", "default", CANCEL) == []
    assert {one.id for one in store.cancel_lot("lot_1", "default", CANCEL)} == {"job_1", "job_2"}
    assert store.cancel_lot("lot_1", "default", CANCEL) == []
    assert store.complete("job_1", 1, "w", Outcome(b"\x80", (), {"images": 1.0})).verdict in ("late", "again")
    states = {
        name: record.state for name in ("job_0", "job_1", "job_single", "job_else") if (record := store.get(name))
    }
    assert states == {"job_0": "succeeded", "job_1": "cancelled", "job_single": "running", "job_else": "queued"}


def test_a_lot_is_forgotten_after_its_jobs(store: Store) -> None:
    store.insert_lot(lot("lot_1", 1), [("job_1", asked("lot_1"))])
    store.shift_clock(10_000)
    store.purge(5000)
    assert store.get_lot("lot_1", "default") is not None, "its job waits"
    store.cancel_lot("lot_1", "default", CANCEL)
    store.shift_clock(10_000)
    assert [one.job for one in store.purge(5000)] == ["job_1"]
    store.purge(5000)
    assert store.get_lot("lot_1", "default") is None


def test_calls_with_the_same_keys_in_other_orders_make_each_job_once(store: Store) -> None:
    """In PostgreSQL they lock each other out: so many that to begin again side by side would go on for ever."""
    keys = [f"k{n}" for n in range(50)]
    answers: list[list[tuple[object, bool] | Fault]] = []

    def put(name: str, order: list[str]) -> None:
        jobs = [(f"job_{name}_{key}", asked(f"lot_{name}", idempotency_key=key)) for key in order]
        answers.append(list(store.insert_lot(lot(f"lot_{name}", len(jobs)), jobs)[1]))

    orders = {name: keys if number % 2 else keys[::-1] for number, name in enumerate("abcd")}
    with ThreadPoolExecutor(len(orders)) as threads:
        for call in [threads.submit(put, name, order) for name, order in orders.items()]:
            call.result(120)
    assert len(answers) == len(orders)
    assert sum(answer[1] for call in answers for answer in call if not isinstance(answer, Fault)) == len(keys)
