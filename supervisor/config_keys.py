"""Names of single settings: `limits.stall_s`, `models.chat.vram_gb`, `models[0].device`, `engines.llm.options.n_ctx`.

A model goes by its name or by its index; a part with characters other than letters, digits, `_` and `-` is quoted as
in TOML (`models."llama-3.1".device`).
"""

from __future__ import annotations

import re
import tomllib
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from supervisor.config_walk import EnvText, build, did_you_mean, dotted, opened
from supervisor.errors import ConfigError
from supervisor.settings import Settings
from supervisor.toml_lines import Path as KeyPath

_BARE = re.compile(r"[A-Za-z0-9_-]+\Z")


def parse_key(text: str) -> tuple[str, ...]:
    """Take a key apart.

    Raises:
        ConfigError: it is no key.
    """
    plain = text if '"' in text or "'" in text else re.sub(r"\[(\d+)\]", r".\1", text)
    try:
        value: Any = tomllib.loads(f"{plain} = 0") if "\n" not in plain and "=" not in plain else None
    except tomllib.TOMLDecodeError:
        value = None
    parts: list[str] = []
    while isinstance(value, dict):
        ((part, value),) = value.items()
        parts.append(part)
    if not parts:
        raise ConfigError([f'{text}: is no key; write one like limits.stall_s or models."my model".device'])
    return tuple(parts)


def written(parts: Sequence[str | int]) -> str:
    """The key as `parse_key` reads it."""
    text = [
        str(part) if isinstance(part, int) or _BARE.match(part) else msgspec.json.encode(part).decode()
        for part in parts
    ]
    return ".".join(text)


def locate(parts: Sequence[str], models: Any) -> KeyPath:
    """Put the index in the place of a model's name.

    Args:
        parts: from `parse_key`.
        models: the plain `[[models]]` entries, or whatever the file has in their place.

    Raises:
        ConfigError: there is no such model.
    """
    if parts[0] != "models" or len(parts) == 1:
        return tuple(parts)
    models = models if isinstance(models, list) else []
    names = [str(entry.get("name", "")) if isinstance(entry, dict) else "" for entry in models]
    if parts[1] in names:
        return ("models", names.index(parts[1]), *parts[2:])
    if parts[1].isdecimal() and int(parts[1]) < len(models):
        return ("models", int(parts[1]), *parts[2:])
    raise ConfigError([f'{written(parts)}: there is no model "{parts[1]}"{did_you_mean(parts[1], names)}'])


def type_at(path: KeyPath) -> Any:
    """The type of the setting at `path`; Any below free tables.

    Raises:
        ConfigError: there is no such setting.
    """
    type_: Any = Settings
    for number, part in enumerate(path):
        plain = typing.get_args(type_)[0] if typing.get_origin(type_) is typing.Annotated else type_
        origin = typing.get_origin(plain)
        if isinstance(plain, type) and issubclass(plain, msgspec.Struct):
            hints = typing.get_type_hints(plain, include_extras=True)
            if part not in hints:
                raise ConfigError([f"{dotted(path[: number + 1])}: unknown key{did_you_mean(str(part), hints)}"])
            type_ = hints[str(part)]
        elif origin is dict:
            type_ = typing.get_args(plain)[1]
        elif origin is list and (isinstance(part, int) or part.isdecimal()):
            type_ = typing.get_args(plain)[0]
        elif plain is not Any:
            raise ConfigError([f"{dotted(path[: number + 1])}: {dotted(path[:number])} has no keys of its own"])
    return type_


def is_table(type_: Any) -> bool:
    """Whether settings of this type are tables, or lists of tables, that are set key by key."""
    if typing.get_origin(type_) is list:
        return is_table(typing.get_args(type_)[0])
    return isinstance(type_, type) and issubclass(type_, msgspec.Struct)


def value_of(path: KeyPath, text: str) -> Any:
    """What `text`, typed by a person, says for the setting at `path`: a TOML value, or bare text.

    Raises:
        ConfigError: it does not fit.
    """
    type_ = type_at(path)
    if is_table(type_):
        raise ConfigError([f"{dotted(path)}: is a table; set its keys one by one"])
    spoken = opened(EnvText(text))
    candidates = [text] if isinstance(spoken, EnvText) else [spoken, text]
    problems: list[list[str]] = []
    for candidate in candidates:
        problems.append(_misfits(candidate, type_, path))
        if not problems[-1]:
            return candidate
    raise ConfigError(problems[-1 if _is_text(type_) else 0])  # "inf" is a number in TOML, and no level of a log


def _is_text(type_: Any) -> bool:
    plain = typing.get_args(type_)[0] if typing.get_origin(type_) is typing.Annotated else type_
    return plain is str or typing.get_origin(plain) is typing.Literal


def _misfits(value: Any, type_: Any, path: KeyPath) -> list[str]:
    found: list[str] = []
    build(value, type_, path, lambda at, sentence: found.append(f"{dotted(at)}: {sentence}"))
    return found


def leaves(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Each single value of plain settings, with its path; an empty table is a value, too."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from leaves(inner, (*path, key))
    elif isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        for number, inner in enumerate(value):
            yield from leaves(inner, (*path, number))
    else:
        yield path, value
