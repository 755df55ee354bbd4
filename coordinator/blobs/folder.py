"""Blobs in a folder: of this machine, or one that all replicas share."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import BinaryIO

from coordinator.blobs.base import ORPHAN_S, SECRET_BYTES, Blobs, Output, below
from coordinator.blobs.bounds import MAX_OUTPUT_BYTES
from coordinator.blobs.drafts import Draft, Drafts, mtime
from protocol.faults import refuse
from protocol.ids import is_safe_id


class FolderBlobs(Blobs):
    """See the module. Replicas that share the folder share its secret, and so each other's URLs.

    Args:
        folder: made when it is missing.
        max_output_bytes, now_s: as in `Blobs`.

    Raises:
        ValueError: the file of the secret is too short.
        OSError: the folder cannot be used.
    """

    def __init__(
        self, folder: Path, max_output_bytes: int = MAX_OUTPUT_BYTES, now_s: Callable[[], float] = time.time
    ) -> None:
        self._folder = folder
        for name in ("in", "out"):
            (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        super().__init__(Drafts(folder, now_s), _secret(folder / "secret"), max_output_bytes, now_s)

    def path(self, key: str) -> Path:
        """Where the file of a key lies, or would lie. Raises FaultError(not_found) for what is no key."""
        return below(self._folder, key)

    def size(self, key: str) -> int | None:
        """See `Blobs`."""
        with contextlib.suppress(FileNotFoundError):
            return self.path(key).stat().st_size
        return None

    def reader(self, key: str) -> BinaryIO:
        """See `Blobs`."""
        try:
            return self.path(key).open("rb")
        except FileNotFoundError:
            raise refuse("not_found", "The file is gone; files are deleted with their job.") from None

    def delete(self, job: str, inputs: Iterable[str] = ()) -> None:
        """See `Blobs`."""
        for key in inputs:
            self.path(key).unlink(missing_ok=True)
        if is_safe_id(job):
            shutil.rmtree(self._folder / "out" / job, ignore_errors=True)
            self._drafts.forget(job)

    def tidy(self, job: str, attempt: int, keep: Collection[str]) -> None:
        """See `Blobs`."""
        self._drafts.forget(job, attempt)
        folder = self._folder / "out" / job / str(attempt)
        for file in _inside(folder):
            if f"{job}/{attempt}/{file.name}" not in keep:
                file.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # something is kept, or came just now: whoever received it will say so
            folder.rmdir()

    def left_lately(self, since_s: float) -> dict[tuple[str, int], set[str]]:
        """See `Blobs`."""
        since = self._now_s() - since_s
        found = {whose: {""} for whose in self._drafts.attempts()}
        for folder in (one for job in _inside(self._folder / "out") for one in _inside(job)):
            if folder.name.isdecimal() and since <= mtime(folder) < float("inf"):
                job, attempt = folder.parent.name, int(folder.name)
                keys = {f"{job}/{attempt}/{one.name}" for one in self._outputs(job, attempt)}
                found.setdefault((job, attempt), set()).update(keys)
        return found

    def sweep(self, input_used: Callable[[str], bool], job_known: Callable[[str], bool]) -> int:
        """See `Blobs`."""
        before = self._now_s() - ORPHAN_S
        old_inputs = [file for file in (self._folder / "in").iterdir() if mtime(file) < before]
        orphans = [file for file in old_inputs if not input_used(file.name)]
        for file in orphans:
            file.unlink(missing_ok=True)
        jobs = [folder for folder in (self._folder / "out").iterdir() if mtime(folder) < before]
        lost = [folder for folder in jobs if not job_known(folder.name)]
        for folder in lost:
            shutil.rmtree(folder, ignore_errors=True)
        return len(orphans) + len(lost) + self._drafts.sweep()

    def _publish(self, draft: Draft, key: str) -> None:
        draft.move(self.path(key))

    def _outputs(self, job: str, attempt: int) -> list[Output]:
        found = []
        for file in _inside(self._folder / "out" / job / str(attempt)):
            with contextlib.suppress(FileNotFoundError):
                status = file.stat()
                found.append(Output(file.name, status.st_mtime, status.st_size))
        return found


def _inside(folder: Path) -> list[Path]:
    """What lies in it; nothing, where it goes meanwhile or is none: another coordinator may delete it at any time."""
    try:
        return list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []


def _secret(path: Path) -> bytes:
    """Read the key of the signatures, or make it. It outlives restarts, so that URLs do, too."""
    while True:
        with contextlib.suppress(FileNotFoundError):
            return path.read_bytes()
        draft = path.with_name(f"{path.name}.{secrets.token_hex(8)}")
        fd = os.open(draft, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
        try:
            with os.fdopen(fd, "wb") as file:
                file.write(secrets.token_bytes(SECRET_BYTES))
                file.flush()
                os.fsync(file.fileno())
            with contextlib.suppress(FileExistsError):  # another replica began at the same moment: its secret counts
                os.link(draft, path)
        finally:
            draft.unlink(missing_ok=True)
