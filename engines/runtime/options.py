"""Load options as one struct: every name and type checked at once."""

from __future__ import annotations

import re
from typing import TypeVar

import msgspec

from engines.runtime.contract import known_options
from protocol.engine_wire import Model
from protocol.faults import refuse

_T = TypeVar("_T", bound=msgspec.Struct)
_PATH = re.compile(r" - at `\$\.?([^`]*)`$")


def options_as(model: Model, type_: type[_T]) -> _T:
    """Return the model's load options as a struct.

    Raises:
        FaultError: `load_failed`, naming `options.FIELD`.
    """
    known_options(model, type_.__struct_fields__)
    for name in type_.__struct_fields__[: _required(type_)]:
        if name not in model.options:
            raise refuse("load_failed", f"The load option {name!r} is missing.", f"options.{name}")
    try:
        return msgspec.convert(model.options, type=type_)
    except msgspec.ValidationError as error:
        text = str(error)
        found = _PATH.search(text)
        field = f"options.{found[1]}" if found and found[1] else "options"
        raise refuse("load_failed", f"{field}: {_PATH.sub('', text)}.", field) from None


def _required(type_: type[msgspec.Struct]) -> int:
    fields = msgspec.structs.fields(type_)
    return next((number for number, field in enumerate(fields) if not field.required), len(fields))
