"""What is kept as it changes says the same as a look at every worker."""

from __future__ import annotations

import random

import pytest

from coordinator.fleet import Fleet, HeldAttempt, Worker
from coordinator.records import JobRecord
from coordinator.store.base import Want
from protocol import link_wire as wire
from protocol.faults import Fault

KINDS = (("llm",), ("embedding", "llm"), ())
LABELS: tuple[dict[str, str], ...] = ({}, {"zone": "a"}, {"zone": "b"})


class NoPort:
    def send(self, body: wire.Body, job: str = "", attempt: int = 0) -> None:
        raise AssertionError("the fleet sends nothing")

    def close(self, code: str, message: str) -> None:
        raise AssertionError("the fleet closes nothing")


def capabilities(dice: random.Random) -> wire.Capabilities:
    names = dice.sample(["a", "b", "c"], dice.randint(0, 3))
    offers = tuple(
        wire.ModelOffer(
            name=name, kinds=dice.choice(KINDS), engine="e", slots=dice.randint(0, 3), resident=dice.random() < 0.3
        )
        for name in names
    )
    return wire.Capabilities(models=offers, accepting=dice.random() < 0.9, labels=dice.choice(LABELS))


def looked_up(workers: list[Worker], now: float, zone_matters: bool) -> dict[Want, int]:
    """The free slots by a look at every worker; `limit` is the value, so that the order does not count."""
    sums: dict[Want, int] = {}
    for one in workers:
        for offer in one.capabilities.models:
            if offer.kinds and one.open_to(offer.name, now) and (free := one.free(offer)):
                labels = one.labels if zone_matters else frozenset()
                want = Want(offer.name, tuple(sorted(offer.kinds)), 0, labels, one.room_gb)
                sums[want] = sums.get(want, 0) + free
    return sums


def best_by_hand(workers: list[Worker], now: float, model: str) -> str | None:
    ranked = [
        (not offer.resident, len(one.attempts) / max(1, one.slots), n, one.id)
        for n, one in enumerate(workers)
        if (offer := one.offer_of("llm", model)) is not None and one.open_to(model, now) and one.free(offer)
    ]
    return min(ranked)[3] if ranked else None


@pytest.mark.parametrize("seed", range(12))
def test_after_any_changes_it_is_as_if_all_workers_were_looked_at(seed: int) -> None:
    dice = random.Random(seed)
    fleet, now, jobs, zone_matters = Fleet(), 0.0, 0, False
    for _ in range(500):
        now += dice.random() * 2
        workers = list(fleet.workers.values())
        one = dice.choice(workers) if workers else None
        match dice.randrange(11):
            case 0:
                fleet.add(Worker(f"w{dice.randrange(8)}", NoPort(), capabilities(dice)))
            case 1 if one and dice.random() < 0.3:
                assert fleet.remove(one)
            case 2 if one:
                fleet.announce(one, capabilities(dice))
            case 3 if one:
                one.draining = not one.draining
            case 4 if one:
                one.block(dice.choice(["", "a", "b"]), now + 5 * dice.random())
            case 5 if one and one.attempts:
                key = dice.choice(list(one.attempts))
                assert fleet.holder(key) == (one, one.attempts[key])
                one.attempts.pop(key)
                assert fleet.holder(key) is None
            case 6:
                zone_matters = dice.random() < 0.5
                fleet.asked(frozenset())
                fleet.asked(frozenset({("zone", "a"), ("zone", "b")}) if zone_matters else frozenset())
            case 7 if one:
                for n in range(3):  # it rests, or does so longer
                    held = HeldAttempt(f"f{n}", 1, "llm", dice.choice("ab"), "running", since=now)
                    fleet.failed(one, held, Fault("engine_failed", "It broke."), now)
            case 8 if one:
                fleet.succeeded(one, dice.choice("ab"))
            case _:
                model = dice.choice("abc")
                fixed = {"state": "queued", "tenant": "t", "attempt": 1, "created_ms": 0, "params": b""}
                record = JobRecord(id=f"j{jobs}", kind="llm", model=model, **fixed)  # type: ignore[arg-type]
                placed = fleet.place(record, now)
                chosen = placed.id if placed else None
                assert chosen == best_by_hand(list(fleet.workers.values()), now, model)
                if placed:
                    held = HeldAttempt(f"j{jobs}", 1, "llm", model, "offered")
                    placed.attempts[held.key] = held
                    jobs += 1
        workers = list(fleet.workers.values())
        for only in (None, "a"):
            told = fleet.wants(now, only)
            expected = looked_up(workers, now, zone_matters)
            assert {Want(w.model, w.kinds, 0, w.labels, w.vram_gb): w.limit for w in told} == {
                want: free for want, free in expected.items() if only in (None, want.model)
            }
    assert jobs > 20


def test_a_worker_on_which_the_job_failed_comes_last_and_one_that_has_left_never() -> None:
    offer = wire.ModelOffer(name="a", kinds=("llm",), engine="e", slots=2)
    fleet = Fleet()
    first, second = (Worker(name, NoPort(), wire.Capabilities(models=(offer,))) for name in ("w1", "w2"))
    fleet.add(first)
    fleet.add(second)
    fixed = {"state": "queued", "tenant": "t", "attempt": 1, "created_ms": 0, "params": b""}
    record = JobRecord(id="j", kind="llm", model="a", **fixed)  # type: ignore[arg-type]
    fleet.refusals.shun("j", "w1")
    assert fleet.place(record, 0.0) is second
    fleet.remove(second)
    assert fleet.place(record, 0.0) is first
    fleet.remove(first)
    assert fleet.place(record, 0.0) is None


def test_the_attempts_of_a_worker_that_comes_back_are_found_with_its_new_session() -> None:
    fleet = Fleet()
    old = Worker("w", NoPort(), wire.Capabilities())
    fleet.add(old)
    held = HeldAttempt("j", 1, "llm", "a", "running")
    old.attempts[held.key] = held
    fleet.remove(old)
    assert fleet.holder(held.key) is None
    new = Worker("w", NoPort(), wire.Capabilities())
    new.attempts[held.key] = held
    fleet.add(new)
    del old.attempts[held.key]
    assert fleet.holder(held.key) == (new, held)
