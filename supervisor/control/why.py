"""Why the worker, or one of its GPUs, is idle: a sentence or two. Pure.

The first reason that holds is the one to tell, in the order in which a person would mend them: what somebody decided
(a drain, a pause), what is broken (the GPU, the link, the models), what is merely not so far (memory, a load), and
last that there is nothing to do. Where jobs wait although somebody decided that no more are taken, both are told: the
decision, and what those jobs wait for.

There is always a reason: a GPU without a running job, and a worker without one, never get "".
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import msgspec

from supervisor.control.snapshot import GpuView, ModelView, Snapshot
from supervisor.intake.holds import Hold, Holds, Mode, Source

_LOADING = ("starting", "loading")
_BROKEN = ("quarantined", "backoff")
_ENDING = ("draining", "stopping")
# Who ends a hold without an end of its own. The sentences of rules say themselves when they let go.
_LIFTED = {
    Source.OPERATOR: " until `supervisor resume`",
    Source.COORDINATOR: " until the coordinator resumes it",
    Source.UPDATE: " until the update is done",
}


def explained(snapshot: Snapshot) -> Snapshot:
    """The same, with `state`, `why` and each GPU's `why` filled in."""
    gpus = tuple(msgspec.structs.replace(gpu, why=why_gpu(gpu, snapshot)) for gpu in snapshot.gpus)
    return msgspec.structs.replace(snapshot, gpus=gpus, state=state_of(snapshot), why=why_worker(snapshot))


def state_of(snapshot: Snapshot) -> str:
    """The worker's state, in one word. Cordons pause a part of it only, and do not count."""
    if snapshot.draining:
        return "draining"
    if Holds(snapshot.holds).about():
        return "paused"
    if _works(snapshot.models):
        return "busy"
    if not snapshot.link.connected:
        return "offline"
    return "idle"


def why_worker(snapshot: Snapshot) -> str:
    """Why the worker does nothing, or takes no more jobs; "" when it works and goes on."""
    holds = Holds(snapshot.holds).about()
    decided = _decided(snapshot, holds)
    if not decided:
        return "" if _works(snapshot.models) else _about_models(snapshot.models, snapshot)
    # While something runs, what waits for it will be next: no need to say.
    queued = "" if _works(snapshot.models) else _about_queued(snapshot.models)
    return " ".join(part for part in (decided, _left(snapshot, holds), queued) if part)


def why_gpu(gpu: GpuView, snapshot: Snapshot) -> str:
    """Why this GPU does nothing; "" when a job runs on it."""
    if _works([model for model in snapshot.models if _is_on(model, gpu, snapshot)]):
        return ""
    if gpu.fault:
        return gpu.fault
    mine = [model for model in snapshot.models if _may_use(model, gpu, snapshot)]
    if not mine:
        return "No model is configured for it."
    if decided := _decided(snapshot, Holds(snapshot.holds).about(gpu=gpu.uuid)):
        return " ".join(part for part in (decided, _about_queued(mine)) if part)
    return _about_models(mine, snapshot)


def _works(models: Sequence[ModelView]) -> bool:
    return any(model.running for model in models)


def _is_on(model: ModelView, gpu: GpuView, snapshot: Snapshot) -> bool:
    """Whether its instance is there: by where it was started, else by what it holds, else by what it is told."""
    if model.on or model.held:
        return gpu.uuid in (model.on or [uuid for uuid, count in model.held.items() if count])
    if model.gpus:
        return gpu.uuid in model.gpus
    return model.device != "cpu" and gpu.uuid == snapshot.gpus[0].uuid


def _may_use(model: ModelView, gpu: GpuView, snapshot: Snapshot) -> bool:
    return gpu.uuid in model.gpus or _is_on(model, gpu, snapshot) or (not model.gpus and model.device != "cpu")


# ---- what somebody decided


def _decided(snapshot: Snapshot, holds: Sequence[Hold]) -> str:
    if snapshot.draining:
        return f"The worker is draining: {snapshot.draining.rstrip('.')}."
    return f"Paused {' and '.join(_held(hold) for hold in holds)}." if holds else ""


def _held(hold: Hold) -> str:
    """Without its first word, "held"."""
    phrase = hold.phrase.removeprefix("held ")
    if hold.until is not None:
        return f"{phrase} until {_at(hold.until)}"
    if hold.source is Source.OPERATOR and (hold.gpu or hold.kind):
        return f"{phrase} until the cordon is lifted"
    return phrase + _LIFTED.get(hold.source, "")


def _left(snapshot: Snapshot, holds: Sequence[Hold]) -> str:
    """What becomes of the jobs that run all the same."""
    count = sum(model.running for model in snapshot.models)
    if not count:
        return ""
    still = f"{count} job{' is' if count == 1 else 's are'} still running"
    if snapshot.draining and snapshot.drain_until is not None:
        return f"{still}, and ended at {_at(snapshot.drain_until, '%H:%M:%S')} at the latest."
    if not snapshot.draining and any(hold.mode is Mode.ABORT for hold in holds):
        return f"{still}, and {'is' if count == 1 else 'are'} being ended."
    return f"{still}."


def _at(seconds: float, form: str = "%Y-%m-%d %H:%M") -> str:
    return datetime.datetime.fromtimestamp(seconds).astimezone().strftime(form)


# ---- what is so


def _about_queued(models: Sequence[ModelView]) -> str:
    """What the jobs wait for that are here and do not run; "" when there are none."""
    waiting = [model for model in models if model.queued]
    return _verdict(min(waiting, key=_rank)) if waiting else ""


def _rank(model: ModelView) -> int:
    """The one to tell of first: whoever is on the way, then whoever waits, which may be for the first."""
    if model.waits:
        return 1
    return 0 if model.state in _LOADING else 2


def _verdict(model: ModelView) -> str:
    """What this model's jobs wait for."""
    if model.waits:
        text = model.waits.rstrip(".")
        return f"{model.name} {text}." if text.startswith("waits") else f"{model.name} waits: {text}."
    if model.running:
        count = f"{model.queued} job{'' if model.queued == 1 else 's'}"
        return f"{model.name} works, and {count} more wait{'s' if model.queued == 1 else ''} for it."
    if model.state in _LOADING:
        return f"{model.name} is {model.state}."
    if model.state in _BROKEN:
        return _broken([model])
    if model.state in _ENDING:
        return f"{model.name} is ending, and is then loaded again for the jobs that wait."
    if model.state == "cold":
        return f"{model.name} is about to be loaded."
    return f"{model.name} is about to take the next job."


def _about_models(models: Sequence[ModelView], snapshot: Snapshot) -> str:
    """What keeps these models from working, when nobody decided that they should not."""
    if not models:
        return "No model is configured."
    if queued := _about_queued(models):
        return queued
    for model in sorted(models, key=_rank):
        if model.waits or model.state in _LOADING:
            return _verdict(model)
    broken = [model for model in models if model.state in _BROKEN]
    if broken and len(broken) == len(models):
        return _broken(broken)
    if not snapshot.link.connected:
        because = f": {snapshot.link.reason.rstrip('.')}" if snapshot.link.reason else ""
        return f"The coordinator{f' at {snapshot.link.url}' if snapshot.link.url else ''} is not connected{because}."
    parts = (_elsewhere(snapshot), _broken(broken), _unserved(models), _cordoned(models))
    return " ".join(part for part in parts if part)


def _elsewhere(snapshot: Snapshot) -> str:
    """No job runs or waits at these models: where those are that this worker has."""
    count = snapshot.jobs - sum(model.running + model.queued for model in snapshot.models)
    if count <= 0:
        return "There are no jobs."
    does = "fetches its inputs or hands over its results" if count == 1 else "fetch inputs or hand over results"
    return f"{count} job{'' if count == 1 else 's'} {does}."


def _broken(models: Sequence[ModelView]) -> str:
    if not models:
        return ""
    first = models[0]
    word = "is quarantined" if first.state == "quarantined" else "is waiting to be started again"
    because = f" because {first.reason[:1].lower()}{first.reason[1:]}" if first.reason else ""
    more = f" ({len(models) - 1} more like it)" if len(models) > 1 else ""
    return f"{first.name} {word}{because.rstrip('.')}{more}."


def _unserved(models: Sequence[ModelView]) -> str:
    """Jobs for these cannot come: nobody was told of them. What is broken has been named."""
    found = [model for model in models if model.unserved and model.state not in _BROKEN]
    if not found:
        return ""
    more = f" ({len(found) - 1} more like it)" if len(found) > 1 else ""
    return f"{found[0].name} is not served: {found[0].unserved.rstrip('.')}{more}."


def _cordoned(models: Sequence[ModelView]) -> str:
    """Jobs of these kinds are not taken."""
    found = {kind: why for model in models if not model.unserved for kind, why in model.held_kinds.items()}
    return " ".join(f"No {kind} jobs are taken: {why}." for kind, why in found.items())
