"""Everything that the owner is shown, gathered from those who know it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import trio

from supervisor.control.snapshot import GpuView, IncidentView, Link, ModelView, Snapshot
from supervisor.control.why import explained
from supervisor.host.family import members
from supervisor.host.work import InstanceStatus, ModelSpec
from supervisor.intake.holds import Coming, Holds, Sight
from supervisor.machine.readings import GpuReading
from supervisor.room import VramRoom
from supervisor.version import version

# Incidents that `status` shows.
RECENT = 5
# Of a model whose load is decided and has not begun: the engine before it is just going.
_ORDERED = "it is about to be loaded"
# How an instance ended for a hold: the end stays true when the hold is over, the hold does not.
_FOR_A_HOLD = re.compile(r" \((held .*)\)")


class Watch(Protocol):
    """What is asked of the GPU telemetry."""

    @property
    def reason(self) -> str:
        """Why nothing is known; "" when something is."""

    def readings(self) -> Mapping[str, GpuReading]:
        """The latest of each GPU."""

    def foreign_bytes(self, uuid: str, own_pids: Iterable[int], own_bytes: int = 0) -> int | None:
        """Bytes that are not ours; None when it is not known."""


class Sources(NamedTuple):
    """Where the parts come from; all are asked on the trio thread and answer at once.

    Attributes:
        instances: `Host.snapshot`.
        holds: `Pausing.holds`.
        link: the session with the coordinator.
        jobs: attempts that have not ended.
        draining: reason of the drain, or "".
        drain_until: seconds since the epoch at which the drain ends what still runs; None when there is no such time.
        sights: what the rules of holds see now.
        coming: holds that are known to begin.
        gpu_faults: GPU -> why it is not used.
        incidents: the newest bad ends, at most so many.
        ends: model -> cause -> count.
        refused: model -> why it is not offered to anybody (its proof failed, its GPU is out of service).
        slow: why a model is slower than it was.
    """

    worker: str
    specs: Sequence[ModelSpec]
    instances: Callable[[], Sequence[InstanceStatus]]
    holds: Callable[[], Holds]
    room: VramRoom
    watch: Watch
    link: Callable[[], Link] = Link
    jobs: Callable[[], int] = int
    draining: Callable[[], str] = str
    drain_until: Callable[[], float | None] = lambda: None
    sights: Callable[[], Sequence[Sight]] = tuple
    coming: Callable[[], Sequence[Coming]] = tuple
    gpu_faults: Callable[[], Mapping[str, str]] = dict
    incidents: Callable[[int], Sequence[IncidentView]] = lambda _count: ()
    ends: Callable[[], Mapping[str, Mapping[str, int]]] = dict
    refused: Callable[[], Mapping[str, str]] = dict
    slow: Callable[[str], str] = lambda _model: ""


class Gathering:
    """Makes snapshots. Made when the supervisor starts: its uptime counts from there."""

    def __init__(self, sources: Sources) -> None:
        self._sources = sources
        self._began = trio.current_time()

    def snapshot(self) -> Snapshot:
        """Everything at this moment, explained."""
        sources = self._sources
        sources.room.sample()
        instances = list(sources.instances())
        holds = sources.holds()
        return explained(
            Snapshot(
                version=version(),
                worker=sources.worker,
                pid=os.getpid(),
                now=time.time(),
                uptime_s=trio.current_time() - self._began,
                draining=sources.draining(),
                drain_until=sources.drain_until(),
                link=sources.link(),
                jobs=sources.jobs(),
                holds=holds.items,
                sights=tuple(sources.sights()),
                coming=tuple(sources.coming()),
                models=self._models(instances, holds),
                gpus=self._gpus(instances),
                gpu_reason=sources.watch.reason,
                incidents=tuple(sources.incidents(RECENT)),
            )
        )

    def _models(self, instances: Sequence[InstanceStatus], holds: Holds) -> tuple[ModelView, ...]:
        specs = {spec.name: spec for spec in self._sources.specs}
        refused = self._sources.refused()
        waits, held, ends = self._sources.room.waiting(), self._sources.room.held(), self._sources.ends()
        begun = {one.model for one in instances if one.state != "cold" or one.blocked}
        return tuple(
            ModelView(
                name=one.model,
                engine=one.engine,
                state=one.state,
                kinds=specs[one.model].model.kinds,
                held_kinds=holds.kinds_held(specs[one.model].model.kinds, self._gpus_of(specs[one.model])),
                reason=_reason(one, holds) or refused.get(one.model, ""),
                slow=self._sources.slow(one.model),
                unserved=refused.get(one.model, "").removeprefix("not served: "),
                waits=waits.get(one.model, "") or (_ORDERED if one.queued and one.model not in begun else ""),
                device=one.device or specs[one.model].model.device,
                gpus=specs[one.model].model.devices,
                on=one.gpus if one.pid else (),
                pid=one.pid,
                running=one.running,
                queued=one.queued,
                slots=one.slots,
                restarts=one.restarts,
                rss_bytes=one.rss_bytes,
                vram_bytes=sum(held.get(one.model, {}).values()) or one.vram_bytes,
                held=held.get(one.model, {}),
                idle_s=one.idle_s,
                sandbox=one.sandbox,
                last_end=_of_now(one.last_end, holds),
                ends=ends.get(one.model, {}),
            )
            for one in instances
        )

    def _gpus_of(self, spec: ModelSpec) -> tuple[str, ...]:
        """GPUs that a model may use: its own, or any."""
        if spec.model.devices or spec.model.device == "cpu":
            return tuple(spec.model.devices)
        return tuple(self._sources.watch.readings())

    def _gpus(self, instances: Sequence[InstanceStatus]) -> tuple[GpuView, ...]:
        room, watch = self._sources.room, self._sources.watch
        own = [pid for one in instances if one.pid for pid in members(one.pid)]
        held, promised, tainted = room.held(), room.promised(), room.tainted()
        faults = self._sources.gpu_faults()
        views = []
        for uuid, gpu in watch.readings().items():
            ours = sum(devices.get(uuid, 0) for devices in held.values())
            view = GpuView(
                uuid=uuid,
                name=gpu.name,
                total_bytes=gpu.memory_total_bytes,
                free_bytes=gpu.memory_free_bytes,
                ours_bytes=ours,
                foreign_bytes=watch.foreign_bytes(uuid, own, ours),
                promised_bytes=promised.get(uuid, 0),
                busy=gpu.busy,
                temperature_c=gpu.temperature_c,
                power_w=gpu.power_w,
                fault=faults.get(uuid, "") or gpu.error,
                tainted=tainted.get(uuid, ""),
            )
            views.append(view)
        return tuple(views)


def _reason(one: InstanceStatus, holds: Holds) -> str:
    """Why it does not serve. A model that is merely not loaded waits for nothing, and owes nobody a reason."""
    past = one.state == "cold" and not one.blocked
    if past and (one.reason.startswith("waits ") or one.last_end.startswith("unloaded")):
        return ""
    return _of_now(one.reason, holds)


def _of_now(text: str, holds: Holds) -> str:
    """A sentence without the hold that it speaks of, when that is over."""
    found = _FOR_A_HOLD.search(text)
    if found is None or any(each.phrase in found[1] for each in holds.items):
        return text
    return text[: found.start()] + text[found.end() :]
