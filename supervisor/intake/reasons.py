"""Why a model's jobs wait, in one sentence with numbers. Pure; for people, not for events: it reads a whole GPU."""

from __future__ import annotations

from supervisor.intake.fleet import Fleet, Instance, Model, Stage
from supervisor.intake.placement import Place
from supervisor.intake.residency import gib, short


def why(model: Model, fleet: Fleet) -> str:
    """What the jobs of a model, or those who want it loaded, wait for."""
    if fleet.held:
        return fleet.held
    if model.target is not None:
        return _lacking(model, model.target, fleet)
    if model.loading:
        return "it is loading"
    if model.ready:
        return _busy(model)
    if not model.plan.copies:
        return "its last instance ended badly, and the next one is started after a pause"
    if model.unread:
        return "its files are being looked at"
    if model.why and (place := _nearest(model, fleet)) is not None:
        return _lacking(model, place, fleet)
    if not model.why and any(each.stage is Stage.LEAVING for each in model.instances.values()):
        return "its last instance is ending"
    return model.why or "it is about to be looked at"


def _busy(model: Model) -> str:
    if model.waiting and model.waiting.first().alone:
        return "the first of its jobs waits until it is alone"
    count = model.ready * model.plan.slots
    return f"its {count} slots are busy" if count > 1 else "its only slot is busy"


def _nearest(model: Model, fleet: Fleet) -> Place | None:
    """The place that lacks least, when all that are open lack something."""
    places = [place for place in model.places if place and not any(fleet.gpus[uuid].shut for uuid in place)]
    if fleet.blind or not places or not model.waiting:
        return None
    place = min(places, key=lambda each: sum(_missing(each, fleet).values()))
    return place if _missing(place, fleet) else None


def _missing(place: Place, fleet: Fleet, own: bool = False) -> dict[str, int]:
    found = {}
    for uuid, share in place.items():
        gpu = fleet.gpus[uuid]
        lack = share - gpu.free - (gpu.reserved if own else 0)
        if lack > 0:
            found[uuid] = lack
    return found


def _lacking(model: Model, place: Place, fleet: Fleet) -> str:
    missing = _missing(place, fleet, own=model.target is not None)
    if not missing:
        return "waits until its place is free"
    wants = " and ".join(f"{gib(min(lack, place[uuid]))} on {short(uuid)}" for uuid, lack in missing.items())
    who = "; ".join(_who(model, fleet, uuid, lack) for uuid, lack in missing.items())
    return f"waits for {wants}: {who}"


def _who(model: Model, fleet: Fleet, uuid: str, lack: int) -> str:
    """Who holds what is missing of a device, those that end first."""
    gpu = fleet.gpus[uuid]
    if gpu.reserved and model.target is None:
        ahead = sorted(each.plan.name for each in fleet.models.values() if uuid in (each.target or {}))
        return _are(ahead, "next there")
    others = [each for each in gpu.instances.values() if each.model is not model]
    ending = sorted({each.model.plan.name for each in others if not each.live and not each.runs})
    working = sorted({each.model.plan.name for each in others if each.runs})
    loading = sorted({each.model.plan.name for each in others if each.stage is Stage.LOADING})
    if not others or lack > sum(each.shares.get(gpu.plan.uuid, 0) for each in others):
        return f"other programs hold {gib(gpu.foreign)} there"
    parts = [_are(names, what) for names, what in ((ending, "ending"), (working, "working"), (loading, "loading"))]
    return ", ".join(part for part in parts if part) or _idle(model, others)


def _are(names: list[str], what: str) -> str:
    return f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} {what}" if names else ""


def _idle(model: Model, others: list[Instance]) -> str:
    """Nobody works or leaves: they are pinned, or ending them would cost more than it brings."""
    names = sorted({each.model.plan.name for each in others})
    if all(each.model.plan.pin for each in others):
        return _are(names, "pinned")
    return f"{', '.join(names)} {'holds' if len(names) == 1 else 'hold'} it ({model.why})"
