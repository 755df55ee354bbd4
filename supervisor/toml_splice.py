"""Changing single statements of a TOML text; every other byte of it stays, comments and order included.

A statement (toml_lines.py) that holds the value is edited in place by tomlkit, which sees nothing but that statement.
A new key goes behind the last one of its table, a new table to the end. Whatever the layout of a file is, the caller
compares the values before and after, so that an edit which would change more than was asked is never written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import tomlkit

from supervisor.config_keys import written
from supervisor.toml_lines import Path, Statement, statements


def put(text: str, path: Path, value: Any) -> str:
    """Set one value; tables on the way are made.

    Raises:
        TypeError, KeyError, IndexError: something on the way is no table, or a list without that item.
        ValueError: TOML has no such value.
    """
    found = statements(text)
    for one in found:
        if not one.header and path[: len(one.path)] == one.path:
            return _within(text, one, path[len(one.table) :], inline(value))
    if isinstance(value, Mapping):
        if any(one.path[: len(path)] == path for one in found):
            text = drop(text, path)
        for key, inner in value.items():
            text = put(text, (*path, key), inner)
        if value:
            return text
    return _with_new(text, statements(text), path, inline(value))


def drop(text: str, path: Path) -> str:
    """Take a value or a table out; comments between its lines go along, those around it stay.

    Raises:
        KeyError, IndexError, TypeError: it is not there.
    """
    found = statements(text)
    for one in found:
        if not one.header and path[: len(one.path)] == one.path and path != one.path:
            return _within(text, one, path[len(one.table) :], None)
    runs = _runs(found, path)
    if not runs:
        raise KeyError(path)
    for first, last in reversed(runs):
        text = _closed(text[: first.start], text[last.end :])
    return text


def put_item(text: str, path: Path, entry: str) -> str:
    """Replace item `path` of an array of tables by `entry`, its own text; behind the last item, where it is new."""
    runs = _runs(statements(text), path)
    if runs:
        start = runs[0][0].start
        for first, last in reversed(runs[1:]):
            text = _closed(text[: first.start], text[last.end :])
        return text[:start] + entry + text[runs[0][1].end :]
    items = [one for one in statements(text) if one.path[: len(path) - 1] == path[:-1]]
    at = items[-1].end if items else len(text)
    return _inserted(text, at, f"\n{entry}")


def inline(value: Any) -> Any:
    """The value for one line. Raises ValueError for what TOML does not have."""
    if isinstance(value, Mapping):
        table = tomlkit.inline_table()
        for key, inner in value.items():
            table.append(key, inline(inner))
        return table
    if isinstance(value, list | tuple):
        array = tomlkit.array()
        array.extend([inline(item) for item in value])
        return array
    if isinstance(value, float) and value != value:
        raise ValueError("nan is no setting")
    if isinstance(value, str) and any(0xD800 <= ord(character) <= 0xDFFF for character in value):
        raise ValueError("holds half a character, which no file in UTF-8 can hold")
    try:
        return tomlkit.item(value)
    except Exception as error:  # tomlkit has errors of several trees for it
        raise ValueError(f"TOML has no {type(value).__name__}") from error


def _within(text: str, one: Statement, path: Path, value: Any) -> str:
    """Set a value inside a statement, or take it out when it is None. `path` begins at the statement's table."""
    document = tomlkit.parse(text[one.start : one.end])
    here: Any = document
    for part in path[:-1]:
        if isinstance(part, str) and isinstance(here, dict) and part not in here and value is not None:
            here[part] = tomlkit.inline_table()
        here = here[part]
    if value is None:
        del here[path[-1]]
    else:
        here[path[-1]] = value
    return text[: one.start] + tomlkit.dumps(document) + text[one.end :]


def _with_new(text: str, found: list[Statement], path: Path, value: Any) -> str:
    """A value that no statement has yet."""
    parent = path[:-1]
    spoken = value.as_string()
    header = next((one for one in found if one.header and one.path == parent), None)
    if header is not None or not parent:
        own = [one for one in found if one.table == parent]
        line = f"{written(path[len(parent) :])} = {spoken}\n"
        return _inserted(text, own[-1].end, line) if own else _on_top(text, found, line)
    # Keys like `limits.stall_s = 1` have made the table already: it must not have a header.
    dotted = [one for one in found if not one.header and _made_by(one, parent)]
    if dotted:
        last = dotted[-1]
        return _inserted(text, last.end, f"{written(path[len(last.table) :])} = {spoken}\n")
    lines = f"\n[{written([part for part in parent if isinstance(part, str)])}]\n{written(path[-1:])} = {spoken}\n"
    item = next((number for number, part in enumerate(parent) if isinstance(part, int)), None)
    if item is None:
        return _inserted(text, len(text), lines)
    same = [one for one in found if one.path[: item + 1] == parent[: item + 1]]
    if not same:
        raise IndexError(path)
    return _inserted(text, same[-1].end, lines)


def _made_by(one: Statement, table: Path) -> bool:
    """Whether the dotted key of a statement makes this table."""
    return len(one.table) < len(table) < len(one.path) and one.path[: len(table)] == table


def _on_top(text: str, found: list[Statement], line: str) -> str:
    """A key of no table, where there is none yet: it must be above all headers and their comments."""
    if not found:
        return _inserted(text, len(text), line)
    at = found[0].start
    comment = re.search(r"(?:^[ \t]*#[^\n]*\n)+\Z", text[:at], re.MULTILINE)
    if comment and comment.start():
        at = comment.start()
    return _inserted(text, at, f"{line}\n")


def _runs(found: list[Statement], path: Path) -> list[tuple[Statement, Statement]]:
    """First and last of each row of statements below `path`, with none of others between them."""
    runs: list[tuple[Statement, Statement]] = []
    before = -2
    for number, one in enumerate(found):
        if one.path[: len(path)] != path:
            continue
        runs = [*runs[:-1], (runs[-1][0], one)] if number == before + 1 else [*runs, (one, one)]
        before = number
    return runs


def _inserted(text: str, at: int, lines: str) -> str:
    head, tail = text[:at], text[at:]
    if head and not head.endswith("\n"):
        head += "\n"
    return head + (lines.lstrip("\n") if not head else lines) + tail


def _closed(head: str, tail: str) -> str:
    """Both parts of a text, with no more empty lines between them than before one of them."""
    if not head.strip() or head.endswith(("\n\n", "\r\n\r\n")):
        tail = re.sub(r"\A(?:[ \t]*\r?\n)+", "", tail)
    return head + tail
