"""The connected workers, what they hold, and which of them gets a job. No I/O; times are handed in, in seconds.

A slot is one concurrent job of one model on one worker. An attempt takes its slot from the offer on, so that
there is never more than one offer at a time per free slot.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, Protocol

from coordinator.records import JobRecord, ServedModel, WorkerView
from coordinator.slots import Holding, Key, Slots
from coordinator.store.base import Want
from coordinator.store.needs import Labels, fits, needs_of
from protocol.faults import Fault
from protocol.link_wire import Body, Capabilities, Fetch, GpuState, ModelOffer, OrderDone

__all__ = ["FOREVER", "Fleet", "HeldAttempt", "Key", "Port", "Worker"]

RETRY_HINT_S = 3  # a worker that lost its connection is usually back by then
FOREVER = float("inf")
MAX_REMEMBERED = 10_000  # models; names come from workers, so their number is not ours to trust
_COUNTED = frozenset({"capabilities", "draining", "at_once", "vram_gb"})  # what `Slots` goes by, beside the methods


class Port(Protocol):
    """The way to a connected worker. Neither method waits."""

    def send(self, body: Body, job: str = "", attempt: int = 0) -> None:
        """Queue a message; a worker that does not read is disconnected instead."""

    def close(self, code: str, message: str) -> None:
        """Say `error` and end the session; `code` is one of `link_wire.Error`."""


@dataclasses.dataclass
class HeldAttempt:
    """One attempt that a worker has been offered or works on.

    Attributes:
        state: "abandoned" means the row went on without it: it still takes a slot until the worker ends it.
        next_seq: number of the next chunk to forward; None when it is unknown after a restart of ours.
        since: when it was offered.
        needs, vram_gb: what its job needs of a worker, as in the row.
        origin: the replica that the job's client asked.
    """

    job: str
    attempt: int
    kind: str
    model: str
    state: Literal["offered", "running", "abandoned"]
    stream: bool = False
    streamed: bool = False
    next_seq: int | None = 0
    since: float = 0.0
    needs: str = ""
    vram_gb: float = 0.0
    origin: str = ""

    @property
    def key(self) -> Key:
        """(job, attempt)."""
        return (self.job, self.attempt)


@dataclasses.dataclass(eq=False)
class Worker:
    """One connected worker.

    Attributes:
        protocol: what its session speaks.
        key_id: prefix of the key that it came with, where it came with one.
        at_once: how many jobs it takes at a time over all its models; None when only their slots count.
        vram_gb: its dialect's word for the most GPU memory that a job may be reckoned to need; None when the
            announcement says it.
        resumes: whether it keeps what it has accepted when its session ends, and goes on with it in the next one.
        view: of a worker that is connected to another replica: what that one told of it last.
        slots_of: where its free slots are counted, while it is in a fleet.
    """

    id: str
    port: Port
    capabilities: Capabilities
    attempts: Holding = dataclasses.field(init=False)
    draining: bool = False
    revision: int = 1  # of the link, in this session
    gpus: tuple[GpuState, ...] = ()  # as the last heartbeat told
    fetches: tuple[Fetch, ...] = ()  # the same
    orders: dict[str, Callable[[OrderDone], None]] = dataclasses.field(default_factory=dict)  # by id, who waits
    # Model -> no offer before this time; "" speaks of all models. A new announcement lifts them.
    blocked: dict[str, float] = dataclasses.field(default_factory=dict)
    protocol: str = "native"
    at_once: int | None = None
    vram_gb: float | None = None
    resumes: bool = True
    key_id: str = ""
    view: WorkerView | None = None
    slots_of: Slots | None = None

    def __post_init__(self) -> None:
        self.attempts = Holding(self)

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name in _COUNTED and self.slots_of is not None:
            self.slots_of.changed(self)

    @property
    def slots(self) -> int:
        """Concurrent jobs over all its models."""
        slots = sum(offer.slots for offer in self.capabilities.models)
        return slots if self.at_once is None else min(slots, self.at_once)

    @property
    def room_gb(self) -> float | None:
        """Most GPU memory that a job may be reckoned to need here; None sets no limit.

        Without a word of the worker's own it is all its GPUs together: what one of them holds, only it can tell.
        """
        if self.vram_gb is not None:
            return self.vram_gb
        if self.capabilities.vram_threshold_gb > 0:
            return self.capabilities.vram_threshold_gb
        return sum(gpu.vram_bytes for gpu in self.capabilities.gpus) / 2**30 if self.capabilities.gpus else None

    @property
    def labels(self) -> Labels:
        """Its labels, as jobs ask for them."""
        return frozenset(self.capabilities.labels.items())

    def fits(self, needs: str, vram_gb: float) -> bool:
        """Whether it has what a job needs beside its model."""
        return fits(needs, vram_gb, self.labels, self.room_gb)

    def offer_of(self, kind: str, model: str) -> ModelOffer | None:
        """Its announcement of this model for this kind."""
        for offer in self.capabilities.models:
            if offer.name == model and kind in offer.kinds:
                return offer
        return None

    def free(self, offer: ModelOffer) -> int:
        """Free slots of an announced model."""
        if not self.attempts:  # as of most workers of a large fleet that waits
            return offer.slots if self.at_once is None else min(offer.slots, self.at_once)
        taken = sum(held.model == offer.name and held.kind in offer.kinds for held in self.attempts.values())
        free = offer.slots - taken
        return max(0, free if self.at_once is None else min(free, self.at_once - len(self.attempts)))

    def open_to(self, model: str, now: float) -> bool:
        """Whether it takes offers of this model now."""
        if self.draining or not self.capabilities.accepting:
            return False
        return not self.blocked or all(self.blocked.get(name, 0.0) <= now for name in (model, ""))

    def block(self, model: str, until: float) -> None:
        """No offers of this model ("" for all) before `until`."""
        self.blocked[model] = max(until, self.blocked.get(model, 0.0))
        if self.slots_of is not None:
            self.slots_of.changed(self)

    def unblock(self, now: float) -> None:
        """Forget blocks whose time is over."""
        if self.blocked:
            self.blocked = {model: until for model, until in self.blocked.items() if until > now}


class Fleet:
    """All connected workers."""

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}
        self._slots = Slots()
        self.elsewhere: Callable[[], Iterable[Worker]] = tuple  # those that are connected to other replicas
        self._avoid: dict[str, dict[str, float]] = {}  # job -> worker -> until
        self._shunned: dict[str, set[str]] = {}  # job -> workers on which it has failed
        self._seen: dict[str, set[str]] = {}  # model -> kinds, of all workers since the start
        self._asked: Labels = frozenset()  # what waiting jobs ask for, as last looked up
        self._asked_before: set[tuple[str, str]] = set()  # by jobs that came while that was looked up, or since
        self._asked_lately: set[tuple[str, str]] = set()

    # ---- choosing ------------------------------------------------------------------------------------------

    def wants(self, now: float, model: str | None = None) -> list[Want]:
        """Free slots of all workers, or of one model, summed over those that are alike to the jobs that wait.

        Of labels only those count that some job asks for: so a thousand workers with names of their own are one want.
        """
        return [
            Want(name, kinds, free, labels, vram, self._avoided_by(slots, now))
            for (name, kinds, labels, vram), free, slots in self._slots.free(now, self._asked_for, model)
        ]

    @property
    def _asked_for(self) -> Labels:
        """What jobs ask for that may wait now."""
        return self._asked | self._asked_before | self._asked_lately

    def _avoided_by(self, slots: Iterable[str], now: float) -> tuple[str, ...]:
        """Jobs that none of these workers is to be offered now."""
        return tuple(
            job for job, avoided in self._avoid.items() if all(avoided.get(worker, 0.0) > now for worker in slots)
        )

    def ask(self, labels: Mapping[str, str]) -> None:
        """A job that asks for these labels was queued."""
        if len(self._asked_lately) < MAX_REMEMBERED:
            self._asked_lately.update(labels.items())

    def asked(self, labels: Labels) -> None:
        """What all waiting jobs ask for was looked up just now."""
        self._asked, self._asked_before, self._asked_lately = labels, self._asked_lately, set()

    def place(self, record: JobRecord, now: float) -> Worker | None:
        """The worker for a claimed job; None when no slot is free.

        One on which the job has not failed before one on which it has; loaded before cold; then the least busy, and of
        several such the one that connected first.
        """
        avoided = self._avoid.get(record.id, {})
        shunned = self._shunned.get(record.id, set())

        def takes(worker: Worker, offer: ModelOffer) -> bool | None:
            if record.kind not in offer.kinds or avoided.get(worker.id, 0.0) > now:
                return False
            if not worker.fits(record.needs, record.vram_gb_estimate):
                return False
            return None if worker.id in shunned else True

        return self._slots.best(record.model, now, self._asked_for, takes)

    def avoid(self, job: str, worker: str, until: float) -> None:
        """Do not offer the job to this worker before `until`."""
        self._avoid.setdefault(job, {})[worker] = until

    def shun(self, job: str, worker: str) -> None:
        """Prefer any other worker for this job, because it failed on this one."""
        self._shunned.setdefault(job, set()).add(worker)

    def forget_job(self, job: str) -> None:
        """The job has ended."""
        self._avoid.pop(job, None)
        self._shunned.pop(job, None)

    def refused_by_all(self, held: HeldAttempt) -> bool:
        """Whether every connected worker that could have the job has refused it for good."""
        avoided = self._avoid.get(held.job, {})
        serving = [worker for worker in self._slots.serving(held.model).values() if _suits(worker, held)]
        return bool(serving) and all(avoided.get(worker.id) == FOREVER for worker in serving)

    def others(self, held: HeldAttempt, but: str, now: float) -> bool:
        """Whether a worker other than `but` could take the job now or when it has a free slot."""
        avoided = self._avoid.get(held.job, {})
        return any(
            worker.id != but
            and _suits(worker, held)
            and worker.open_to(held.model, now)
            and avoided.get(worker.id, 0.0) <= now
            for worker in self._slots.serving(held.model).values()
        )

    # ---- membership ----------------------------------------------------------------------------------------

    def add(self, worker: Worker) -> None:
        """A session is open; an older one of the same worker is not in the fleet any more."""
        if older := self.workers.get(worker.id):
            self.remove(older)
        self.workers[worker.id] = worker
        self._slots.add(worker)
        self._remember(worker.capabilities)

    def announce(self, worker: Worker, capabilities: Capabilities) -> None:
        """Capabilities changed; what a decline had blocked is open again."""
        worker.blocked.clear()
        worker.capabilities = capabilities
        self._remember(capabilities)

    def remove(self, worker: Worker) -> bool:
        """Its session is over. False when a newer session has taken its place."""
        if self.workers.get(worker.id) is not worker:
            return False
        del self.workers[worker.id]
        self._slots.remove(worker)
        return True

    def holder(self, key: Key) -> tuple[Worker, HeldAttempt] | None:
        """Who holds an attempt."""
        worker = self._slots.holders.get(key)
        return None if worker is None else (worker, worker.attempts[key])

    def all_attempts(self) -> Iterator[tuple[Worker, HeldAttempt]]:
        """Every attempt that is held by a connected worker; safe against changes meanwhile."""
        pairs = [(worker, held) for worker in self.workers.values() for held in worker.attempts.values()]
        return iter(pairs)

    # ---- views ---------------------------------------------------------------------------------------------

    def judge(
        self, kind: str, model: str, labels: Mapping[str, str] | None = None, vram_gb: float = 0.0
    ) -> Fault | None:
        """Why nobody could run such a job now; None when somebody could."""
        if self._serves(kind, model, needs_of(labels or {}, vram_gb), vram_gb):
            return None
        kinds = {k for offer in self._live_offers() if offer.name == model for k in offer.kinds}
        if kind in kinds:
            return self._judge_needs(kind, model, labels or {}, vram_gb)
        hint = {"retry_after_s": RETRY_HINT_S}
        if kinds:
            listed = ", ".join(sorted(kinds))
            return Fault("unsupported", f"The model {model!r} does not serve {kind}; it serves {listed}.", "model")
        if kind in self._seen.get(model, ()):
            return Fault(
                "no_worker",
                f"No worker can take the model {model!r} now: it is away, or it could not load it; try again.",
                detail=hint,
            )
        if not any(True for _ in self._live_offers()):
            return Fault("no_worker", "No worker is connected; try again in a few seconds.", detail=hint)
        return Fault(
            "model_not_found", f"The model {model!r} is not served here; GET /v1/models lists what is.", "model"
        )

    def _serves(self, kind: str, model: str, needs: str, vram_gb: float) -> bool:
        """Whether a worker that is connected here could run such a job: nearly always the first that is looked at."""
        return any(
            not worker.draining and worker.offer_of(kind, model) is not None and worker.fits(needs, vram_gb)
            for worker in self._slots.serving(model).values()
        )

    def _judge_needs(self, kind: str, model: str, labels: Mapping[str, str], vram_gb: float) -> Fault | None:
        serving = [worker for worker in self._live() if worker.offer_of(kind, model)]
        needs = needs_of(labels, vram_gb)
        if any(worker.fits(needs, vram_gb) for worker in serving):
            return None
        hint = {"retry_after_s": RETRY_HINT_S}
        cure = "ask for less, or set wait_for_worker to queue it for one that has"
        labelled = [worker for worker in serving if frozenset(labels.items()) <= worker.labels]
        if not labelled:
            asked = ", ".join(f"{name}={text}" for name, text in sorted(labels.items()))[:300]
            message = f"labels: No worker that serves {model!r} has {asked}; {cure}."
            return Fault("no_worker", message, "labels", detail=hint)
        most = max(worker.room_gb or 0.0 for worker in labelled)
        message = (
            f"vram_gb_estimate: No worker that serves {model!r} takes {vram_gb:g} GB, the most is {most:g}; {cure}."
        )
        return Fault("no_worker", message, "vram_gb_estimate", detail=hint)

    def models(self) -> list[ServedModel]:
        """What is served now, by name."""
        names = sorted({offer.name for offer in self._live_offers()})
        return [self._served(name) for name in names]

    def views(self) -> list[WorkerView]:
        """All workers, by id."""
        return [
            WorkerView(
                id=worker.id,
                accepting=worker.capabilities.accepting and not worker.draining,
                reason="draining" if worker.draining else worker.capabilities.reason,
                running=len(worker.attempts),
                slots=worker.slots,
                models=tuple(offer.name for offer in worker.capabilities.models),
                version=worker.capabilities.version,
                machine=worker.capabilities.machine,
                labels=worker.capabilities.labels,
                gpus=worker.gpus,
                protocol=worker.protocol,
                key_id=worker.key_id,
            )
            for _, worker in sorted(self.workers.items())
        ]

    def views_elsewhere(self) -> list[WorkerView]:
        """Workers of the other replicas, as those have told of them last."""
        return [one.view for one in self.elsewhere() if one.view is not None and one.id not in self.workers]

    def sandboxes(self) -> list[tuple[str, str, dict[str, str]]]:
        """(worker, model, layer -> verdict) of every model whose instance has told its verdicts."""
        return [
            (worker.id, offer.name, offer.sandbox)
            for worker in self.workers.values()
            for offer in worker.capabilities.models
            if offer.sandbox
        ]

    def _served(self, name: str) -> ServedModel:
        pairs = [
            (worker.id, offer)
            for worker in self._live()
            for offer in worker.capabilities.models
            if offer.name == name and offer.kinds
        ]
        offers = [offer for _, offer in pairs]
        return ServedModel(
            name=name,
            kinds=_unique(kind for offer in offers for kind in offer.kinds),
            workers=_unique(worker for worker, _ in pairs),
            slots=sum(offer.slots for offer in offers),
            limits=next((offer.limits for offer in offers if offer.limits), {}),
            engines=_unique(offer.engine for offer in offers),
            resident=any(offer.resident for offer in offers),
        )

    def _live(self) -> list[Worker]:
        return [worker for worker in self.all_workers().values() if not worker.draining]

    def all_workers(self) -> dict[str, Worker]:
        """By id, those of other replicas included; one that is connected twice is the one that is connected here."""
        return {worker.id: worker for worker in self.elsewhere()} | self.workers

    def _live_offers(self) -> Iterator[ModelOffer]:
        for worker in self._live():
            yield from (offer for offer in worker.capabilities.models if offer.kinds)

    def _remember(self, capabilities: Capabilities) -> None:
        for offer in capabilities.models:
            if offer.name in self._seen or len(self._seen) < MAX_REMEMBERED:
                self._seen.setdefault(offer.name, set()).update(offer.kinds)


def _suits(worker: Worker, held: HeldAttempt) -> bool:
    return worker.offer_of(held.kind, held.model) is not None and worker.fits(held.needs, held.vram_gb)


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(names)))
