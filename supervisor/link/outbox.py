"""The outbox: files that jobs brought, kept apart from the engines' ground until the coordinator has them.

    outbox/J.1/     outputs of attempt 1 of job J, ours alone

An engine may still hold a descriptor of what it wrote, so an output is copied: one pass that reads, hashes, writes and
syncs, and that believes the engine's word only when size and digest are right. A folder is whole before the row in the
journal that names it is written, and is removed after that row is gone; what a crash leaves in between has no row, and
`sweep` removes it at the next start.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Collection
from pathlib import Path

import trio

from protocol.engine_wire import OutputFile
from protocol.faults import FaultError, refuse

PIECE_BYTES = 2**20
# What a file is said to be, and what opens it for reading, or its content.
Item = tuple[OutputFile, Callable[[], int] | bytes]


class Outbox:
    """See the module. All calls of one attempt come one after the other.

    Args:
        root: made when it is missing; nobody else's.
        budget_bytes: with this much in it, no more jobs are taken; what was taken is kept all the same.
    """

    def __init__(self, root: Path, budget_bytes: int) -> None:
        self._root, self._budget = root, budget_bytes
        self._sizes: dict[tuple[str, int], int] = {}

    @property
    def held_bytes(self) -> int:
        """What waits for the coordinator."""
        return sum(self._sizes.values())

    def reason(self) -> str:
        """Why no more jobs are taken, as a phrase; "" when there is room."""
        if self.held_bytes < self._budget:
            return ""
        count = len(self._sizes)
        return (
            f"{count} result{'s' * (count != 1)} with {self.held_bytes / 2**30:.1f} GiB wait for the coordinator, and "
            f"limits.outbox_gb allows {self._budget / 2**30:.1f}"
        )

    def folder(self, job: str, attempt: int) -> Path:
        """Where the files of an attempt lie."""
        return self._root / f"{job}.{attempt}"

    async def keep(
        self, job: str, attempt: int, files: Collection[tuple[OutputFile, Callable[[], int] | bytes]]
    ) -> int:
        """Copy files here and sync them; returns their bytes.

        Args:
            files: what each is said to be, and what opens it or is its content.

        Raises:
            FaultError: engine_protocol: a file is not what was said.
            OSError: it cannot be written; nothing of the attempt is left here.

        Cancellation: what was begun is finished first; an attempt that is not wanted is the caller's to `drop`.
        """
        size = sum(file.size for file, _source in files)
        folder = self.folder(job, attempt)
        await trio.to_thread.run_sync(_keep, folder, list(files))
        self._sizes[job, attempt] = size
        return size

    def note(self, job: str, attempt: int, size: int) -> None:
        """Count what an earlier life has kept."""
        self._sizes[job, attempt] = size

    def open(self, job: str, attempt: int, name: str) -> int:
        """A descriptor of a kept file. Raises OSError."""
        return os.open(self.folder(job, attempt) / name, os.O_RDONLY | os.O_CLOEXEC)

    async def drop(self, job: str, attempt: int) -> None:
        """Remove what was kept of an attempt."""
        if self._sizes.pop((job, attempt), None) is None:
            return
        await trio.to_thread.run_sync(lambda: shutil.rmtree(self.folder(job, attempt), ignore_errors=True))

    async def sweep(self, known: Collection[tuple[str, int]]) -> None:
        """Make the folder, and remove what no row of the journal names. Raises OSError."""
        names = {f"{job}.{attempt}" for job, attempt in known}

        def work() -> None:
            self._root.mkdir(mode=0o700, parents=True, exist_ok=True)
            for entry in self._root.iterdir():
                if entry.name not in names:
                    shutil.rmtree(entry, ignore_errors=True)

        await trio.to_thread.run_sync(work)


def _keep(folder: Path, files: list[Item]) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir(mode=0o700)
        for file, source in files:
            if isinstance(source, bytes):
                _write(folder / file.name, source)
            else:
                _copy(folder / file.name, file, source)
        sync_folder(folder)
        sync_folder(folder.parent)
    except (OSError, FaultError):
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write(path: Path, data: bytes) -> None:
    with path.open("xb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def _copy(path: Path, file: OutputFile, source: Callable[[], int]) -> None:
    digest, size = hashlib.sha256(), 0
    fd = source()
    try:
        with path.open("xb") as out:
            while piece := os.read(fd, PIECE_BYTES):
                size += len(piece)
                if size > file.size:
                    raise refuse("engine_protocol", f"The output {file.name!r} grew beyond {file.size} bytes.")
                digest.update(piece)
                out.write(piece)
            out.flush()
            os.fsync(out.fileno())
    finally:
        os.close(fd)
    if size != file.size:
        raise refuse("engine_protocol", f"The output {file.name!r} shrank to {size} of {file.size} bytes.")
    if digest.hexdigest() != file.sha256.lower():
        raise refuse("engine_protocol", f"The sha256 of the output {file.name!r} is not the one that was told.")


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable. Raises OSError; nothing where folders cannot be opened (Windows)."""
    if os.name == "nt":
        return
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
