"""Rehashing what is on the disk: pulled models against their manifests, others against worker.toml.

The supervisor hashes a file once and trusts it until its inode, size or time changes. Bit rot changes none of them, so
a damaged file gets a new time here: the next load hashes it again and refuses the model.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import msgspec

from supervisor.machine.weights import folder_digest, folder_files, hash_file
from supervisor.model_store import Manifest
from supervisor.pull_wire import Progress
from supervisor.settings import ModelTable

_EVERY_S = 0.1


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """What a rehash of one model found.

    Attributes:
        ok: None when there is no digest to compare with.
        problems: a sentence for each file that is not as it was pulled.
    """

    name: str
    path: str
    ok: bool | None
    bytes: int
    problems: tuple[str, ...] = ()


def damages(folder: Path, manifest: Manifest, say: Callable[[Progress], None]) -> list[str]:
    """Compare every file of a pulled model with its manifest.

    Returns a sentence for each difference: a file that is damaged, missing, unreadable, or one too many where the
    engine takes the folder as a whole.
    """
    problems = []
    meter = _Meter(say, sum(kept.size_bytes for kept in manifest.files.values()))
    for name, kept in manifest.files.items():
        path = folder / name
        try:
            if path.stat().st_size != kept.size_bytes:
                problems.append(f"{name} has {path.stat().st_size} bytes where {kept.size_bytes} were pulled")
                _distrust(path)
                continue
            found = hash_file(path, meter.counts(name))
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror or error}")
            continue
        if found != kept.sha256:
            problems.append(f"{name} is damaged: it has the sha256 {found} where {kept.sha256} was pulled")
            _distrust(path)
    if not manifest.guess.main:
        problems += [f"{name} was not pulled" for name in sorted(folder_files(folder).keys() - manifest.files.keys())]
    return problems


def compared(table: ModelTable, say: Callable[[Progress], None]) -> Verified:
    """Compare a model that was not pulled with the digests that worker.toml gives for it."""
    problems = []
    total = 0
    for role, text in {"model": table.path, **table.files}.items():
        path = Path(text)
        wanted = table.sha256.get(role, "").lower()
        if not text or not wanted:
            continue
        try:
            files = folder_files(path) if path.is_dir() else {path.name: path}
            total += sum(file.stat().st_size for file in files.values())
            found = _digest(path, files, say)
        except OSError as error:
            problems.append(f"{path} cannot be read: {error.strerror or error}")
            continue
        if found != wanted:
            problems.append(f"{path} is damaged: it has the sha256 {found} where worker.toml says {wanted}")
            for file in files.values():
                _distrust(file)
    known = bool(table.sha256)
    return Verified(
        name=table.name, path=table.path, ok=not problems if known else None, bytes=total, problems=tuple(problems)
    )


def _digest(path: Path, files: Mapping[str, Path], say: Callable[[Progress], None]) -> str:
    meter = _Meter(say, sum(file.stat().st_size for file in files.values()))
    digests = {name: hash_file(file, meter.counts(name)) for name, file in files.items()}
    return folder_digest(digests) if path.is_dir() else digests[path.name]


def _distrust(path: Path) -> None:
    """See the module's docstring. A file of another user's keeps its time."""
    with contextlib.suppress(OSError):
        os.utime(path)


class _Meter:
    """Progress over several files, at a bearable rate."""

    def __init__(self, say: Callable[[Progress], None], total_bytes: int) -> None:
        self._say, self._total = say, total_bytes
        self._done = 0
        self._last = time.monotonic()

    def counts(self, name: str) -> Callable[[int], None]:
        """For one file: called with the bytes just read."""

        def count(read: int) -> None:
            self._done += read
            if time.monotonic() - self._last >= _EVERY_S:
                self._last = time.monotonic()
                self._say(Progress(done_bytes=self._done, total_bytes=self._total, file=name, phase="hash"))

        return count
