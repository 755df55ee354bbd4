"""Dispatch: what the scheduler does with its books: start runs, order loads, clear places, end instances.

Each method here is one act with its consequences; which events call for which act is `scheduler.Scheduler`'s.
"""

from __future__ import annotations

import math

from supervisor.intake import effects as fx
from supervisor.intake.fleet import Fleet, Instance, Model, Stage
from supervisor.intake.placement import Place
from supervisor.intake.queues import Clock
from supervisor.intake.turns import SOONEST_S, Go, Later, Look, Swap, look

_READY = Stage.READY  # naming an enum's member costs a call in Python 3.11, and `_slot` asks at every event


class Dispatch:
    """See the module. `out` collects the effects of one step, `now` is its time.

    Args:
        spread: take the free place with the fewest at work; else the tightest.
    """

    def __init__(self, fleet: Fleet, *, spread: bool) -> None:
        self.fleet, self.spread = fleet, spread
        self.jobs: dict[str, Model] = {}
        self.clock: Clock[Model | Instance] = Clock()
        self.line: Clock[Model] = Clock()  # models without an instance, by urgency
        self.stuck: Clock[Model] = Clock()  # those of them that nothing we could end would help
        self.targets: list[Model] = []
        self.made = 0
        self.now = 0.0
        self.out: list[fx.Effect] = []

    def serve(self, model: Model) -> None:
        """Start its jobs on free slots."""
        while model.waiting and (instance := self._slot(model)) is not None:
            alone = model.waiting.first().alone
            if alone and instance.runs:
                return  # it waits for an empty instance, and those behind it for it: neither starves
            job = model.waiting.pop()
            del self.jobs[job.id]
            instance.runs += 1
            instance.alone = instance.closed = alone
            self.out.append(fx.StartRun(instance.id, job))

    def _slot(self, model: Model) -> Instance | None:
        """The instance that is least at work, if one has a free slot."""
        if self.fleet.held:
            return None
        best, least = None, float(model.plan.slots)
        for each in model.instances.values():
            if each.runs < least and each.stage is _READY and not each.barred and not each.closed:
                best, least = each, each.runs
        return best

    def refuse(self, job_id: str, code: str, reason: str) -> None:
        """Answer a job that is not going to run."""
        self.out.append(fx.Refuse(job_id, code, reason))

    def want(self, model: Model) -> bool:
        """Its jobs wait: have it looked at, unless it has what it may have. Returns whether it wants to load."""
        if not (model.waiting or model.wanted) or model.target is not None or model.unread:
            return False
        live = model.live
        if live + model.lost >= model.plan.copies or (live and not model.waiting):
            return False
        if not live and not model.stuck and model.waiting:
            self.line.set(model, model.waiting.urgency())
        if self.clock.time_of(model) is None:
            self.clock.set(model, self.now + SOONEST_S * bool(live))
        return True

    def look(self, model: Model) -> None:
        """Judge where it may load now, and do so."""
        model.stuck = False
        if not self.want(model):
            return
        ahead = self._ahead()
        view = Look(self.now, None if ahead is model else ahead, self.spread)
        turn = look(model, self.fleet, view)
        model.stuck = isinstance(turn, Later) and turn.stuck
        match turn:
            case Go(place):
                self._load(model, place)
                self.offer()
            case Swap(place, who):
                self.fleet.reserve(model, place)
                self.targets.append(model)
                self._leaves_line(model)
                for number in who:
                    self.end(self.fleet.instances[number], f"{model.plan.name} takes its turn")
                self._say(model, "waits until its place is free")
                self._settle(model)
            case Later(reason, again_s):
                self.clock.set(model, self.now + again_s)
                self._say(model, reason)
                if turn.stuck:
                    # It holds up nobody: the next in line may be helped.
                    self.line.unset(model)
                    self.stuck.set(model, model.waiting.urgency() if model.waiting else math.inf)

    def _load(self, model: Model, place: Place) -> None:
        self.made += 1
        self._leaves_line(model)
        instance = Instance(self.made, model, place)
        instance.kept = model.plan.pin or model.wanted
        model.wanted = model.ordered = False
        self.fleet.add(instance)
        self.out.append(fx.Load(instance.id, model.plan.name, dict(place)))

    def _ahead(self) -> Model | None:
        """The model that waits longest among those that have no instance and may be helped."""
        while (model := self.line.first()) is not None:
            if not model.waiting or model.target is not None or model.live:
                self.line.unset(model)
            elif self.line.time_of(model) != (urgency := model.waiting.urgency()):
                self.line.set(model, urgency)
            else:
                return model
        return None

    def offer(self) -> None:
        """Memory is free or idle: let whoever waits longest look now."""
        if (model := self._ahead()) is not None:
            self.clock.set(model, self.now)

    def room(self) -> None:
        """Memory came free: places that were being cleared may be clear."""
        for model in list(self.targets):
            self._settle(model)
        if (stuck := self.stuck.first()) is not None:
            self.stuck.unset(stuck)
            stuck.stuck = False
            self.want(stuck)
        self.offer()

    def _settle(self, model: Model) -> None:
        """Load into its target if that is clear; give the target up when it is not going to be."""
        gpus, place = self.fleet.gpus, model.target
        if place is None:
            return
        lacks = [uuid for uuid, share in place.items() if gpus[uuid].free + gpus[uuid].reserved < share]
        rivals = self.fleet.rivals(model)
        if not lacks and not rivals:
            self.fleet.reserve(model, None)
            self.targets.remove(model)
            self._load(model, place)
        elif any(gpus[uuid].coming <= 0 for uuid in lacks) or any(rival.live for rival in rivals):
            self.give_up(model)
            self.want(model)

    def give_up(self, model: Model) -> None:
        """Leave its target; who still works there for it to end need not."""
        place = model.target
        if place is None:
            return
        self.fleet.reserve(model, None)
        self.targets.remove(model)
        for uuid in place:
            if any(uuid in (other.target or {}) for other in self.targets):
                continue
            for instance in self.fleet.gpus[uuid].instances.values():
                if instance.stage is Stage.DRAINING and not (instance.barred or instance.ordered):
                    self.fleet.stays(instance)
                    self.serve(instance.model)

    def idle(self, instance: Instance) -> None:
        """It has no run left."""
        instance.idle_since = self.now
        if (reason := self.freed(instance)) and not instance.model.waiting:
            self.end(instance, reason)
            return
        if instance.model.plan.keep_alive_s:
            self.clock.set(instance, self.now + instance.model.plan.keep_alive_s)
        self.offer()

    def freed(self, instance: Instance) -> str:
        """Why it shall not keep memory without work; "" when it may."""
        if self.fleet.freeing and instance.model.plan.gpu:
            return self.fleet.freeing
        gpus = self.fleet.gpus
        return next((gpus[uuid].held for uuid in instance.shares if gpus[uuid].unloads), "")

    def keep_for(self, instance: Instance, limit: float) -> None:
        """From now on it is kept for another while without work, which counts from when it became idle."""
        self.clock.unset(instance)
        if limit and instance.stage is Stage.READY and not instance.runs:
            self.clock.set(instance, max(self.now, instance.idle_since + limit))

    def keep_alive(self, instance: Instance) -> None:
        """End it if it has had no work for as long as its model is kept."""
        limit = instance.model.plan.keep_alive_s
        if instance.stage is not _READY or instance.runs:
            return
        if self.now < instance.idle_since + limit:
            self.clock.set(instance, instance.idle_since + limit)
        elif not instance.model.plan.pin:
            self.end(instance, f"idle for {limit:g} s", idle=True)

    def end(self, instance: Instance, reason: str, *, idle: bool = False) -> None:
        """End it after its last run; its queue may go elsewhere."""
        if instance.stage is Stage.LOADING:
            self.cancel_load(instance, reason)
        elif instance.stage is _READY:
            self.fleet.ends(instance, Stage.DRAINING)
            instance.why_ends = reason
            if not instance.runs:
                self.evict(instance, idle=idle)
            self.want(instance.model)

    def evict(self, instance: Instance, *, idle: bool = False) -> None:
        """End an instance that has no run."""
        self.fleet.ends(instance, Stage.LEAVING)
        self.out.append(fx.Evict(instance.id, instance.why_ends, idle))

    def cancel_load(self, instance: Instance, reason: str) -> None:
        """End an instance that is still loading."""
        self.fleet.ends(instance, Stage.LEAVING)
        self.out.append(fx.CancelLoad(instance.id, reason))

    def fail(self, model: Model, code: str, problem: str) -> None:
        """Whoever waits is answered at once: the coordinator decides what becomes of the jobs."""
        while model.waiting:
            job = model.waiting.pop()
            del self.jobs[job.id]
            self.refuse(job.id, code, problem)
        self.give_up(model)

    def parts(self, model: Model) -> None:
        """Forget a model that is served no more, once its last instance is gone."""
        if model.parting and not model.instances:
            self._leaves_line(model)
            self.fleet.parts(model)
            self.out.append(fx.ModelGone(model.plan.name))

    def _leaves_line(self, model: Model) -> None:
        self.line.unset(model)
        self.stuck.unset(model)
        self.clock.unset(model)

    def _say(self, model: Model, reason: str) -> None:
        if reason != model.why:
            model.why = reason
            self.out.append(fx.Waits(model.plan.name, reason))
