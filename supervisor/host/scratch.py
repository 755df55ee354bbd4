"""How much disk an instance's scratch folder takes.

An engine that fills the disk takes the supervisor's own records, and every other engine, with it. There is no quota
that an ordinary user can set, so the folder is measured from time to time, in a thread, with bounded work.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import msgspec
import trio

# Files and folders that one measurement looks at; about a second of work. More of them is a flood in itself.
MAX_ENTRIES = 200_000
POLL_S = 5.0
_BLOCK_BYTES = 512  # st_blocks counts in these, whatever the file system's own blocks are
_MAX_DESCRIPTORS = 65_536
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_BY_DESCRIPTOR = sys.platform != "win32"
_HIDES = {errno.ENAMETOOLONG: "a path that is too long", errno.EACCES: "a folder that its owner may not read"}


class Usage(msgspec.Struct, frozen=True):
    """What a measurement found.

    Attributes:
        size_bytes: blocks that are taken on the disk; a sparse file counts what it really takes.
        entries: files and folders seen.
        unseen: why there is more than that, in words; "" when everything was seen.
    """

    size_bytes: int
    entries: int
    unseen: str = ""


def measure(folder: Path, max_entries: int = MAX_ENTRIES) -> Usage:
    """Measure a folder; blocks, so call it in a thread. Links are not followed, one file with two names counts once.

    What vanishes meanwhile is left out. What is hidden from us is told: an engine could keep gigabytes below a path
    that is too long for any call, or in a folder that it forbids its owner to read.
    """
    size, entries = 0, 0
    unseen = ""
    seen: set[tuple[int, int]] = set()
    waiting = [os.fspath(folder)]
    while waiting:
        above = waiting.pop()
        try:
            for name, found in _looked_into(above):
                entries += 1
                if entries > max_entries:
                    return Usage(size, entries, f"more than {max_entries} files")
                if stat.S_ISDIR(found.st_mode):
                    waiting.append(os.path.join(above, name))
                elif found.st_nlink > 1:
                    if (found.st_dev, found.st_ino) in seen:
                        continue
                    seen.add((found.st_dev, found.st_ino))
                size += _taken(found)
        except OSError as error:
            unseen = unseen or _HIDES.get(error.errno or 0, "")
    return Usage(size, entries, unseen)


def _looked_into(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    """Names in a folder, and what they are. Raises OSError: it is gone, hidden, or a link by now."""
    opened = os.open(folder, _FOLDER) if _BY_DESCRIPTOR else -1
    try:
        with os.scandir(opened if _BY_DESCRIPTOR else folder) as listing:
            for entry in listing:
                try:
                    yield entry.name, entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
    finally:
        if opened >= 0:
            os.close(opened)


def _taken(found: os.stat_result) -> int:
    blocks = getattr(found, "st_blocks", None)  # Windows does not count them
    return found.st_size if blocks is None else blocks * _BLOCK_BYTES


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
                size += _taken(found)
    return size


class Watch:
    """Knows a folder's limit, and whether it was passed when it was last measured.

    Args:
        limit_bytes: most that the folder may take.
        pids: gives the processes whose removed but open files count too.
    """

    def __init__(
        self,
        folder: Path,
        limit_bytes: int,
        *,
        pids: Callable[[], Iterable[int]] = tuple,
    ) -> None:
        self.folder, self.limit_bytes = folder, limit_bytes
        self.usage = Usage(0, 0)
        self._pids = pids
        # A file system that hangs keeps the thread: of those that everybody shares it would have one per measurement.
        self._one = trio.CapacityLimiter(1)

    @property
    def exceeded(self) -> bool:
        """Whether the latest measurement was over the limit, or could not see everything."""
        return self.usage.size_bytes > self.limit_bytes or bool(self.usage.unseen)

    def describe(self) -> str:
        """One sentence for people, once the limit is passed."""
        if self.usage.unseen:
            return f"Its scratch folder cannot be measured: it holds {self.usage.unseen}."
        taken, limit = self.usage.size_bytes / 2**30, self.limit_bytes / 2**30
        return f"Its scratch folder takes {taken:.2f} GiB; limits.scratch_gb allows {limit:g} GiB."

    async def measure(self) -> Usage:
        """Measure once, in a thread. Cancellation: at once; the thread ends by itself."""
        self.usage = await trio.to_thread.run_sync(self._measure, abandon_on_cancel=True, limiter=self._one)
        return self.usage

    def _measure(self) -> Usage:
        usage = measure(self.folder)
        hidden = hidden_bytes(self.folder, self._pids())
        return msgspec.structs.replace(usage, size_bytes=usage.size_bytes + hidden)
