"""Load options as a struct: every mistake is named."""

from __future__ import annotations

from typing import Annotated

import msgspec
import pytest

from engines.runtime.options import options_as
from protocol.engine_wire import Model
from protocol.faults import FaultError


class Inner(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    deep: int = 0


class Options(msgspec.Struct):
    first: str
    slots: Annotated[int, msgspec.Meta(ge=1)] = 1
    inner: Inner = Inner()


def test_good_options():
    found = options_as(Model(name="m", options={"first": "x", "inner": {"deep": 3}}), Options)
    assert (found.first, found.slots, found.inner.deep) == ("x", 1, 3)


@pytest.mark.parametrize(
    ("options", "field", "words"),
    [
        ({}, "options.first", "is missing"),
        ({"first": 1}, "options.first", "Expected `str`"),
        ({"first": "x", "slots": 0}, "options.slots", ">= 1"),
        ({"first": "x", "slotz": 0}, "options.slotz", "known options: first, inner, slots"),
        ({"first": "x", "inner": {"deep": "y"}}, "options.inner.deep", "Expected `int`"),
        ({"first": "x", "inner": {"deeper": 1}}, "options.inner", "deeper"),
    ],
)
def test_bad_options_are_named(options, field, words):
    with pytest.raises(FaultError) as caught:
        options_as(Model(name="m", options=options), Options)
    fault = caught.value.fault
    assert (fault.code, fault.field) == ("load_failed", field)
    assert words in fault.message
