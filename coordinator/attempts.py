"""The worker's half of the dispatcher: what becomes of an attempt between its offer and its acknowledgement.

The gateway calls one method per message. Each step is a conditional UPDATE of the row, and only when that says
so does anything else happen: a watcher is told, the worker is acknowledged, the slot is free. An attempt whose
worker vanished is an *orphan* until its grace period is over or the worker says in `hello` that it still has it.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Container

import anyio
import msgspec

from coordinator.blobs.base import Blobs
from coordinator.bus import Bus, Whence
from coordinator.costs import Costs
from coordinator.counting import Counters
from coordinator.elsewhere import Elsewhere, Nobody
from coordinator.fleet import Fleet, HeldAttempt, Key, Port, Worker
from coordinator.kept_lines import KeptLines
from coordinator.logs import JobLines, trouble
from coordinator.plain import bounded
from coordinator.records import JobChunk, JobEnded, JobEvent, JobProgress, JobRecord, JobStarted
from coordinator.refusals import FIRST_PAUSE_S
from coordinator.results import judge_result
from coordinator.store import Store, StoreError
from coordinator.store.base import CRASHES, Done, Ending, Held, OpenAttempt
from coordinator.store.threads import StoreThreads, Together
from coordinator.traces import NoTraces, Traces
from coordinator.worker_lines import Ears
from protocol import link_wire as wire
from protocol.faults import Fault, FaultError

log = logging.getLogger(__name__)

SHUNNED_S = 5.0  # a job that failed waits so long for another worker that could have it, before the same one may
HAND_OVER_LOOK_S = 0.1  # between two looks for workers that have ended what they cannot take along
LOST_AT_ONCE = 200  # orphans given up in one look, each in a transaction: who takes over thousands has more to do
_FOR_GOOD = ("unsupported", "too_large", "bad_offer")  # this worker will not take this job, ever
_WHOLE_WORKER = ("paused", "draining")

Message = tuple[wire.Body, str, int]


@dataclasses.dataclass
class Orphan:
    """An open row that no connected worker holds, until `until`. `held` is what was known of it in memory."""

    state: str
    worker: str
    until: float
    held: HeldAttempt | None = None


class Attempts:
    """See the module. Everything is called on the event loop."""

    def __init__(
        self,
        store: Store,
        threads: StoreThreads,
        blobs: Blobs,
        bus: Bus,
        *,
        ring: Callable[[float], None],
        freed: Callable[[], None],
    ) -> None:
        """`ring` says that jobs are due in so many seconds, `freed` that a slot may be free."""
        self.fleet, self.counters, self.costs = Fleet(), Counters(), Costs()
        self.elsewhere: Elsewhere = Nobody()
        self._store, self._threads, self._blobs, self._bus = store, threads, blobs, bus
        self._ring, self._freed = ring, freed
        self._accept = Together(threads, store.accept_many)
        self._complete = Together(threads, store.complete_many)
        self._orphans: dict[Key, Orphan] = {}
        self._gone: set[Key] = set()  # held here, and not open in the last look at the rows
        self._looked = float("inf")  # when that was; before the first look nothing was missed
        self.traces: Traces = NoTraces()
        self.lines = JobLines()
        self.kept, self.ears = KeptLines(), Ears()
        self.joining = anyio.Lock()  # held by the gateway from `join` to `open`

    # ---- sessions ------------------------------------------------------------------------------------------

    async def join(self, port: Port, hello: wire.Hello, grace_s: float) -> tuple[Worker, list[Message]]:
        """A worker said hello; `joining` is held. Returns it, and what to send right after welcome.

        An older session of the same worker is ended. Attempts that the worker still holds go on with it; those
        that it held and does not name are lost at once, without waiting for the grace period.
        """
        if older := self.fleet.workers.get(hello.worker):
            self.leave(older, grace_s)
            older.port.close("duplicate_worker", "The same worker has opened a newer session.")
        worker = Worker(hello.worker, port, hello.capabilities)
        follow_up: list[Message] = []
        for claim in hello.held:
            follow_up += await self._adopt(worker, claim)
        for row in await self._threads.read(self._store.open_attempts):
            orphan = self._orphans.get((row.job, row.attempt))
            if row.worker == worker.id or (orphan is not None and orphan.worker == worker.id):
                if (row.job, row.attempt) not in worker.attempts:
                    await self.lose(row)
        return worker, follow_up

    def open(self, worker: Worker) -> None:
        """Welcome was sent: offers may follow."""
        self.counters.events["sessions"] += 1
        self.fleet.add(worker)
        self.elsewhere.joined(worker.id)
        self._ring(0)

    def leave(self, worker: Worker, grace_s: float) -> None:
        """Its session is over: what it holds is orphaned for the grace period."""
        if not self.fleet.remove(worker):
            return
        until = anyio.current_time() + grace_s
        for held in worker.attempts.values():
            if held.state != "abandoned":
                self._orphans[held.key] = Orphan(held.state, worker.id, until, held)
        self._ring(grace_s)

    def announce(self, worker: Worker, capabilities: wire.Capabilities) -> None:
        """Its capabilities changed."""
        self.fleet.announce(worker, capabilities)
        self._ring(0)

    def drain(self, worker: Worker) -> None:
        """No more offers; it finishes what it holds."""
        worker.draining = True

    async def _adopt(self, worker: Worker, claim: wire.Held) -> list[Message]:
        key = (claim.job, claim.attempt)
        adoption = await self._threads.write(self._store.adopt, claim.job, claim.attempt, worker.id)
        orphan = self._orphans.pop(key, None)
        record = adoption.record
        if adoption.verdict in ("fenced", "stored") or record is None:
            self.counters.events["fenced"] += adoption.verdict == "fenced"
            verdict = wire.Ack(verdict="stored" if adoption.verdict == "stored" else "fenced")
            return [(verdict, claim.job, claim.attempt)]
        known = orphan.held if orphan else None
        held = known or HeldAttempt(
            *key, record.kind, record.model, "running", record.stream, record.streamed, None, origin=record.origin
        )
        held.needs, held.vram_gb = record.needs, record.vram_gb_estimate
        worker.attempts[key] = held
        held.state = "running"
        if adoption.verdict == "cancelled":
            held.state = "abandoned"
            return [(wire.Cancel(reason="The job was cancelled."), claim.job, claim.attempt)]
        self.counters.events["adopted"] += 1
        return []

    # ---- one method per message ----------------------------------------------------------------------------

    async def accept(self, worker: Worker, key: Key) -> None:
        """The worker took the offer."""
        held = worker.attempts[key]
        if held.state == "abandoned":
            return  # the Cancel is on its way already
        if await self._accept(Held(*key, worker.id)):
            self.counters.events["accepted"] += 1
            if held.state == "offered":  # not when it was cancelled meanwhile
                held.state = "running"
        else:
            self.abandon(worker, held, "The offer is not open any more.")

    async def decline(self, worker: Worker, key: Key, body: wire.Decline) -> None:
        """The worker did not take it: back to the queue, uncounted, and not to the same worker at once."""
        held = worker.attempts.pop(key)
        self.counters.declines[body.code] += 1
        self.traces.ended(key, "declined")
        if held.state == "abandoned":
            self._ring(0)
            return
        now = anyio.current_time()
        pause = self.fleet.refusals.declined(held.job, body.retry_after_ms)
        self._block(worker, held, body.code, now + pause)
        if self.fleet.refused_by_all(held):
            fault = Fault("unsupported", f"No worker can run this job: {body.reason or body.code}")
            await self._ended(await self._threads.write(self._store.end, *key, fault))
            return
        # Others, here or at another replica, may have it at once; this worker avoids it, or is closed, meanwhile.
        delay = 0.0 if self.fleet.others(held, worker.id, now) else pause
        await self._threads.write(self._store.release, *key, int(delay * 1000))
        self._ring(delay)

    def _block(self, worker: Worker, held: HeldAttempt, code: str, until: float) -> None:
        if code in _FOR_GOOD:
            self.fleet.refuse(worker, held)
            return
        self.fleet.refusals.avoid(held.job, worker.id, until)
        if code == "draining":
            worker.draining = True
        # Without this, a thousand waiting jobs would be offered and declined one after the other.
        worker.block("" if code in _WHOLE_WORKER else held.model, until)

    def started(self, worker: Worker, key: Key) -> None:
        """Validation passed, the engine works."""
        if worker.attempts[key].state == "running":
            self._publish(worker.attempts[key], JobStarted())

    async def chunk(self, worker: Worker, key: Key, body: wire.Chunk) -> bool:
        """Forward a chunk to the watchers. False when a chunk before it is missing."""
        held, came_at = worker.attempts[key], time.monotonic()
        if held.state != "running":
            return True
        if held.next_seq is not None and body.seq != held.next_seq:
            return body.seq < held.next_seq  # sent again after a reconnect
        if held.stream and not held.streamed:
            # In the row before the client sees it, so that no restart of ours can begin a second answer.
            if not await self._threads.write(self._store.mark_streamed, *key, worker.id):
                self.abandon(worker, held, "The attempt is not the job's any more.")
                return True
            held.streamed = True
        held.next_seq = body.seq + 1
        if held.stream:
            self.counters.events["chunks"] += 1
            self._publish(held, JobChunk(body.seq, bytes(body.data), came_at))
        return True

    def progress(self, worker: Worker, key: Key, body: wire.Progress) -> None:
        """Tell the watchers how far it is."""
        if worker.attempts[key].state == "running":
            self._publish(worker.attempts[key], JobProgress(body.n, body.total, body.phase, body.text))

    async def complete(self, worker: Worker, key: Key, body: wire.Complete) -> bool:
        """The attempt succeeded, says the worker: judge the result, store it, acknowledge.

        Returns whether it is a result; what is none has failed the attempt.
        """
        held = worker.attempts[key]
        outcome = await judge_result(self._blobs, *key, held.kind, body)
        if isinstance(outcome, Fault):
            log.warning("%s#%d on %s: %s", *key, worker.id, outcome.message)
            await self.fail(worker, key, wire.Fail(fault=outcome, streamed=held.streamed))
            return False
        ending = await self._complete(Done(*key, worker.id, outcome))
        if (failing := self.fleet.succeeded(worker, held.model)) is not None and failing.rests:
            log.info("Worker %s is in order again: a job of the model %r succeeded", worker.id, held.model)
            self.fleet.tell(worker)
        if ending.verdict in ("stored", "late"):
            self.counters.add_usage(held.model, outcome.usage)
        await self._finish(worker, key, ending)
        return True

    async def fail(self, worker: Worker, key: Key, body: wire.Fail) -> None:
        """The attempt failed: requeue the job or end it, then acknowledge."""
        held, fault, now = worker.attempts[key], bounded(body.fault), anyio.current_time()
        others = self.fleet.others(held, worker.id, now)
        if others and fault.code in CRASHES and worker.id in self.fleet.refusals.shunned(held.job):
            # It has failed on this very worker before, and sound ones were busy: that tells nothing of the job.
            fault = msgspec.structs.replace(fault, detail={**fault.detail, "alone": False, "again_on": worker.id})
        ending = await self._threads.write(self._store.fail, *key, worker.id, fault, body.streamed or held.streamed)
        if ending.verdict == "stored":
            self._count_failure(worker, held, fault)
        if ending.requeued:
            self.fleet.refusals.shun(held.job, worker.id)
            if others:
                self.fleet.refusals.avoid(held.job, worker.id, anyio.current_time() + SHUNNED_S)
        await self._finish(worker, key, ending)

    def _count_failure(self, worker: Worker, held: HeldAttempt, fault: Fault) -> None:
        """A worker on which job after job fails rests: it would be offered every job, being always the least busy."""
        now = anyio.current_time()
        if (failing := self.fleet.failed(worker, held, fault, now)) is None:
            return
        self.counters.events["quarantines"] += 1
        rest = max(0.0, failing.until - now)
        what = f"nothing of the model {held.model!r} for {rest:.0f} s"
        if not rest:
            what = f"one job of the model {held.model!r} at a time, being the only one that takes it"
        said = f"{failing.failed} tries in a row failed there, the last with {failing.code}"
        level = logging.INFO if failing.rests > 1 else logging.WARNING
        log.log(level, "Worker %s gets %s: %s", worker.id, what, said)
        self.fleet.tell(worker)
        self._ring(rest)

    async def _finish(self, worker: Worker, key: Key, ending: Ending) -> None:
        held = worker.attempts.pop(key, None)
        fenced = ending.verdict == "fenced"
        self.counters.events["fenced"] += fenced
        self.counters.events["late"] += ending.verdict == "late"
        self.counters.events["duplicate"] += ending.verdict == "again"
        worker.port.send(wire.Ack(verdict="fenced" if fenced else "stored"), *key)
        await self._ended(ending, -1 if held is None or held.next_seq is None else held.next_seq)

    def abandon(self, worker: Worker, held: HeldAttempt, reason: str) -> None:
        """The row went on without this attempt: let the worker stop it. Its slot is free when it has."""
        if held.state != "abandoned":
            held.state = "abandoned"
            worker.port.send(wire.Cancel(reason=reason), *held.key)

    async def spoil(self, worker: Worker, key: Key, fault: Fault) -> None:
        """The worker sent something unreadable about this attempt: it fails, the worker is told to stop it."""
        held = worker.attempts.get(key)
        if held is None or held.state == "abandoned":
            return
        if held.state == "offered":
            await self._threads.write(self._store.release, *key, int(FIRST_PAUSE_S * 1000))
            self.fleet.refusals.shun(key[0], worker.id)
            self._ring(FIRST_PAUSE_S)
        else:
            await self._ended(await self._threads.write(self._store.fail, *key, worker.id, fault, held.streamed))
        self.abandon(worker, held, "The coordinator could not read a message about it.")

    def let_go(self, worker: Worker, key: Key) -> None:
        """The worker runs nothing, it says: an attempt that the row went on without takes no slot any more."""
        held = worker.attempts.get(key)
        if held is not None and held.state == "abandoned":
            del worker.attempts[key]
            self._freed()

    def look_again(self) -> None:
        """A worker is idle: see whether there is something for it, in case a doorbell was lost."""
        self._ring(0)

    # ---- orphans -------------------------------------------------------------------------------------------

    async def reconcile(self, grace_s: float) -> None:
        """Compare the open rows with what workers hold, and give up orphans whose grace period is over.

        This finds rows of an earlier life, of workers that vanished, and claims whose answer was lost. While the store
        is away no worker can come back: of a pause between two looks a quarter of the grace counts, and no more.
        """
        rows = {(row.job, row.attempt): row for row in await self._threads.read(self._store.open_attempts)}
        now = anyio.current_time()
        pause, lost = max(0.0, now - self._looked - grace_s / 4), 0
        self._looked = now
        for orphan in self._orphans.values():
            orphan.until += pause
        for key, row in rows.items():
            if self.fleet.holder(key) is None and key not in self._orphans:
                self._orphans[key] = Orphan(row.state, row.worker, now + grace_s)
                self._ring(grace_s)
        for key, orphan in list(self._orphans.items()):
            if key not in rows or self.fleet.holder(key) is not None:
                self._orphans.pop(key, None)
            elif orphan.until <= now and lost < LOST_AT_ONCE and not self.joining.locked():
                lost += 1
                await self.lose(rows[key])
        self._notice_ends(rows)
        self.fleet.refusals.tidy(now)
        if self.fleet.ask_again(now):
            self._ring(0)

    def _notice_ends(self, rows: Container[Key]) -> None:
        """Stop attempts that another coordinator ended: their rows are open no more, in two looks, one after another.

        In one look alone that is also an attempt whose claim, or whose end, has just not come back from the store.
        """
        gone = {
            held.key: (worker, held)
            for worker, held in self.fleet.all_attempts()
            if held.state != "abandoned" and held.key not in rows
        }
        for key in self._gone & gone.keys():
            self.abandon(*gone[key], "The job was ended elsewhere.")
        self._gone = set(gone)

    async def hold_again(self) -> None:
        """We were silent so long that others may have taken over what is held here.

        Whose attempt is not ours by its row any more is asked to come again: what it says it holds then is the truth,
        whether it comes back here or has long gone elsewhere.
        """
        rows = {(row.job, row.attempt) for row in await self._threads.read(self._store.open_attempts)}
        for worker in list(self.fleet.workers.values()):
            lost = [held for held in worker.attempts.values() if held.state == "running" and held.key not in rows]
            if lost:
                log.warning("Worker %s shall come again: %d of its attempts were taken over", worker.id, len(lost))
                worker.port.close("", "")

    async def take_back(self) -> None:
        """No worker gets more, and offers that are open are offers no more."""
        for worker in list(self.fleet.workers.values()):
            worker.draining = True
        try:
            for _, held in self.fleet.all_attempts():
                if held.state == "offered":
                    await self._threads.write(self._store.release, *held.key)
                    held.state = "abandoned"
        except (StoreError, FaultError) as error:
            trouble(log, error, "Open offers are not taken back; they are when this replica is gone")

    async def hand_over(self) -> None:
        """Every worker goes to another replica and takes along what it has accepted; returns when all have gone.

        One that can take nothing along ends it first. Cancellation: those that have not ended it stay.
        """
        while self.fleet.workers:
            for worker in list(self.fleet.workers.values()):
                if worker.resumes or not any(held.state == "running" for held in worker.attempts.values()):
                    worker.port.close("", "")
            await anyio.sleep(HAND_OVER_LOOK_S)

    async def lose(self, row: OpenAttempt) -> None:
        """Nobody holds the attempt any more."""
        self._orphans.pop((row.job, row.attempt), None)
        self.counters.events["lost"] += 1
        if row.state == "offered":
            self.traces.ended((row.job, row.attempt), "lost")
            await self._threads.write(self._store.release, row.job, row.attempt)
            self._ring(0)
            return
        fault = Fault("worker_lost", "The worker lost its connection while it ran the job.")
        await self._ended(await self._threads.write(self._store.fail, row.job, row.attempt, row.worker, fault))

    async def give_up_offers(self, older_than_s: float) -> None:
        """Take back offers that were not answered in time."""
        before = anyio.current_time() - older_than_s
        for worker, held in self.fleet.all_attempts():
            if held.state == "offered" and held.since < before:
                self.counters.events["offer_timeouts"] += 1
                self.traces.ended(held.key, "unanswered")
                self.fleet.refusals.shun(held.job, worker.id)
                if await self._threads.write(self._store.release, *held.key):
                    self.abandon(worker, held, "The offer was not answered in time.")
                    self._ring(0)

    # ---- endings -------------------------------------------------------------------------------------------

    async def _ended(self, ending: Ending, chunks: int = -1) -> None:
        """Tell everybody what an ending changed."""
        record = ending.record
        if ending.verdict == "stored" and record is not None:
            if ending.requeued:
                self.counters.events["requeued"] += 1
                self.traces.ended((record.id, record.attempt), "requeued")
                self._ring(0.25)
            else:
                self.announce_end(record, chunks)
        self._freed()

    def announce_end(self, record: JobRecord, chunks: int = -1) -> None:
        """A row has just become terminal, after so many chunks: count it and end its watchers."""
        self.counters.jobs[record.kind, record.model, record.state] += 1
        self.costs.note(record)
        if record.fault is not None:
            self.counters.faults[record.kind, record.model, record.fault.code] += 1
        self.lines.ended(record)
        self.traces.ended((record.id, record.attempt), record.fault.code if record.fault is not None else "")
        self.fleet.refusals.forget(record.id)
        self._bus.publish(record.id, JobEnded(record, chunks), Whence(record.attempt, record.origin))

    def stop(self, record: JobRecord, reason: str) -> None:
        """A row became terminal from our side: its worker, if any, stops the attempt."""
        if found := self.fleet.holder((record.id, record.attempt)):
            self.abandon(*found, reason)
        elif record.gateway:
            self.elsewhere.stop(record.gateway, (record.id, record.attempt), reason)
        self._orphans.pop((record.id, record.attempt), None)
        self.announce_end(record)

    def _publish(self, held: HeldAttempt, event: JobEvent) -> None:
        self._bus.publish(held.job, event, Whence(held.attempt, held.origin))
