"""What a store is: plain synchronous functions over rows, each one transaction.

The row is the truth. An attempt number is a fencing token: `claim` mints it, it is never used twice, and every
later step names it, so that whoever comes late changes nothing. States in the row are those of `JobState` plus
`offered`, which is `queued` to everybody outside.

    queued ──claim──► offered ──accept──► running ──complete──► succeeded
       ▲                 │ release            │ fail
       └─────────────────┴────────────────────┴──► failed
    cancel: from queued, offered and running ──► cancelled

Functions may be called from any thread. They raise `FaultError` for what a client is told (conflict,
storage_full) and `StoreError` for what the operator has to see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import msgspec

from coordinator.records import AttemptRecord, JobRecord, LotRecord, StoredFile, Submission
from coordinator.store.deployments import Deployments
from coordinator.store.needs import Labels, fits
from coordinator.store.shelf import Shelf
from coordinator.store.vitals import StoreVitals
from coordinator.store.watch import Watch
from protocol.faults import Fault, FaultError

FIRST_BACKOFF_MS = 250
LONGEST_BACKOFF_MS = 30_000
# Only these can be a job's doing; the worker says beside them who was in flight (`suspects`, `alone`).
CRASHES = frozenset({"engine_crashed", "engine_hung", "engine_protocol", "out_of_memory"})
POISONED_AFTER = 2  # crashes while it ran alone
SPARED_AT_MOST = 5  # tries that a neighbour's crash cost and that do not count
SILENT_MS = 6000  # without a beat for so long, a coordinator is gone and others take over what it held
LEFT_BEHIND = Fault("cancelled", "The coordinator that the client was connected to is gone.")


class StoreError(Exception):
    """The store itself is in trouble; the sentence says what to do."""


class StoreBusy(StoreError):
    """Another coordinator has this store open."""


class StoreTooNew(StoreError):
    """A later version of the coordinator wrote this store."""


class StoreAway(FaultError, StoreError):
    """The database cannot be reached now; it is asked again by itself. A client sees a 503 and may try again."""


class Want(msgspec.Struct, frozen=True):
    """Free slots: up to `limit` jobs of this model whose kind is one of `kinds`.

    Attributes:
        labels: what the workers with these slots are labelled; jobs that ask for others are not for them.
        vram_gb: most GPU memory that a job may be reckoned to need; None sets no limit.
        but: jobs that none of these workers takes now.
        waited_ms: only jobs that were submitted so long ago: until then they are left to better workers elsewhere.
    """

    model: str
    kinds: tuple[str, ...]
    limit: int
    labels: Labels = frozenset()
    vram_gb: float | None = None
    but: tuple[str, ...] = ()
    waited_ms: int = 0

    def takes(self, job: JobRecord) -> bool:
        """Whether a slot of these could have the job."""
        if job.model != self.model or job.kind not in self.kinds or job.id in self.but:
            return False
        return fits(job.needs, job.vram_gb_estimate, self.labels, self.vram_gb)


Claimed = tuple[JobRecord, int]  # with the time left until its deadline in ms, 0 when it has none


class Outcome(msgspec.Struct, frozen=True):
    """What a successful attempt left."""

    result: bytes
    files: tuple[StoredFile, ...] = ()
    usage: dict[str, float] = {}


class Held(msgspec.Struct, frozen=True):
    """An attempt and the worker that has it."""

    job: str
    attempt: int
    worker: str


class Done(msgspec.Struct, frozen=True):
    """An attempt that succeeded, says its worker."""

    job: str
    attempt: int
    worker: str
    outcome: Outcome


class Ending(msgspec.Struct, frozen=True):
    """What the end of an attempt changed.

    Attributes:
        verdict: "stored" (this call ended the attempt), "again" (this end is stored already, or the job was
            cancelled before), "late" (cancelled before, and the usage was taken now), "fenced" (the attempt is
            not the job's any more).
        record: the row afterwards; None when there is no such job.
        requeued: the job went back to the queue.
    """

    verdict: Literal["stored", "again", "late", "fenced"]
    record: JobRecord | None = None
    requeued: bool = False


class Cancelled(msgspec.Struct, frozen=True):
    """`won`: this call cancelled it; otherwise it had ended before and nothing changed."""

    record: JobRecord
    won: bool


class OpenAttempt(msgspec.Struct, frozen=True):
    """A row that is offered or running."""

    job: str
    attempt: int
    state: Literal["offered", "running"]
    worker: str
    kind: str
    model: str
    streamed: bool = False


class JobFiles(msgspec.Struct, frozen=True):
    """How a job stands with its files.

    Attributes:
        attempt: the one that is offered or running, or with which its worker may come back while the job waits for
            the next; 0 for none: all others are over for good.
        files: keys of its outputs.
    """

    attempt: int = 0
    files: frozenset[str] = frozenset()


class Adoption(msgspec.Struct, frozen=True):
    """Answer to a worker that still holds an attempt.

    `verdict`: "adopted", "stored" (its success is stored already), "cancelled" (stop it), "fenced".
    """

    verdict: Literal["adopted", "stored", "cancelled", "fenced"]
    record: JobRecord | None = None


class Purged(msgspec.Struct, frozen=True):
    """A finished job that was deleted, and the input blobs that belonged to it."""

    job: str
    blobs: tuple[str, ...]


class Beat(msgspec.Struct, frozen=True):
    """What a beat of a coordinator found.

    Attributes:
        lapsed: it comes so late that others may have taken over what this coordinator held.
        taken: so many open attempts of coordinators that are gone are held here now.
        left: jobs that were cancelled because their clients hung on coordinators that are gone.
    """

    lapsed: bool = False
    taken: int = 0
    left: tuple[JobRecord, ...] = ()


class Store(Shelf, Deployments, Watch, Protocol):
    """One implementation per database; all pass the same contract suite.

    Several coordinators may share a database, each with a `Store` of its own. An open attempt is held by one of
    them, which says by its beat that it lives.
    """

    @property
    def parallel(self) -> int:
        """How many threads may write at once without waiting for each other."""

    def beat(self) -> Beat:
        """Say that this coordinator lives (once a second), and take over from those that have not for `SILENT_MS`
        while this one has."""

    def listen(self, ring: Callable[[], None]) -> None:
        """From now on call `ring`, in a thread of the store's, when another coordinator has made work due."""

    def now_ms(self) -> int:
        """The store's clock, milliseconds since the epoch."""

    def shift_clock(self, ms: int) -> None:
        """Move the store's clock by `ms` from now on; for tests."""

    def insert(self, job_id: str, submission: Submission) -> tuple[JobRecord, bool]:
        """Queue a job. With a known idempotency key returns that job and False.

        Raises:
            FaultError: `conflict` when the key was used with another request, `storage_full`.
        """

    def insert_and_claim(
        self, job_id: str, submission: Submission, wants: Sequence[Want]
    ) -> tuple[JobRecord, bool, list[Claimed]]:
        """`insert`, and when that made a row `claim`, in one transaction: a job that can start at once costs one
        commit. Raises FaultError as `insert` does."""

    def by_key(self, submission: Submission) -> JobRecord | None:
        """The job that the submission's idempotency key names. Raises FaultError(conflict) as `insert` does."""

    def get(self, job_id: str, tenant: str | None = None) -> JobRecord | None:
        """The row; with a tenant only when it is the tenant's."""

    def recent(self, tenant: str, limit: int, state: str | None = None, dead: bool = False) -> list[JobRecord]:
        """Newest first, without params and result; with `dead` only those that somebody may want to try again."""

    def videos(self, tenant: str, limit: int, after: str = "", oldest_first: bool = False) -> list[JobRecord]:
        """The tenant's jobs of videos behind the one with the id `after`, without those that were cancelled."""

    def attempts_of(self, record: JobRecord) -> list[AttemptRecord]:
        """The attempts that workers accepted, in their order; of very many the latest."""

    def retry(self, job_id: str, tenant: str | None) -> JobRecord | None:
        """Failed back to queued, with all its tries, and its whole time; what became of earlier attempts is kept.

        None when there is no such job (of the tenant's, unless that is None). Raises FaultError(conflict) for a job
        that has not failed.
        """

    def insert_lot(
        self, lot: LotRecord, jobs: Sequence[tuple[str, Submission]]
    ) -> tuple[LotRecord, list[tuple[JobRecord, bool] | Fault]]:
        """`insert` of each, in one transaction; one whose idempotency key conflicts gets its fault, and no row."""

    def get_lot(self, lot_id: str, tenant: str) -> LotRecord | None:
        """The tenant's lot, with its jobs counted by state."""

    def cancel_lot(self, lot_id: str, tenant: str, fault: Fault) -> list[JobRecord]:
        """`cancel` of all jobs of a lot; those that this call cancelled."""

    def asked_labels(self) -> Labels:
        """All labels that waiting jobs ask for."""

    def claim(self, wants: Sequence[Want]) -> list[Claimed]:
        """Take due jobs (higher priority first, then in fair turns of the tenants, then older) as offered, each with
        a new attempt number.

        With each comes the time left until its deadline in ms, 0 when it has none.
        """

    def release(self, job_id: str, attempt: int, delay_ms: int = 0) -> bool:
        """Put an offered job back; uncounted. False when it is not this attempt's any more."""

    def accept(self, job_id: str, attempt: int, worker: str) -> bool:
        """Offered to running; counts a try.

        The one step that a loss of power may undo: nobody is told of it, and a worker that still has the attempt
        says so when it comes back (`adopt` takes an offered row, too).
        """

    def accept_many(self, held: Sequence[Held]) -> list[bool]:
        """`accept` of each, in one transaction."""

    def mark_streamed(self, job_id: str, attempt: int, worker: str) -> bool:
        """Before the first chunk is forwarded. False when fenced: then nothing may be forwarded."""

    def complete(self, job_id: str, attempt: int, worker: str, outcome: Outcome) -> Ending:
        """Running to succeeded, with result, files and usage, in one transaction."""

    def complete_many(self, done: Sequence[Done]) -> list[Ending]:
        """`complete` of each, in one transaction: many results cost one sync of the disk."""

    def fail(self, job_id: str, attempt: int, worker: str, fault: Fault, streamed: bool = False) -> Ending:
        """Running to queued or failed, as `after_failure` says."""

    def cancel(self, job_id: str, tenant: str, fault: Fault) -> Cancelled | None:
        """To cancelled from any state that is not terminal. None when the tenant has no such job."""

    def end(self, job_id: str, attempt: int, fault: Fault) -> Ending:
        """Offered or running to failed, without any retry."""

    def adopt(self, job_id: str, attempt: int, worker: str) -> Adoption:
        """A worker came back with an attempt: running (or offered, when the accept was lost) stays with it."""

    def open_attempts(self) -> list[OpenAttempt]:
        """All rows that are offered or running and held by this coordinator."""

    def job_files(self, job_id: str) -> JobFiles:
        """Which attempt is open, whoever holds it, and what outputs the job has; nothing of one that is unknown."""

    def leave_unattended(self, fault: Fault) -> list[JobRecord]:
        """To cancelled: all jobs whose clients waited on connections of an earlier life. For the start alone; where
        several share the database nobody is known to be gone at once, and `beat` finds them."""

    def expire(self, slack_ms: int) -> list[JobRecord]:
        """Fail what is past its deadline: waiting jobs at once, running ones `slack_ms` after it."""

    def queued(self) -> dict[tuple[str, str], int]:
        """(kind, model) -> jobs that wait."""

    def waiting(self) -> dict[str, tuple[int, int]]:
        """Tenant -> its jobs that wait and are due, or pause before their next try; and those that were asked to start
        later."""

    def purge(self, retention_ms: int, limit: int = 500) -> list[Purged]:
        """Delete jobs that ended more than `retention_ms` ago; at most `limit` of them, and none of an open batch."""

    def remove(self, job_id: str, tenant: str) -> Purged | None:
        """Delete one job of the tenant's that has ended; None when there is none."""

    def usage(self, first: int, last: int, group_by: Sequence[str], tenant: str | None = None) -> list[dict[str, Any]]:
        """Sums over days since the epoch, both included: a row per group; `group_by` as `coordinator.usage.GROUPS`."""

    def vitals(self) -> StoreVitals:
        """How the store is; cheap, and never a look at jobs that have ended."""

    def fold_usage(self) -> int:
        """Add up usage that was counted lately; how many rows went. Sums are right before and after."""

    def has_blob(self, key: str) -> bool:
        """Whether a job's input or a kept file has this key."""

    def has_job(self, job_id: str) -> bool:
        """Whether there is such a row, and its content was not deleted."""

    def close(self) -> None:
        """Release the store; later calls raise StoreError."""


class Failing(msgspec.Struct, frozen=True):
    """What `after_failure` needs of a row."""

    tries: int
    max_attempts: int
    streamed: bool
    deadline_at_ms: int
    crashes: int = 0
    spared: int = 0


class Again(msgspec.Struct, frozen=True):
    """A failed attempt's job waits for the next one.

    Attributes:
        delay_ms: not before this much later.
        alone: it is a suspect: nothing may run beside it.
        crashes: how often it has crashed an engine that ran nothing else.
        spared: tries that do not count, because an engine crashed under several jobs and nobody knows whose it was.
    """

    delay_ms: int
    alone: bool = False
    crashes: int = 0
    spared: int = 0


def after_failure(row: Failing, fault: Fault, now_ms: int) -> Again | Fault:
    """Decide what a failed attempt does to its job: wait for the next one, or end with that fault.

    After the first chunk no new attempt starts: the client has seen part of an answer that another attempt
    would contradict. An engine that crashed under several jobs makes each a suspect, run again alone; only a crash
    while it ran alone is a job's own, and the second of those ends it.
    """
    if row.streamed or not fault.may_retry:
        return fault
    crashed = fault.code in CRASHES
    alone = crashed and fault.detail.get("alone") is True
    suspected = crashed and not alone and _count(fault.detail.get("suspects")) > 1
    crashes = row.crashes + alone
    if crashes >= POISONED_AFTER:
        return _poisoned(fault, crashes)
    spared = min(SPARED_AT_MOST, row.spared + suspected)
    counted = row.tries - spared
    delay = min(LONGEST_BACKOFF_MS, FIRST_BACKOFF_MS << max(0, row.tries - 1))
    if counted < row.max_attempts:
        if row.deadline_at_ms and now_ms + delay >= row.deadline_at_ms:
            return deadline_fault(fault)
        return Again(delay, alone=crashes > 0 or spared > 0, crashes=crashes, spared=spared)
    if row.tries <= 1:
        return fault
    # The caller wants to know what happened, not that we counted: the last fault stands, with the count beside it.
    return msgspec.structs.replace(
        fault,
        message=f"{fault.message} All {row.tries} attempts failed.",
        retryable=False,
        detail={**fault.detail, "attempts": row.tries},
    )


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0


def _poisoned(last: Fault, crashes: int) -> Fault:
    return Fault(
        "job_poisoned",
        f"This job ended its engine {crashes} times while nothing else ran there; it is not tried again. "
        f"The last time: {last.message}",
        detail={**last.detail, "crashes": crashes, "last_code": last.code},
    )


def deadline_fault(last: Fault | None = None) -> Fault:
    """The fault of a job that ran out of time."""
    detail = {"last": msgspec.to_builtins(last)} if last else {}
    return Fault("deadline_exceeded", "The job's deadline passed before it was done.", detail=detail)
