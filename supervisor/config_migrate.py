"""Bringing a worker.toml of an older `config_version` to this one.

A step takes the document of version n to version n + 1. It is a pure function over a `Draft`, whose verbs keep
comments, order and lines, so that a migrated file still looks like its owner's. A step only says what it changed; the
version number is raised here. Reading an old file migrates its text in memory (config_layers.py); `supervisor config
migrate` shows the difference, and writes it when told.

To add a step: raise `CONFIG_VERSION` in settings.py, write `_from_N`, put it into `STEPS`, add its two texts to the
test. Steps that were released are never edited.

Version 0 was never released: it has the names of early drafts, and keeps this machinery in use and tested.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.container import Container
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import AbstractTable, AoT, Array, SingleKey, Table

from supervisor.config_layers import decoded, parsed, version_line
from supervisor.errors import ConfigError
from supervisor.settings import CONFIG_VERSION


@dataclass(frozen=True)
class Migrated:
    """A migrated text.

    Attributes:
        before: the old text.
        text: the new text; the old one when nothing was to do.
        version: what the file was before.
        changes: one sentence for each change.
    """

    before: str
    text: str
    version: int
    changes: tuple[str, ...] = ()


class Draft:
    """A parsed file under migration.

    Attributes:
        changes: sentences about what was changed.
        clashes: sentences about old keys that stand beside their new names.
    """

    def __init__(self, document: tomlkit.TOMLDocument) -> None:
        self._document = document
        self.changes: list[str] = []
        self.clashes: list[str] = []

    def rename(self, *keys: str, to: str, convert: Callable[[Any], Any] | None = None) -> None:
        """Give the last of `keys` a new name where it stands, if it is there; `convert` changes its value, too.

        A list on the way means: in each of its tables.
        """
        *parents, old = keys
        shown = ".".join(keys)
        for body in self._bodies(self._document, parents):
            names = [key.key if key is not None else None for key, _ in body]
            if old not in names:
                continue
            if to in names:
                self.clashes.append(f"{shown}: its new name is {to}, which is there as well; keep one of them")
                continue
            for number, (key, item) in enumerate(body):
                if names[number] == old:
                    _forget_names(item)
                    new = SingleKey(to, sep=" = ")
                    new._dotted = key.is_dotted()
                    body[number] = (new, _same_trivia(convert(item.unwrap()), item) if convert else item)
            self.changes.append(f"{shown} is now {to}")

    def set_version(self, version: int) -> None:
        """Write `config_version`; at the top when it was not there."""
        item = self._document.get("config_version")
        if item is None:
            self._document.body.insert(0, (SingleKey("config_version"), tomlkit.item(version)))
            return
        for number, (key, item) in enumerate(self._document.body):
            if key is not None and key.key == "config_version":
                self._document.body[number] = (key, _same_trivia(version, item))

    def _bodies(self, container: Container, keys: list[str]) -> Iterator[list[Any]]:
        """The entries of each table at `keys`, in their order; what is changed there is what is written.

        Entries rather than tomlkit's views: a table whose parts stand apart is one view, which cannot be edited, but
        several entries.
        """
        if not keys:
            yield container.body
            return
        for key, item in container.body:
            if key is not None and key.key == keys[0]:
                tables = item.body if isinstance(item, AoT) else list(item) if isinstance(item, Array) else [item]
                for table in tables:
                    if isinstance(table, AbstractTable):
                        yield from self._bodies(table.value, keys[1:])


def _forget_names(item: Any) -> None:
    """Let the headers of a table and of those below it be made anew, from the keys that they have now."""
    if isinstance(item, AoT):
        for table in item.body:
            _forget_names(table)
    elif isinstance(item, Table):
        item.display_name = None
        for _, inner in item.value.body:
            _forget_names(inner)


def _same_trivia(value: Any, old: Any) -> Any:
    """`value` as an item with the white space and the comment of `old`."""
    item: Any = tomlkit.item(value)
    item.trivia.indent, item.trivia.comment_ws = old.trivia.indent, old.trivia.comment_ws
    item.trivia.comment, item.trivia.trail = old.trivia.comment, old.trivia.trail
    return item


def _from_0(draft: Draft) -> None:
    draft.rename("supervisor", to="worker")
    draft.rename("coordinator", "address", to="url")
    draft.rename("limits", "drain_timeout_s", to="drain_s")
    draft.rename("limits", "idle_unload_min", to="keep_alive_s", convert=lambda minutes: minutes * 60)
    draft.rename("models", "modality", to="kinds", convert=lambda kind: [kind])


STEPS: tuple[Callable[[Draft], None], ...] = (_from_0,)


def migrate(path: Path, text: str) -> Migrated:
    """Return `text`, the content of `path`, as a text of this program's version.

    Raises:
        ConfigError: its version is unknown here, or a key stands beside its new name.
    """
    version = parsed(path, text).get("config_version", CONFIG_VERSION)
    if type(version) is not int or version == CONFIG_VERSION:
        return Migrated(text, text, CONFIG_VERSION)
    place = f"{path}:{version_line(text)}: config_version: {version}"
    if version > CONFIG_VERSION:
        raise ConfigError([f"{place} is newer than this program knows ({CONFIG_VERSION}); install a newer release"])
    if version < 0:
        raise ConfigError([f"{place} was never a version; this program writes {CONFIG_VERSION}"])
    try:
        draft = Draft(tomlkit.parse(text))
        for step in STEPS[version:]:
            step(draft)
        draft.set_version(CONFIG_VERSION)
        after = tomlkit.dumps(draft._document)
    except (TOMLKitError, TypeError, AttributeError) as error:
        # A value of a type that a step did not expect, or a layout that tomlkit cannot edit.
        raise ConfigError([f"{place} cannot be migrated ({error}); bring it to {CONFIG_VERSION} by hand"]) from None
    if draft.clashes:
        raise ConfigError([f"{path}: {sentence}" for sentence in draft.clashes])
    parsed(path, after)
    return Migrated(text, after, version, tuple(draft.changes))


def migrate_file(path: Path) -> tuple[Migrated, str]:
    """Migrate a file in memory; returns that and the difference, as `diff -u` shows it, "" for none.

    Raises:
        ConfigError: see `migrate`; or the file cannot be read.
    """
    try:
        text = decoded(path, path.read_bytes())
    except OSError as error:
        raise ConfigError([f"{path}: cannot be read: {error.strerror}"]) from None
    migrated = migrate(path, text)
    lines = difflib.unified_diff(
        text.splitlines(keepends=True),
        migrated.text.splitlines(keepends=True),
        str(path),
        f"{path} (config_version {CONFIG_VERSION})",
    )
    return migrated, "".join(lines)
