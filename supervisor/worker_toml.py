"""Editing worker.toml as a person would: comments and order stay, the file is replaced whole or not at all.

`save` checks the result like any configuration, keeps the last five contents as worker.toml.bak1 (the newest) to
worker.toml.bak5, writes beside the file, flushes to the disk and renames. Two editors exclude each other by a lock on
the folder, and one that read an older content than stands there is refused.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError

from supervisor.config import load
from supervisor.config_layers import parsed
from supervisor.config_walk import dotted
from supervisor.errors import ConfigError, NoPermission
from supervisor.settings import CONFIG_VERSION
from supervisor.toml_lines import Path as KeyPath

BACKUPS = 5

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
        whole: refuse a file that is not valid as it stands; without it only the result of the edits must be.

    Raises:
        ConfigError: the file cannot be edited.
        NoPermission: it cannot be read.
    """

    def __init__(self, path: Path, *, whole: bool = True) -> None:
        self.path = path.resolve()
        self._before: bytes | None = None
        try:
            self._before = self.path.read_bytes()
            text = self._before.decode()
            if whole:
                load(self.path)
        except FileNotFoundError:
            text = FRESH
        except PermissionError:
            raise NoPermission(f"{self.path} cannot be read; run this as its owner.") from None
        except UnicodeDecodeError:
            raise ConfigError([f"{self.path}: is not UTF-8 text"]) from None
        self._plain: dict[str, Any] = parsed(self.path, text)
        version = self._plain.get("config_version", CONFIG_VERSION)
        if type(version) is int and version < CONFIG_VERSION:
            raise ConfigError(
                [f"{self.path}: is of config_version {version}; first run: supervisor config migrate --write"]
            )
        try:
            self._doc = tomlkit.parse(text)
        except TOMLKitError as error:  # pragma: no cover  tomllib has accepted it
            raise ConfigError([f"{self.path}: cannot be edited: {error}"]) from None

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

    def put(self, path: KeyPath, value: Any) -> None:
        """Set one value; tables on the way are made. List indexes must exist."""
        table: Any = self._doc
        plain: Any = self._plain
        for part in path[:-1]:
            if isinstance(part, str) and part not in table:
                table[part] = tomlkit.table()
                plain[part] = {}
            table, plain = table[part], plain[part]
        table[path[-1]] = value
        plain[path[-1]] = value

    def drop(self, path: KeyPath) -> None:
        """Take one value or table out; its default counts from then on. Raises KeyError when it is not there."""
        if len(path) == 2 and path[0] == "models":
            self.remove_model(self.models[int(path[1])]["name"])
            return
        table: Any = self._doc
        plain: Any = self._plain
        for number, part in enumerate(path):
            inside: Any = plain
            if not (isinstance(plain, list) or (isinstance(plain, dict) and part in plain)):
                raise KeyError(dotted(path))
            if number < len(path) - 1:
                table, plain = table[part], inside[part]
        del table[path[-1]], plain[path[-1]]

    def put_top_line(self, line: str) -> None:
        """Make `line` the first one, where it is not in the file yet; a `#:schema` line must stand there."""
        text = tomlkit.dumps(self._doc)
        if line not in text.splitlines():
            self._doc = tomlkit.parse(f"{line}\n{text}")

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
            ConfigError: the result would not be valid, or the file was changed by others since it was read; the old
                file stands.
            NoPermission: the folder cannot be written.
        """
        data = self.text().encode()
        replace_whole(self.path, self._before, data, load)
        self._before = data


def replace_whole(path: Path, before: bytes | None, data: bytes, check: Callable[[Path], object] | None = None) -> None:
    """Replace a configuration file atomically, and keep its old content as a backup.

    Args:
        before: what the caller has read there, None for no file.
        check: called with a file beside `path` that has the new content; a ConfigError of it leaves all as it was.

    Raises:
        ConfigError: the file was changed since it was read, or `check` says so.
        NoPermission: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent):
            now = path.read_bytes() if path.exists() else None
            if now != before:
                raise ConfigError([f"{path}: was changed by another program meanwhile; nothing was written, try again"])
            if now != data:
                _replace(path, data, check)
    except OSError as error:
        raise NoPermission(f"{path} cannot be written: {error.strerror}; run this as its owner.") from None


def _replace(path: Path, data: bytes, check: Callable[[Path], object] | None) -> None:
    new = _written(path, f".{path.name}-", data)
    try:
        if check is not None:
            check(new)
        if path.exists():
            _keep(path)
        new.replace(path)
        _flush(path.parent)
    except ConfigError as error:
        raise ConfigError([line.replace(str(new), str(path)) for line in error.problems]) from None
    finally:
        new.unlink(missing_ok=True)


def _keep(path: Path) -> None:
    """Keep the content of `path` as the newest backup."""
    kept = [path.with_name(f"{path.name}.bak{number}") for number in range(1, BACKUPS + 1)]
    for older, newer in zip(reversed(kept[1:]), reversed(kept[:-1]), strict=True):
        if newer.exists():
            newer.replace(older)
    _written(path, f".{path.name}.bak-", path.read_bytes()).replace(kept[0])


def put_beside(path: Path, data: bytes) -> None:
    """Write a file whole or not at all, for programs that read it beside worker.toml.

    Raises:
        NoPermission: the folder cannot be written.
    """
    try:
        _written(path, f".{path.name}-", data).replace(path)
    except OSError as error:
        raise NoPermission(f"{path} cannot be written: {error.strerror}; run this as its owner.") from None


def _written(path: Path, prefix: str, data: bytes) -> Path:
    """A new file beside `path`, flushed to the disk, with the mode and the owner of `path`."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=prefix)
    new = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        new.chmod(path.stat().st_mode & 0o777 if path.exists() else 0o644)
        if path.exists() and hasattr(os, "geteuid") and os.geteuid() == 0:  # an edit by root leaves it its owner's
            os.chown(new, path.stat().st_uid, path.stat().st_gid)
    except BaseException:
        new.unlink(missing_ok=True)
        raise
    return new


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder against other editors of ours; they wait."""
    if sys.platform == "win32":  # the comparison of contents still finds most races
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _flush(folder: Path) -> None:
    """Make a rename last through a power cut; a folder cannot be opened on Windows, where the rename is enough."""
    with contextlib.suppress(PermissionError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


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
