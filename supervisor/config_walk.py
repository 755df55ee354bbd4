"""From plain values to structs, collecting every error on the way.

msgspec stops at its first error and loses dict keys and list indexes from its paths, so this walk goes down the
struct types itself and lets msgspec judge only the leaves.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import tomllib
import typing
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from supervisor.toml_lines import Path


class EnvText(str):
    """A value from an environment variable: text that may stand for a number, a boolean or a TOML value."""

    __slots__ = ()


class _Bad:
    """Stands where a value could not be made; whoever needs it leaves out the check."""

    def __repr__(self) -> str:
        return "BAD"


BAD: Any = _Bad()
Report = Callable[[Path, str], None]  # path and sentence


def dotted(path: Path) -> str:
    """`models[0].name` for ("models", 0, "name")."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}"
    return text.removeprefix(".")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` (did you mean "…"?)`, or the known words when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, 1)
    if near:
        return f' (did you mean "{near[0]}"?)'
    return f" (known: {', '.join(names)})" if names else ""


def build(value: Any, type_: Any, path: Path, report: Report) -> Any:
    """Return `value` as `type_`, or BAD; every error below is told to `report`."""
    plain = typing.get_args(type_)[0] if typing.get_origin(type_) is typing.Annotated else type_
    origin = typing.get_origin(plain)
    if isinstance(plain, type) and issubclass(plain, msgspec.Struct):
        return _struct(value, plain, path, report)
    if origin is dict:
        name, item = typing.get_args(plain)
        return _dict(value, name, item, path, report)
    if origin is list:
        return _list(value, typing.get_args(plain)[0], path, report)
    return _leaf(value, type_, path, report)


def _struct(value: Any, type_: type[msgspec.Struct], path: Path, report: Report) -> Any:
    value = opened(value)
    if not isinstance(value, dict):
        report(path, f"expected a table, got {_named(value)}")
        return BAD
    fields, hints = _fields(type_)
    for key in value.keys() - fields.keys():
        report((*path, key), f"unknown key{did_you_mean(key, fields)}")
    made: dict[str, Any] = {}
    whole = True
    for name, field in fields.items():
        if name in value:
            built = build(value[name], hints[field.name], (*path, name), report)
            if built is not BAD:
                made[field.name] = built
            else:
                whole = whole and not field.required
        elif field.required:
            report((*path, name), "is missing")
            whole = False
    return type_(**made) if whole else BAD


@functools.cache  # compiling the annotations takes 0.8 ms a struct, and every model is one
def _fields(type_: type[msgspec.Struct]) -> tuple[dict[str, msgspec.structs.FieldInfo], dict[str, Any]]:
    """The fields of a table by key, and their types by name."""
    fields = {field.encode_name: field for field in msgspec.structs.fields(type_)}
    return fields, typing.get_type_hints(type_, include_extras=True)


def _dict(value: Any, name: Any, item: Any, path: Path, report: Report) -> Any:
    value = opened(value)
    if not isinstance(value, dict):
        report(path, f"expected a table, got {_named(value)}")
        return BAD
    if typing.get_origin(name) is typing.Literal:
        for key in value.keys() - set(typing.get_args(name)):
            report((*path, key), f"unknown key{did_you_mean(key, typing.get_args(name))}")
    for key in value:
        if sentence := _unfit(key):
            report((*path, key), sentence)
    return {key: build(inner, item, (*path, key), report) for key, inner in value.items()}


def _list(value: Any, item: Any, path: Path, report: Report) -> Any:
    value = opened(value)
    if not isinstance(value, list):
        report(path, f"expected a list, got {_named(value)}")
        return BAD
    return [build(inner, item, (*path, number), report) for number, inner in enumerate(value)]


def _leaf(value: Any, type_: Any, path: Path, report: Report) -> Any:
    if isinstance(value, str) and (sentence := _unfit(value)):
        report(path, sentence)
        return BAD
    try:
        return _convert(value, type_)
    except msgspec.ValidationError as error:
        report(path, _sentence(str(error), value, type_))
        return BAD


def _unfit(text: str) -> str:
    """Why a text is none for a setting: no path, name or argument can hold it, and no message either."""
    if "\0" in text:
        return "holds a zero byte"
    return (
        ""
        if text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)
        else "is not UTF-8 text"
    )


def _convert(value: Any, type_: Any) -> Any:
    if not isinstance(value, EnvText):
        return msgspec.convert(value, type_)
    if type_ is Any:
        spoken = opened(value)
        return str(spoken) if isinstance(spoken, EnvText) else spoken
    try:
        return msgspec.convert(str(value), type_, strict=False)
    except msgspec.ValidationError:
        spoken = opened(value)
        if isinstance(spoken, EnvText):
            raise
        return msgspec.convert(spoken, type_)


def opened(value: Any) -> Any:
    """What the text of an environment variable says in TOML; anything else as it is."""
    if isinstance(value, EnvText):
        try:
            spoken = tomllib.loads(f"value = {value}")
        except (ValueError, RecursionError):  # no TOML, or a number with more digits than Python reads
            return value
        return spoken["value"] if spoken.keys() == {"value"} else value  # a second line is no setting
    return value


def _sentence(text: str, value: Any, type_: Any) -> str:
    """msgspec's message as ours: lower case, no path, and the choices of a Literal."""
    plain = typing.get_args(type_)[0] if typing.get_origin(type_) is typing.Annotated else type_
    if typing.get_origin(plain) is typing.Literal and isinstance(value, str):
        choices = [choice for choice in typing.get_args(plain) if choice]
        near = difflib.get_close_matches(value, choices, 1)
        hint = f' (did you mean "{near[0]}"?)' if near else ""
        return f'"{value}" is not one of {", ".join(choices)}{hint}'
    text = text.split(" - at `$")[0].replace("`", "")
    return text[:1].lower() + text[1:] + _cure(value, type_)


def _cure(value: Any, type_: Any) -> str:
    """What to write instead, where that is plain."""
    if isinstance(value, str) and not isinstance(value, EnvText):
        with contextlib.suppress(msgspec.ValidationError):
            msgspec.convert(value, type_, strict=False)
            return f"; write {value} without quotes"
    elif isinstance(value, int | float) and not isinstance(value, bool):
        with contextlib.suppress(msgspec.ValidationError):
            msgspec.convert(str(value), type_)
            return f'; write "{value}" in quotes'
    return ""


def _named(value: Any) -> str:
    names = {dict: "a table", list: "a list", str: "a text", EnvText: "a text", bool: "a boolean", int: "a number"}
    return names.get(type(value), type(value).__name__)
