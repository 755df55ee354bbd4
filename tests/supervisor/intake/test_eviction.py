"""What ending a loaded model costs, and which set costs least."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.intake.eviction import DEMAND_S, Demand, Tenant, greedy, greedy_on_one, harm, lacking

A, B = "gpu-a", "gpu-b"


def tenant(name: str, size: int, price: float = 0.0, on: str = A) -> Tenant:
    return Tenant(name, {on: size}, price)


def names(tenants) -> list[str]:
    return [each.name for each in tenants]


def test_demand_decays_with_its_time_constant():
    demand = Demand().seen(0.0)
    assert demand.rate(0.0) == pytest.approx(1 / DEMAND_S)
    assert demand.rate(DEMAND_S) == pytest.approx(1 / DEMAND_S / 2.718281828, rel=1e-6)


def test_demand_of_a_steady_stream_is_its_rate():
    demand = Demand()
    for second in range(0, 3000, 2):
        demand = demand.seen(float(second))
    assert demand.rate(3000.0) == pytest.approx(0.5, rel=0.02)


@pytest.mark.parametrize(
    ("queued", "per_s", "swap_s", "copies", "seconds"),
    [
        (0, 0.0, 30, 1, 0),  # nobody asks for it
        (2, 0.0, 30, 1, 60),  # two jobs wait a swap long
        (0, 0.1, 20, 1, 20),  # two come meanwhile and wait half of it
        (2, 0.0, 30, 3, 20),  # the other copies go on
    ],
)
def test_harm_in_job_seconds(queued, per_s, swap_s, copies, seconds):
    assert harm(queued=queued, per_s=per_s, swap_s=swap_s, copies=copies) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("tenants", "lack", "chosen"),
    [
        ([tenant("old", 10), tenant("young", 10)], 10, ["old"]),
        ([tenant("busy", 10, 90), tenant("quiet", 10, 1)], 10, ["quiet"]),
        ([tenant("dear", 10, 50), tenant("a", 5, 10), tenant("b", 5, 10)], 10, ["a", "b"]),
        ([tenant("cheap", 10, 15), tenant("a", 5, 10), tenant("b", 5, 10)], 10, ["cheap"]),
        ([tenant("a", 4)], 10, []),
        ([tenant("elsewhere", 10, on=B), tenant("a", 10)], 10, ["a"]),
    ],
)
def test_the_cheapest_set(tenants, lack, chosen):
    assert names(greedy(tenants, {A: lack})) == chosen
    assert names(greedy_on_one(tenants, A, lack)) == chosen


def test_two_devices_are_cleared_together():
    both = Tenant("both", {A: 5, B: 5}, 12.0)
    assert names(greedy([tenant("a", 5, 8), tenant("b", 5, 8, on=B), both], {A: 5, B: 5})) == ["both"]


TENANTS = st.lists(st.tuples(st.integers(1, 9), st.integers(0, 5)), max_size=7)


@settings(max_examples=200, deadline=None)
@given(TENANTS, st.integers(1, 30))
def test_every_choice_suffices_and_wastes_nobody(sizes, lack):
    tenants = [tenant(str(number), size, price) for number, (size, price) in enumerate(sizes)]
    missing = {A: lack}
    possible = not lacking(missing, tenants)
    for chosen in (greedy(tenants, missing), greedy_on_one(tenants, A, lack)):
        assert bool(chosen) == possible
        if chosen:
            assert not lacking(missing, chosen)
            for each in chosen:
                assert lacking(missing, [other for other in chosen if other is not each])
