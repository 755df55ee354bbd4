"""Tenants whose content is not kept: what their jobs, batches and files hold is deleted once it was delivered.

Delivered means: the answer was given to the client's connection to its last byte; a result fetched by GET once; a job
with output files, when each was fetched whole. What nobody fetches goes `undelivered_s` after its job ended; so does
what was delivered a moment before this process was killed. A job that was cancelled because its client was gone has
nothing to deliver: it goes with the next look. A batch's jobs and its input go when the batch has ended, its output
once it was fetched.

Of a job stays its row without content: when, where, how long, which model, what it used, and which fault code it ended
with. What is on other media is beyond us: backups, a standby's archive, a file system's snapshots and free blocks, and
in PostgreSQL the dead rows until VACUUM and the write-ahead log until it is recycled. Lines of workers' logs that this
process keeps in memory go with the content; those in another replica's stay until newer ones displace them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import anyio
import msgspec
from anyio.to_thread import run_sync

from coordinator.blobs.base import Blobs
from coordinator.deliveries import Notes
from coordinator.kept_files import KeptFiles
from coordinator.kept_lines import KeptLines
from coordinator.logs import trouble
from coordinator.store import Store, StoreError
from coordinator.store.shelf import BatchRecord
from coordinator.store.threads import StoreThreads
from protocol.faults import FaultError

log = logging.getLogger(__name__)

MOST_BATCHES = 200  # of one tenant in one look; older ones were looked at before
MOST_NOTED = 10_000  # jobs of which some files were fetched and some not
PAGE = 200
LATE_MS = 600_000  # a commit may become visible so much later than the instant that it names
_INPUT_GONE, _ALL_GONE = 1, 2


class PrivacySettings(msgspec.Struct, frozen=True, kw_only=True):
    """Tunables, in seconds.

    Attributes:
        undelivered_s: how long what nobody has fetched is kept after its job, or batch, has ended.
        sweep_s: pause between two looks for that.
    """

    undelivered_s: float = 3600.0
    sweep_s: float = 30.0


class Privacy:
    """See the module. Everything is called on the event loop.

    Args:
        lines: what workers' logs said of jobs, kept by this process.
        tenants: names of those whose content is not kept, as they are now.
    """

    def __init__(
        self,
        store: Store,
        blobs: Blobs,
        files: KeptFiles,
        lines: KeptLines,
        tenants: Callable[[], Sequence[str]],
        settings: PrivacySettings | None = None,
    ) -> None:
        self.settings = settings or PrivacySettings()
        self._store, self._blobs, self._files, self._lines, self._tenants = store, blobs, files, lines, tenants
        self._threads = StoreThreads(writers=store.parallel)
        self._jobs: dict[str, None] = {}  # delivered, and not forgotten yet
        self._kept: dict[str, str] = {}  # id -> tenant of kept files that were fetched
        self._fetched: dict[str, set[str]] = {}  # job -> keys of its files that were fetched
        self._bell = anyio.Event()
        self._looked: dict[str, int] = {}  # tenant -> what ended before this instant was forgotten
        self._left: dict[str, int] = {}  # likewise, of jobs whose clients were gone
        self._tidied: dict[str, int] = {}  # batch -> how far
        self._fresh: set[str] = set()  # jobs of `_fetched` that were not looked at since
        self._unsettled = False
        self._at_once = True  # a sweep is due, whatever the time

    def delivered(self, notes: Notes) -> None:
        """An answer was sent to its end."""
        tenants = set(self._tenants())
        if not tenants:
            return
        self._jobs |= {job: None for job, tenant in notes.jobs.items() if tenant in tenants}
        self._kept |= {file: tenant for file, tenant in notes.files.items() if tenant in tenants}
        for key in notes.blobs:
            job, slash, _ = key.partition("/")
            if slash and job not in notes.jobs:
                self._fetched.setdefault(job, set()).add(key)
                self._fresh.add(job)
        while len(self._fetched) > MOST_NOTED:  # the oldest goes when its time is over
            del self._fetched[next(iter(self._fetched))]
        self._bell.set()

    def look(self) -> None:
        """A batch has ended: look at once."""
        if self._tenants():
            self._at_once = True
            self._bell.set()

    async def run(self) -> None:
        """Forget until cancelled. Trouble with a store is logged and tried again."""
        sweep_at = 0.0
        while True:
            self._bell = anyio.Event()
            now = anyio.current_time()
            try:
                await self.forget_delivered()
                if self._tenants() and (now >= sweep_at or self._at_once):
                    sweep_at, self._at_once = now + self.settings.sweep_s, False
                    await self.sweep()
                if self._unsettled:
                    self._unsettled = not await self._threads.write(self._store.settle)
            except (StoreError, FaultError, OSError) as error:
                trouble(log, error, "What a tenant does not want kept waits for trouble with a store to end")
                await anyio.sleep(1)
            with anyio.move_on_after(self.settings.sweep_s):
                await self._bell.wait()

    async def forget_delivered(self) -> None:
        """Forget what was delivered since the last time."""
        fresh, self._fresh = self._fresh, set()
        for job in fresh:
            record = await self._threads.read(self._store.get, job)
            mine = record is not None and record.tenant in self._tenants()
            whole = record is not None and {file.blob for file in record.files} <= self._fetched.get(job, set())
            if not mine or whole:
                self._fetched.pop(job, None)
            if mine and whole:
                self._jobs[job] = None
        jobs = list(self._jobs)
        await self._forget(jobs)
        for job in jobs:
            self._jobs.pop(job, None)
        for file, tenant in list(self._kept.items()):
            await self._remove_file(file, tenant)
            self._kept.pop(file, None)

    async def sweep(self) -> None:
        """Forget what nobody has fetched in time, and what batches that have ended leave."""
        tenants = list(self._tenants())
        now_ms = await self._threads.read(self._store.now_ms)
        before = now_ms - int(self.settings.undelivered_s * 1000)
        for tenant in tenants:
            self._unsettled |= tenant not in self._looked  # an earlier life may have left its journal as it was
            for batch in await self._threads.read(self._store.list_batches, tenant, MOST_BATCHES):
                if batch.ended:
                    await self._tidy(batch, before)
            since = self._looked.get(tenant, 0)
            while found := await self._threads.read(self._store.unforgotten, [tenant], since, before, PAGE):
                await self._forget(found)
            self._looked[tenant] = max(0, before - LATE_MS)
            since = self._left.get(tenant, 0)
            while found := await self._threads.read(self._store.left_behind, [tenant], since, PAGE):
                await self._forget(found)
            self._left[tenant] = max(0, now_ms - LATE_MS)
        for looked in (self._looked, self._left):
            for tenant in set(looked) - set(tenants):
                del looked[tenant]

    async def _tidy(self, batch: BatchRecord, before_ms: int) -> None:
        """A batch that has ended: its jobs and its input are in its output."""
        step = self._tidied.get(batch.id, 0)
        if step < _INPUT_GONE:
            await self._forget(await self._threads.read(self._store.batch_jobs, batch.id, batch.tenant))
            if not await self._remove_file(batch.input_file, batch.tenant):
                return
            self._tidied[batch.id] = _INPUT_GONE
        if step < _ALL_GONE and batch.moved.get(batch.state, 0) <= before_ms:
            for file in (batch.output_file, batch.error_file):
                if file:
                    await self._remove_file(file, batch.tenant)
            self._unsettled |= await self._threads.write(self._store.forget_batch, batch.id)
            self._tidied[batch.id] = _ALL_GONE
        while len(self._tidied) > MOST_NOTED:
            del self._tidied[next(iter(self._tidied))]

    async def _remove_file(self, file: str, tenant: str) -> bool:
        """Delete a kept file, if it is there; False while a batch still reads it."""
        try:
            self._unsettled |= await self._files.remove(file, tenant)
        except FaultError as error:
            if error.fault.code != "conflict":
                raise
            return False
        return True

    async def _forget(self, jobs: Sequence[str]) -> None:
        """Files first, rows then: a row that still has content is found again, a file without a row's word is not."""
        for first in range(0, len(jobs), PAGE):
            due = await self._threads.read(self._store.forgettable, jobs[first : first + PAGE])
            for job in due:
                await run_sync(self._blobs.delete, job, ())
            for left in await self._threads.write(self._store.forget, due):
                self._unsettled = True
                await run_sync(self._blobs.delete, "", left.blobs)
            self._lines.drop(due)
