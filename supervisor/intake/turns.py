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


class Go(msgspec.Struct, frozen=True):
    """Load there now."""

    place: Place


class Swap(msgspec.Struct, frozen=True):
    """Clear this place: these end, after their runs. Empty when they are ending already."""

    place: Place
    who: tuple[int, ...]


class Later(msgspec.Struct, frozen=True):
    """Look again after `again_s`. `stuck`: nothing that we could end would help."""

    reason: str
    again_s: float
    stuck: bool = False


Turn = Go | Swap | Later


class Look(msgspec.Struct, frozen=True):
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
    rivals = fleet.rivals(model)
    if model.plan.group and (mate := fleet.turn_of(model)) is not None:
        return Later(f"only one model of the group {model.plan.group} may be loaded, and {mate.plan.name} is next", 1.0)
    if not rivals:
        free = [place for place in places if _fits(place, gpus)]
        if free:
            return Go(min(free, key=lambda place: _rank(place, gpus, view.spread)))
    elif blocked := [each for each in rivals if each.model.plan.pin or each.stage is Stage.LOADING]:
        name = blocked[0].model.plan.name
        return Later(f"only one model of the group {model.plan.group} may be loaded, and {name} is", 1.0, stuck=True)
    return _swap(model, places, rivals, fleet, view)


def _unasked(model: Model, places: list[Place], fleet: Fleet, view: Look) -> Turn:
    """Somebody wants it loaded, and no job waits for it: it takes what is free and ends nobody.

    An order of the owner ends others, but none that has work: its jobs are somebody's, and the order is nobody's job.
    """
    if fleet.freeing and model.plan.gpu:
        return Later(f"waits for the end of a hold: {fleet.freeing}", LATEST_S, stuck=True)
    free = [place for place in places if _fits(place, fleet.gpus) and not any(fleet.gpus[uuid].shut for uuid in place)]
    rivals = fleet.rivals(model)
    if model.ordered and (rivals or not free):
        return _ordered(model, places, rivals, fleet, view.now)
    if not free or rivals:
        return Later("waits until there is room, for nobody is ended for a preload", LATEST_S, stuck=True)
    return Go(min(free, key=lambda place: _rank(place, fleet.gpus, view.spread)))


def _ordered(model: Model, places: list[Place], rivals: list[Instance], fleet: Fleet, now: float) -> Swap | Later:
    """Clear the place that harms least of those where nobody has work."""
    if any(each.model.plan.pin or each.stage is Stage.LOADING for each in rivals):
        name = rivals[0].model.plan.name
        return Later(f"only one model of the group {model.plan.group} may be loaded, and {name} is", 1.0, stuck=True)
    best: Swap | None = None
    least, works = math.inf, False
    for place in places:
        found = _clear(model, place, rivals, fleet, now)
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


def _open(model: Model, gpus: dict[str, Gpu]) -> tuple[list[Place], str]:
    """Its places of which no device is held or broken, and why one of the others is.

    When there are none, those whose holds let the jobs finish that came before.
    """
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


def _fits(place: Place, gpus: dict[str, Gpu]) -> bool:
    for uuid, share in place.items():
        gpu = gpus[uuid]
        if gpu.plan.total_bytes - gpu.margin - gpu.foreign - gpu.ours - gpu.reserved < share:
            return False
    return True


def _lack(place: Place, gpus: dict[str, Gpu]) -> int:
    lack = 0
    for uuid, share in place.items():
        gpu = gpus[uuid]
        lack += share - gpu.free - gpu.coming
    return lack


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


def _swap(model: Model, places: list[Place], rivals: list[Instance], fleet: Fleet, view: Look) -> Swap | Later:
    if view.ahead is not None and overdue(view.ahead, view.now):
        # What the one ahead could use is that one's first.
        reach = view.ahead.reach
        places = [place for place in places if reach.isdisjoint(place)]
        if not places:
            return Later(f"{view.ahead.plan.name} has waited longer", LATEST_S)
    if len(places) > MOST_PLACES:
        places = sorted(places, key=lambda place: _lack(place, fleet.gpus))[:MOST_PLACES]
    best: Swap | None = None
    least, soonest = 0.0, math.inf
    for place in places:
        found = _clear(model, place, rivals, fleet, view.now)
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
    model: Model, place: Place, rivals: list[Instance], fleet: Fleet, now: float
) -> tuple[float, tuple[int, ...]] | float:
    """The price of clearing a place and who has to go; or in how many seconds it may be possible, inf for unknown."""
    missing: dict[str, int] = {}
    for uuid, share in place.items():
        gpu = fleet.gpus[uuid]
        if (lack := share - gpu.free - gpu.coming) > 0:
            missing[uuid] = lack
    price, who = 0.0, tuple[int, ...]()
    for rival in rivals:
        if rival.stage is Stage.READY:
            price += _harm(model, rival, now)
            who = (*who, rival.id)
            for uuid, share in rival.shares.items():
                missing[uuid] = missing.get(uuid, 0) - share
    missing = {uuid: lack for uuid, lack in missing.items() if lack > 0}
    if not missing:
        return price, who
    tenants, soonest = _tenants(model, missing, who, fleet, now)
    chosen = _cheapest(tenants, missing)
    if not chosen:
        return soonest
    return price + sum(each.price for each in chosen), (*who, *(int(each.name) for each in chosen))


def _cheapest(tenants: list[Tenant], missing: dict[str, int]) -> tuple[Tenant, ...]:
    if len(missing) > 1:
        return greedy(tenants, missing)
    [(uuid, lack)] = missing.items()
    return greedy_on_one(tenants, uuid, lack)


def _tenants(
    model: Model, missing: dict[str, int], taken: tuple[int, ...], fleet: Fleet, now: float
) -> tuple[list[Tenant], float]:
    """Who on these devices could go; and in how many seconds the next one that has work could."""
    found, soonest = dict[int, Tenant](), math.inf
    for uuid in missing:
        for each in fleet.gpus[uuid].instances.values():
            other = each.model
            if other.plan.pin or other is model or each.id in taken:
                continue
            if each.stage is Stage.LOADING:
                soonest = min(soonest, LATEST_S)
            elif each.stage is Stage.READY:
                swap_s = model.load_s + other.load_s + UNLOAD_S
                if each.runs or other.waiting:
                    rest = each.ready_at + SLICES * swap_s - now
                    if rest > 0:
                        soonest = min(soonest, rest)
                        continue
                found[each.id] = Tenant(str(each.id), each.shares, _harm(model, each, now))
    return list(found.values()), soonest


def _harm(model: Model, victim: Instance, now: float) -> float:
    other = victim.model
    return harm(
        queued=len(other.waiting) + victim.runs,
        per_s=other.demand.rate(now),
        swap_s=model.load_s + other.load_s + UNLOAD_S,
        copies=other.ready,
    )
