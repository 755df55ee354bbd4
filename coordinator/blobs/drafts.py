"""Files on their way in: received into a local folder, whole or not at all, and gone on with when a connection broke.

    folder/tmp/…                            uploads under way
    folder/parts/{job}.{attempt}.{sha256}   what came of an output before its connection broke

Several coordinators may share the folder. Whoever receives a file holds a lock on it, so that no other goes on with it,
or takes it for left behind. Of a coordinator that died, uploads go with the first sweep after two minutes, and parts,
from which a worker may go on, once they are an hour old: some shared folders keep a lock to the machine that took it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import hmac
import os
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import anyio
from anyio.to_thread import run_sync

from protocol.faults import FaultError, refuse
from protocol.ids import is_safe_id

WRITE_BYTES = 2**20  # a thread hop per MiB, not per network read
LEFT_S = 3600.0  # nothing has come for so long: nobody writes there any more
YOUNG_S = 120.0  # an upload of which nothing comes for a minute is ended by whoever receives it

_PART = re.compile(r"(.+)\.([0-9]{1,10})\.[0-9a-f]{64}\Z")  # others are not ours, as what NFS leaves in a folder
_FULL = (errno.ENOSPC, errno.EDQUOT)


class Draft:
    """A file that is being received. Everything here blocks; at its end comes `keep` or `discard`.

    Attributes:
        path: where it is.
        spoiled: what is in it is of no use to anybody.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.digest = hashlib.sha256()
        self.size = 0
        self.spoiled = False
        self._fd = -1

    def open(self, at: int) -> int | None:
        """Open it, anew or to go on; returns how much is there, None when another coordinator writes to it."""
        while True:
            fd = os.open(self.path, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(fd)
                return None
            if _still_there(self.path, fd):
                break
            os.close(fd)  # it was made whole, or deleted, between the two
        self._fd = fd
        if not at:
            os.ftruncate(fd, 0)
        while piece := os.read(fd, WRITE_BYTES):
            self.digest.update(piece)
            self.size += len(piece)
        return self.size

    def write(self, data: bytes) -> None:
        """Append. Raises OSError."""
        self.digest.update(data)
        self.size += len(data)
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]

    def move(self, target: Path) -> None:
        """Make it visible; on the disk before that, because a worker forgets a result once it is acknowledged."""
        os.fsync(self._fd)
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.path.replace(target)
        folder = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def keep(self) -> None:
        """Leave what came, if it is worth going on from."""
        if self.size < WRITE_BYTES:
            self.discard()
        elif self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def discard(self) -> None:
        """Delete it; nothing when it was moved, or is another's."""
        if self._fd < 0:
            return
        if _still_there(self.path, self._fd):
            self.path.unlink(missing_ok=True)
        os.close(self._fd)
        self._fd = -1


class Drafts:
    """All of one coordinator.

    Args:
        folder: made when it is missing.
        now_s: the clock, seconds since the epoch.
    """

    def __init__(self, folder: Path, now_s: Callable[[], float] = time.time) -> None:
        self._folder, self._now_s = folder, now_s
        self._receiving: dict[str, tuple[anyio.CancelScope, anyio.Event]] = {}  # by name, what is written to now
        for name in ("tmp", "parts"):
            (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        self.sweep()

    async def receive(
        self,
        data: AsyncIterator[bytes],
        grow: Callable[[int], None],
        expected: str,
        publish: Callable[[Draft], str],
        part: str = "",
        at: int = 0,
    ) -> tuple[str, Draft]:
        """Receive a file.

        Args:
            grow: called with its size, with that of each piece before it is kept; raises FaultError when it is too
                much, and then nothing is kept.
            expected: sha256 in hex that it must have; "" for any.
            publish: called in a thread with the whole file; makes it visible and returns its key.
            part: the name under which it may be kept in parts.
            at: how much of it is here.

        Raises:
            FaultError: what `grow` raises, upload_failed (another digest), storage_full, conflict (also when it was
                deleted meanwhile).

        Cancellation: with a part what came is kept, otherwise nothing stays behind.
        """
        path = self._folder / "parts" / part if part else self._folder / "tmp" / secrets.token_hex(16)
        await self._take_over(path.name)
        scope, over = self._receiving[path.name] = (anyio.CancelScope(), anyio.Event())
        draft = Draft(path)
        try:
            there = await run_sync(draft.open, at)
            if there is None and not at:  # another coordinator still reads a connection that is dead: apart from it
                draft, part = Draft(self._folder / "tmp" / secrets.token_hex(16)), ""
                there = await run_sync(draft.open, 0)
            if there != at:
                raise refuse("conflict", "Another number of bytes has come before; ask for it again.")
            with scope:
                await _fill(draft, data, grow, at)
            if scope.cancelled_caught:
                raise refuse("conflict", "The same file comes on a newer connection.")
            if expected and not hmac.compare_digest(expected.lower().encode(), draft.digest.hexdigest().encode()):
                draft.spoiled = True
                raise refuse("upload_failed", "The file arrived with another sha256 than announced; send it again.")
            return await run_sync(publish, draft), draft
        except FileNotFoundError:
            raise refuse("conflict", "The file is not wanted any more.") from None
        except OSError as error:
            if error.errno in _FULL:
                draft.spoiled = True
                raise refuse("storage_full", "The coordinator's disk is full; try again when there is room.") from None
            raise
        finally:
            with anyio.CancelScope(shield=True):
                await run_sync(draft.keep if part and not draft.spoiled else draft.discard)
            del self._receiving[path.name]
            over.set()

    async def received(self, part: str) -> int:
        """How many bytes of this part have come; 0 for none, and while another coordinator writes to it.

        Who asks has lost the connection, whatever we know of it: it is ended, so that its bytes are all there.
        """
        await self._take_over(part)
        return await run_sync(_length, self._folder / "parts" / part)

    async def _take_over(self, name: str) -> None:
        """End whoever still receives this file: the latest connection is the one that lives."""
        while earlier := self._receiving.get(name):
            scope, over = earlier
            scope.cancel()
            await over.wait()

    def forget(self, job: str, attempt: int | None = None) -> None:
        """Delete all parts of a job, or of one of its attempts. Blocks."""
        for part in (self._folder / "parts").glob(f"{job}.*" if attempt is None else _of(job, attempt)):
            part.unlink(missing_ok=True)

    def parts(self, job: str, attempt: int) -> dict[str, int]:
        """What came of an attempt's outputs: sha256 -> bytes, also while more comes. Blocks."""
        found: dict[str, int] = {}
        for part in (self._folder / "parts").glob(_of(job, attempt)):
            with contextlib.suppress(FileNotFoundError):
                found[part.name.rpartition(".")[2]] = part.stat().st_size
        return found

    def attempts(self) -> set[tuple[str, int]]:
        """Of which attempts there are parts. Blocks."""
        names = [_PART.match(part.name) for part in (self._folder / "parts").iterdir()]
        return {(found[1], int(found[2])) for found in names if found and is_safe_id(found[1])}

    def sweep(self) -> int:
        """Delete what nobody receives any more, uploads after two minutes, parts after an hour; how many. Blocks."""
        before = self._now_s() - LEFT_S
        uploads = self._folder / "tmp"
        found = list(uploads.iterdir())
        if found:
            os.utime(uploads)  # the file system's own clock: it is what the files have their times by
            young = mtime(uploads) - YOUNG_S
            found = [file for file in found if mtime(file) < young]
        found += [file for file in (self._folder / "parts").iterdir() if mtime(file) < before]
        return sum(_delete_left(file) for file in found)


def _delete_left(path: Path) -> bool:
    """Delete a file unless somebody receives it."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        left = _still_there(path, fd)
        if left:
            path.unlink()
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return left


def _still_there(path: Path, fd: int) -> bool:
    """Whether the open file was neither made whole nor deleted meanwhile."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(fd))
    except FileNotFoundError:
        return False


async def _fill(draft: Draft, data: AsyncIterator[bytes], grow: Callable[[int], None], at: int) -> None:
    pending = bytearray()
    size = at
    try:
        _grown(draft, grow, size)
        async for piece in data:
            size += len(piece)
            _grown(draft, grow, size)
            pending += piece
            if len(pending) >= WRITE_BYTES:
                await run_sync(draft.write, bytes(pending))
                pending.clear()
    finally:
        if not draft.spoiled:
            with anyio.CancelScope(shield=True):
                await run_sync(draft.write, bytes(pending))


def _of(job: str, attempt: int) -> str:
    return f"{job}.{attempt}.{'?' * 64}"  # the whole digest: there may be a dot in an id


def _grown(draft: Draft, grow: Callable[[int], None], size: int) -> None:
    try:
        grow(size)
    except FaultError:
        draft.spoiled = True
        raise


def _length(path: Path) -> int:
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return 0
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.fstat(fd).st_size
    except BlockingIOError:
        return 0
    finally:
        os.close(fd)


def mtime(path: Path) -> float:
    """When a file was written to last; never for one that is gone."""
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return float("inf")
