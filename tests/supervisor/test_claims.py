"""One model that is loaded or wants to be, as residency sees it."""

from __future__ import annotations

import pytest

from protocol import engine_wire as wire
from supervisor.claims import Claim
from supervisor.host.work import EngineSpec, ModelSpec
from supervisor.intake.residency import Need
from supervisor.peaks import Facts


class Lane:
    """A model that does nothing."""

    spec = ModelSpec(name="m", engine=EngineSpec(name="e", module="none", python="none"), model=wire.Model(name="m"))
    pid, wanted, idle_since, ready_since = 1, False, 5.0, 4.0

    def evict(self, reason: str) -> None:
        raise AssertionError(reason)

    def tell(self, progress) -> None:
        raise AssertionError(progress)


def claim(**fields: object) -> Claim:
    made = Claim(Lane(), ("A",), Facts(key="k"), Need(10, "operator"), 0.0)
    for name, value in fields.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("fields", "holds", "promised"),
    [
        ({}, {}, 0),
        ({"takes": {"A": 10}}, {"A": 10}, 10),
        ({"takes": {"A": 10}, "now": {"A": 4}}, {"A": 10}, 6),
        ({"takes": {"A": 10}, "now": {"A": 14}}, {"A": 14}, 0),
        ({"takes": {"A": 10}, "now": {"A": 4, "B": 2}}, {"A": 10, "B": 2}, 6),
        ({"takes": {"A": 10}, "now": {"A": 4}, "settled": True}, {"A": 4}, 0),
        ({"takes": {"A": 10}, "now": {"A": 4}, "leaving": True}, {"A": 10}, 0),
    ],
)
def test_what_it_holds_and_will_still_take(fields, holds, promised):
    made = claim(**fields)
    assert made.promised("A") == promised
    resident = made.resident()
    assert resident.holds == holds
    assert (resident.name, resident.idle_since, resident.wanted) == ("m", 5.0, False)
