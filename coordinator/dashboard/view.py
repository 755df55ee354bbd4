"""From what the coordinator knows to rows of the dashboard. Pure; every text is cut, because others chose it.

A row has only what may be shown to an admin: never what a job was asked, and never what it answered.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

from coordinator.fleet import FOREVER, Fleet, Worker
from coordinator.records import AttemptRecord, JobRecord
from coordinator.registrations import Registration
from coordinator.store.vitals import SLOW_TRANSACTION_S
from coordinator.store.watch import QueueLoad
from coordinator.vitals import Sample
from protocol.faults import Fault
from protocol.link_wire import GpuState, ModelOffer

Row = dict[str, Any]
Rows = dict[str, Row]

MOST_WORKERS = 1000
MOST_QUEUES = 200
MOST_JUDGED = 20  # each judgement looks at every worker
MOST_JOBS = 25  # a page of them; older ones are asked for
MOST_PENDING = 100
MOST_DEPLOYMENTS = 100
_TEXT = 300
_SHORT = 128
_MANY = 64  # of what a worker or a client may list
_STEP = 64 * 2**20  # free memory is rounded to it: what flickers by less is no news


def cut(text: object, most: int = _SHORT) -> str:
    """A text of others, not longer than `most`."""
    words = str(text)
    return words if len(words) <= most else words[: most - 1] + "…"


# ---- workers ------------------------------------------------------------------------------------------------


class WorkerRows:
    """Rows of workers, each made anew only when something in it may have changed: idle ones cost little."""

    def __init__(self) -> None:
        self._known: dict[str, _Known] = {}

    def __call__(self, fleet: Iterable[Worker], now: float) -> Rows:
        """By id; when there are too many, those that take no jobs stay. `now` is the fleet's clock."""
        found = sorted(fleet, key=lambda worker: (worker.capabilities.accepting and not worker.draining, worker.id))
        known = {worker.id: self._of(worker, now) for worker in found[:MOST_WORKERS]}
        self._known = known
        return {cut(name): one.row for name, one in known.items()}

    def _of(self, worker: Worker, now: float) -> _Known:
        told = (worker.capabilities, worker.gpus, worker.view)
        blocked = tuple(name for name, until in worker.blocked.items() if until > now)
        state = (worker.draining, worker.protocol, tuple(worker.attempts), blocked, resting(worker))
        known = self._known.get(worker.id)
        if known and known.state == state and all(old is new for old, new in zip(known.told, told, strict=True)):
            return known
        return _Known(told, state, worker_row(worker, now))


class _Known(NamedTuple):
    """A row, and what it was made of."""

    told: tuple[object, ...]
    state: tuple[object, ...]
    row: Row


def worker_row(worker: Worker, now: float) -> Row:
    """One connected worker."""
    told = worker.capabilities
    return {
        "id": cut(worker.id),
        "state": worker_state(worker),
        "reason": cut("finishes what it has, and takes nothing new" if worker.draining else told.reason, _TEXT),
        "running": running(worker),
        "slots": worker.slots,
        "protocol": worker.protocol,
        "version": cut(told.version),
        "machine": cut(told.machine),
        "labels": labels(told.labels),
        "gpus": gpus(worker),
        "models": [model_row(offer) for offer in told.models[:_MANY]],
        # Models of which it takes nothing for a while, because it declined or could not load them.
        "declined": sorted(cut(name) or "all" for name, until in worker.blocked.items() if until > now)[:_MANY],
        "resting": resting(worker),
        "jobs": sorted({held.job for held in worker.attempts.values()})[:_MANY],
    }


def resting(worker: Worker) -> list[str]:
    """Why it gets nothing of a model, or only one job at a time: a sentence for each such model."""
    if worker.view is not None:
        told = [(one.model, one.failed, one.code) for one in worker.view.resting]
    else:
        told = [(model, one.failed, one.code) for model, one in sorted(worker.failing.items()) if one.rests]
    return [
        f"{cut(model)}: {failed} tries in a row failed, the last with {cut(code)}; after a rest it gets one at a time"
        for model, failed, code in told[:_MANY]
    ]


def worker_state(worker: Worker) -> str:
    """One word for what it does."""
    if worker.draining:
        return "draining"
    if not worker.capabilities.accepting:
        return "paused"
    return "busy" if running(worker) else "idle"


def running(worker: Worker) -> int:
    """Jobs that it has; of one that is connected to another replica, as that one told last."""
    return len(worker.attempts) if worker.view is None else worker.view.running


def gpus(worker: Worker) -> list[Row]:
    """What it announced, with what its last heartbeat told."""
    told = worker.gpus if worker.view is None else worker.view.gpus
    now: dict[str, GpuState] = {state.uuid: state for state in told[:_MANY]}
    rows = []
    for gpu in worker.capabilities.gpus[:_MANY]:
        state = now.pop(gpu.uuid, GpuState(uuid=gpu.uuid))
        rows.append(_gpu(state, gpu.name, gpu.vram_bytes, gpu.free_bytes))
    return rows + [_gpu(state, "", 0, None) for state in now.values()]


def _gpu(state: GpuState, name: str, total: int, announced: int | None) -> Row:
    free = state.free_bytes if state.free_bytes is not None else announced
    return {
        "uuid": cut(state.uuid),
        "name": cut(name),
        "total_bytes": total,
        "free_bytes": None if free is None else free // _STEP * _STEP,
        "busy": None if state.busy is None else round(state.busy, 2),
        "temperature_c": None if state.temperature_c is None else round(state.temperature_c),
        "power_w": None if state.power_w is None else round(state.power_w),
    }


def model_row(offer: ModelOffer) -> Row:
    """One model that a worker announced."""
    return {
        "name": cut(offer.name),
        "kinds": [cut(kind) for kind in offer.kinds[:_MANY]],
        "engine": cut(offer.engine),
        "slots": offer.slots,
        "resident": offer.resident,
        "device": cut(offer.device),
        "vram_bytes": offer.vram_bytes,
        "sandbox": {cut(layer): cut(word) for layer, word in sorted(offer.sandbox.items())[:_MANY]},
    }


def labels(told: Mapping[str, str]) -> dict[str, str]:
    """As somebody set them."""
    return {cut(name): cut(value) for name, value in sorted(told.items())[:_MANY]}


# ---- the queue ----------------------------------------------------------------------------------------------


def queues(loads: Iterable[QueueLoad], fleet: Fleet, now: float = FOREVER) -> Rows:
    """What waits and runs, and every model that is served, by kind and model; of too many the fullest.

    `now` is the fleet's clock; without it nobody rests.
    """
    served = _Served(fleet, now)
    found: Rows = {}
    unserved = 0
    for load in sorted(loads, key=lambda load: -load.waiting)[:MOST_QUEUES]:
        row = _queue(load.kind, load.model)
        row |= {"waiting": load.waiting, "running": load.running, "oldest_ms": load.oldest_ms}
        found[row["id"]] = row
        key = (load.kind, load.model)
        if not load.waiting or served.taking[key]:
            continue
        if served.workers[key] and not served.resting[key]:
            row["why"] = "Every worker that serves it is paused or draining."
        elif (unserved := unserved + 1) <= MOST_JUDGED and (fault := fleet.judge(*key, now=now)) is not None:
            row["why"] = cut(fault.message, _TEXT)
    for (kind, model), number in served.workers.items():
        row = _queue(kind, model)
        if row["id"] not in found and len(found) >= MOST_QUEUES:
            continue
        row = found.setdefault(row["id"], row)
        row["workers"] += number
        row["slots"] += served.slots[kind, model]
    return found


class _Served:
    """Workers and their slots by kind and model; `taking` counts those that take jobs now, `resting` those that
    would, if jobs had not failed there one after the other."""

    def __init__(self, fleet: Fleet, now: float) -> None:
        self.workers: Counter[tuple[str, str]] = Counter()
        self.taking: Counter[tuple[str, str]] = Counter()
        self.resting: Counter[tuple[str, str]] = Counter()
        self.slots: Counter[tuple[str, str]] = Counter()
        for worker in fleet.all_workers().values():
            takes = worker.capabilities.accepting and not worker.draining
            for offer in worker.capabilities.models:
                rests = takes and worker.rests_from(offer.name, now) > 0
                for kind in offer.kinds:
                    self.workers[kind, offer.name] += 1
                    self.taking[kind, offer.name] += takes and not rests
                    self.resting[kind, offer.name] += rests
                    self.slots[kind, offer.name] += offer.slots


def _queue(kind: str, model: str) -> Row:
    kind, model = cut(kind), cut(model)
    return {
        "id": f"{kind}/{model}",
        "kind": kind,
        "model": model,
        "waiting": 0,
        "running": 0,
        "oldest_ms": 0,
        "workers": 0,
        "slots": 0,
        "why": "",
    }


# ---- deployments --------------------------------------------------------------------------------------------


def deployments(found: Iterable[Mapping[str, Any]]) -> Rows:
    """What the fleet is told to serve, as the API tells it: wanted, ready, and of each worker why not; by name."""
    rows: Rows = {}
    for one in found:
        if len(rows) >= MOST_DEPLOYMENTS:
            break
        placed = [
            {"worker": cut(each["worker"]), "state": each["state"], "why": cut(each["why"], _TEXT)}
            | {"revision": each["revision"]}
            for each in sorted(one["workers"], key=lambda each: each["state"] == "ready")
        ]
        others = [{"worker": cut(each["worker"]), "why": cut(each["why"], _TEXT)} for each in one["not_chosen"][:_MANY]]
        rows[one["name"]] = {
            "name": one["name"],
            "source": cut(one["source"], _TEXT),
            "engine": cut(one["engine"]),
            "on": labels(one["on"]),
            "revision": one["revision"],
            "serving": one["serving"],
            "wanted": one["wanted"],
            "ready": one["ready"],
            "leaving": one["leaving"],
            "workers": placed[:_MANY],
            "workers_total": len(placed),
            "not_chosen": others,
            "not_chosen_total": one["not_chosen_total"],
        }
    return rows


# ---- jobs ---------------------------------------------------------------------------------------------------


def jobs(records: Iterable[JobRecord]) -> Rows:
    """By id."""
    return {record.id: job_row(record) for record in records}


def job_row(record: JobRecord) -> Row:
    """One job, without what it was asked and what it answered."""
    return {
        "id": record.id,
        "kind": record.kind,
        "model": cut(record.model),
        "state": record.state,
        "tenant": cut(record.tenant),
        "key": cut(record.key_id),
        "worker": cut(record.worker),
        "attempt": record.attempt,
        "tries": record.tries,
        "max_attempts": record.max_attempts,
        "priority": record.priority,
        "alone": record.alone,
        "labels": labels(record.labels),
        "created_ms": record.created_ms,
        "started_ms": record.started_ms,
        "finished_ms": record.finished_ms,
        "deadline_at_ms": record.deadline_at_ms,
        "usage": {cut(name): value for name, value in sorted(record.usage.items())[:_MANY]},
        "fault": fault_row(record.fault),
    }


def attempt_row(attempt: AttemptRecord) -> Row:
    """One attempt of a job."""
    return {
        "n": attempt.n,
        "worker": cut(attempt.worker),
        "began_ms": attempt.began_ms,
        "ended_ms": attempt.ended_ms,
        "outcome": attempt.outcome,
        "fault": fault_row(attempt.fault),
    }


def fault_row(fault: Fault | None) -> Row | None:
    """What went wrong, in one sentence, and whose it is."""
    if fault is None:
        return None
    return {"code": cut(fault.code), "message": cut(fault.message, _TEXT), "owner": str(fault.owner)}


# ---- who asks to be let in ----------------------------------------------------------------------------------


def pending(found: Iterable[Registration]) -> Rows:
    """Requests that wait for an admin, by id."""
    rows: Rows = {}
    for one in found:
        if len(rows) >= MOST_PENDING:
            break
        row = msgspec.to_builtins(one)
        row |= {name: cut(row[name]) for name in ("machine", "user", "agent", "address", "install")}
        row["models"] = [cut(model) for model in one.models[:_MANY]]
        row.pop("seen_ms")  # it rises with every poll, which is no news
        rows[one.id] = row
    return rows


# ---- trouble


def trouble(seen: Sample) -> Rows:
    """What an operator must know of the store while it answers: a transaction that is long, in whole minutes."""
    gauges = seen.store.gauges if seen.store is not None else {}
    open_s = gauges.get("oldest_transaction_seconds", 0.0)
    if open_s < SLOW_TRANSACTION_S:
        return {}
    idle = gauges.get("idle_in_transaction_seconds", 0.0) >= SLOW_TRANSACTION_S
    message = (
        f"A transaction has been open in the store's database for {int(open_s // 60)} min"
        f"{', and one of them does nothing' if idle else ''}: the queue slows down until it ends. "
        "coordinator doctor says whose it is."
    )
    return {"transaction": {"message": message}}
