"""The sources of a configuration, laid over each other, with the place that each value came from.

Weakest first: the defaults of settings.py, worker.toml, the drop-ins `conf.d/*.toml` beside it in the order of their
names, the environment (`BULKHEAD__SECTION__KEY`). How a drop-in is laid over what is below it:

- a table key by key;
- `[[models]]` by name: an entry of a known name is laid over that model, any other is one more model;
- everything else, lists included, as a whole.

A file of an older `config_version` is read as the migrated text (config_migrate.py); the file itself stays as it is.
"""

from __future__ import annotations

import codecs
import hashlib
import os
import re
import stat
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from supervisor.config_walk import EnvText
from supervisor.errors import ConfigError
from supervisor.settings import CONFIG_VERSION
from supervisor.toml_lines import Path as KeyPath
from supervisor.toml_lines import key_lines, line_of

# A hundred times the largest that was seen; tomllib takes seconds for each 10 MB.
MAX_BYTES = 2 * 2**20
ENV_PREFIX = "BULKHEAD__"
DROP_INS = "conf.d"


@dataclass(frozen=True)
class Source:
    """Where a value came from: a place in a file, or a variable.

    Attributes:
        kind: "file" or "env".
        name: path of the file, or name of the variable.
        line: from 1, in a file; 0 where it is not known.
        rank: 0 for the environment, then the files from the weakest on; orders the reports.
    """

    kind: str
    name: str
    line: int = 0
    rank: int = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.line}" if self.line else self.name


@dataclass
class Layers:
    """All sources as one document.

    Attributes:
        files: what was read, weakest first.
        raw: the merged document; values of the environment are `EnvText`.
        notes: sentences about what works and should be mended all the same.
        problems: what has no place in the document.
        etag: sha256 over names and contents of the files.
    """

    files: list[Path]
    raw: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    etag: str = ""
    _places: dict[KeyPath, Source] = field(default_factory=dict)
    _variables: dict[KeyPath, Source] = field(default_factory=dict)

    def blame(self, path: KeyPath) -> Source:
        """Whom a problem at `path` belongs to: a variable, the nearest line, else the first file."""
        place = self._nearest(path)
        for known, variable in self._variables.items():
            # The value itself, or a parent of it, came from a variable; or only a variable made this parent.
            if path[: len(known)] == known or (place is None and known[: len(path)] == path):
                return variable
        return place or Source("file", str(self.files[0]), rank=1)

    def origin(self, path: KeyPath) -> Source | None:
        """Where the value at `path` was given; None means that it is a default."""
        for known, variable in self._variables.items():
            if path[: len(known)] == known:
                return variable
        here: Any = self.raw
        for part in path:
            try:
                here = here[part]
            except (KeyError, IndexError, TypeError):
                return None
        return self._nearest(path)

    def _nearest(self, path: KeyPath) -> Source | None:
        for end in range(len(path), 0, -1):
            if path[:end] in self._places:
                return self._places[path[:end]]
        return None

    # ---- laying one over the other

    def lay_file(self, path: Path, text: str, raw: dict[str, Any]) -> None:
        """Lay a file over what is there."""
        models, indexes = raw.get("models"), None
        if isinstance(models, list) and isinstance(self.raw.get("models"), list):
            indexes = self._lay_models(models)
            raw = {key: value for key, value in raw.items() if key != "models"}
        self._lay(self.raw, raw, ())
        rank = self.files.index(path) + 1
        for key, line in key_lines(text).items():
            if indexes is not None and len(key) > 1 and key[0] == "models" and isinstance(key[1], int):
                key = ("models", indexes[key[1]], *key[2:])
            self._places[key] = Source("file", str(path), line, rank)

    def _lay_models(self, models: list[Any]) -> list[int]:
        """Returns the index that each entry has in the whole."""
        known = self.raw["models"]
        names = {entry.get("name"): index for index, entry in enumerate(known) if isinstance(entry, dict)}
        indexes = []
        for entry in models:
            name = entry.get("name") if isinstance(entry, dict) else None
            # Taken out once used: a name that one file gives twice is a mistake that must stay visible.
            index = names.pop(name, None) if isinstance(name, str) else None
            if index is None:
                known.append(entry)
                indexes.append(len(known) - 1)
            else:
                self._lay(known[index], entry, ("models", index))
                indexes.append(index)
        return indexes

    def _lay(self, under: dict[str, Any], over: dict[str, Any], at: KeyPath) -> None:
        for key, value in over.items():
            if isinstance(value, dict) and isinstance(under.get(key), dict):
                self._lay(under[key], value, (*at, key))
            else:
                if key in under:
                    whole = (*at, key)
                    self._places = {k: v for k, v in self._places.items() if k[: len(whole)] != whole}
                under[key] = value

    def lay_environment(self, environ: Mapping[str, str]) -> None:
        """Lay the environment's values over the files'."""
        for variable, text in sorted(environ.items()):
            if not variable.startswith(ENV_PREFIX):
                continue
            parts = [part.lower() for part in variable.removeprefix(ENV_PREFIX).split("__")]
            try:
                path = _put(self.raw, parts, EnvText(text))
            except (TypeError, ValueError, IndexError):
                self.problems.append(f"{variable}: there is no place {'.'.join(parts)} in the configuration")
            else:
                self._variables[path] = Source("env", variable)


def drop_ins(path: Path) -> list[Path]:
    """The drop-ins that belong to the file at `path`, weakest first; hidden files are not among them."""
    return sorted(file for file in (path.parent / DROP_INS).glob("*.toml") if not file.name.startswith("."))


def read_layers(path: Path, environ: Mapping[str, str]) -> Layers:
    """Read worker.toml at `path` with its drop-ins and the environment.

    Raises:
        ConfigError: files that cannot be read, are not TOML, or are of a version that this program does not know.
    """
    layers = Layers([path, *drop_ins(path)])
    problems = _no_folder(path.parent / DROP_INS)
    digest = hashlib.sha256()
    for file in layers.files:
        try:
            if not stat.S_ISREG(file.stat().st_mode):  # a pipe would keep us waiting for ever
                raise ConfigError([f"{file}: cannot be read: it is not a plain file"])
            data = file.read_bytes()
            digest.update(f"{file.name}\0{len(data)}\0".encode() + data)
            text, raw = _read(file, data, layers.notes)
        except OSError as error:
            problems.append(f"{file}: cannot be read: {error.strerror}")
        except ConfigError as error:
            problems += error.problems
        else:
            if file != path and type(raw.get("config_version")) is int:
                del raw["config_version"]
            layers.lay_file(file, text, raw)
    if problems:
        raise ConfigError(problems)
    layers.etag = digest.hexdigest()
    layers.lay_environment(environ)
    return layers


def _no_folder(path: Path) -> list[str]:
    """Why the drop-ins cannot be looked for: silence would leave settings out that somebody counts on."""
    try:
        os.listdir(path)
    except OSError as error:
        if os.path.lexists(path):
            return [f"{path}: cannot be read as a folder: {error.strerror}"]
    return []


def _read(path: Path, data: bytes, notes: list[str]) -> tuple[str, dict[str, Any]]:
    text = decoded(path, data)
    raw = parsed(path, text)
    version = raw.get("config_version", CONFIG_VERSION)
    if type(version) is not int or version == CONFIG_VERSION:
        return text, raw
    from supervisor.config_migrate import migrate  # tomlkit, which reading needs for old files only

    text = migrate(path, text).text
    notes.append(
        f"{path}: config_version {version} is read as {CONFIG_VERSION}; "
        "run `supervisor config migrate --write` to rewrite the file"
    )
    return text, parsed(path, text)


def decoded(path: Path, data: bytes) -> str:
    """The text of a file. Raises ConfigError when it is not UTF-8, begins with a mark, or is too long."""
    if len(data) > MAX_BYTES:
        raise ConfigError([f"{path}: has {len(data)} bytes, more than {MAX_BYTES}; that is no configuration"])
    if data.startswith(codecs.BOM_UTF8):
        raise ConfigError([f"{path}:1: begins with a byte order mark; save it as UTF-8 without one"])
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        column = error.start - data.rfind(b"\n", 0, error.start)
        raise ConfigError([f"{path}:{line}: column {column}: is not UTF-8 text; save it as UTF-8"]) from None


def parsed(path: Path, text: str) -> dict[str, Any]:
    """The document in a text. Raises ConfigError, with the place, when it is not TOML."""
    try:
        return tomllib.loads(text)
    except RecursionError:
        raise ConfigError([f"{path}: is nested too deeply"]) from None
    except ValueError as error:  # of tomllib, and of numbers with more digits than Python reads
        message = str(error).split("; use sys.")[0]
    found = re.search(r" \(at line (\d+), column (\d+)\)", message)
    if found is None:  # tomllib says "(at end of document)"
        raise ConfigError([f"{path}:{len(text.splitlines()) or 1}: {message}"])
    raise ConfigError([f"{path}:{found[1]}: column {found[2]}: {message[: found.start()]}"])


def version_line(text: str) -> int:
    """Line of `config_version`."""
    return line_of(("config_version",), key_lines(text)) or 0


def _put(raw: dict[str, Any], parts: list[str], value: EnvText) -> KeyPath:
    """Set `value` at `parts` within `raw`. Keys are matched without regard to case."""
    here: Any = raw
    path: KeyPath = ()
    for number, part in enumerate(parts):
        key: str | int = part
        if isinstance(here, list):
            if not (part.isascii() and part.isdecimal()):
                raise ValueError(part)
            key = int(part)
            here[key]  # an index that does not exist is an error, not a new item
        elif isinstance(here, dict):
            if not part:
                raise ValueError("an empty part")
            key = next((known for known in here if known.lower() == part), part)
        else:
            raise TypeError(part)
        path = (*path, key)
        if number == len(parts) - 1:
            here[key] = value
        else:
            here = here.setdefault(key, {}) if isinstance(here, dict) else here[key]
    return path
