"""What the coordinator's halves tell each other: submissions, job records, events, served models.

All instants are milliseconds since the epoch by the store's clock; all durations are milliseconds.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from protocol.faults import Fault
from protocol.link_wire import GpuState

JobState = Literal["queued", "running", "succeeded", "failed", "cancelled"]
TERMINAL: frozenset[str] = frozenset({"succeeded", "failed", "cancelled"})


class StoredInput(msgspec.Struct, frozen=True):
    """An input file that lies in the blobs: `blob` is its key there, `name` what the engine calls it."""

    name: str
    blob: str
    size: int
    sha256: str
    mime: str = "application/octet-stream"


class StoredFile(msgspec.Struct, frozen=True):
    """An output file of a succeeded job: `blob` is its key in the blobs."""

    name: str
    blob: str
    mime: str
    size: int
    sha256: str


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """A job as a client asks for it, already checked by `protocol.work.parse_params`.

    Attributes:
        params: msgpack of the parameter struct of `kind`.
        inputs: files that the worker fetches before the run.
        stream: whether chunks are wanted.
        idempotency_key: a second submission of this tenant with the same key returns the first one's job.
        deadline_ms: time from now until the answer is worthless, queueing included; 0 means none.
        max_attempts: how many accepted attempts a job may have in all.
        wait_for_worker: queue even when nobody serves the model now.
        attended: its client waits on an open connection and cannot come back for the answer.
        asked: what the client called the model, where that is another name of it.
        run_after_ms: no worker gets it before this instant; its deadline counts from then on.
        labels: what its worker's labels must say.
        vram_gb_estimate: its worker must have so much GPU memory for one job.
        weight: share of its tenant: with 2 a tenant's jobs come up twice as often as with 1.
        key_open, tenant_open: refused when its key, or its tenant, has so many jobs open already; 0 is no limit.
        cost: estimated seconds of a GPU, 1 when nothing is known; a tenant's turns are as rare as they are dear.
        lot: the call with which many jobs were submitted at once; "" for a single one.
    """

    kind: str
    model: str
    params: bytes
    inputs: tuple[StoredInput, ...] = ()
    stream: bool = False
    tenant: str = "default"
    key_id: str = ""
    idempotency_key: str = ""
    priority: int = 0
    deadline_ms: int = 0
    labels: dict[str, str] = {}
    vram_gb_estimate: float = 0.0
    max_attempts: int = 3
    wait_for_worker: bool = False
    traceparent: str = ""
    attended: bool = False
    asked: str = ""
    run_after_ms: int = 0
    weight: float = 1.0
    key_open: int = 0
    tenant_open: int = 0
    cost: float = 1.0
    lot: str = ""


class JobRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One row of the store as others may see it.

    Attributes:
        attempt: the latest fencing token; offers that were declined have used numbers, too.
        tries: how many attempts were accepted by a worker; this is what `max_attempts` bounds.
        result: msgpack of the result struct, only when succeeded.
        usage: what was counted; a cancelled job keeps it as well.
        streamed: a chunk was forwarded, so no new attempt will start.
        worker: who runs or ran the latest attempt.
        deadline_at_ms: 0 means none.
        alone: the next attempt must have its instance for itself: an engine crashed while it ran.
        run_after_ms: a waiting job is given to no worker before this instant: its scheduled start, or the pause
            before its next attempt; 0 means none.
        needs: its labels and GPU memory, as `coordinator.store.needs` writes them.
        lot: see `Submission`.
        dead: it failed, and not by its caller's doing: somebody may want to look at it and try it again.
        origin: the coordinator that its client asked; watchers of its stream are there. "" in lists.
        gateway: the coordinator that holds, or held, the latest attempt. "" in lists.
    """

    id: str
    kind: str
    model: str
    state: JobState
    tenant: str
    attempt: int
    created_ms: int
    params: bytes
    key_id: str = ""
    tries: int = 0
    started_ms: int | None = None
    finished_ms: int | None = None
    result: bytes | None = None
    files: tuple[StoredFile, ...] = ()
    usage: dict[str, float] = {}
    fault: Fault | None = None
    inputs: tuple[StoredInput, ...] = ()
    stream: bool = False
    streamed: bool = False
    worker: str = ""
    priority: int = 0
    deadline_at_ms: int = 0
    labels: dict[str, str] = {}
    vram_gb_estimate: float = 0.0
    max_attempts: int = 3
    traceparent: str = ""
    idempotency_key: str = ""
    alone: bool = False
    run_after_ms: int = 0
    needs: str = ""
    lot: str = ""
    dead: bool = False
    origin: str = ""
    gateway: str = ""

    @property
    def ended(self) -> bool:
        """Whether the state is terminal."""
        return self.state in TERMINAL


class AttemptRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One attempt that a worker accepted; offers that were declined have used numbers, and leave no record.

    Attributes:
        n: its number, the fencing token.
        ended_ms: None while it runs.
        outcome: how it ended; a failed attempt's job may have been tried again.
        fault: of this attempt.
    """

    n: int
    worker: str
    began_ms: int | None
    ended_ms: int | None
    outcome: Literal["running", "succeeded", "failed", "cancelled"]
    fault: Fault | None = None


class LotRecord(msgspec.Struct, frozen=True, kw_only=True):
    """Many jobs that were submitted in one call.

    Attributes:
        total: lines of the call.
        refused: lines that made no job.
        counts: state -> jobs that are kept; one that was deleted since is in none.
    """

    id: str
    tenant: str
    created_ms: int
    total: int
    refused: int
    counts: dict[str, int] = {}


class JobEvent(msgspec.Struct, frozen=True):
    """Base of what a watcher of one job sees."""


class JobStarted(JobEvent, frozen=True):
    """The engine's validation passed and the work began: response headers may go out now."""


class JobChunk(JobEvent, frozen=True):
    """One piece of streamed output: `data` is msgpack of the kind's chunk struct; `seq` rises from 0 by 1.

    `at`: when it came to this coordinator, on the monotonic clock; 0 when that is not known.
    """

    seq: int
    data: bytes
    at: float = 0.0


class JobNudge(JobEvent, frozen=True):
    """The job has ended, they say elsewhere: whoever watches looks at the row. `chunks` as in `JobEnded`."""

    chunks: int = -1


class JobProgress(JobEvent, frozen=True):
    """How far the work is; may be dropped when the watcher is slow."""

    n: int
    total: int | None = None
    phase: str = ""
    text: str = ""


class JobEnded(JobEvent, frozen=True):
    """The job's terminal row; always the last event.

    `chunks`: how many its last attempt has streamed; -1 when it is not known here, and then some may be missing.
    """

    record: JobRecord
    chunks: int = -1


class ServedModel(msgspec.Struct, frozen=True, kw_only=True):
    """One model over all connected workers.

    Attributes:
        workers: ids of the connected workers that serve it.
        slots: concurrent jobs over all of them.
        limits: what the engine reported (context length, voices, …), of the first worker that said anything.
        resident: whether it is loaded anywhere now.
    """

    name: str
    kinds: tuple[str, ...]
    workers: tuple[str, ...]
    slots: int
    limits: dict[str, Any] = {}
    engines: tuple[str, ...] = ()
    resident: bool = False


class Resting(msgspec.Struct, frozen=True, kw_only=True):
    """A model of which a worker gets no job for `for_s` seconds, and then, at 0, one at a time until one succeeds.

    `failed` tries in a row have failed there, the last with the fault `code`.
    """

    model: str
    for_s: float = 0.0
    failed: int = 0
    code: str = ""


class WorkerView(msgspec.Struct, frozen=True, kw_only=True):
    """One connected worker, for health and metrics. `accepting` is false while it drains or is paused.

    `protocol` is what its session speaks: native or studio; `key_id` the prefix of the key that it came with.
    `resting` are the models that its replica keeps it from, because job after job of them failed there.
    """

    id: str
    accepting: bool
    reason: str
    running: int
    slots: int
    models: tuple[str, ...]
    version: str = ""
    machine: str = ""
    labels: dict[str, str] = {}
    gpus: tuple[GpuState, ...] = ()
    protocol: str = "native"
    key_id: str = ""
    resting: tuple[Resting, ...] = ()


class WorkerScope(msgspec.Struct, frozen=True):
    """What a worker token allows. `worker` pins the token to one worker id; "" allows any."""

    worker: str = ""
    key_id: str = ""
