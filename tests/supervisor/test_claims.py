"""One instance that holds GPU memory, and what it was promised."""

from __future__ import annotations

import pytest

from protocol import engine_wire as wire
from supervisor.claims import Claim
from supervisor.host.work import EngineSpec, ModelSpec
from supervisor.peaks import Facts


class Lane:
    """A model that does nothing."""

    spec = ModelSpec(name="m", engine=EngineSpec(name="e", module="none", python="none"), model=wire.Model(name="m"))
    pid, idle_since = 1, 5.0


@pytest.mark.parametrize(
    ("takes", "fields", "promised"),
    [
        ({}, {}, 0),
        ({"A": 10}, {}, 10),
        ({"A": 10}, {"now": {"A": 4}}, 6),
        ({"A": 10}, {"now": {"A": 14}}, 0),
        ({"A": 10}, {"now": {"A": 4}, "settled": True}, 0),
        ({"A": 10}, {"now": {"A": 4}, "leaving": True}, 0),
    ],
)
def test_what_it_will_still_take(takes, fields, promised):
    made = Claim(Lane(), 3, ("A",), Facts(key="k"), takes)
    for name, value in fields.items():
        setattr(made, name, value)
    assert (made.promised("A"), made.promised("B")) == (promised, 0)
    assert (made.name, made.number, made.devices) == ("m", 3, ("A",))
