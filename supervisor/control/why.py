"""Why the worker, or one of its GPUs, is idle: one sentence. Pure.

The first reason that holds is the one to tell, in the order in which a person would mend them: what somebody decided
(a drain, a pause), what is broken (the GPU, the link, the models), what is merely not so far (memory, a load), and
last that there is nothing to do.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence

import msgspec

from supervisor.control.snapshot import GpuView, ModelView, Snapshot
from supervisor.intake.holds import Hold

_LOADING = ("starting", "loading")
_BROKEN = ("quarantined", "backoff")


def explained(snapshot: Snapshot) -> Snapshot:
    """The same, with `state`, `why` and each GPU's `why` filled in."""
    gpus = tuple(msgspec.structs.replace(gpu, why=why_gpu(gpu, snapshot)) for gpu in snapshot.gpus)
    return msgspec.structs.replace(snapshot, gpus=gpus, state=state_of(snapshot), why=why_worker(snapshot))


def state_of(snapshot: Snapshot) -> str:
    """The worker's state, in one word."""
    if snapshot.draining:
        return "draining"
    if snapshot.holds:
        return "paused"
    if _works(snapshot.models):
        return "busy"
    if not snapshot.link.connected:
        return "offline"
    return "idle"


def why_worker(snapshot: Snapshot) -> str:
    """Why the worker does nothing; "" when it works."""
    if _works(snapshot.models):
        return ""
    return _decided(snapshot) or _about_models(snapshot.models, snapshot)


def why_gpu(gpu: GpuView, snapshot: Snapshot) -> str:
    """Why this GPU does nothing; "" when a job runs on it."""
    mine = [model for model in snapshot.models if _on(model, gpu, snapshot)]
    if _works(mine):
        return ""
    if gpu.fault:
        return gpu.fault
    if decided := _decided(snapshot):
        return decided
    if not mine:
        return "No model is configured for it."
    return _about_models(mine, snapshot)


def _works(models: Sequence[ModelView]) -> bool:
    return any(model.running for model in models)


def _on(model: ModelView, gpu: GpuView, snapshot: Snapshot) -> bool:
    if model.held.get(gpu.uuid):
        return True
    if model.gpus:
        return gpu.uuid in model.gpus
    return model.device != "cpu" and gpu.uuid == snapshot.gpus[0].uuid


def _decided(snapshot: Snapshot) -> str:
    """What somebody decided, or what cuts the worker off."""
    if snapshot.draining:
        return f"The worker is draining: {snapshot.draining}."
    if snapshot.holds:
        return _paused(snapshot.holds)
    return ""


def _paused(holds: Sequence[Hold]) -> str:
    parts = []
    for hold in holds:
        until = "until `supervisor resume`" if hold.until is None else f"until {_at(hold.until)}"
        reason = f" ({hold.reason})" if hold.reason else ""
        parts.append(f"by the {hold.source}{reason} {until}")
    return f"Paused {' and '.join(parts)}."


def _at(seconds: float) -> str:
    moment = datetime.datetime.fromtimestamp(seconds).astimezone()
    return moment.strftime("%Y-%m-%d %H:%M")


def _about_models(models: Sequence[ModelView], snapshot: Snapshot) -> str:
    """What keeps these models from working, when nobody decided that they should not."""
    if not models:
        return "No model is configured."
    for model in models:
        if model.waits:
            return f"{model.name} {model.waits}."
    for model in models:
        if model.state in _LOADING:
            return f"{model.name} is {model.state}."
    broken = [model for model in models if model.state in _BROKEN]
    if broken and len(broken) == len(models):
        return _broken(broken)
    if not snapshot.link.connected:
        because = f": {snapshot.link.reason}" if snapshot.link.reason else ""
        return f"The coordinator{f' at {snapshot.link.url}' if snapshot.link.url else ''} is not connected{because}."
    left_out = f" {_broken(broken)}" if broken else ""
    return f"There are no jobs.{left_out}"


def _broken(models: Sequence[ModelView]) -> str:
    first = models[0]
    word = "is quarantined" if first.state == "quarantined" else "is waiting to be started again"
    because = f" because {first.reason[:1].lower()}{first.reason[1:]}" if first.reason else ""
    more = f" ({len(models) - 1} more like it)" if len(models) > 1 else ""
    return f"{first.name} {word}{because.rstrip('.')}{more}."
