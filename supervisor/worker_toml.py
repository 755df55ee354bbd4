"""Editing worker.toml as a person would: comments and order stay, the file is replaced whole or not at all."""

from __future__ import annotations

import os
import tempfile
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from supervisor.config import load
from supervisor.errors import ConfigError, NoPermission

FRESH = """\
# Bulkhead worker. Every key has a default; unknown keys are errors. `supervisor run` reads this file.
config_version = 1

[coordinator]
url = "embedded"            # or wss://… of a coordinator elsewhere
listen = "127.0.0.1:8080"
"""


class WorkerToml:
    """One worker.toml, open for edits; nothing is written before `save`.

    Args:
        path: a file that does not exist yet begins with defaults.

    Raises:
        ConfigError: the file is not valid as it stands.
        NoPermission: it cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path.resolve()
        try:
            text = self.path.read_bytes().decode()
            load(self.path)
        except FileNotFoundError:
            text = FRESH
        except PermissionError:
            raise NoPermission(f"{self.path} cannot be read; run this as its owner.") from None
        except UnicodeDecodeError:
            raise ConfigError([f"{self.path}: is not UTF-8 text"]) from None
        try:
            self._doc = tomlkit.parse(text)
        except TOMLKitError as error:  # pragma: no cover  tomllib has accepted it
            raise ConfigError([f"{self.path}: cannot be edited: {error}"]) from None
        self._plain: dict[str, Any] = tomllib.loads(text)

    @property
    def models(self) -> list[dict[str, Any]]:
        """The [[models]] entries as plain values, paths as they are written."""
        found: list[dict[str, Any]] = self._plain.get("models", [])
        return found

    def has_model(self, name: str) -> bool:
        """Whether an entry has this name."""
        return any(entry.get("name") == name for entry in self.models)

    def put_model(self, entry: Mapping[str, Any], comment: str = "") -> None:
        """Add a [[models]] entry, or replace the one of the same name where it stands."""
        table = _table(entry, comment)
        array = self._models()
        for number, old in enumerate(array):
            if old.get("name") == entry["name"]:
                array[number] = table
                self._plain["models"][number] = _plain(entry)
                return
        table.trivia.indent = "\n"  # an empty line before it
        array.append(table)
        self._plain.setdefault("models", []).append(_plain(entry))

    def remove_model(self, name: str) -> None:
        """Take the entry out. Raises KeyError when there is none."""
        array = self._models()
        for number, old in enumerate(array):
            if old.get("name") == name:
                del array[number]
                del self._plain["models"][number]
                if not self._plain["models"]:
                    del self._plain["models"], self._doc["models"]
                return
        raise KeyError(name)

    def set_engine(self, name: str, values: Mapping[str, Any]) -> None:
        """Set keys of [engines.NAME]; the others stay."""
        if "engines" not in self._doc:
            self._doc["engines"] = tomlkit.table(is_super_table=True)
        engines: Any = self._doc["engines"]
        if name not in engines:
            engines[name] = tomlkit.table()
        plain = self._plain.setdefault("engines", {}).setdefault(name, {})
        for key, value in values.items():
            engines[name][key] = value
            plain[key] = value

    def _models(self) -> Any:
        """The array of tables; `models = []` and an inline array become one."""
        found = self._doc.get("models")
        if isinstance(found, tomlkit.items.AoT):
            return found
        array = tomlkit.aot()
        for entry in found.unwrap() if found is not None else []:
            array.append(_table(entry, ""))
        if found is not None:
            del self._doc["models"]
        self._doc["models"] = array
        return self._doc["models"]

    def text(self) -> str:
        """The file as it would be written.

        Raises:
            ConfigError: the edit would change more than was asked (the file's layout is too unusual).
        """
        text = tomlkit.dumps(self._doc)
        try:
            after: Any = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            after = error
        if after != self._plain:
            raise ConfigError([f"{self.path}: its layout is too unusual to be edited safely; edit it by hand"])
        return text

    def save(self) -> None:
        """Replace the file atomically, after the new text was checked like any configuration.

        Raises:
            ConfigError: the result would not be valid; the old file stands.
            NoPermission: the folder cannot be written.
        """
        text = self.text()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.path.parent, prefix=f".{self.path.name}-")
        except OSError as error:
            raise NoPermission(f"{self.path} cannot be written: {error.strerror}; run this as its owner.") from None
        new = Path(name)
        try:
            with os.fdopen(handle, "w") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            new.chmod(self.path.stat().st_mode & 0o777 if self.path.exists() else 0o644)
            load(new)
            new.replace(self.path)
        except ConfigError as error:
            raise ConfigError([line.replace(str(new), str(self.path)) for line in error.problems]) from None
        finally:
            new.unlink(missing_ok=True)


def _table(entry: Mapping[str, Any], comment: str) -> Any:
    table = tomlkit.table()
    for key, value in entry.items():
        if isinstance(value, Mapping):
            inline = tomlkit.inline_table()
            inline.update(value)
            table.add(key, inline)
        else:
            table.add(key, value)
    if comment:
        table.comment(" ".join(comment.split()))
    return table


def _plain(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: dict(value) if isinstance(value, Mapping) else value for key, value in entry.items()}
