"""The operator's argv template: items with places that the caller's values fill.

A place is `{name}` (a value of `args`), `{input:NAME}` (path of an input file), `{config}` (path of the job config
file) or `{folder}` (the attempt's folder); `{{` and `}}` are braces. A place is a part of one item and stays within
it: no value can become a second item. There is no shell anywhere.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import msgspec

from protocol.faults import refuse

_TOKEN = re.compile(r"\{\{|\}\}|\{(?P<place>[^{}]*)\}|[{}]")
_NAME = re.compile(r"(input:)?[A-Za-z_][A-Za-z0-9_-]{0,63}\Z")
OWN_PLACES = ("config", "folder")

Value = str | int | float | bool


class Place(msgspec.Struct, frozen=True):
    """One place of an item."""

    name: str


Item = tuple[str | Place, ...]


def parse(argv: Sequence[str]) -> tuple[Item, ...]:
    """Take a template apart. Raises FaultError `load_failed`, naming the item."""
    items = tuple(_parse_item(number, text) for number, text in enumerate(argv))
    if not items or items[0] == ():
        raise refuse("load_failed", "options.argv is empty: name the program.", "options.argv")
    if any(isinstance(part, Place) for part in items[0]):
        raise refuse("load_failed", "options.argv: the program itself cannot be a place.", "options.argv")
    return items


def _parse_item(number: int, text: str) -> Item:
    parts: list[str | Place] = []
    at = 0
    for match in _TOKEN.finditer(text):
        parts.append(text[at : match.start()])
        at = match.end()
        place = match["place"]
        if place is None and len(match[0]) == 2:
            parts.append(match[0][0])
        elif place is None or not _NAME.match(place):
            raise refuse(
                "load_failed",
                f"options.argv item {number}: {match[0]!r} is no place; write {{{{ for a brace.",
                "options.argv",
            )
        else:
            parts.append(Place(place))
    parts.append(text[at:])
    return tuple(part for part in parts if part != "")


def places(items: Sequence[Item]) -> set[str]:
    """Names of all places."""
    return {part.name for item in items for part in item if isinstance(part, Place)}


def render(items: Sequence[Item], value_of: Callable[[str], Value]) -> list[str]:
    """Fill every place; the result has exactly one string per item.

    Raises:
        FaultError: `invalid_parameter`: a text that begins an item begins with "-" and would pass for an option.
    """
    return [_render_item(item, value_of) for item in items]


def _render_item(item: Item, value_of: Callable[[str], Value]) -> str:
    out = ""
    for part in item:
        if isinstance(part, str):
            out += part
            continue
        value = value_of(part.name)
        text = str(value).lower() if isinstance(value, bool) else str(value)
        if not out and isinstance(value, str) and text.startswith("-") and part.name not in OWN_PLACES:
            raise refuse(
                "invalid_parameter",
                f"args.{part.name}: a value here must not start with '-', or it would pass for an option.",
                f"args.{part.name}",
            )
        out += text
    return out
