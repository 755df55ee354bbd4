"""This machine around the host: its GPUs and their health, who fits into them, ceilings, leftovers, holds.

Wiring only. Everything here is made once per life of the supervisor, before anything is started; `run` owns the
tasks. What it knows reaches the host as `Means`, the owner as a snapshot, and the coordinator as capabilities.
"""

from __future__ import annotations

import functools
import logging
import os
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import trio

from protocol.link_wire import Gpu, GpuState
from supervisor.control.snapshot import IncidentView
from supervisor.host.cgroups import Cgroups
from supervisor.host.child import open_child
from supervisor.host.family import members
from supervisor.host.host import Host
from supervisor.host.incidents import Incident, Incidents, now_utc
from supervisor.host.leftovers import Ledger, sweep
from supervisor.host.means import Means, OpenChild, Witness
from supervisor.host.quarantine import Quarantines
from supervisor.host.senses import Senses
from supervisor.host.work import InstanceStatus, ModelSpec
from supervisor.intake.holds import Hold, Holds, Mode
from supervisor.machine.gpu_health import GpuHealth, State
from supervisor.machine.gpu_metrics import gpu_metrics
from supervisor.machine.gpu_trials import GpuTrials
from supervisor.machine.load import Ours
from supervisor.machine.readings import GpuReading
from supervisor.machine.telemetry import GpuWatch, simulated_argv
from supervisor.pausing import Pausing
from supervisor.room import VramRoom
from supervisor.settings import Settings
from supervisor.state import StateFolder, write_atomically
from supervisor.suspend import SleepWatch
from supervisor.watch_holds import WatchHolds, system_readers

log = logging.getLogger(__name__)

# For trying things out without a GPU: a script for engines/telemetry/simulated.py.
SIMULATED = "BULKHEAD_SIMULATED_GPUS"
# Bad ends that are kept in memory for the status; the reports of more of them lie in the state folder.
LATEST = 10


class Box:
    """See the module. Made on the trio thread, before the first child; `clear_leftovers` comes next.

    Attributes:
        on_change: called when a GPU or a hold changed what may be announced.
        spawn: `open_child` that writes its children down for the next life.
    """

    def __init__(self, settings: Settings, state: StateFolder) -> None:
        self._settings, self._state = settings, state
        self.on_change: Callable[[], None] = lambda: None
        self._cgroups = Cgroups.find()  # may move us into a leaf of our own, so before anything is started
        self._ledger = Ledger(state.children)
        self._incidents = _Counted(state.incidents)
        self.spawn: OpenChild = self._ledger.recording(open_child)
        self.watch = GpuWatch(_reader(state), spawn=self.spawn)
        self.health = GpuHealth(trio.current_time, self._health_changed)
        self._trials = GpuTrials(self.health)
        self.watch.subscribe(self._listed)
        self.watch.subscribe(self.health.note_readings, self.health.note_event)
        margin = int(settings.limits.vram_margin_gb * 2**30)
        self.room = VramRoom(
            self.watch, margin, state.peaks, unusable=self.health.usable, on_lost=self.health.note_not_returned
        )
        self.health.restore(_kept_quarantines(state.gpus))  # tells the room
        self.pausing = Pausing(state.holds)
        self.pausing.on_change = self._hold_changed
        self.pausing.loaded = self._leaving
        self.on_abort: Callable[[Hold, tuple[str, ...]], None] = lambda _hold, _models: None
        self.on_slept: Callable[[float], None] = lambda _seconds: None
        self._aborted: set[Hold] = set()
        self.watch_holds = WatchHolds(
            settings.holds, self.pausing, system_readers(state.instances.parent), self.watch, self._ours
        )
        self._host: Host | None = None
        self._known: tuple[str, ...] = ()  # GPUs as they were last listed: a driver that hangs lists none

    async def clear_leftovers(self, control_socket: Path) -> None:
        """End what an earlier life left running, and remove its scratch folders and sockets.

        Cancellation: at once; what the thread does not get done is left to the next life.
        """
        folders = [self._state.instances, self._state.probes]
        swept = await trio.to_thread.run_sync(
            lambda: sweep(self._ledger, scratch=folders, sockets=[control_socket]), abandon_on_cancel=True
        )
        for found in swept.unkillable:
            log.error("%s (pid %d) of an earlier life cannot be ended; reboot to be rid of it", found.name, found.pid)

    def means(
        self,
        verify: Callable[[ModelSpec], Awaitable[str]],
        reprobe: Callable[[ModelSpec], Awaitable[str]],
        witness: Witness,
    ) -> Means:
        """What the host works with."""
        return Means(
            verify=verify,
            room=self.room,
            witness=witness,
            reprobe=reprobe,
            memory=Quarantines(self._state.quarantines),
            senses=Senses(vram_bytes=self.room.vram_bytes, gpu_share=self._gpu_share, gpus=self._evidence),
            cgroups=self._cgroups,
            ledger=self._ledger,
            incidents=self._incidents,
        )

    async def run(self, host: Host) -> None:
        """All tasks of the machine but `watch`, which has to outlive the engines. Runs until cancelled."""
        self._host = host
        host.on_unkillable, host.on_late_death = self._unkillable, self._died_late
        self._incidents.on_incident = self._incident
        self._hold_changed()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._trials.run)
            nursery.start_soon(self.room.keep_learning)
            nursery.start_soon(self.pausing.run)
            nursery.start_soon(self.watch_holds.run)
            nursery.start_soon(SleepWatch(on_slept=functools.partial(self._slept, host)).run)

    def _slept(self, host: Host, seconds: float) -> None:
        # In one breath: a job that goes from the link to the host in between would keep the time that was slept.
        host.slept(seconds)
        self.on_slept(seconds)

    # ---- what others ask

    def barred(self, spec: ModelSpec) -> str:
        """Why a model cannot be served on this machine now; "" when one of its GPUs can be used."""
        reasons = [self.health.usable(uuid) or self._cordoned(uuid) for uuid in self._gpus_of(spec)]
        return next(iter(reasons), "") if all(reasons) else ""

    def cordons(self, spec: ModelSpec) -> Mapping[str, tuple[str, float | None]]:
        """Kind -> why no jobs of it are taken for a model, and for how many more seconds."""
        return self.pausing.kinds_held(spec.model.kinds, self._gpus_of(spec, spec.model.devices))

    def _cordoned(self, uuid: str) -> str:
        """Why this GPU alone is held; what holds the whole worker is told in another way."""
        return Holds(self.pausing.holds().scoped()).reason(gpu=uuid)

    def gpus(self) -> tuple[Gpu, ...]:
        """What is announced of the GPUs; free memory is left out, because it never stands still."""
        return tuple(
            Gpu(uuid=uuid, name=gpu.name, vram_bytes=gpu.memory_total_bytes or 0)
            for uuid, gpu in self.watch.readings().items()
        )

    def gpu_states(self) -> tuple[GpuState, ...]:
        """What a heartbeat tells of the GPUs."""
        return tuple(
            GpuState(
                uuid=uuid,
                free_bytes=gpu.memory_free_bytes,
                busy=gpu.busy,
                temperature_c=gpu.temperature_c,
                power_w=gpu.power_w,
            )
            for uuid, gpu in self.watch.readings().items()
        )

    def gpu_faults(self) -> Mapping[str, str]:
        """GPU -> why it is not used."""
        return {uuid: why for uuid in self.watch.readings() if (why := self.health.usable(uuid))}

    def gpu_metrics(self) -> Iterable[str]:
        """Prometheus lines."""
        own = [pid for one in self._host.snapshot() if one.pid for pid in members(one.pid)] if self._host else []
        return gpu_metrics(
            self.watch.readings(),
            age_s=self.watch.age_s(),
            driver=self.watch.driver,
            health=self.health.snapshot(),
            faults=self.health.faults,
            own_pids=own,
        )

    def ends(self) -> Mapping[str, Mapping[str, int]]:
        """Model -> fault code -> bad ends since the start."""
        return self._incidents.counts

    def recent_incidents(self, count: int) -> list[IncidentView]:
        """The newest bad ends, at most `LATEST`, those of earlier lives included."""
        return list(self._incidents.latest)[:count]

    def hopeless(self, specs: Iterable[ModelSpec]) -> str:
        """Why no model can ever run again without a person: "" as long as one may.

        A GPU that is merely suspect, or in quarantine, is tried again and may come back by itself.
        """
        stuck = [self._stuck(spec) for spec in specs]
        if not stuck or not all(stuck):
            return ""
        pids = ", ".join(str(pid) for pid in sorted(frozenset[int]().union(*stuck)))
        return f"No GPU is left: process {pids} cannot be killed and holds it; reset the GPU or reboot."

    # ---- GPUs

    def _listed(self, readings: Mapping[str, GpuReading]) -> None:
        if readings:
            self._known = tuple(readings)

    def _gpus_of(self, spec: ModelSpec, told: Iterable[str] = ()) -> list[str]:
        """UUIDs that a model may use: those told, its own, or any; none on the CPU."""
        named = [uuid for uuid in told if not uuid.startswith("cuda")]
        named = named or [uuid for uuid in spec.model.devices if not uuid.startswith("cuda")]
        if named or spec.model.device == "cpu":
            return named
        on_gpu = spec.model.device == "cuda" or any(word.startswith("cuda") for word in told)
        return list(self._known) if on_gpu else []

    def _used_by(self, spec: ModelSpec, told: Iterable[str] = ()) -> list[str]:
        """UUIDs that an instance uses: where it was not told any, engines take the first GPU."""
        told = list(told)
        named = [uuid for uuid in (*told, *spec.model.devices) if not uuid.startswith("cuda")]
        return self._gpus_of(spec, told)[: None if named else 1]

    def _stuck(self, spec: ModelSpec) -> frozenset[int]:
        """Processes that hold on to every GPU of this model and cannot be killed."""
        stuck = [self.health.of(uuid).stuck for uuid in self._gpus_of(spec)]
        return frozenset[int]().union(*stuck) if all(stuck) else frozenset()

    def _gpu_share(self, spec: ModelSpec) -> float | None:
        shares = [self.watch.utilisation(uuid) for uuid in self._used_by(spec)]
        known = [share for share in shares if share is not None]
        return max(known) if known else None

    def _evidence(self, spec: ModelSpec) -> tuple[Mapping[str, Any], ...]:
        readings = self.watch.readings()
        return tuple(msgspec.to_builtins(readings[uuid]) for uuid in self._used_by(spec) if uuid in readings)

    def _incident(self, incident: Incident) -> None:
        """An engine's last words may speak of the GPU; they cost it a trial at most."""
        self.watch_holds.note_bad(f"{incident.model} {incident.how}")
        occupants = self._host.occupants if self._host else ()
        lane = next((each for each in occupants if each.spec.name == incident.model), None)
        if lane is not None:
            gpus = [str(gpu["uuid"]) for gpu in incident.gpus if "uuid" in gpu]
            self.health.note_engine(self._used_by(lane.spec, gpus), incident.stderr)

    def _unkillable(self, spec: ModelSpec, devices: tuple[str, ...], pid: int) -> None:
        self.health.note_unkillable(self._used_by(spec, devices), pid)
        self._changed()

    def _died_late(self, _spec: ModelSpec, _devices: tuple[str, ...], pid: int) -> None:
        """Its GPUs are tried at once."""
        self.health.note_gone([pid])
        self._changed()

    def _health_changed(self, _uuid: str) -> None:
        self._trials.wake()
        kept = {uuid: one.reason for uuid, one in self.health.snapshot().items() if one.state is State.QUARANTINED}
        try:
            write_atomically(self._state.gpus, msgspec.json.encode(kept))
        except OSError as error:
            log.warning("the quarantine of GPUs could not be kept: %s", error.strerror)
        self.room.look_again()
        self._changed()

    def _changed(self) -> None:
        try:
            self.on_change()
        except Exception:  # the GPU watch, the trials or a lane would end of it
            log.exception("a change of the machine could not be passed on")

    def _hold_changed(self) -> None:
        holds = self.pausing.holds()
        cordons = {hold.gpu: holds.reason(gpu=hold.gpu) for hold in holds.items if hold.gpu and not hold.kind}
        freed = {hold.gpu: cordons[hold.gpu] for hold in holds.items if hold.gpu in cordons and hold.unloads}
        whole = holds.reason() if holds.mode() not in (None, Mode.STOP) else ""
        self.room.free(whole, freed, cordons=cordons)
        self._changed()
        aborting = {hold for hold in holds.items if hold.mode is Mode.ABORT}
        for hold in aborting - self._aborted:
            self.on_abort(hold, self._loaded(hold.gpu))
        self._aborted = aborting

    def _on_gpus(self) -> dict[str, tuple[str, ...]]:
        """Model -> GPUs, of those that are loaded."""
        if self._host is None:
            return {}
        specs = {lane.spec.name: lane.spec for lane in self._host.occupants}
        found: dict[str, tuple[str, ...]] = {}
        for one in self._host.snapshot():
            if one.pid:
                gpus = self._used_by(specs[one.model], one.gpus)
                found[one.model] = tuple(dict.fromkeys((*found.get(one.model, ()), *gpus)))
        return found

    def _loaded(self, gpu: str) -> tuple[str, ...]:
        return tuple(model for model, gpus in self._on_gpus().items() if not gpu or gpu in gpus)

    def _leaving(self, gpu: str) -> tuple[str, ...]:
        """Loaded models that a hold which frees GPU memory ends: those on the CPU stay."""
        lanes = self._host.occupants if self._host else ()
        on_cpu = {lane.spec.name for lane in lanes if lane.spec.model.device == "cpu"}
        return tuple(name for name in self._loaded(gpu) if name not in on_cpu)

    def _ours(self) -> Ours:
        seen = self._host.snapshot() if self._host else []
        held = Counter(self.room.promised())
        for by_gpu in self.room.held().values():
            held.update(by_gpu)
        where = self._on_gpus()
        return Ours(
            pids=frozenset({os.getpid(), *(pid for one in seen if one.pid for pid in members(one.pid))}),
            held=held,
            works=frozenset(uuid for one in seen if _at_work(one) for uuid in where.get(one.model, ())),
        )


def _at_work(one: InstanceStatus) -> bool:
    return bool(one.running) or one.state in ("starting", "loading")


class _Counted(Incidents):
    """Incidents that are counted by model and fault code, too.

    Attributes:
        counts: model -> fault code -> how many in this life.
        latest: the newest first: whoever asks for the status must not wait for a disk.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.counts: dict[str, Counter[str]] = {}
        self.latest = deque(map(_seen, self.recent(LATEST)), maxlen=LATEST)
        self.on_incident: Callable[[Incident], None] = lambda _incident: None

    def keep(self, incident: Incident) -> Path | None:
        """See `Incidents.keep`."""
        if not incident.time:
            incident = msgspec.structs.replace(incident, time=now_utc())
        self.latest.appendleft(_seen(incident))
        self.counts.setdefault(incident.model, Counter())[incident.code or "engine_crashed"] += 1
        self.on_incident(incident)
        return super().keep(incident)


def _seen(incident: Incident) -> IncidentView:
    return IncidentView(**{name: getattr(incident, name) for name in IncidentView.__struct_fields__})


def _reader(state: StateFolder) -> tuple[str, ...] | None:
    script = os.environ.get(SIMULATED)
    if not script:
        return None
    log.warning("%s is set: the GPUs are simulated by %s", SIMULATED, script)
    return simulated_argv(Path(script), state.instances)


def _kept_quarantines(path: Path) -> dict[str, str]:
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, str])
    except (OSError, msgspec.MsgspecError):
        return {}
