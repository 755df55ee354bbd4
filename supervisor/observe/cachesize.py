"""How much the pulled models hold on the disk, looked up once in a while by a thread: a scrape waits for no disk.

A model that was pulled from a file of this machine is a hard link to it and takes no room: only files of which every
name lies in the models folder count, as `supervisor models gc` counts them.
"""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from pathlib import Path

import trio

EVERY_S = 60.0


class CacheSize:
    """See the module.

    Args:
        folder: the models folder; it need not exist.
        every_s: pause between two looks.
    """

    def __init__(self, folder: Path, every_s: float = EVERY_S) -> None:
        self._folder, self._every_s = folder, every_s
        self._bytes: int | None = None

    def bytes(self) -> int | None:
        """What was found last; None before the first look."""
        return self._bytes

    async def run(self) -> None:
        """Look again and again. Runs until cancelled.

        Cancellation: at once; a thread that hangs on a dead disk is left to itself.
        """
        while True:
            await self.look()
            await trio.sleep(self._every_s)

    async def look(self) -> None:
        """Look once. Cancellation: as for `run`."""
        self._bytes = await trio.to_thread.run_sync(held_bytes, self._folder, abandon_on_cancel=True)


def held_bytes(folder: Path) -> int:
    """Bytes that would be free without this folder; 0 when there is none."""
    names: Counter[tuple[int, int]] = Counter()
    sizes: dict[tuple[int, int], tuple[int, int]] = {}  # inode -> its names anywhere, its size
    for parent, _folders, files in os.walk(folder):
        for name in files:
            with contextlib.suppress(OSError):
                found = os.lstat(os.path.join(parent, name))
                inode = found.st_dev, found.st_ino
                names[inode] += 1
                sizes[inode] = found.st_nlink, found.st_size
    return sum(size for inode, (links, size) in sizes.items() if names[inode] >= links)
