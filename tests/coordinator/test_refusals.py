"""What is kept of jobs that were declined, or that failed: pure, with times handed in."""

from __future__ import annotations

from coordinator.refusals import KEPT_S, MOST_TOLD, Refusals


def test_what_a_job_is_not_offered_is_forgotten_with_it() -> None:
    kept = Refusals()
    kept.avoid("j", "a", 5.0)
    kept.shun("j", "b")
    kept.refuse("j", "a")
    assert (kept.declined("j"), kept.declined("j")) == (0.25, 0.5)
    assert (kept.avoided("j"), kept.shunned("j"), kept.refused("j")) == ({"a": 5.0}, {"b"}, {"a"})
    assert kept.avoided_by_all(["a"], 4.9) == ("j",)
    assert kept.avoided_by_all(["a", "b"], 4.9) == kept.avoided_by_all(["a"], 5.0) == ()
    kept.forget("j")
    assert (kept.avoided("j"), kept.shunned("j"), kept.refused("j"), kept.declined("j")) == ({}, (), (), 0.25)


def test_a_declining_worker_is_left_alone_ever_longer_or_for_as_long_as_it_asks() -> None:
    kept = Refusals()
    assert [kept.declined("j") for _ in range(8)] == [0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 10.0, 10.0]
    assert (kept.declined("j", 8000), kept.declined("j", 10**9)) == (8.0, 60.0)


def test_of_many_refusals_the_latest_are_told() -> None:
    kept = Refusals()
    for n in range(MOST_TOLD + 3):
        kept.refuse(f"j{n}", "a")
    kept.refuse("j0", "b")
    kept.refuse("j0", "a")
    told = kept.refused_by("a")
    assert (len(told), told[0], told[-1]) == (MOST_TOLD, "j4", "j0")
    assert kept.refused_by("b") == ("j0",)
    assert kept.by_worker() == {"a": list(told), "b": ["j0"]}


def test_who_avoids_nothing_costs_nothing_and_what_is_avoided_is_what_all_avoid() -> None:
    kept = Refusals()
    for n in range(20):
        kept.avoid(f"j{n}", "a", 9.0)
        if n % 2:
            kept.avoid(f"j{n}", "b", float(n))
    assert kept.avoided_by_all(["b", "a"], 5.0) == tuple(f"j{n}" for n in range(7, 20, 2))
    assert kept.avoided_by_all(["a", "b", "c"], 5.0) == ()
    kept.avoid("j7", "a", 1.0)
    for n in range(8, 20):
        kept.forget(f"j{n}")
    assert kept.avoided_by_all(["a", "b"], 5.0) == ()
    for n in range(8):
        kept.forget(f"j{n}")
    assert kept._avoiding == {}


def test_jobs_that_ended_at_another_replica_are_let_go() -> None:
    kept = Refusals()
    kept.tidy(0.0)
    kept.refuse("old", "a")
    kept.refuse("young", "a")
    kept.tidy(KEPT_S)
    kept.avoid("young", "a", 9e9)
    assert kept.refused_by("a") == ("old", "young")
    kept.tidy(2 * KEPT_S - 1)
    assert kept.refused_by("a") == ("old", "young")
    kept.tidy(2 * KEPT_S)
    assert kept.refused_by("a") == ("young",)
    kept.tidy(4 * KEPT_S)
    assert kept.avoided_by_all(["a"], 0.0) == kept.refused_by("a") == ()
