"""Which jobs a want may have: labels, GPU memory, and times, in the queue itself."""

from __future__ import annotations

import pytest

from coordinator.records import Submission
from coordinator.store import Store
from coordinator.store.base import Want
from coordinator.store.needs import asked_labels, fits, may_fit, needs_of

TRUSTED = frozenset({("trusted", "true")})
EU = frozenset({("pool", "eu")})


def want(limit: int = 100, **options: object) -> Want:
    return Want("chat", ("llm",), limit, **options)  # type: ignore[arg-type]


def put(store: Store, name: str, **options: object) -> str:
    asked = Submission(**{"kind": "llm", "model": "chat", "params": b"\x80", **options})  # type: ignore[arg-type]
    return store.insert(name, asked)[0].id


def claimed(store: Store, *wants: Want) -> list[str]:
    return [record.id for record, _ in store.claim(wants)]


# ---- the text -----------------------------------------------------------------------------------------------


def test_the_order_of_labels_makes_no_difference_and_nothing_needed_is_nothing_written() -> None:
    assert needs_of({}, 0.0) == ""
    assert needs_of({"a": "1", "b": "2"}, 0) == needs_of({"b": "2", "a": "1"}, 0)
    assert needs_of({"a": "1"}, 7.2) == needs_of({"a": "1"}, 8.0) != needs_of({"a": "1"}, 8.1)
    odd = {"a=b\x1f": 'c"\u0000é'}
    assert asked_labels(needs_of(odd, 0)) == frozenset(odd.items())


@pytest.mark.parametrize(
    ("labels", "estimate", "has", "vram", "expected"),
    [
        ({}, 0.0, frozenset(), None, True),
        ({}, 99.0, frozenset(), None, True),
        ({}, 8.0, frozenset(), 8.0, True),
        ({}, 8.1, frozenset(), 8.0, False),
        ({}, 8.1, frozenset(), 8.5, True),
        ({}, 8.9, frozenset(), 8.5, False),
        ({"trusted": "true"}, 0.0, frozenset(), None, False),
        ({"trusted": "true"}, 0.0, TRUSTED | EU, None, True),
        ({"trusted": "yes"}, 0.0, TRUSTED, None, False),
        ({"trusted": "true"}, 9.0, TRUSTED, 8.0, False),
    ],
)
def test_what_fits(
    labels: dict[str, str], estimate: float, has: frozenset[tuple[str, str]], vram: float | None, expected: bool
) -> None:
    needs = needs_of(labels, estimate)
    assert fits(needs, estimate, has, vram) is expected
    assert may_fit(needs, has, vram) or not expected, "the line is left out only when none of it fits"


# ---- the queue ----------------------------------------------------------------------------------------------


def test_a_job_goes_to_workers_with_its_labels_and_those_behind_it_do_not_wait(store: Store) -> None:
    both = put(store, "job_0", labels={"trusted": "true", "pool": "eu"})
    trusted = put(store, "job_1", labels={"trusted": "true"})
    plain = put(store, "job_2")
    assert claimed(store, want()) == [plain]
    assert claimed(store, want(labels=EU)) == []
    assert claimed(store, want(labels=TRUSTED)) == [trusted]
    assert claimed(store, want(labels=TRUSTED | EU | {("more", "x")})) == [both]


def test_a_job_goes_to_workers_with_its_memory(store: Store) -> None:
    huge, large, small = (
        put(store, f"job_{gb}", vram_gb_estimate=gb, priority=priority)
        for priority, gb in ((2, 80.0), (1, 23.5), (0, 8))
    )
    assert claimed(store, want(vram_gb=8.0)) == [small]
    assert claimed(store, want(vram_gb=23.4)) == []
    assert claimed(store, want(vram_gb=23.9)) == [large]
    assert claimed(store, want(vram_gb=24.0)) == []
    assert claimed(store, want()) == [huge]


def test_jobs_with_different_needs_come_in_one_order(store: Store) -> None:
    names = [
        put(store, f"job_{n}", labels={"trusted": "true"} if n % 2 else {}, vram_gb_estimate=float(n % 3), priority=-n)
        for n in range(9)
    ]
    assert claimed(store, want(4, labels=TRUSTED)) == names[:4]
    assert claimed(store, want(4, labels=TRUSTED)) == names[4:8]
    assert claimed(store, want(4, labels=TRUSTED)) == names[8:]


def test_wants_of_one_model_share_its_queue(store: Store) -> None:
    names = [put(store, f"job_{n}", labels={"trusted": "true"} if n < 2 else {}) for n in range(6)]
    got = claimed(store, want(1), want(3, labels=TRUSTED))
    assert len(got) == len(set(got)) == 4
    assert set(names[:2]) <= set(got)


def test_jobs_that_nobody_free_takes_now_are_left_where_they_are(store: Store) -> None:
    first, second = put(store, "job_0"), put(store, "job_1")
    assert claimed(store, want(but=(first, "job_unknown"))) == [second]
    record = store.get(first)
    assert record is not None
    assert record.attempt == 0, "it was not claimed and put back"
    assert claimed(store, want()) == [first]


def test_many_that_cannot_be_had_do_not_hide_one_that_can(store: Store) -> None:
    for n in range(300):
        put(store, f"job_{n}", labels={"owner": str(n % 7)}, vram_gb_estimate=40.0)
    plain = put(store, "job_plain")
    assert claimed(store, want(1, vram_gb=24.0)) == [plain]
    assert claimed(store, want(vram_gb=24.0)) == []
    assert len(claimed(store, want(labels=frozenset({("owner", "3")})))) == 43


def test_all_labels_that_are_asked_for_are_known(store: Store) -> None:
    assert store.asked_labels() == frozenset()
    put(store, "job_0", labels={"trusted": "true"})
    put(store, "job_1", labels={"trusted": "true", "pool": "eu"}, vram_gb_estimate=3.0)
    put(store, "job_2", vram_gb_estimate=3.0)
    assert store.asked_labels() == TRUSTED | EU
    claimed(store, want(labels=TRUSTED | EU))
    assert store.asked_labels() == frozenset()


# ---- times --------------------------------------------------------------------------------------------------


def test_a_job_may_wait_for_its_hour_and_its_deadline_counts_from_there(store: Store) -> None:
    start = store.now_ms() + 3_600_000
    later = put(store, "job_later", run_after_ms=start, deadline_ms=60_000, priority=9)
    soon = put(store, "job_soon", run_after_ms=store.now_ms() - 5000)
    record = store.get(later)
    assert record is not None
    assert (record.state, record.run_after_ms, record.deadline_at_ms) == ("queued", start, start + 60_000)
    assert claimed(store, want()) == [soon]
    store.shift_clock(3_600_001)
    assert store.expire(0) == []
    assert claimed(store, want()) == [later]
    again = store.get(soon)
    assert again is not None
    assert again.run_after_ms == 0


# ---- fair turns ---------------------------------------------------------------------------------------------


def turns(store: Store, **shares: dict[str, float]) -> list[str]:
    """Which tenant's job is claimed, one after another; 12 jobs of each wait."""
    for n in range(12):
        for tenant, options in shares.items():
            put(store, f"job_{tenant}_{n}", tenant=tenant, **options)
    return [name.split("_")[1] for name in claimed(store, want())]


def test_a_tenant_with_twice_the_weight_has_twice_the_turns(store: Store) -> None:
    order = turns(store, a={"weight": 2.0}, b={})
    assert order[:18].count("a") == 12
    assert abs(order[:9].count("a") - 6) <= 1


def test_dear_jobs_come_up_as_seldom_as_they_cost(store: Store) -> None:
    order = turns(store, a={}, b={"cost": 3.0})
    assert abs(order[:16].count("a") - 12) <= 1
    assert set(order[:5]) == {"a", "b"}, "dear is not never"
