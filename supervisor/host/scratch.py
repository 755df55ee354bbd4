"""How much disk an instance's scratch folder takes.

An engine that fills the disk takes the supervisor's own records, and every other engine, with it. There is no quota
that an ordinary user can set, so the folder is measured from time to time, in a thread, with bounded work.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path

import msgspec
import trio

# Files and folders that one measurement looks at; about a second of work. More of them is a flood in itself.
MAX_ENTRIES = 200_000
POLL_S = 5.0
_BLOCK_BYTES = 512  # st_blocks counts in these, whatever the file system's own blocks are
_MAX_DESCRIPTORS = 65_536


class Usage(msgspec.Struct, frozen=True):
    """What a measurement found.

    Attributes:
        size_bytes: blocks that are taken on the disk; a sparse file counts what it really takes.
        entries: files and folders seen.
        whole: False when there were more than `MAX_ENTRIES`.
    """

    size_bytes: int
    entries: int
    whole: bool = True


def measure(folder: Path, max_entries: int = MAX_ENTRIES) -> Usage:
    """Measure a folder; blocks, so call it in a thread. Links are not followed, one file with two names counts once.

    What vanishes meanwhile, or cannot be looked into, is left out.
    """
    size, entries = 0, 0
    seen: set[tuple[int, int]] = set()
    waiting = [os.fspath(folder)]
    while waiting:
        try:
            listing = os.scandir(waiting.pop())
        except OSError:
            continue
        with listing:
            for entry in listing:
                entries += 1
                if entries > max_entries:
                    return Usage(size, entries, whole=False)
                try:
                    found = entry.stat(follow_symlinks=False)
                except OSError:
                    continue
                if stat.S_ISDIR(found.st_mode):
                    waiting.append(entry.path)
                elif found.st_nlink > 1:
                    if (found.st_dev, found.st_ino) in seen:
                        continue
                    seen.add((found.st_dev, found.st_ino))
                size += found.st_blocks * _BLOCK_BYTES
    return Usage(size, entries)


def size_bytes(folder: Path) -> int:
    """Disk that a folder takes, in bytes; see `measure`."""
    return measure(folder).size_bytes


def hidden_bytes(folder: Path, pids: Iterable[int]) -> int:
    """Disk taken by files that `pids` have removed and still hold open, on the file system of `folder`; blocks."""
    try:
        device = folder.stat().st_dev
    except OSError:
        return 0
    size = 0
    seen: set[int] = set()
    for pid in pids:
        try:
            names = os.listdir(f"/proc/{pid}/fd")[:_MAX_DESCRIPTORS]
        except OSError:
            continue
        for name in names:
            try:
                found = os.stat(f"/proc/{pid}/fd/{name}")
            except OSError:
                continue
            hidden = stat.S_ISREG(found.st_mode) and found.st_nlink == 0 and found.st_dev == device
            if hidden and found.st_ino not in seen:
                seen.add(found.st_ino)
                size += found.st_blocks * _BLOCK_BYTES
    return size


class Watch:
    """Watches a folder's limit. `run` returns when it is passed.

    Args:
        limit_bytes: most that the folder may take.
        pids: gives the processes whose removed but open files count too.
    """

    def __init__(
        self,
        folder: Path,
        limit_bytes: int,
        *,
        poll_s: float = POLL_S,
        pids: Callable[[], Iterable[int]] = tuple,
    ) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self.usage = Usage(0, 0)
        self._poll_s = poll_s
        self._pids = pids

    @property
    def exceeded(self) -> bool:
        """Whether the latest measurement was over the limit, or did not come to an end."""
        return self.usage.size_bytes > self.limit_bytes or not self.usage.whole

    def describe(self) -> str:
        """One sentence for people, once the limit is passed."""
        if not self.usage.whole:
            return f"Its scratch folder holds more than {MAX_ENTRIES} files; that is more than an engine may leave."
        taken, limit = self.usage.size_bytes / 2**30, self.limit_bytes / 2**30
        return f"Its scratch folder takes {taken:.2f} GiB; limits.scratch_gb allows {limit:g} GiB."

    async def measure(self) -> Usage:
        """Measure once, in a thread. Cancellation: at once; the thread ends by itself."""
        self.usage = await trio.to_thread.run_sync(self._measure, abandon_on_cancel=True)
        return self.usage

    async def run(self) -> Usage:
        """Measure every `poll_s` until the limit is passed; returns the measurement that did."""
        while not self.exceeded:
            await trio.sleep(self._poll_s)
            await self.measure()
        return self.usage

    def _measure(self) -> Usage:
        usage = measure(self.folder)
        hidden = hidden_bytes(self.folder, self._pids())
        return msgspec.structs.replace(usage, size_bytes=usage.size_bytes + hidden)
