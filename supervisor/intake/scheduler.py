"""The scheduler: events in, effects out. Pure: no clock, no I/O, no dice; the same events give the same effects.

Theory of operation. Every model has a queue of its own, so that a load never blocks other models. A job that finds
a free slot of a loaded instance starts at once. Otherwise its model wants to load, and is *looked at* (`turns.look`):
now, or at the time that the last look named, or when memory came free and it is the one that waits longest. A
look ends in a load, in a *target* (a place that is being cleared: its memory is reserved, those who have to go take
no more runs and end after their last), or in a sentence that says what it waits for.

Cost. An event touches one queue, one instance and at most `LOOKS` looks; queues and times are heaps. A look reads
the places of one model and the instances on them, never the queue and never all models.

The caller tells every event once and in order, carries the effects out, and calls `step(Tick(), …)` when `due()`
has come. What it is told about instances and models that it does not know (they were gone already) changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from supervisor.intake import effects as fx
from supervisor.intake.dispatch import Dispatch
from supervisor.intake.fleet import Fleet, Gpu, Instance, Model, Stage
from supervisor.intake.placement import Place, Space, job_too_large, never_fits, places
from supervisor.intake.reasons import why

# Looks in one step; what is left is due at once. Bounds the cost of a step.
LOOKS = 1
# How much of what was expected of a load's or a run's length is replaced by what was seen last.
LEARN = 0.2
BLIND = "waits until the state of the GPUs is known"


class Scheduler:
    """See the module.

    Args:
        devices: None while nothing is known about them: then models of the GPU are not loaded before `Listed`.
        margin_bytes: what stays free on every device.
        threshold_bytes: most that one job may say it needs (`vram_threshold_gb`); 0 sets no limit.
        most_waiting: jobs that may wait for one model; 0 sets no limit.
        spread: take the free place with the fewest at work; else the tightest.
    """

    def __init__(
        self,
        models: Iterable[fx.ModelPlan],
        devices: Iterable[fx.DevicePlan] | None,
        *,
        margin_bytes: int = 0,
        threshold_bytes: int = 0,
        most_waiting: int = 0,
        spread: bool = True,
    ) -> None:
        gpus = {plan.uuid: Gpu(plan, margin_bytes) for plan in devices or ()}
        fleet = Fleet(gpus, {plan.name: _model(plan, gpus) for plan in models})
        fleet.blind = BLIND if devices is None else ""
        self._margin = margin_bytes
        self._do = Dispatch(fleet, spread=spread)
        self._threshold, self._most = threshold_bytes, most_waiting
        self._steps: dict[type, Callable[[Any], None]] = {
            fx.Arrives: self._arrives,
            fx.Cancelled: self._cancelled,
            fx.RunEnds: self._run_ends,
            fx.LoadEnds: self._load_ends,
            fx.NearlyLoaded: self._nearly_loaded,
            fx.Accepts: self._accepts,
            fx.Leaves: self._leaves,
            fx.Gone: self._gone,
            fx.Reading: self._reading,
            fx.Settles: self._settles,
            fx.Learned: self._learned,
            fx.Unread: self._unread,
            fx.Wanted: self._wanted,
            fx.Tuned: self._tuned,
            fx.Unload: self._unload,
            fx.Copies: self._copies,
            fx.ModelJoins: self._joins,
            fx.ModelParts: self._parts,
            fx.Listed: self._listed,
            fx.Broken: self._broken,
            fx.HoldPut: self._hold_put,
            fx.HoldLifted: self._hold_lifted,
            fx.Tick: lambda _event: None,
        }

    def step(self, event: fx.Event, now: float) -> list[fx.Effect]:
        """Take one event in. `now` never goes back. Returns what has to be done, in order."""
        self._do.now, self._do.out = now, []
        self._steps[type(event)](event)
        for _ in range(LOOKS):
            what = self._do.clock.pop(now)
            if what is None:
                break
            if isinstance(what, Model):
                self._do.look(what)
            else:
                self._do.keep_alive(what)
        return self._do.out

    def due(self) -> float | None:
        """When the next `Tick` is wanted; None when only an event can change anything."""
        return self._do.clock.next()

    def why(self) -> dict[str, str]:
        """Model -> why its jobs wait, for every model that has some. Reads all models: for people, not for events."""
        fleet = self._do.fleet
        return {name: why(model, fleet) for name, model in fleet.models.items() if model.waiting or model.wanted}

    def waits(self) -> dict[str, str]:
        """The same, only for models that wait to be loaded: none of their instances serves or is going to."""
        fleet = self._do.fleet
        waiting = [each for each in fleet.models.values() if (each.waiting or each.wanted) and not each.live]
        return {model.plan.name: why(model, fleet) for model in waiting}

    def waits_of(self, name: str) -> str:
        """The same for one model; "" when it does not wait to be loaded."""
        model = self._staying(name)
        return "" if model is None or model.live else why(model, self._do.fleet)

    def most_of(self, name: str) -> int:
        """The most GPU memory that one job of a model may say it needs; 0 sets no limit."""
        model = self._staying(name)
        if model is None:
            return 0
        rooms = model.rooms.values()
        most = (sum if model.plan.split else max)(rooms) if rooms else 0
        return min((each for each in (most, self._threshold) if each), default=0)

    def queued(self) -> dict[str, int]:
        """Model -> jobs that wait, where some do. Reads all models."""
        return {name: len(model.waiting) for name, model in self._do.fleet.models.items() if model.waiting}

    def loaded(self) -> dict[int, tuple[str, str]]:
        """Instance -> (model, stage)."""
        return {each.id: (each.model.plan.name, each.stage.value) for each in self._do.fleet.instances.values()}

    def _arrives(self, event: fx.Arrives) -> None:
        job = event.job
        model = self._staying(job.model)
        if model is None:
            self._do.refuse(job.id, "unknown_model", f"This worker has no model {job.model!r}.")
        elif found := self._hopeless(model):
            self._do.refuse(job.id, *found)
        elif reason := self._too_large(job, model):
            self._do.refuse(job.id, "too_large", reason)
        elif self._most and len(model.waiting) >= self._most:
            self._do.refuse(job.id, "busy", f"{len(model.waiting)} jobs wait for the model {job.model!r} already.")
        elif job.id in self._do.jobs:
            self._do.refuse(job.id, "bad_offer", f"The job {job.id!r} waits already.")
        else:
            model.demand = model.demand.seen(self._do.now)
            model.waiting.push(job)
            self._do.jobs[job.id] = model
            self._do.serve(model)
            self._do.want(model)

    def _hopeless(self, model: Model) -> tuple[str, str] | None:
        """Code and sentence when no place is left where it could be loaded, as far as that is known."""
        fleet = self._do.fleet
        if not model.places and not model.unread and not (fleet.blind and model.plan.gpu):
            return "never_fits", never_fits(model.plan.name, model.plan.need_bytes, model.rooms, self._margin)
        if not fleet.faulty or not model.places or model.live:
            return None
        reason = ""
        for place in model.places:
            broken = next((fleet.gpus[uuid].broken for uuid in place if fleet.gpus[uuid].broken), "")
            if not broken:
                return None
            reason = reason or broken
        return "gpu_failed", f"{model.plan.name} cannot be loaded: {reason}"

    def _answer_hopeless(self, model: Model) -> None:
        if model.waiting and (found := self._hopeless(model)):
            self._do.fail(model, *found)

    def _too_large(self, job: fx.Job, model: Model) -> str:
        return job_too_large(job.vram_bytes, threshold_bytes=self._threshold, rooms=model.rooms, split=model.plan.split)

    def _cancelled(self, event: fx.Cancelled) -> None:
        model = self._do.jobs.pop(event.job, None)
        if model is None:
            return
        model.waiting.drop(event.job)
        if model.waiting:
            self._do.serve(model)  # it may have been one that the others waited for, to be alone
            return
        self._do.give_up(model)
        for instance in list(model.instances.values()):
            if instance.stage is Stage.LOADING and not instance.kept:
                self._do.cancel_load(instance, "nobody waits for it any more")

    def _run_ends(self, event: fx.RunEnds) -> None:
        instance = self._do.fleet.instances.get(event.instance)
        if instance is None or not instance.runs:
            return
        instance.runs -= 1
        if instance.alone:
            instance.alone, instance.closed = False, instance.refuses
        model = instance.model
        model.run_s = _learn(model.run_s, event.took_s)
        if instance.stage is Stage.DRAINING and not instance.runs:
            self._do.evict(instance)
        elif instance.stage is Stage.READY:
            self._do.serve(model)
            if not instance.runs:
                self._do.idle(instance)

    def _load_ends(self, event: fx.LoadEnds) -> None:
        instance = self._do.fleet.instances.get(event.instance)
        if instance is None or instance.stage is not Stage.LOADING:
            return
        model = instance.model
        if event.problem:
            self._do.fleet.ends(instance, Stage.LEAVING)
            if not model.live:
                self._do.fail(model, "load_failed", f"{model.plan.name} could not be loaded: {event.problem}")
            return
        if event.slots and event.slots != model.plan.slots:
            model.plan = msgspec.structs.replace(model.plan, slots=event.slots)
        instance.stage = Stage.READY
        instance.ready_at = self._do.now
        model.load_s = _learn(model.load_s, event.took_s)
        self._do.serve(model)
        self._do.want(model)
        if not instance.runs:
            self._do.idle(instance)

    def _nearly_loaded(self, event: fx.NearlyLoaded) -> None:
        if instance := self._do.fleet.instances.get(event.instance):
            instance.kept = True

    def _accepts(self, event: fx.Accepts) -> None:
        instance = self._do.fleet.instances.get(event.instance)
        if instance is None:
            return
        instance.refuses = not event.accepts
        instance.closed = instance.refuses or instance.alone
        if event.accepts and instance.stage is Stage.READY:
            self._do.serve(instance.model)
            if not instance.runs:
                self._do.idle(instance)

    def _leaves(self, event: fx.Leaves) -> None:
        instance = self._do.fleet.instances.get(event.instance)
        if instance is None or instance.stage is Stage.LEAVING:
            return
        self._do.fleet.ends(instance, Stage.LEAVING)
        self._do.clock.unset(instance)
        instance.lost = True  # what becomes of its place is known when it is gone
        instance.model.lost += 1
        self._do.want(instance.model)

    def _gone(self, event: fx.Gone) -> None:
        instance = self._do.fleet.instances.get(event.instance)
        if instance is None:
            return
        self._do.fleet.remove(instance)
        self._do.clock.unset(instance)
        model = instance.model
        model.lost -= instance.lost
        model.wanted = model.wanted or (model.plan.pin and not model.live and not instance.dismissed)
        self._answer_hopeless(model)
        self._do.want(model)
        self._do.parts(model)
        self._do.room()

    def _reading(self, event: fx.Reading) -> None:
        gpu = self._do.fleet.gpus.get(event.uuid)
        if gpu is None:
            return
        gpu.foreign = event.foreign_bytes
        for number, count in event.held.items():
            if number in self._do.fleet.instances:
                self._do.fleet.holds(self._do.fleet.instances[number], event.uuid, count)
        self._do.room()

    def _settles(self, event: fx.Settles) -> None:
        instance = self._do.fleet.instances.get(event.instance)
        if instance is None or not instance.live:
            return
        for uuid in [*instance.shares, *(uuid for uuid in event.held if uuid not in instance.shares)]:
            self._do.fleet.takes(instance, uuid, event.held.get(uuid, 0))
        self._do.room()

    def _learned(self, event: fx.Learned) -> None:
        model = self._do.fleet.models.get(event.model)
        if model is None:
            return
        plan = msgspec.structs.replace(model.plan, need_bytes=event.need_bytes, estimated=event.estimated)
        moved = plan != model.plan
        model.plan = plan
        if moved:
            model.move(*_places(plan, self._do.fleet.gpus))
        if model.unread:
            model.unread = False
            self._answer_hopeless(model)
            if self._do.want(model):
                self._do.clock.set(model, self._do.now)

    def _unread(self, event: fx.Unread) -> None:
        if model := self._staying(event.model):
            self._do.give_up(model)
            model.unread = True

    def _wanted(self, event: fx.Wanted) -> None:
        model = self._staying(event.model)
        if model is not None and not model.live:
            model.wanted = True
            model.ordered = model.ordered or event.ordered
            model.stuck = False
            if self._do.want(model):
                self._do.clock.set(model, self._do.now)

    def _unload(self, event: fx.Unload) -> None:
        model = self._staying(event.model)
        if model is None:
            return
        model.wanted = model.ordered = event.again
        if not (event.again or model.waiting):
            self._do.give_up(model)
        for instance in list(model.instances.values()):
            instance.ordered, instance.dismissed = True, not event.again
            self._do.end(instance, event.reason)
        self._do.want(model)

    def _tuned(self, event: fx.Tuned) -> None:
        self._threshold = event.threshold_bytes
        for name, limit in event.keep_alive_s.items():
            model = self._staying(name)
            if model is not None and limit != model.plan.keep_alive_s:
                model.plan = msgspec.structs.replace(model.plan, keep_alive_s=limit)
                for instance in model.instances.values():
                    self._do.keep_for(instance, limit)

    def _copies(self, event: fx.Copies) -> None:
        model = self._staying(event.model)
        if model is None:
            return
        more = event.count > model.plan.copies
        model.plan = msgspec.structs.replace(model.plan, copies=event.count)
        if not event.count and event.problem:
            model.wanted = model.ordered = False
            self._do.fail(model, "quarantined", event.problem)
            return
        model.wanted = model.wanted or (more and model.plan.pin and not model.live)
        self._do.want(model)

    def _staying(self, name: str) -> Model | None:
        """A model that is served; None when it never was, or parts."""
        model = self._do.fleet.models.get(name)
        return None if model is None or model.parting else model

    def _joins(self, event: fx.ModelJoins) -> None:
        fleet = self._do.fleet
        if event.plan.name in fleet.models:
            raise ValueError(f"there is a model {event.plan.name!r} already")
        fleet.joins(_model(event.plan, fleet.gpus))

    def _parts(self, event: fx.ModelParts) -> None:
        model = self._staying(event.model)
        if model is None:
            return
        model.parting = True
        model.wanted = model.ordered = False
        model.plan = msgspec.structs.replace(model.plan, copies=0, pin=False)
        self._do.fail(model, "parted", f"{event.model} is not served here any more: {event.reason}")
        for instance in list(model.instances.values()):
            instance.ordered = instance.dismissed = True
            self._do.end(instance, event.reason)
        self._do.parts(model)

    def _listed(self, event: fx.Listed) -> None:
        """A rare event that looks at all models: where each could lie is asked anew."""
        fleet = self._do.fleet
        fleet.blind = ""
        known = {plan.uuid: plan for plan in event.devices}
        lost = {uuid for uuid in fleet.gpus if uuid not in known}
        for model in list(self._do.targets):
            if lost & set(model.target or {}):
                self._do.give_up(model)
        for uuid in lost:
            fleet.gpus[uuid].gone = True
            if not fleet.gpus[uuid].instances:
                del fleet.gpus[uuid]
        for uuid, plan in known.items():
            gpu = fleet.gpus.setdefault(uuid, Gpu(plan, self._margin))
            gpu.plan, gpu.gone = plan, False
        self._count_faulty()
        for model in fleet.models.values():
            model.move(*_places(model.plan, fleet.gpus))
        self._look_at_all()

    def _broken(self, event: fx.Broken) -> None:
        gpu = self._do.fleet.gpus.get(event.uuid)
        if gpu is None:
            return
        gpu.breaks(event.reason)
        self._count_faulty()
        for model in list(self._do.targets):
            if event.reason and event.uuid in (model.target or {}):
                self._do.give_up(model)
        self._look_at_all()

    def _count_faulty(self) -> None:
        self._do.fleet.faulty = sum(bool(gpu.broken) for gpu in self._do.fleet.gpus.values())

    def _look_at_all(self) -> None:
        for model in self._do.fleet.models.values():
            self._answer_hopeless(model)
            self._do.serve(model)
            if self._do.want(model):
                self._do.clock.set(model, self._do.now)

    def _hold_put(self, event: fx.HoldPut) -> None:
        fleet = self._do.fleet
        if event.finish and not event.uuid:
            fleet.freeing = event.reason if event.unload else ""
        else:
            for gpu in self._held_by(event.uuid):
                gpu.hold(event.reason, unloads=event.unload, finish=event.finish)
            if not event.uuid:
                fleet.held = event.reason
        for instance in list(fleet.instances.values()):
            if event.uuid and event.uuid not in instance.shares:
                continue
            if event.finish:
                self._free(instance)
                continue
            instance.barred = True
            if event.unload:
                self._do.end(instance, event.reason)
            else:
                self._do.want(instance.model)
        for model in list(self._do.targets):
            if not event.finish and (not event.uuid or event.uuid in (model.target or {})):
                self._do.give_up(model)
                self._do.want(model)

    def _free(self, instance: Instance) -> None:
        """A hold wants memory: what has no work ends."""
        if not instance.runs and instance.live and not instance.model.waiting and (why := self._do.freed(instance)):
            self._do.end(instance, why)

    def _hold_lifted(self, event: fx.HoldLifted) -> None:
        """A rare event that may look at all models: any of them may have waited for this."""
        fleet = self._do.fleet
        if not event.uuid and fleet.freeing:
            fleet.freeing = ""
        else:
            for gpu in self._held_by(event.uuid):
                gpu.hold("")
            if not event.uuid:
                fleet.held = ""
        for instance in fleet.instances.values():
            instance.barred = any(fleet.gpus[uuid].bars for uuid in instance.shares)
        for model in fleet.models.values():
            spare = model.live - model.plan.copies
            for instance in [each for each in model.instances.values() if each.live and not each.runs][: max(0, spare)]:
                self._do.end(instance, "another copy was loaded while its GPU was held")
            if model.live >= model.plan.copies:
                self._do.give_up(model)  # it was to load elsewhere meanwhile
        self._look_at_all()

    def _held_by(self, uuid: str) -> list[Gpu]:
        return [gpu for each, gpu in self._do.fleet.gpus.items() if uuid in ("", each)]


def _model(plan: fx.ModelPlan, gpus: dict[str, Gpu]) -> Model:
    return Model(plan, *_places(plan, gpus))


def _places(plan: fx.ModelPlan, gpus: dict[str, Gpu]) -> tuple[tuple[Place, ...], dict[str, int]]:
    """Where it could lie on an empty box, and what its devices have for models then.

    Where nothing is known of its devices it may lie anywhere, and nothing is held back for it.
    """
    here = {uuid: gpu for uuid, gpu in gpus.items() if not gpu.gone}
    if plan.devices:
        here = {uuid: here[uuid] for uuid in plan.devices if uuid in here}
    if plan.need_bytes <= 0 or (not here and (plan.devices or not gpus)):
        return ({},), {}
    spaces = [
        Space(uuid=uuid, room_bytes=gpu.plan.total_bytes - gpu.margin, speed=gpu.plan.speed)
        for uuid, gpu in here.items()
    ]
    rooms = {space.uuid: space.room_bytes for space in spaces}
    return places(plan.need_bytes, spaces, split=plan.split, elastic=plan.estimated), rooms


def _learn(known: float, seen: float) -> float:
    return seen if known <= 0 else known + LEARN * (seen - known)
