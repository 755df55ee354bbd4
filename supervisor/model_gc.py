"""Which pulled models go when the models folder is over its budget.

What goes, in this order, until the folder fits: leftovers of deletions that were cut short (always); then interrupted
pulls and models that nobody names, the longest unused first. What never goes: a model that a worker.toml names, one
that a running supervisor has loaded, one that a pull works on, and folders that were not pulled by this program.

Files are counted by inode: a model pulled from a file of this machine is a hard link to it, takes no room, and its
deletion would give none. Only inodes of which every link lies in the models folder count.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import msgspec

from supervisor.model_store import Store
from supervisor.settings import Settings

Inode = tuple[int, int]  # device, number
What = Literal["model", "interrupted", "leftover"]


class Links(msgspec.Struct, frozen=True):
    """One inode as one folder sees it: how many of its names are in there, and how many there are at all."""

    size_bytes: int
    here: int
    all: int


class Held(msgspec.Struct, frozen=True, kw_only=True):
    """One folder below the models folder.

    Attributes:
        last_used: seconds since 1970; the last load, else the pull.
        keep: why it stays, for people; "" when it may go.
    """

    key: str
    what: What
    last_used: float
    keep: str = ""
    inodes: dict[Inode, Links] = {}


class Going(msgspec.Struct, frozen=True):
    """A folder to delete, and what that frees."""

    held: Held
    frees_bytes: int


class Plan(msgspec.Struct, frozen=True):
    """What to delete, in order; sizes are of the folder as a whole, before and after."""

    before_bytes: int
    after_bytes: int
    going: tuple[Going, ...]


def plan(held: Sequence[Held], budget_bytes: int) -> Plan:
    """Choose what goes until the rest fits into the budget, or nothing more may go."""
    names: Counter[Inode] = Counter()
    on_disk: dict[Inode, Links] = {}
    for one in held:
        for inode, links in one.inodes.items():
            names[inode] += links.here
            on_disk[inode] = links
    ours = {inode for inode, count in names.items() if count >= on_disk[inode].all}
    before = left = sum(on_disk[inode].size_bytes for inode in ours)
    going = []
    for one in sorted(held, key=lambda one: (one.what != "leftover", one.last_used, one.key)):
        if one.keep or (one.what != "leftover" and (left <= budget_bytes or not ours & one.inodes.keys())):
            continue
        frees = 0
        for inode, links in one.inodes.items():
            names[inode] -= links.here
            if inode in ours and names[inode] == 0:
                frees += links.size_bytes
        left -= frees
        going.append(Going(one, frees))
    return Plan(before, left, tuple(going))


def survey(store: Store, named: Sequence[str]) -> list[Held]:
    """Look at the models folder.

    Args:
        named: paths that some worker.toml names.
    """
    found = []
    for key in store.keys():
        manifest = store.manifest(key)
        pulled_at = manifest.pulled_at if manifest else 0.0
        found.append(
            Held(
                key=key,
                what="model",
                last_used=max(pulled_at, store.last_loaded(key) or 0.0),
                keep=_reason(store, key, named, manifest is not None),
                inodes=_inodes(store.folder(key)),
            )
        )
    for key in store.interrupted():
        folder = store.staging(key)
        keep = "a pull works on it" if store.is_pulled_now(key) else ""
        found.append(Held(key=key, what="interrupted", last_used=_newest(folder), keep=keep, inodes=_inodes(folder)))
    for folder in store.replaced():
        key = folder.name
        found.append(Held(key=key, what="leftover", last_used=0.0, inodes=_inodes(folder)))
    return found


def named_paths(settings: Settings) -> list[str]:
    """Every text of the models and engines of a worker.toml that could be a path: paths, files, options, grants."""
    found: list[str] = []
    _texts([msgspec.to_builtins(table) for table in (*settings.models, *settings.engines.values())], found)
    return [text for text in found if "/" in text]


def _texts(value: object, found: list[str]) -> None:
    if isinstance(value, str):
        found.append(value)
    elif isinstance(value, dict):
        for inner in value.values():
            _texts(inner, found)
    elif isinstance(value, list):
        for inner in value:
            _texts(inner, found)


def is_named(folder: Path, named: Sequence[str]) -> bool:
    """Whether one of the paths is this folder or lies in it; links on the way count as what they point to."""
    insides = {str(folder) + os.sep, os.path.realpath(folder) + os.sep}
    for text in named:
        if any((path + os.sep).startswith(inside) for path in (text, os.path.realpath(text)) for inside in insides):
            return True
        if any(inside in text for inside in insides):  # a word of a command line: --model=/models/x/y.gguf
            return True
    return False


def _reason(store: Store, key: str, named: Sequence[str], pulled: bool) -> str:
    if is_named(store.folder(key), named):
        return "worker.toml names it"
    if not pulled:
        return "it was not pulled by this program"
    if store.is_pulled_now(key):
        return "a pull works on it"
    if store.is_loaded(key):
        return "a running supervisor has loaded it"
    return ""


def _inodes(folder: Path) -> dict[Inode, Links]:
    found: dict[Inode, Links] = {}
    for parent, _folders, names in os.walk(folder):
        for name in names:
            try:
                state = os.lstat(os.path.join(parent, name))
            except OSError:
                continue
            inode = (state.st_dev, state.st_ino)
            here = found[inode].here if inode in found else 0
            found[inode] = Links(state.st_size, here + 1, state.st_nlink)
    return found


def _newest(folder: Path) -> float:
    times = [0.0]
    for parent, _folders, _names in os.walk(folder):
        try:
            times.append(os.stat(parent).st_mtime)
        except OSError:
            continue
    return max(times)
