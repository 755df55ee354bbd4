"""The dispatcher: takes submissions, gives them to workers, tells watchers how they go.

The store row is the truth; what is held in memory only makes it fast. The dispatch loop wakes by a doorbell
(a submission, a free slot, a worker) and otherwise polls, so that a doorbell that was lost costs half a second
and never a job. `Attempts` is the other half: what workers say about what they hold.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec
from anyio.to_thread import run_sync

from coordinator.attempts import Attempts
from coordinator.blobs.base import Blobs
from coordinator.bus import Bus, LocalBus, Subscription
from coordinator.counting import Counters, Histogram
from coordinator.dispatch_settings import DispatchSettings
from coordinator.fleet import FOREVER, HeldAttempt, Worker
from coordinator.leftovers import Leftovers
from coordinator.logs import trouble
from coordinator.lots import Lots
from coordinator.offers import to_offer
from coordinator.records import (
    AttemptRecord,
    JobEvent,
    JobRecord,
    ServedModel,
    Submission,
    WorkerView,
)
from coordinator.room import RETRY_HINT_S, Room
from coordinator.store import Store, StoreError
from coordinator.store.base import Claimed, Want
from coordinator.store.threads import StoreThreads, hear
from coordinator.submitting import check
from coordinator.watching import events_of
from protocol.faults import Fault, FaultError, refuse
from protocol.ids import RANDOM_BYTES, new_id

log = logging.getLogger(__name__)

UNPLACED_MS = 500

# Inside the class `list` is the method.
Records = list[JobRecord]
Attempted = list[AttemptRecord]
Models = list[ServedModel]
Rows = list[dict[str, Any]]
Workers = list[WorkerView]
Sandboxes = list[tuple[str, str, dict[str, str]]]
Events = AsyncIterator[JobEvent]


class Dispatcher:
    """See the module. Everything is called on the event loop; nothing here is thread-safe."""

    def __init__(
        self, store: Store, blobs: Blobs, bus: Bus | None = None, settings: DispatchSettings | None = None
    ) -> None:
        self.settings = settings or DispatchSettings()
        self._store, self._blobs = store, blobs
        self._bus: Bus = bus or LocalBus()
        self._threads = StoreThreads(writers=store.parallel)
        self.attempts = Attempts(store, self._threads, blobs, self._bus, ring=self._ring, freed=self._slot_freed)
        # Lays over each submission what its tenant and key say, or refuses it.
        self.terms: Callable[[Submission], Submission] = lambda s: s
        self.lots = Lots(self, store, self._threads)
        self.leftovers = Leftovers(store, self._threads, blobs)
        # What a deployment answers to: from a client's name to a worker's, and back (None: it answers nobody).
        self.model_of: Callable[[str], str] = lambda name: name
        self.name_of: Callable[[str], str | None] = lambda model: model
        self._accepting = True
        self.handing_over = False  # workers are sent to other replicas
        self._room = Room(self.settings.max_queued, self.settings.max_queued_per_tenant)
        self._bell = anyio.Event()
        self._due = float("inf")  # when the next ring is wanted, on anyio's clock
        self._freed = False
        self._claiming = anyio.Lock(fast_acquire=True)  # from counting free slots to filling them
        # What the queue had nothing for. A ring or the poll clears it, a slot that becomes free does not: so a job
        # that ends does not cost a look at a queue that is known to be empty.
        self._nothing_for: set[tuple[object, ...]] = set()

    @property
    def counters(self) -> Counters:
        """What happened since the start."""
        return self.attempts.counters

    @property
    def store_timings(self) -> dict[str, Histogram]:
        """How long the store's reads and writes took, in seconds."""
        return self._threads.timings

    @property
    def waiting(self) -> int:
        """About how many jobs wait."""
        return self._room.total

    @property
    def accepting(self) -> bool:
        """Whether `submit` takes jobs."""
        return self._accepting

    # ---- for clients ---------------------------------------------------------------------------------------

    async def submit(self, s: Submission) -> JobRecord:
        """Queue a job; the same idempotency key returns the first job, even when nobody serves it now.

        Raises:
            FaultError: model_not_found, no_worker, unsupported, overloaded, payload_too_large,
                invalid_parameter, conflict, storage_full.
        """
        record, _ = await self._insert(_new_job_id(), s)
        return record

    @asynccontextmanager
    async def submit_and_watch(self, s: Submission) -> AsyncIterator[tuple[JobRecord, Events]]:
        """Submit with the watcher registered before the row is committed, so that no event is lost.

        The events end with `JobEnded`; they raise FaultError(overloaded) when the reader of a stream fell so
        far behind that chunks had to be dropped. Leaving the context does not cancel the job.
        """
        job_id = _new_job_id()
        with self._bus.subscribe(job_id) as early:
            record, created = await self._insert(job_id, s)
            if created:
                yield record, self._watched(record, early)
                return
        with self._bus.subscribe(record.id, everywhere=True) as late:
            row = await self._row(record.id)
            yield row, self._watched(row, late)

    @asynccontextmanager
    async def watch(self, job_id: str) -> AsyncIterator[Events]:
        """Events of a job from now on, as in `submit_and_watch`. Raises FaultError(not_found)."""
        with self._bus.subscribe(job_id, everywhere=True) as subscription:
            record = await self._threads.read(self._store.get, job_id)
            if record is None:
                raise _no_job(job_id)
            yield self._watched(record, subscription)

    async def get(self, job_id: str, tenant: str | None) -> JobRecord | None:
        """The row, when it belongs to the tenant; None asks for anybody's."""
        return await self._threads.read(self._store.get, job_id, tenant)

    async def list(self, tenant: str, limit: int, state: str | None = None, dead: bool = False) -> Records:
        """Newest first, without params and result; with `dead` only those that somebody may want to try again."""
        return await self._threads.read(self._store.recent, tenant, limit, state, dead)

    async def videos(self, tenant: str, limit: int, after: str, oldest_first: bool) -> Records:
        """A page of the tenant's videos, see `Store.videos`."""
        return await self._threads.read(self._store.videos, tenant, limit, after, oldest_first)

    async def cancel(self, job_id: str, tenant: str, reason: str) -> JobRecord | None:
        """Cancel; returns the row as it is afterwards (unchanged when it had ended before), None when unknown.

        The job is cancelled when this returns. A worker that runs it is told to stop; what it still sends is
        not kept, but its usage counts.
        """
        fault = Fault("cancelled", reason or "The job was cancelled.")
        cancelled = await self._threads.write(self._store.cancel, job_id, tenant, fault)
        if cancelled is None:
            return None
        if cancelled.won:
            self.attempts.stop(cancelled.record, fault.message)
        return cancelled.record

    async def usage(self, first: int, last: int, group_by: Sequence[str], tenant: str | None) -> Rows:
        """Sums of what ended jobs used; see `Store.usage`."""
        return await self._threads.read(self._store.usage, first, last, group_by, tenant)

    async def now_ms(self) -> int:
        """The store's clock, milliseconds since the epoch."""
        return await self._threads.read(self._store.now_ms)

    async def attempts_of(self, record: JobRecord) -> Attempted:
        """The attempts that workers accepted, in their order."""
        return await self._threads.read(self._store.attempts_of, record)

    async def retry(self, job_id: str, tenant: str | None) -> JobRecord | None:
        """A failed job goes back to the queue with all its tries, whether or not anybody serves it now.

        None when there is no such job (of the tenant's, unless that is None). Raises FaultError(conflict) for a job
        that has not failed.
        """
        record = await self._threads.write(self._store.retry, job_id, tenant)
        if record is not None:
            self.counters.events["retried"] += 1
            self._room.came([record])
            self.attempts.fleet.ask(record.labels)
            self._ring(0)
        return record

    async def remove(self, job_id: str, tenant: str) -> bool:
        """Delete a job that has ended, with its files; False when the tenant has no such job."""
        removed = await self._threads.write(self._store.remove, job_id, tenant)
        if removed is not None:
            await run_sync(self._blobs.delete, removed.job, removed.blobs)
        return removed is not None

    async def drop_unused(self, keys: Iterable[str]) -> None:
        """Delete those of these uploads that belong to no job."""

        def drop() -> None:
            self._blobs.delete("", [key for key in keys if not self._store.has_blob(key)])

        await self._threads.read(drop)

    def models(self) -> Models:
        """Models of all connected workers that are not draining, by the name that clients ask for."""
        named = [(self.name_of(model.name), model) for model in self.attempts.fleet.models()]
        return [msgspec.structs.replace(model, name=name) for name, model in named if name is not None]

    def workers(self, now: float = FOREVER) -> Workers:
        """All connected workers, by id; see `Fleet.views`."""
        return self.attempts.fleet.views(now)

    def sandboxes(self) -> Sandboxes:
        """(worker, model, layer -> verdict) of every announced model."""
        return self.attempts.fleet.sandboxes()

    async def hand_over(self) -> None:
        """Send all workers to other replicas, with what they hold; none is taken in here any more."""
        self.handing_over = True
        async with self._claiming:  # what is being claimed is offered first, and then given back
            await self.attempts.take_back()
        await self.attempts.hand_over()

    def stop_accepting(self) -> None:
        """From now on `submit` answers 503; jobs that are queued or running go on."""
        self._accepting = False

    async def wants_output(self, job_id: str, attempt: int) -> bool:
        """Whether outputs of this attempt are still of use."""
        return (await self.leftovers.files_of(job_id)).attempt == attempt

    async def _insert(self, job_id: str, s: Submission) -> tuple[JobRecord, bool]:
        if s.idempotency_key and (known := await self._threads.read(self._store.by_key, s)):
            return known, False
        s = self.ready(s)
        # Shielded: a row that was made is made known, so that whoever watches it can cancel it, and what was claimed
        # is offered. It lasts as long as one transaction.
        with anyio.CancelScope(shield=True), self.attempts.traces.submit(s) as s:
            record, created = await self._insert_row(job_id, s)
        if created:
            self.attempts.lines.asked(record.id)
            self.counters.submitted[s.kind, s.model] += 1
        return record, created

    def ready(self, s: Submission, more: int = 0) -> Submission:
        """Check a submission that is about to be queued, with `more` of the same call before it; completed.

        What such jobs of its tenant have cost lately is how far apart its turns are.

        Raises:
            FaultError: as `submit` does.
        """
        s = self.terms(s)
        if (model := self.model_of(s.model)) != s.model:
            s = msgspec.structs.replace(s, model=model, asked=s.model)
        self._may_wait(s, more)
        check(s, self.attempts.fleet, anyio.current_time())
        self.attempts.fleet.ask(s.labels)
        return msgspec.structs.replace(s, cost=self.attempts.costs.of(s.tenant, s.model))

    def queued(self, records: Sequence[JobRecord]) -> None:
        """Rows were made of jobs that were ready."""
        self._room.came(records)
        for record in records:
            self.counters.submitted[record.kind, record.model] += 1
        self._ring(0)

    async def _insert_row(self, job_id: str, s: Submission) -> tuple[JobRecord, bool]:
        """Make the row; when a slot is free, claim in the same transaction instead of leaving that to the loop."""
        async with self._claiming:
            wants = self.attempts.fleet.wants(anyio.current_time(), s.model)
            wants = [want for want in wants if not want.waited_ms]  # the others are not for a job that comes just now
            if wants:
                write = self._store.insert_and_claim
                record, created, claimed = await self._threads.write(write, job_id, s, wants)
                self._room.came([record] if created else [])
                if created and all(job.id != job_id for job, _ in claimed):
                    self._ring(0)
                await self._place(claimed)
                return record, created
        record, created = await self._threads.write(self._store.insert, job_id, s)
        if created:
            self._room.came([record])
            self._ring(0)
        return record, created

    def _may_wait(self, s: Submission, more: int) -> None:
        if not self._accepting:
            raise refuse("overloaded", "The coordinator is shutting down; try again later.", retry_after_s=RETRY_HINT_S)
        self._room.check(s, more)

    def _watched(self, record: JobRecord, subscription: Subscription) -> Events:
        def lagged() -> None:
            self.counters.events["lagged"] += 1

        return events_of(record, subscription, lambda: self._row(record.id), self.settings.repair_s, lagged)

    async def _row(self, job_id: str) -> JobRecord:
        row = await self._threads.read(self._store.get, job_id)
        if row is None:
            raise _no_job(job_id)
        return row

    # ---- the loops -----------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Dispatch, sweep and reconcile until cancelled; watchers end with it.

        Trouble with the store (a full disk) is logged and tried again; it does not end the loops.
        """
        try:
            await self._guarded(lambda: self.attempts.reconcile(self.settings.startup_grace_s))
            async with anyio.create_task_group() as tasks:
                tasks.start_soon(self._dispatch_loop)
                tasks.start_soon(hear, self._store, lambda: self._ring(0))
                tasks.start_soon(self._repeat, self._beat, self.settings.sweep_s)  # beside sweeps that take long
                tasks.start_soon(self._repeat, self._sweep, self.settings.sweep_s)
                tasks.start_soon(self._repeat, self.leftovers.look, self.settings.sweep_s)
                tasks.start_soon(self._repeat, self._purge, self.settings.purge_s)
                tasks.start_soon(self._repeat, self.leftovers.sweep, self.settings.orphan_sweep_s)
        finally:
            self._bus.close()

    def _ring(self, after_s: float) -> None:
        """Jobs may be due in `after_s` seconds: wake the dispatch loop then at the latest."""
        self._due = min(self._due, anyio.current_time() + after_s)
        self._bell.set()

    def _slot_freed(self) -> None:
        """A slot may be free: wake the dispatch loop."""
        self._freed = True
        self._bell.set()

    async def _dispatch_loop(self) -> None:
        poll_at = anyio.current_time() + self.settings.poll_s
        while True:
            await self._guarded(self._dispatch)
            while not self._freed and (pause := min(poll_at, self._due) - anyio.current_time()) > 0:
                self._bell = anyio.Event()
                with anyio.move_on_after(pause):
                    await self._bell.wait()
            self._freed = False
            now = anyio.current_time()
            if min(poll_at, self._due) <= now:
                self._nothing_for.clear()
                poll_at, self._due = now + self.settings.poll_s, float("inf")

    async def _dispatch(self) -> None:
        """Claim what free slots allow, and offer it."""
        async with self._claiming:
            wants = self.attempts.fleet.wants(anyio.current_time())
            wants = [want for want in wants if _slots_of(want) not in self._nothing_for]
            if not wants:
                return
            claimed = await self._threads.write(self._store.claim, wants)
            for want in wants:
                if sum(want.takes(job) for job, _ in claimed) < want.limit:
                    self._nothing_for.add(_slots_of(want))
            await self._place(claimed)
        if self.waiting and (waited := max(want.waited_ms for want in wants)):
            self._ring(waited / 1000)  # what is too young for a cold slot now, and is not taken elsewhere

    async def _place(self, claimed: Sequence[Claimed]) -> None:
        for record, left_ms in claimed:
            worker = self.attempts.fleet.place(record, anyio.current_time())
            if worker is None:
                # The worker left meanwhile, or has declined this very job. Those behind it must not wait for it.
                await self._threads.write(self._store.release, record.id, record.attempt, UNPLACED_MS)
                self._ring(0)
                continue
            self._room.went(record)
            self._offer(worker, record, left_ms)

    def _offer(self, worker: Worker, record: JobRecord, left_ms: int) -> None:
        held = HeldAttempt(
            record.id,
            record.attempt,
            record.kind,
            record.model,
            "offered",
            stream=record.stream,
            since=anyio.current_time(),
            needs=record.needs,
            vram_gb=record.vram_gb_estimate,
            origin=record.origin,
        )
        worker.attempts[held.key] = held
        self.counters.events["offers"] += 1
        record = msgspec.structs.replace(record, traceparent=self.attempts.traces.offered(record))
        worker.port.send(to_offer(record, left_ms, self._blobs, self.settings.blob_url_s), *held.key)

    async def _beat(self) -> None:
        beat = await self._threads.write(self._store.beat)
        for record in beat.left:
            self.attempts.stop(record, "Its client is gone.")
        if beat.lapsed:
            await self.attempts.hold_again()

    async def _sweep(self) -> None:
        for record in await self._threads.write(self._store.expire, int(self.settings.deadline_slack_s * 1000)):
            self.attempts.stop(record, "The job's deadline has passed.")
        await self.attempts.give_up_offers(self.settings.offer_s)
        await self.attempts.reconcile(self.settings.worker_grace_s)
        self._room.counted(await self._threads.read(self._store.waiting))
        self.attempts.fleet.asked(await self._threads.read(self._store.asked_labels))

    async def _purge(self) -> None:
        """Delete old jobs; rows first, so that no row ever names a file that is gone."""
        while purged := await self._threads.write(self._store.purge, int(self.settings.retention_s * 1000)):
            for job in purged:
                await run_sync(self._blobs.delete, job.job, job.blobs)
        while await self._threads.write(self._store.fold_usage):
            pass

    async def _repeat(self, step: Callable[[], Awaitable[None]], pause_s: float) -> None:
        while True:
            await self._guarded(step)
            await anyio.sleep(pause_s)

    async def _guarded(self, step: Callable[[], Awaitable[None]]) -> None:
        try:
            await step()
        except (StoreError, FaultError, OSError) as error:
            trouble(log, error, "The dispatcher goes on after trouble with its store")
            await anyio.sleep(self.settings.poll_s)


def _slots_of(want: Want) -> tuple[object, ...]:
    """Which slots these are, however many of them are free."""
    return (want.model, want.kinds, want.labels, want.vram_gb, want.but, want.waited_ms)


def _new_job_id() -> str:
    return new_id("job", int(time.time() * 1000), os.urandom(RANDOM_BYTES))


def _no_job(job_id: str) -> FaultError:
    return refuse("not_found", f"There is no job {job_id!r}.", "job")
