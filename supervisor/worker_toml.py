"""Editing worker.toml as a person would: comments and order stay, the file is replaced whole or not at all.

`save` checks the result like any configuration, keeps the last five contents as worker.toml.bak1 (the newest) to
worker.toml.bak5, writes beside the file, flushes to the disk and renames. Two editors exclude each other by a lock on
the folder, and one that read an older content than stands there is refused.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import tempfile
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import tomlkit

from supervisor import toml_splice
from supervisor.config import load
from supervisor.config_layers import decoded, parsed
from supervisor.config_walk import dotted
from supervisor.errors import ConfigError, NoPermission
from supervisor.settings import CONFIG_VERSION
from supervisor.toml_lines import Path as KeyPath
from supervisor.toml_lines import statements

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
        self._before: bytes | None = None
        try:
            self.path = path.resolve()
            self._before = self.path.read_bytes()
            self._text = decoded(self.path, self._before)
            if whole:
                load(self.path)
        except FileNotFoundError:
            self._text = FRESH
        except PermissionError:
            raise NoPermission(f"{path} cannot be read; run this as its owner.") from None
        except (OSError, RuntimeError) as error:  # a folder; links that lead to themselves
            raise ConfigError([f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}"]) from None
        self._plain: dict[str, Any] = parsed(self.path, self._text)
        version = self._plain.get("config_version", CONFIG_VERSION)
        if type(version) is int and version < CONFIG_VERSION:
            raise ConfigError(
                [f"{self.path}: is of config_version {version}; first run: supervisor config migrate --write"]
            )

    @property
    def models(self) -> list[dict[str, Any]]:
        """The [[models]] entries as plain values, paths as they are written; what is no entry is left out."""
        found = self._plain.get("models", [])
        return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []

    def has_model(self, name: str) -> bool:
        """Whether an entry has this name."""
        return any(entry.get("name") == name for entry in self.models)

    def put_model(self, entry: Mapping[str, Any], comment: str = "") -> None:
        """Add a [[models]] entry, or replace the one of the same name where it stands."""
        names = [old.get("name") for old in self.models]
        number = names.index(entry["name"]) if entry["name"] in names else len(names)
        models = self._plain.setdefault("models", [])
        if any(one.path == ("models",) and not one.header for one in statements(self._text)):
            self._put_inline(number, entry)
        else:
            array = tomlkit.aot()
            array.append(_table(entry, comment))
            document = tomlkit.document()
            document["models"] = array
            self._text = toml_splice.put_item(self._text, ("models", number), tomlkit.dumps(document))
        models[number:] = [_plain(entry), *models[number + 1 :]]

    def _put_inline(self, number: int, entry: Mapping[str, Any]) -> None:
        """The same for `models = [ … ]`, which cannot be told apart into tables without losing its comments."""
        (one,) = [one for one in statements(self._text) if one.path == ("models",)]
        document: Any = tomlkit.parse(self._text[one.start : one.end])
        array = document["models"]
        if number < len(array):
            array[number] = toml_splice.inline(entry)
        else:
            array.append(toml_splice.inline(entry))
        self._text = self._text[: one.start] + tomlkit.dumps(document) + self._text[one.end :]

    def remove_model(self, name: str) -> None:
        """Take the entry out. Raises KeyError when there is none."""
        for number, old in enumerate(self.models):
            if old.get("name") == name:
                self.drop(("models", number))
                return
        raise KeyError(name)

    def set_engine(self, name: str, values: Mapping[str, Any]) -> None:
        """Set keys of [engines.NAME]; the others stay."""
        for key, value in values.items():
            self.put(("engines", name, key), value)

    def put(self, path: KeyPath, value: Any) -> None:
        """Set one value; tables on the way are made. List indexes must exist.

        Raises:
            ConfigError: something on the way is no table, or TOML has no such value.
        """
        try:
            self._text = toml_splice.put(self._text, path, value)
            plain: Any = self._plain
            for part in path[:-1]:
                plain = plain.setdefault(part, {}) if isinstance(part, str) else plain[part]
            plain[path[-1]] = value
        except ValueError as error:
            raise ConfigError([f"{dotted(path)}: {error}"]) from None
        except (TypeError, KeyError, IndexError, AttributeError):
            raise ConfigError([f"{self.path}: {dotted(path)} has no place there; mend the file by hand"]) from None

    def drop(self, path: KeyPath) -> None:
        """Take one value or table out; its default counts from then on. Raises KeyError when it is not there."""
        if _at(self._plain, path) is None:
            raise KeyError(dotted(path))
        try:
            self._text = toml_splice.drop(self._text, path)
        except (TypeError, IndexError):
            raise KeyError(dotted(path)) from None
        del _at(self._plain, path[:-1])[path[-1]]
        self._forget_empty(path[:-1])

    def _forget_empty(self, path: KeyPath) -> None:
        """A table that only its last key had made is gone with it."""
        while path:
            outer, there = _at(self._plain, path[:-1]), _at(parsed(self.path, self._text), path[:-1])
            if outer[path[-1]] or (isinstance(there, dict) and path[-1] in there):
                return
            del outer[path[-1]]
            path = path[:-1]

    def put_top_line(self, line: str) -> None:
        """Make `line` the first one, where it is not in the file yet; a `#:schema` line must stand there."""
        if line not in self._text.splitlines():
            self._text = f"{line}\n{self._text}"

    def text(self) -> str:
        """The file as it would be written, with the ends of lines that it had.

        Raises:
            ConfigError: the edit would change more than was asked (the file's layout is too unusual).
        """
        text = self._text
        if self._before is not None and b"\r\n" in self._before and b"\n" not in self._before.replace(b"\r\n", b""):
            text = text.replace("\r\n", "\n").replace("\n", "\r\n")
        try:
            after: Any = tomllib.loads(text)
            text.encode()
        except (tomllib.TOMLDecodeError, UnicodeEncodeError) as error:
            after = error
        if after != self._plain:
            raise ConfigError([f"{self.path}: its layout is too unusual to be edited safely; edit it by hand"])
        return text

    def save(self) -> None:
        """Replace the file atomically, after the new text was checked like any configuration.

        Raises:
            ChangedMeanwhile: others have written the file since it was read; theirs stands.
            ConfigError: the result would not be valid; the old file stands.
            NoPermission: the folder cannot be written.
        """
        data = self.text().encode()
        replace_whole(self.path, self._before, data, load)
        self._before = data


class ChangedMeanwhile(ConfigError):
    """Somebody else has written the file since it was read."""


def replace_whole(path: Path, before: bytes | None, data: bytes, check: Callable[[Path], object] | None = None) -> None:
    """Replace a configuration file atomically, and keep its old content as a backup.

    Args:
        before: what the caller has read there, None for no file.
        check: called with a file beside `path` that has the new content; a ConfigError of it leaves all as it was.

    Raises:
        ChangedMeanwhile: the file was changed since it was read.
        ConfigError: `check` says so.
        NoPermission: the folder cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path.parent):
            now = path.read_bytes() if path.exists() else None
            if now != before:
                text = f"{path}: was changed by another program meanwhile; nothing was written, try again"
                raise ChangedMeanwhile([text])
            if now != data:
                _replace(path, data, check)
    except OSError as error:
        raise _unwritten(path, error) from None


def _unwritten(path: Path, error: OSError) -> NoPermission:
    cures = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "free some space there; the old content stands")
    cures[errno.EBUSY] = "it is mounted by itself, so edit it where it comes from"
    cure = cures.get(error.errno or 0, "run this as its owner")
    return NoPermission(f"{path} cannot be written: {error.strerror}; {cure}.")


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
        raise _unwritten(path, error) from None


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


def _at(plain: Any, path: KeyPath) -> Any:
    """What is at a path; None for nothing."""
    for part in path:
        try:
            plain = plain[part]
        except (KeyError, IndexError, TypeError):
            return None
    return plain


def _plain(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: dict(value) if isinstance(value, Mapping) else value for key, value in entry.items()}
