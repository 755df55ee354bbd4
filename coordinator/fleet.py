"""The connected workers, what they hold, and which of them gets a job. No I/O; times are handed in, in seconds.

A slot is one concurrent job of one model on one worker. An attempt takes its slot from the offer on, so that
there is never more than one offer at a time per free slot.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping

from coordinator.quarantine import Failing, Quarantine
from coordinator.records import JobRecord, Resting, ServedModel, WorkerView
from coordinator.refusals import Refusals
from coordinator.slots import Key, Slots
from coordinator.store.base import Want
from coordinator.store.needs import Labels, needs_of
from coordinator.worker import HeldAttempt, Port, Worker
from protocol.faults import Fault
from protocol.link_wire import Capabilities, ModelOffer

__all__ = ["FOREVER", "Fleet", "HeldAttempt", "Key", "Port", "Worker", "view_of"]

RETRY_HINT_S = 3  # a worker that lost its connection is usually back by then
FOREVER = float("inf")
# What another replica may take from the doorbell on; to load a model takes longer. A dead one costs no more than this,
# and one poll.
COLD_WAITS_MS = 250
AFAR_AGAIN_S = 0.5  # a look at all workers of the others
GONE_S = 15.0  # a reconnect takes about 1 s, a move to another replica 0.5 s
MAX_REMEMBERED = 10_000  # models; names come from workers, so their number is not ours to trust


class Fleet:
    """All connected workers."""

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}
        self._slots = Slots()
        self.elsewhere: Callable[[], Iterable[Worker]] = tuple  # those that are connected to other replicas
        self._afar_loaded: dict[str, set[Labels]] = {}  # see `_loaded_afar`; looked up at most so often
        self._afar_at = -FOREVER
        self.tell: Callable[[Worker], None] = lambda worker: None  # those: something of ours has changed
        self.refusals = Refusals()
        self._refused: dict[str, HeldAttempt] = {}  # jobs that somebody here refused for good, as they were offered
        self._among: set[str] = set()  # who was connected at the last look at them, here and elsewhere
        self._left_at: dict[str, float] = {}  # who has gone since, and may come back
        self._quarantine = Quarantine()
        self._seen: dict[str, set[str]] = {}  # model -> kinds, of all workers since the start
        self._asked: Labels = frozenset()  # what waiting jobs ask for, as last looked up
        self._asked_before: set[tuple[str, str]] = set()  # by jobs that came while that was looked up, or since
        self._asked_lately: set[tuple[str, str]] = set()

    # ---- choosing ------------------------------------------------------------------------------------------

    def wants(self, now: float, model: str | None = None) -> list[Want]:
        """Free slots of all workers, or of one model, summed over those that are alike to the jobs that wait.

        Of labels only those count that some job asks for: so a thousand workers with names of their own are one want.
        While another replica has an idle worker with the model loaded, cold slots are for jobs that it did not take.
        """
        wants = []
        for alike, free, slots in self._slots.free(now, self._asked_for, model):
            name, kinds, labels, vram = alike
            loaded = self._slots.loaded(alike)
            ready = sum(loaded.values())
            if ready < free and any(labels <= theirs for theirs in self._loaded_afar(name, now)):
                if ready:
                    wants.append(Want(name, kinds, ready, labels, vram, self.refusals.avoided_by_all(loaded, now)))
                avoided = self.refusals.avoided_by_all(slots, now)
                wants.append(Want(name, kinds, free - ready, labels, vram, avoided, COLD_WAITS_MS))
            else:
                wants.append(Want(name, kinds, free, labels, vram, self.refusals.avoided_by_all(slots, now)))
        return wants

    def _loaded_afar(self, model: str, now: float) -> Collection[Labels]:
        """Labels of workers of other replicas that have the model loaded and, as told last, a free slot."""
        if now >= self._afar_at:
            self._afar_at, self._afar_loaded = now + AFAR_AGAIN_S, {}
            for worker in self._afar():
                if worker.view is None or worker.view.running >= worker.slots:
                    continue
                for offer in worker.capabilities.models:
                    if offer.resident and offer.kinds and worker.open_to(offer.name, now):
                        self._afar_loaded.setdefault(offer.name, set()).add(worker.labels)
        return self._afar_loaded.get(model, ())

    @property
    def _asked_for(self) -> Labels:
        """What jobs ask for that may wait now."""
        return self._asked | self._asked_before | self._asked_lately

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
        avoided, shunned = self.refusals.avoided(record.id), self.refusals.shunned(record.id)

        def takes(worker: Worker, offer: ModelOffer) -> bool | None:
            if record.kind not in offer.kinds or avoided.get(worker.id, 0.0) > now:
                return False
            if not worker.fits(record.needs, record.vram_gb_estimate):
                return False
            return None if worker.id in shunned else True

        return self._slots.best(record.model, now, self._asked_for, takes)

    def refuse(self, worker: Worker, held: HeldAttempt) -> None:
        """The worker will never take this job. It is not asked again; but see `ask_again`."""
        self._refused[held.job] = held
        self.refusals.refuse(held.job, worker.id)
        self.refusals.avoid(held.job, worker.id, FOREVER)
        self.tell(worker)

    def ask_again(self, now: float) -> bool:
        """Have jobs offered here once more that everybody has refused by now, so that this refusal ends them.

        That is when another replica was told too late, or when who might have taken them has gone, and has not come
        back for `GONE_S`. Where nobody has gone, only those are looked at that the others have told of. Returns whether
        there are any.
        """
        afar = list(self._afar())
        among = {*self.workers, *(worker.id for worker in afar)}
        self._left_at = {name: at for name, at in self._left_at.items() if name not in among}
        self._left_at.update(dict.fromkeys(self._among - among, now))
        self._among = among
        gone = [name for name, at in self._left_at.items() if now >= at + GONE_S]
        for name in gone:
            del self._left_at[name]
        self._refused = {job: held for job, held in self._refused.items() if self.refusals.refused(job)}
        if not self._refused or (self._left_at and not gone):
            return False
        told = self._refused.keys() & {job for worker in afar for job in worker.refuses}
        found = False
        for job in list(self._refused) if gone else told:
            if self.refused_by_all(self._refused[job]):
                for worker in [name for name, until in self.refusals.avoided(job).items() if until > now]:
                    self.refusals.avoid(job, worker, 0.0)
                    found = True
        return found

    def refused_by_all(self, held: HeldAttempt) -> bool:
        """Whether every connected worker that could have the job has refused it for good, here and elsewhere."""
        return self.refused_here(held) and all(
            held.job in worker.refuses for worker in self._afar() if _suits(worker, held)
        )

    def refused_here(self, held: HeldAttempt) -> bool:
        """The same of those that are connected here."""
        refused = self.refusals.refused(held.job)
        serving = [worker for worker in self._slots.serving(held.model).values() if _suits(worker, held)]
        return bool(serving) and all(worker.id in refused for worker in serving)

    def others(self, held: HeldAttempt, but: str, now: float) -> bool:
        """Whether a worker other than `but`, here or elsewhere, could take the job now or when it has a free slot."""
        avoided = self.refusals.avoided(held.job)
        return any(
            worker.id != but
            and _suits(worker, held)
            and worker.open_to(held.model, now)
            and avoided.get(worker.id, 0.0) <= now
            for worker in self._slots.serving(held.model).values()
        ) or any(
            worker.id != but
            and held.job not in worker.refuses
            and _suits(worker, held)
            and worker.open_to(held.model, now)
            for worker in self._afar()
        )

    def _afar(self) -> Iterator[Worker]:
        """Those that are connected to other replicas, and not, by a newer session, here."""
        return (worker for worker in self.elsewhere() if worker.id not in self.workers)

    # ---- who fails -----------------------------------------------------------------------------------------

    def failed(self, worker: Worker, held: HeldAttempt, fault: Fault, now: float) -> Failing | None:
        """An attempt failed there. Returns what has failed when the worker is to rest from the model from now on.

        The only one that could have such a job rests for no time: it has one job at a time from now on.
        """
        worker.failing = self._quarantine.of(worker.id)  # what had nothing in it may have been let go meanwhile
        one = self._quarantine.failed(
            worker.id, held.model, held.job, fault, held.since, now, sole=not self._takes(held, worker.id, now)
        )
        if one is not None:
            self._slots.changed(worker)
        return one

    def _takes(self, held: HeldAttempt, but: str, now: float) -> bool:
        """Whether another worker takes such jobs now; that this very one keeps off it, having failed there, is no sign.

        Unlike `others`, which asks for this job alone.
        """
        serving = self._slots.serving(held.model).values()
        return any(
            worker.id != but and worker.open_to(held.model, now) and _suits(worker, held)
            for worker in itertools.chain(serving, self._afar())
        )

    def succeeded(self, worker: Worker, model: str) -> Failing | None:
        """An attempt succeeded there. Returns what had failed before, if anything."""
        if not worker.failing:
            return None
        self._slots.changed(worker)
        return self._quarantine.succeeded(worker.id, model)

    # ---- membership ----------------------------------------------------------------------------------------

    def add(self, worker: Worker) -> None:
        """A session is open; an older one of the same worker is not in the fleet any more."""
        if older := self.workers.get(worker.id):
            self.remove(older)
        self.workers[worker.id] = worker
        worker.failing = self._quarantine.came_again(worker.id)
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
        self,
        kind: str,
        model: str,
        labels: Mapping[str, str] | None = None,
        vram_gb: float = 0.0,
        now: float = FOREVER,
    ) -> Fault | None:
        """Why nobody could run such a job now; None when somebody could. Without `now` nobody rests."""
        if self._serves(kind, model, needs_of(labels or {}, vram_gb), vram_gb, now):
            return None
        kinds = {k for offer in self._live_offers() if offer.name == model for k in offer.kinds}
        if kind in kinds:
            return self._judge_needs(kind, model, labels or {}, vram_gb, now)
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

    def _serves(self, kind: str, model: str, needs: str, vram_gb: float, now: float) -> bool:
        """Whether a worker that is connected here could run such a job: nearly always the first that is looked at."""
        return any(
            not worker.draining
            and worker.offer_of(kind, model) is not None
            and worker.fits(needs, vram_gb)
            and not (worker.failing and worker.rests_from(model, now))
            for worker in self._slots.serving(model).values()
        )

    def _judge_needs(
        self, kind: str, model: str, labels: Mapping[str, str], vram_gb: float, now: float
    ) -> Fault | None:
        serving = [worker for worker in self._live() if worker.offer_of(kind, model)]
        needs = needs_of(labels, vram_gb)
        fitting = [worker for worker in serving if worker.fits(needs, vram_gb)]
        if fitting:
            return _resting(model, min(worker.rests_from(model, now) for worker in fitting))
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

    def views(self, now: float = FOREVER) -> list[WorkerView]:
        """All workers, by id. Without `now` nobody rests any more, and who rested is tried with one job at a time."""
        return [view_of(worker, now) for _, worker in sorted(self.workers.items())]

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


def _resting(model: str, for_s: float) -> Fault | None:
    """Why a job waits when all that could have it rest."""
    if not for_s:
        return None
    message = (
        f"Every worker that serves {model!r} rests, because job after job failed there; try again in {for_s:.0f} s."
    )
    return Fault("quarantined", message, "model", detail={"retry_after_s": math.ceil(for_s)})


def view_of(worker: Worker, now: float) -> WorkerView:
    """A worker that is connected here, as it is listed; see `Fleet.views`."""
    return WorkerView(
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
        resting=_resting_models(worker, now),
    )


def _resting_models(worker: Worker, now: float) -> tuple[Resting, ...]:
    return tuple(
        Resting(model=model, for_s=worker.rests_from(model, now), failed=one.failed, code=one.code)
        for model, one in sorted(worker.failing.items())
        if one.rests
    )


def _unique(names: Iterable[str]) -> tuple[str, ...]:
    return tuple(sorted(set(names)))
