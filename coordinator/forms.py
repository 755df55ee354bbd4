"""Typed fields out of a form, where everything is text."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from coordinator.uploads import Form
from protocol.faults import refuse


def _flag(text: str) -> bool:
    words = {"true": True, "1": True, "false": False, "0": False}
    return words[text.strip().lower()]


CONVERTERS: Mapping[type, tuple[Callable[[str], Any], str]] = {
    bool: (_flag, "true or false"),
    int: (int, "a whole number"),
    float: (float, "a number"),
    str: (str, "text"),
}


def form_values(form: Form, types: Mapping[str, type], lists: Mapping[str, type] | None = None) -> dict[str, Any]:
    """Convert the form's text fields.

    Args:
        form: as it was read.
        types: field -> type of its single value.
        lists: field -> type of its values; may stand in the form as `field` or `field[]`, any number of times.

    Returns:
        What was given, by field; an empty text counts as not given. Fields of no table stay text, so that
        the route's field table refuses them by name.

    Raises:
        FaultError: invalid_parameter.
    """
    values: dict[str, Any] = {}
    for written, texts in form.fields.items():
        name = written.removesuffix("[]")
        if lists and name in lists:
            values[name] = [*values.get(name, []), *(_convert(name, text, lists[name]) for text in texts)]
            continue
        if len(texts) > 1:
            raise refuse("invalid_parameter", f"{written}: Expected one value only.", written)
        if texts[0] != "":
            values[written] = _convert(written, texts[0], types.get(written, str))
    return values


def _convert(name: str, text: str, type_: type) -> Any:
    convert, words = CONVERTERS[type_]
    try:
        return convert(text)
    except (ValueError, KeyError, OverflowError):
        raise refuse("invalid_parameter", f"{name}: Expected {words}.", name) from None
