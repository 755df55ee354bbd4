"""What attempts leave behind: of one that is over, however it ended and wherever, only its job's outputs stay.

An attempt is over when its worker cannot come back with it: its job has ended, or another attempt at it was begun.
Each coordinator looks after the attempts that left something through it, until they are over: files that were never
declared, files of a result, parts of uploads that broke. What came through one that died is found by the others.
"""

from __future__ import annotations

import time

from anyio.to_thread import run_sync

from coordinator.blobs.base import Blobs
from coordinator.store import Store
from coordinator.store.base import JobFiles
from coordinator.store.threads import StoreThreads

LATELY_S = 3 * 3600.0  # what was left before that was found by an earlier look


class Leftovers:
    """All of one coordinator. Everything is called on the event loop."""

    def __init__(self, store: Store, threads: StoreThreads, blobs: Blobs) -> None:
        self._store, self._threads, self._blobs = store, threads, blobs
        self._again: dict[tuple[str, int], float] = {}  # attempts that are over -> until when they may leave more

    async def files_of(self, job: str) -> JobFiles:
        """How a job stands with its files."""
        return await self._threads.read(self._store.job_files, job)

    async def look(self) -> None:
        """Delete what attempts left that are over since they left it. Raises StoreError, FaultError, OSError.

        What of one cannot be deleted is tried again with the next look; the last such trouble is raised at the end.
        """
        now = time.monotonic()
        due = [key for key, when in self._again.items() if when <= now]
        for key in due:
            del self._again[key]
        self._blobs.touched.update(due)
        trouble: Exception | None = None
        for job, attempt in list(self._blobs.touched):
            has = await self.files_of(job)
            if has.attempt == attempt:
                continue
            self._blobs.touched.discard((job, attempt))  # before that: what comes meanwhile is noted anew
            try:
                await run_sync(self._blobs.tidy, job, attempt, has.files)
            except Exception as error:  # that of one attempt keeps nobody from the others
                self._blobs.touched.add((job, attempt))
                trouble = error
                continue
            except BaseException:
                self._blobs.touched.add((job, attempt))
                raise
            if self._blobs.lasting_s and (job, attempt) not in due:
                self._again[job, attempt] = now + self._blobs.lasting_s
        if trouble is not None:
            raise trouble

    async def sweep(self) -> None:
        """Delete files of no job, and note attempts that left something that is no output. Raises as `look`."""
        await run_sync(self._blobs.sweep, self._store.has_blob, self._store.has_job)
        for (job, attempt), keys in (await run_sync(self._blobs.left_lately, LATELY_S)).items():
            if not keys <= (await self.files_of(job)).files:
                self._blobs.touched.add((job, attempt))
