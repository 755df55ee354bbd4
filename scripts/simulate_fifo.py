"""What the scheduler is compared with: first come, first served, and the least recently used model is ended.

"fifo+lru" serves strictly in order: the first job waits for its model's load, and everybody behind it waits too.
"queues+lru" has one queue per model and lets others start while a model loads; loads happen in the order of the
first job of each, and idle models are ended by age alone. Both place on the GPU with the most free memory, load
further copies when all slots are busy and a GPU is free or idle, split models, and obey holds and pins, so that only
order and eviction differ from the scheduler.
"""

from __future__ import annotations

from collections import deque

from supervisor.intake import effects as fx
from supervisor.intake.placement import Place, Space, places


class _Instance:
    def __init__(self, number: int, model: fx.ModelPlan, shares: Place) -> None:
        self.id, self.model, self.shares = number, model, shares
        self.ready = self.leaving = self.draining = False
        self.runs, self.used = 0, 0.0


class Fifo:
    """See the module. `strict` is "fifo+lru"."""

    def __init__(self, models: list[fx.ModelPlan], devices: list[fx.DevicePlan], *, strict: bool) -> None:
        self._models = {model.name: model for model in models}
        self._strict = strict
        self._total = {device.uuid: device.total_bytes for device in devices}
        self._free = dict(self._total)
        self._foreign = dict.fromkeys(self._total, 0)
        self._held: set[str] = set()
        spaces = [Space(uuid=device.uuid, room_bytes=device.total_bytes) for device in devices]
        self._places = {
            m.name: places(m.need_bytes, spaces, split=m.split, allowed=m.devices) if m.need_bytes else ({},)
            for m in models
        }
        self._queue: deque[fx.Job] = deque()
        self._queues: dict[str, deque[fx.Job]] = {name: deque() for name in self._models}
        self._instances: dict[int, _Instance] = {}
        self._by_model: dict[str, list[_Instance]] = {name: [] for name in self._models}
        self._made = 0
        self._promised = False  # room was made for a load: nobody else is ended until it is there
        self._out: list[fx.Effect] = []

    def due(self) -> float | None:
        """It has no timers."""
        return None

    def step(self, event: fx.Event, now: float) -> list[fx.Effect]:
        """As `Scheduler.step`."""
        self._out, self._now = [], now
        match event:
            case fx.Arrives(job):
                if not self._places[job.model]:
                    return [fx.Refuse(job.id, "too_large", "No GPU here could hold it.")]
                (self._queue if self._strict else self._queues[job.model]).append(job)
            case fx.RunEnds(number):
                instance = self._instances[number]
                instance.runs -= 1
                instance.used = now
                if instance.draining and not instance.runs:
                    self._evict(instance)
            case fx.LoadEnds(number):
                self._instances[number].ready = True
                self._instances[number].used = now
            case fx.Gone(number):
                self._remove(number)
            case fx.Reading(uuid, foreign):
                self._free[uuid] += self._foreign[uuid] - foreign
                self._foreign[uuid] = foreign
            case fx.HoldPut(uuid):
                self._held.add(uuid)
                for instance in [each for each in self._instances.values() if uuid in each.shares]:
                    self._give_back(instance)
            case fx.HoldLifted(uuid):
                self._held.discard(uuid)
        self._serve()
        return self._out

    def _serve(self) -> None:
        if self._strict:
            while self._queue and self._advance(self._queue[0]):
                self._queue.popleft()
            return
        waiting = sorted((q[0].at, name) for name, q in self._queues.items() if q)
        for _at, name in waiting:
            queue = self._queues[name]
            while queue and self._advance(queue[0]):
                queue.popleft()

    def _advance(self, job: fx.Job) -> bool:
        """Start it, or begin what it takes; True when it started."""
        own = self._by_model[job.model]
        for instance in own:
            if instance.ready and not instance.draining and instance.runs < instance.model.slots:
                instance.runs += 1
                instance.used = self._now
                self._out.append(fx.StartRun(instance.id, job))
                return True
        model = self._models[job.model]
        live = [each for each in own if not each.leaving and not each.draining]
        if any(not each.ready for each in live) or len(live) >= model.copies:
            return False
        if any(each.leaving for each in self._instances.values()) and self._promised:
            return False
        self._load(model, bool(live))
        return False

    def _load(self, model: fx.ModelPlan, has_one: bool) -> None:
        options = [place for place in self._places[model.name] if not self._held & set(place)]
        rivals = [
            each
            for each in self._instances.values()
            if model.group and each.model.group == model.group and each.model is not model
        ]
        if rivals:
            for each in rivals:
                if each.ready and not each.leaving and not each.runs and not each.model.pin:
                    self._evict(each)
            return
        fitting = [place for place in options if all(share <= self._free[uuid] for uuid, share in place.items())]
        if fitting:
            place = max(fitting, key=lambda each: sum(self._free[uuid] for uuid in each))
            self._made += 1
            instance = _Instance(self._made, model, place)
            self._instances[instance.id] = instance
            self._by_model[model.name].append(instance)
            for uuid, share in place.items():
                self._free[uuid] -= share
            self._promised = False
            self._out.append(fx.Load(instance.id, model.name, place))
            return
        found = [
            (used, who) for place in options if (found_one := self._oldest(place, model)) for used, who in (found_one,)
        ]
        if found and not has_one:
            for instance in min(found, key=lambda each: each[0])[1]:
                self._evict(instance)
            self._promised = True

    def _oldest(self, place: Place, model: fx.ModelPlan) -> tuple[float, list[_Instance]] | None:
        """Least recently used idle ones that make this place free, and when the last of them was used."""
        chosen: list[_Instance] = []
        for uuid, share in place.items():
            free = self._free[uuid] + sum(each.shares.get(uuid, 0) for each in chosen)
            free += sum(each.shares.get(uuid, 0) for each in self._instances.values() if each.leaving)
            idle = [
                each
                for each in self._instances.values()
                if uuid in each.shares
                and each.ready
                and not each.leaving
                and not each.runs
                and not each.model.pin
                and each not in chosen
                and each.model is not model
            ]
            for each in sorted(idle, key=lambda one: one.used):
                if free >= share:
                    break
                chosen.append(each)
                free += each.shares[uuid]
            if free < share:
                return None
        return max((each.used for each in chosen), default=0.0), chosen

    def _give_back(self, instance: _Instance) -> None:
        if instance.leaving:
            return
        if not instance.ready:
            instance.leaving = True
            self._out.append(fx.CancelLoad(instance.id, "held"))
        elif instance.runs:
            instance.draining = True
        else:
            self._evict(instance)

    def _evict(self, instance: _Instance) -> None:
        instance.leaving = instance.draining = True
        self._out.append(fx.Evict(instance.id, "least recently used"))

    def _remove(self, number: int) -> None:
        instance = self._instances.pop(number)
        self._by_model[instance.model.name].remove(instance)
        for uuid, share in instance.shares.items():
            self._free[uuid] += share
        if not any(each.leaving for each in self._instances.values()):
            self._promised = False
