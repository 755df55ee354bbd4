"""Typed values out of texts."""

from __future__ import annotations

import pytest

from coordinator.forms import form_values
from coordinator.uploads import Form
from protocol.faults import FaultError

TYPES = {"n": int, "f": float, "b": bool}


def values(**fields: list[str]) -> dict[str, object]:
    return form_values(Form(fields, {}), TYPES, {"many": str})


def test_texts_become_values() -> None:
    form = Form({"n": ["3"], "f": ["1e-1"], "b": ["True"], "s": ["x"], "empty": [""], "many[]": ["p", "q"]}, {})
    assert form_values(form, TYPES, {"many": str}) == {"n": 3, "f": 0.1, "b": True, "s": "x", "many": ["p", "q"]}


@pytest.mark.parametrize(
    "fields", [{"n": ["x"]}, {"n": ["1.5"]}, {"f": [""" """]}, {"b": ["maybe"]}, {"n": ["1", "2"]}, {"n": ["9" * 5000]}]
)
def test_refusals_name_the_field(fields: dict[str, list[str]]) -> None:
    with pytest.raises(FaultError) as caught:
        values(**fields)
    assert caught.value.fault.field == next(iter(fields))
