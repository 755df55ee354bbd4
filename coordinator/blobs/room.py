"""Whether there is room for what an attempt leaves: its files are counted together, also those that come side by side.

What lies there is read when the first upload of an attempt begins, and again whenever one of several ends; what comes
through this coordinator is counted as it comes. Of several coordinators each counts so: at worst an attempt that uses
all of them at once leaves its bounds once for each, until it ends.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import anyio
from anyio.to_thread import run_sync

from coordinator.blobs.bounds import Bounds
from protocol.faults import refuse

Look = Callable[[str, int], dict[str, int]]


class Coming:
    """One file on its way in.

    Attributes:
        key: what it is, whichever connection it comes on: a worker that lost one begins another before we know.
        size: how much of it has come.
    """

    def __init__(self, of: _Attempt, name: str, sha256: str, limit: int, bounds: Bounds) -> None:
        self._of, self._name, self._limit, self._bounds = of, name, limit, bounds
        self.key = f"{sha256}-{name}" if sha256 else f"{id(self)}-{name}"
        self.names = {sha256, self.key} if sha256 else set()  # the part of it, and itself from before
        self.size = 0

    def grow(self, size: int) -> None:
        """So much of it is there, or will be. Raises FaultError(payload_too_large)."""
        if size > self._limit:
            raise refuse("payload_too_large", f"The file {self._name!r} exceeds {self._limit} bytes.", "name")
        self.size = size
        if sum(self._of.sizes().values()) > self._bounds.total:
            sentence = f"The files of this attempt exceed {self._bounds.total} bytes together."
            raise refuse("payload_too_large", sentence)


class _Attempt:
    def __init__(self) -> None:
        self.loading = anyio.Lock()
        self.lying: dict[str, int] = {}  # name -> bytes
        self.known = False  # what lies there
        self.coming: list[Coming] = []
        self.ends = 0  # how many have ended

    def sizes(self) -> dict[str, int]:
        """The bytes of each file; one that comes again is counted once."""
        again = {name for one in self.coming for name in one.names}
        found = {name: size for name, size in self.lying.items() if name not in again}
        for one in self.coming:
            found[one.key] = max(one.size, found.get(one.key, 0))
        return found


class Rooms:
    """All of one coordinator.

    Args:
        look: what an attempt has left: {digest}-{name} of outputs, {digest} of parts -> bytes. Blocks.
    """

    def __init__(self, look: Look) -> None:
        self._look = look
        self._attempts: dict[tuple[str, int], _Attempt] = {}

    @asynccontextmanager
    async def enter(
        self, job: str, attempt: int, name: str, sha256: str, limit: int, bounds: Bounds
    ) -> AsyncIterator[Coming]:
        """While a file comes. Raises FaultError(payload_too_large) when there are too many."""
        key = (job, attempt)
        of = self._attempts.setdefault(key, _Attempt())
        coming = Coming(of, name, sha256.lower(), limit, bounds)
        of.coming.append(coming)
        try:
            async with of.loading:
                while not of.known:
                    ends = of.ends
                    lying = await run_sync(self._look, job, attempt)
                    if of.ends == ends:  # else it may have been too early to see what ended meanwhile
                        of.lying, of.known = lying, True
            if len(of.sizes()) > bounds.files + 1:
                sentence = f"An attempt at this job has at most {bounds.files} output files and a result."
                raise refuse("payload_too_large", sentence)
            yield coming
        finally:
            of.coming.remove(coming)
            if not of.coming:
                del self._attempts[key]
            else:
                # How it ended, whoever comes next sees on the disk; those that are coming take it to lie there.
                of.lying[coming.key], of.known = coming.size, False
                of.ends += 1
