"""Turns: where a model that wants to load may go now, whom that ends, or when to look again. Pure: it only reads.

1. A place that is free is taken: the one with the fewest at work, then the tightest ("spread"), or the tightest
   first ("pack").
2. Otherwise somebody has to go. Loading costs both sides seconds, so the newcomer waits until its jobs together
   have waited as long as the swap would make others wait (`eviction.harm`): a rare model gathers its jobs before it
   interrupts a busy one, an idle one goes at once. This is the rent-or-buy rule: it costs at most about
   twice what knowing the future would.
3. Nobody waits longer than `PATIENCE_S` for that comparison; after it the cheapest place is cleared whatever it
   costs, the longest waiting model first.
4. Who has work keeps its place for a slice that pays for its load (`SLICES` swaps), else two busy models would only
   load. Running jobs are never interrupted, pinned models never ended.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from supervisor.intake.eviction import UNLOAD_S, Tenant, greedy, greedy_on_one, harm
from supervisor.intake.fleet import Fleet, Gpu, Instance, Model, Stage
from supervisor.intake.placement import Place

# Longest that a model's first job waits for its harm to be paid, in seconds.
PATIENCE_S = 120.0
# A model with work keeps its place for this many times the seconds that swapping it costs.
SLICES = 8.0
# Harm up to this many job-seconds counts as none: demand only fades, and a model of yesterday goes at once.
NOTHING = 0.5
# Places that a look prices: those that lack least. A box has few more, and a look stays short.
MOST_PLACES = 4
_SLICE = "the models that hold the memory have just been loaded and have work"
# Looking again: not more often than the first, not more rarely than the second, in seconds.
SOONEST_S, LATEST_S = 0.25, 5.0
# A look asks these of every instance on several GPUs, and naming an enum's member costs a call in Python 3.11.
_READY, _LOADING = Stage.READY, Stage.LOADING


class Go(msgspec.Struct, frozen=True, gc=False):
    """Load there now."""

    place: Place


class Swap(msgspec.Struct, frozen=True, gc=False):
    """Clear this place: these end, after their runs. Empty when they are ending already."""

    place: Place
    who: tuple[int, ...]


class Later(msgspec.Struct, frozen=True, gc=False):
    """Look again after `again_s`. `stuck`: nothing that we could end would help."""

    reason: str
    again_s: float
    stuck: bool = False


Turn = Go | Swap | Later


class Look(msgspec.Struct, frozen=True, gc=False):
    """What a look needs besides the books.

    Attributes:
        now: seconds.
        ahead: the model that waits longest, when it is another.
        spread: whether a free place with the fewest at work comes before the tightest.
    """

    now: float
    ahead: Model | None = None
    spread: bool = True


def look(model: Model, fleet: Fleet, view: Look) -> Turn:
    """Judge where a model with jobs waiting and no slot for them may load."""
    gpus = fleet.gpus
    if reason := fleet.held or (fleet.blind if model.plan.gpu else ""):
        return Later(reason, LATEST_S, stuck=True)
    places, reason = _open(model, gpus)
    if not places:
        return Later(reason or "no GPU could hold it", LATEST_S, stuck=True)
    if not model.waiting:
        return _unasked(model, places, fleet, view)
    if model.loading:
        return Later("it is loading", LATEST_S)
    if model.ready and (rest := _drain_s(model)) <= model.load_s:
        return Later(f"its slots are busy; another copy would take {model.load_s:.0f} s to load", SOONEST_S + rest / 4)
    rivals, free = fleet.rivals(model), fleet.free()
    if model.plan.group and (mate := fleet.turn_of(model)) is not None:
        return Later(f"only one model of the group {model.plan.group} may be loaded, and {mate.plan.name} is next", 1.0)
    if not rivals:
        # Mostly no device has room for even the smallest share, and this says so at once.
        if (not model.least or model.least <= max(free.values())) and (found := _free(places, free)):
            return Go(min(found, key=lambda place: _rank(place, gpus, view.spread)))
    elif blocked := [each for each in rivals if each.model.plan.pin or each.stage is _LOADING]:
        name = blocked[0].model.plan.name
        return Later(f"only one model of the group {model.plan.group} may be loaded, and {name} is", 1.0, stuck=True)
    return _swap(model, places, rivals, fleet, free, view)


def _unasked(model: Model, places: Sequence[Place], fleet: Fleet, view: Look) -> Turn:
    """Somebody wants it loaded, and no job waits for it: it takes what is free and ends nobody.

    An order of the owner ends others, but none that has work: its jobs are somebody's, and the order is nobody's job.
    """
    if fleet.freeing and model.plan.gpu:
        return Later(f"waits for the end of a hold: {fleet.freeing}", LATEST_S, stuck=True)
    free = fleet.free()
    found = [place for place in _free(places, free) if not any(fleet.gpus[uuid].shut for uuid in place)]
    rivals = fleet.rivals(model)
    if model.ordered and (rivals or not found):
        return _ordered(model, places, rivals, fleet, free, view.now)
    if not found or rivals:
        return Later("waits until there is room, for nobody is ended for a preload", LATEST_S, stuck=True)
    return Go(min(found, key=lambda place: _rank(place, fleet.gpus, view.spread)))


def _ordered(
    model: Model, places: Sequence[Place], rivals: list[Instance], fleet: Fleet, free: dict[str, int], now: float
) -> Swap | Later:
    """Clear the place that harms least of those where nobody has work."""
    if any(each.model.plan.pin or each.stage is _LOADING for each in rivals):
        name = rivals[0].model.plan.name
        return Later(f"only one model of the group {model.plan.group} may be loaded, and {name} is", 1.0, stuck=True)
    best: Swap | None = None
    least, works, room = math.inf, False, _room(fleet, free)
    for place in places:
        found = _clear(model, _missing(place, room), rivals, fleet, now)
        if isinstance(found, float):
            works = works or found < math.inf
        elif any(fleet.instances[number].runs or fleet.instances[number].model.waiting for number in found[1]):
            works = True
        elif found[0] < least:
            least, best = found[0], Swap(place, found[1])
    if best is not None:
        return best
    if works:
        return Later("waits until the models that hold the memory have no work", 1.0)
    return Later("pinned models, other programs or loads hold the memory", LATEST_S, stuck=True)


def overdue(model: Model, now: float) -> bool:
    """Whether it has waited so long that it is served whatever that costs others. A further copy never is."""
    return bool(model.waiting) and not model.ready and now - model.waiting.urgency() >= PATIENCE_S


def _open(model: Model, gpus: dict[str, Gpu]) -> tuple[Sequence[Place], str]:
    """Its places of which no device is held or broken, and why one of the others is.

    When there are none, those whose holds let the jobs finish that came before.
    """
    for gpu in gpus.values():
        if gpu.shut:
            break
    else:
        return model.places, ""
    places, reason = list[Place](), ""
    for place in model.places:
        for uuid in place:  # not `any`: this runs for every place of every look
            if gpus[uuid].shut:
                reason = reason or gpus[uuid].shut
                break
        else:
            places.append(place)
    if not places and reason and model.waiting:
        places = [
            place
            for place in model.places
            if not any(gpus[uuid].bars or gpus[uuid].broken or gpus[uuid].gone for uuid in place)
        ]
    return places, reason


def _free(places: Sequence[Place], free: dict[str, int]) -> list[Place]:
    """Those that are free now."""
    found = list[Place]()
    for place in places:
        for uuid, share in place.items():
            if free[uuid] < share:
                break
        else:
            found.append(place)
    return found


def _room(fleet: Fleet, free: dict[str, int]) -> dict[str, int]:
    """Device -> bytes that will be free when all that ends has ended."""
    return {uuid: free[uuid] + gpu.coming for uuid, gpu in fleet.gpus.items()}


def _missing(place: Place, room: dict[str, int]) -> dict[str, int]:
    return {uuid: lack for uuid, share in place.items() if (lack := share - room[uuid]) > 0}


def _least_lacking(places: Sequence[Place], room: dict[str, int]) -> Sequence[Place]:
    """The few that lack least, of many: of equals the first."""
    if len(places) <= MOST_PLACES:
        return places
    lacks = list[tuple[int, int]]()
    for number, place in enumerate(places):
        lack = 0
        for uuid, share in place.items():
            lack += share - room[uuid]
        lacks.append((lack, number))
    lacks.sort()
    return [places[number] for _lack, number in lacks[:MOST_PLACES]]


def _drain_s(model: Model) -> float:
    """How long its ready instances will need for what waits."""
    return len(model.waiting) * model.run_s / (model.ready * model.plan.slots)


def _rank(place: Place, gpus: dict[str, Gpu], spread: bool) -> tuple[float, float, float]:
    working = max(_working(gpus[uuid]) / gpus[uuid].plan.speed for uuid in place) if spread and place else 0.0
    left = sum(gpus[uuid].free - share for uuid, share in place.items())
    return (working, left, -min((gpus[uuid].plan.speed for uuid in place), default=1.0))


def _working(gpu: Gpu) -> float:
    """Instances there that work, the others counted for less: they will."""
    return sum(1.0 if each.runs or each.model.waiting else 0.25 for each in gpu.instances.values())


def _swap(
    model: Model, places: Sequence[Place], rivals: list[Instance], fleet: Fleet, free: dict[str, int], view: Look
) -> Swap | Later:
    if view.ahead is not None and overdue(view.ahead, view.now):
        # What the one ahead could use is that one's first.
        reach = view.ahead.reach
        places = [place for place in places if reach.isdisjoint(place)]
        if not places:
            return Later(f"{view.ahead.plan.name} has waited longer", LATEST_S)
    room = _room(fleet, free)
    best: Swap | None = None
    least, soonest = 0.0, math.inf
    for place in _least_lacking(places, room):
        found = _clear(model, _missing(place, room), rivals, fleet, view.now)
        if isinstance(found, float):
            soonest = min(soonest, found)
        elif best is None or found[0] < least:
            least, best = found[0], Swap(place, found[1])
    if best is None:
        # A slice runs out by itself; anything else needs an event, which looks again at once.
        stuck = soonest == math.inf
        reason = "pinned models, other programs or loads hold the memory" if stuck else _SLICE
        return Later(reason, min(max(soonest, 1.0), LATEST_S), stuck=stuck)
    waited = model.waiting.waited(view.now)
    if waited + NOTHING >= least or overdue(model, view.now):
        return best
    rest = (least - waited) / len(model.waiting)
    return Later("others use the GPUs more than it would; it waits for its turn", min(max(rest, SOONEST_S), LATEST_S))


def _clear(
    model: Model, missing: dict[str, int], rivals: list[Instance], fleet: Fleet, now: float
) -> tuple[float, tuple[int, ...]] | float:
    """The price of clearing a place and who has to go; or in how many seconds it may be possible, inf for unknown.

    Args:
        missing: device -> bytes that the place lacks.
    """
    price, who = 0.0, tuple[int, ...]()
    if rivals:
        for rival in rivals:
            if rival.stage is _READY:
                price += _harm(model, rival, now)
                who = (*who, rival.id)
                for uuid, share in rival.shares.items():
                    missing[uuid] = missing.get(uuid, 0) - share
        missing = {uuid: lack for uuid, lack in missing.items() if lack > 0}
    if not missing:
        return price, who
    movable, soonest = _movable(model, missing, who, fleet, now)
    if not movable or not _enough(movable, missing):
        return soonest  # asked first, for a price costs an exponential and mostly is in vain
    tenants = [Tenant(str(each.id), each.shares, _harm(model, each, now)) for each in movable]
    chosen = _cheapest(tenants, missing)
    return price + sum(each.price for each in chosen), (*who, *(int(each.name) for each in chosen))


def _enough(movable: list[Instance], missing: dict[str, int]) -> bool:
    """Whether all of these together hold what is missing."""
    for uuid, lack in missing.items():
        for each in movable:
            lack -= each.shares.get(uuid, 0)
            if lack <= 0:
                break
        else:
            return False
    return True


def _cheapest(tenants: list[Tenant], missing: dict[str, int]) -> tuple[Tenant, ...]:
    if len(missing) > 1:
        return greedy(tenants, missing)
    [(uuid, lack)] = missing.items()
    return greedy_on_one(tenants, uuid, lack)


def _movable(
    model: Model, missing: dict[str, int], taken: tuple[int, ...], fleet: Fleet, now: float
) -> tuple[list[Instance], float]:
    """Who on these devices could go; and in how many seconds the next one that has work could.

    The inner loop of a look: what is rarely true is asked last.
    """
    found, soonest, load_s = dict[int, Instance](), math.inf, model.load_s
    for uuid in missing:
        for each in fleet.gpus[uuid].instances.values():
            if each.stage is _READY:
                other = each.model
                if each.runs or other.waiting:
                    rest = each.ready_at + SLICES * (load_s + other.load_s + UNLOAD_S) - now
                    if rest > 0:
                        if rest < soonest and not (other.plan.pin or other is model or each.id in taken):
                            soonest = rest
                        continue
                if not (other.plan.pin or other is model or each.id in taken):
                    found[each.id] = each
            elif each.stage is _LOADING and soonest > LATEST_S and not (each.model.plan.pin or each.model is model):
                soonest = LATEST_S
    return list(found.values()), soonest


def _harm(model: Model, victim: Instance, now: float) -> float:
    other = victim.model
    return harm(
        queued=len(other.waiting) + victim.runs,
        per_s=other.demand.rate(now),
        swap_s=model.load_s + other.load_s + UNLOAD_S,
        copies=other.ready,
    )
