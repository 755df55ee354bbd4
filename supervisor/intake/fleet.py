"""The scheduler's books: devices, instances and models, and what each holds. One owner: `scheduler.Scheduler`.

Memory of a device is written down four times: what other programs hold (measured), what our instances were given
(`ours`), what is reserved for loads whose place is still being cleared (`reserved`), and what of `ours` is on its
way back (`coming`). All four change by steps, so that nothing is ever summed over models or jobs.
"""

from __future__ import annotations

import enum

from supervisor.intake.effects import DevicePlan, ModelPlan
from supervisor.intake.eviction import Demand
from supervisor.intake.placement import Place
from supervisor.intake.queues import Waiting


class Stage(enum.Enum):
    """Where an instance is in its life."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"  # takes no more runs; ended after the last
    LEAVING = "leaving"  # told to end


# Naming an enum's member costs a call in Python 3.11, and these are asked at every event.
_READY, _LOADING = Stage.READY, Stage.LOADING


class Instance:
    """One loaded model, or one that is being loaded or ended."""

    __slots__ = (
        "alone", "barred", "closed", "dismissed", "id", "idle_since", "kept", "lost", "model", "ordered", "ready_at",
        "refuses", "runs", "shares", "stage", "why_ends",
    )  # fmt: skip

    def __init__(self, number: int, model: Model, shares: Place) -> None:
        self.id, self.model, self.shares = number, model, dict(shares)
        self.stage = _LOADING
        self.runs = 0
        self.ready_at = 0.0
        self.idle_since = 0.0
        self.why_ends = ""
        self.barred = False
        self.kept = False  # its load goes on though nobody waits
        self.alone = False  # its run wants no other beside it
        self.refuses = False  # it is late to obey a cancel
        self.closed = False  # one of these two
        self.lost = False  # it ends by itself
        self.ordered = False  # its owner wants it to end, whatever others need
        self.dismissed = False  # and does not want its model back for its own sake

    @property
    def live(self) -> bool:
        """Whether it serves, or is going to, as far as its own life goes; a hold may bar it from that."""
        return self.stage is _READY or self.stage is _LOADING


class Gpu:
    """One device.

    Attributes:
        held: why nothing starts there; `finish`: except for jobs that can go nowhere else.
        broken: why nothing is loaded there at all.
        shut: one of these two reasons.
        gone: it is not listed any more.
    """

    __slots__ = (
        "broken", "coming", "finish", "foreign", "gone", "held", "instances", "margin", "ours", "plan", "reserved",
        "shut", "unloads",
    )  # fmt: skip

    def __init__(self, plan: DevicePlan, margin: int) -> None:
        self.plan, self.margin = plan, margin
        self.foreign = self.ours = self.coming = self.reserved = 0
        self.held = self.broken = self.shut = ""
        self.unloads = self.finish = self.gone = False
        self.instances: dict[int, Instance] = {}

    def hold(self, reason: str, *, unloads: bool = False, finish: bool = False) -> None:
        """Put or ("") lift a hold."""
        self.held, self.unloads, self.finish = reason, unloads, finish
        self.shut = self.broken or self.held

    def breaks(self, reason: str) -> None:
        """It has a fault, or ("") none any more."""
        self.broken = reason
        self.shut = self.broken or self.held

    @property
    def bars(self) -> bool:
        """Whether what is loaded there gets no runs."""
        return bool(self.held) and not self.finish

    @property
    def free(self) -> int:
        """Bytes for a new load now; negative when other programs grew into ours."""
        return self.plan.total_bytes - self.margin - self.foreign - self.ours - self.reserved


class Model:
    """One model with its queue.

    Attributes:
        places: where it could lie on an empty box.
        reach: devices of these places.
        least: the smallest share that any of them takes of a device; 0 when they take none.
        rooms: device it may use -> what that has for models when empty.
        target: the place being cleared for it; None when there is none.
        stuck: when last looked at, ending models of ours could not have helped it.
        wanted: to be loaded though no job waits.
        ordered: so wanted that models without work make room.
        unread: its need is being found out.
        parting: it is served no more, and goes with its last instance.
        lost: instances that end by themselves, and are no copies any more only when they are gone.
    """

    __slots__ = (
        "demand", "instances", "least", "load_s", "lost", "ordered", "parting", "places", "plan", "reach", "rooms",
        "run_s", "stuck", "target", "unread", "waiting", "wanted", "why",
    )  # fmt: skip

    def __init__(self, plan: ModelPlan, places: tuple[Place, ...], rooms: dict[str, int]) -> None:
        self.plan = plan
        self.move(places, rooms)
        self.waiting = Waiting()
        self.instances: dict[int, Instance] = {}
        self.demand = Demand()
        self.load_s, self.run_s = plan.load_s, 0.0
        self.target: Place | None = None
        self.lost = 0
        self.stuck = self.unread = self.wanted = self.ordered = self.parting = False
        self.why = ""

    def move(self, places: tuple[Place, ...], rooms: dict[str, int]) -> None:
        """From now on it could lie here; what is loaded stays where it is."""
        self.places, self.rooms = places, rooms
        self.reach = frozenset(uuid for place in places for uuid in place)
        self.least = min((share for place in places for share in place.values()), default=0)

    @property
    def live(self) -> int:
        """Instances that serve or are going to."""
        count = 0
        for each in self.instances.values():
            count += not each.barred and (each.stage is _READY or each.stage is _LOADING)
        return count

    @property
    def ready(self) -> int:
        """Instances that serve."""
        count = 0
        for each in self.instances.values():
            count += each.stage is _READY and not each.barred
        return count

    @property
    def loading(self) -> bool:
        """Whether an instance is on its way."""
        return any(each.stage is _LOADING and not each.barred for each in self.instances.values())


class Fleet:
    """All of them."""

    def __init__(self, gpus: dict[str, Gpu], models: dict[str, Model]) -> None:
        self.gpus, self.models = gpus, models
        self.instances: dict[int, Instance] = {}
        self.groups: dict[str, list[Model]] = {}
        self.held = ""
        self.freeing = ""  # why what has no work is ended, and nothing is loaded that no job waits for
        self.blind = ""  # why nothing is known about the devices yet
        self.faulty = 0  # devices that are broken
        for model in models.values():
            self.joins(model)

    def joins(self, model: Model) -> None:
        """One more model."""
        self.models[model.plan.name] = model
        if model.plan.group:
            self.groups.setdefault(model.plan.group, []).append(model)

    def parts(self, model: Model) -> None:
        """One model less; it has no instance."""
        del self.models[model.plan.name]
        if model.plan.group:
            self.groups[model.plan.group].remove(model)

    def free(self) -> dict[str, int]:
        """Device -> bytes for a new load now (`Gpu.free`, spelled out: a look asks all of them)."""
        return {
            uuid: gpu.plan.total_bytes - gpu.margin - gpu.foreign - gpu.ours - gpu.reserved
            for uuid, gpu in self.gpus.items()
        }

    def rivals(self, model: Model) -> list[Instance]:
        """Instances of the others in its exclusive group."""
        group = model.plan.group
        if not group:
            return []
        mates = self.groups.get(group, ())
        return [instance for mate in mates if mate is not model for instance in mate.instances.values()]

    def turn_of(self, model: Model) -> Model | None:
        """Another model of its exclusive group for which a place is being cleared; None without one."""
        return next((mate for mate in self.groups[model.plan.group] if mate is not model and mate.target), None)

    # ---- the only places that write memory down

    def add(self, instance: Instance) -> None:
        """It was ordered to load."""
        self.instances[instance.id] = instance.model.instances[instance.id] = instance
        for uuid, share in instance.shares.items():
            gpu = self.gpus[uuid]
            gpu.ours += share
            gpu.instances[instance.id] = instance

    def ends(self, instance: Instance, stage: Stage) -> None:
        """It drains or leaves: what it holds is coming back."""
        if instance.live:
            for uuid, share in instance.shares.items():
                self.gpus[uuid].coming += share
        instance.stage = stage

    def stays(self, instance: Instance) -> None:
        """It drained and need not end after all."""
        for uuid, share in instance.shares.items():
            self.gpus[uuid].coming -= share
        instance.stage = _READY

    def remove(self, instance: Instance) -> None:
        """It is gone; its memory is back."""
        del self.instances[instance.id], instance.model.instances[instance.id]
        for uuid, share in instance.shares.items():
            gpu = self.gpus[uuid]
            gpu.ours -= share
            gpu.coming -= 0 if instance.live else share
            del gpu.instances[instance.id]

    def holds(self, instance: Instance, uuid: str, count: int) -> None:
        """It was seen to hold more than it was given."""
        if count > instance.shares.get(uuid, 0):
            self.takes(instance, uuid, count)

    def takes(self, instance: Instance, uuid: str, count: int) -> None:
        """Its share of a device is this much."""
        gpu = self.gpus.get(uuid)
        if gpu is None:
            return
        more = count - instance.shares.get(uuid, 0)
        instance.shares[uuid] = count
        gpu.instances[instance.id] = instance
        gpu.ours += more
        gpu.coming += 0 if instance.live else more

    def reserve(self, model: Model, place: Place | None) -> None:
        """A place is being cleared for it; None gives the place up, or is before the load takes it."""
        for uuid, share in (model.target or {}).items():
            self.gpus[uuid].reserved -= share
        for uuid, share in (place or {}).items():
            self.gpus[uuid].reserved += share
        model.target = place
