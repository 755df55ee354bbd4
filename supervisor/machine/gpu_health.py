"""Which GPUs may be used: what was seen of each becomes one of three states. Pure; time is given.

    healthy ──doubt──► suspect ──trial passed──► healthy
       │                  └─────trial failed, or the third doubt within STRIKES_S──► quarantined
       └──fatal fault, lost, unkillable process──► quarantined ──trial passed──► healthy

A *doubt* is what may be the GPU's fault or its user's: a contained memory error, a copy engine fault, an engine whose
last words speak of the hardware. It costs a trial: a small kernel in a child (`gpu.try_gpu`). Words alone never
quarantine a GPU, or any engine could take a GPU from the others by printing them. A *fatal* fault is what the driver
itself reports and what no restart of a program cures; the GPU then comes back when the driver asks for nothing any
more and a trial has passed, at the earliest after `FIRST_TRIAL_S`. A GPU that some process cannot leave (it is stuck
in the driver) comes back when that process is gone. Whatever the state, faults of programs (Xid 13, 31, 43, 45 and
the like) leave it as it is.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Callable, Iterable, Mapping

import msgspec

from supervisor.machine.gpu_words import GpuFault, Verdict, classify
from supervisor.machine.readings import GpuEvent, GpuReading
from supervisor.machine.xids import Action, Owner, Xid, xid

FIRST_TRIAL_S = 15.0
LONGEST_TRIAL_S = 600.0
STRIKES = 3
STRIKES_S = 600.0

# What the driver wants (readings.GpuReading.recovery_action). "drain-p2p" and "imex" concern links between GPUs only.
_WANTED = {
    "reset": Action.RESET_GPU,
    "drain-and-reset": Action.RESET_GPU,
    "bus-reset": Action.RESET_GPU,
    "reboot": Action.REBOOT,
}
# Events that are no Xid but mean the same as one.
_EVENTS = {
    "ecc-double-bit": Xid("double bit ECC error", Owner.DEVICE, Action.RESET_GPU),
    "retirement-failure": Xid("memory remapping failed", Owner.DEVICE, Action.RESET_GPU),
    "poison-fatal": Xid("uncontained memory error", Owner.DEVICE, Action.RESET_GPU),
    "unavailable": Xid("GPU became unavailable", Owner.DEVICE, Action.RESET_GPU),
}
_CURES = {
    Action.RESET_GPU: "it needs a reset (nvidia-smi --gpu-reset) or a reboot",
    Action.REBOOT: "the machine needs a reboot",
}


class State(enum.StrEnum):
    """Of one GPU."""

    HEALTHY = "healthy"
    SUSPECT = "suspect"
    QUARANTINED = "quarantined"


class Health(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU's state.

    Attributes:
        reason: one sentence; "" when healthy.
        since: when the state was entered, on the clock of the caller.
        action: what has to happen.
        trials: how many have failed in a row since then.
        next_trial: when the next one is due.
        stuck: pids that hold on to the GPU and cannot be killed.
        strikes: when it was last doubted.
    """

    state: State = State.HEALTHY
    reason: str = ""
    since: float = 0.0
    action: Action = Action.IGNORE
    trials: int = 0
    next_trial: float = math.inf
    stuck: frozenset[int] = frozenset()
    strikes: tuple[float, ...] = ()


class GpuHealth:
    """The states of all GPUs, by UUID. The only owner of them; tell it what happened.

    Args:
        clock: seconds, monotonic.
        on_change: called with a UUID after its state changed.
    """

    def __init__(self, clock: Callable[[], float], on_change: Callable[[str], None] = lambda _uuid: None) -> None:
        self._clock, self._on_change = clock, on_change
        self._gpus: dict[str, Health] = {}
        self._parents: dict[str, str] = {}
        self._wanted: dict[str, str] = {}
        self.faults: dict[tuple[str, str], int] = {}  # (uuid, "xid-79" or a kind) -> count, for metrics

    # ---- looking

    def usable(self, uuid: str) -> str:
        """Why nothing may be started on this GPU or MIG device; "" when something may."""
        found = self.of(uuid)
        if found.state is State.HEALTHY:
            return ""
        cure = _CURES.get(found.action, "")
        if found.stuck:
            cure = f"process {min(found.stuck)} holds on to it and cannot be killed"
        tried = "it is being tried" if found.state is State.SUSPECT else "it is tried again from time to time"
        return f"GPU {uuid} is {found.state}: {found.reason}; {cure or tried}."

    def of(self, uuid: str) -> Health:
        """The state of a GPU, or of the GPU that a MIG device is a part of."""
        return self._gpus.get(self._parents.get(uuid, uuid), Health())

    def snapshot(self) -> Mapping[str, Health]:
        """Every GPU that was ever heard of."""
        return dict(self._gpus)

    def due(self) -> list[str]:
        """GPUs whose trial is due now."""
        now = self._clock()
        return [uuid for uuid, found in self._gpus.items() if found.next_trial <= now and not found.stuck]

    def next_due(self) -> float:
        """When `due` has something next; infinite when nothing waits for a trial."""
        return min((found.next_trial for found in self._gpus.values() if not found.stuck), default=math.inf)

    def stuck(self) -> frozenset[int]:
        """Pids that hold on to some GPU."""
        return frozenset[int]().union(*(found.stuck for found in self._gpus.values()))

    # ---- being told

    def note_readings(self, readings: Mapping[str, GpuReading]) -> None:
        """A reading: it may say that a GPU is lost, or what the driver wants done."""
        for uuid, gpu in readings.items():
            self._gpus.setdefault(uuid, Health())
            self._parents.update({part.uuid: uuid for part in gpu.mig})
            self._wanted[uuid] = gpu.recovery_action
            found = self._gpus[uuid]
            if gpu.error:
                self._condemn(uuid, gpu.error, Action.REBOOT if "lost" in gpu.error.lower() else Action.RESET_GPU)
            elif (action := _WANTED.get(gpu.recovery_action)) and found.state is not State.QUARANTINED:
                self._condemn(uuid, f"the driver asks for: {gpu.recovery_action}", action)

    def note_event(self, event: GpuEvent) -> None:
        """An event of the driver. One that names no GPU makes all of them suspect."""
        number = f"xid-{event.xid}" if event.kind == "xid" else event.kind
        self.faults[event.uuid, number] = self.faults.get((event.uuid, number), 0) + 1
        meaning = _EVENTS.get(event.kind)
        reason = meaning.name if meaning else event.text or event.kind
        if event.kind == "xid" and event.xid is not None:
            meaning = xid(event.xid)
            reason = f"Xid {event.xid} ({meaning.name})"
        if event.kind == "recovery-action":
            if action := _WANTED.get(event.action):
                self._condemn(event.uuid, f"the driver asks for: {event.action}", action)
            return
        if meaning is not None and (meaning.owner is Owner.APPLICATION or meaning.action is Action.IGNORE):
            return
        if meaning is not None and meaning.fatal and event.uuid:
            self._condemn(event.uuid, reason, meaning.action)
            return
        for uuid in [event.uuid] if event.uuid else list(self._gpus):
            self._doubt(uuid, reason)

    def note_engine(self, uuids: Iterable[str], words: Iterable[str]) -> Verdict | None:
        """An engine on these GPUs ended badly, with these last words; returns what they say."""
        verdict = classify(words)
        if verdict is not None and verdict.fault in (GpuFault.DEVICE, GpuFault.DRIVER):
            for uuid in uuids:
                self._doubt(uuid, f"an engine said: {verdict.line}")
        return verdict

    def note_not_returned(self, uuid: str, sentence: str) -> None:
        """Memory of an ended process did not come back in time."""
        self._doubt(uuid, sentence)

    def note_unkillable(self, uuids: Iterable[str], pid: int) -> None:
        """A process on these GPUs cannot be killed."""
        for uuid in uuids:
            uuid = self._parents.get(uuid, uuid)
            stuck = self.of(uuid).stuck | {pid}
            self._condemn(uuid, f"process {pid} cannot be killed", Action.RESET_GPU, stuck)

    def note_gone(self, pids: Iterable[int]) -> None:
        """Processes that could not be killed are gone at last; their GPUs are tried at once."""
        gone = frozenset(pids)
        for uuid, found in self._gpus.items():
            if left := found.stuck & gone:
                changes = {"stuck": found.stuck - left, "next_trial": self._clock()}
                self._set(uuid, msgspec.structs.replace(found, **changes))

    def tried(self, uuid: str, error: str, stuck_pid: int = 0) -> None:
        """A trial ended: "" when the kernel's answer was right. Too little memory is no fault of the GPU's."""
        found, now = self.of(uuid), self._clock()
        if stuck_pid:
            self.note_unkillable([uuid], stuck_pid)
            return
        verdict = classify([error])
        passed = not error or (verdict is not None and verdict.fault is GpuFault.OUT_OF_MEMORY)
        wanted = self._wanted.get(uuid, "")
        if passed and found.state is State.QUARANTINED and wanted in _WANTED:
            passed, error = False, f"the driver asks for: {wanted}"
        if passed:
            self._set(uuid, Health(since=now, strikes=found.strikes))
            return
        trials = found.trials + 1
        pause = min(FIRST_TRIAL_S * 2.0 ** (trials - 1), LONGEST_TRIAL_S)
        was_healthy = found.state is not State.QUARANTINED
        self._set(
            uuid,
            msgspec.structs.replace(
                found,
                state=State.QUARANTINED,
                reason=error if was_healthy else found.reason,
                since=now if was_healthy else found.since,
                trials=trials,
                next_trial=now + pause,
            ),
        )

    def restore(self, quarantined: Mapping[str, str]) -> None:
        """GPUs that an earlier life had quarantined, with the reason; they are tried at once."""
        now = self._clock()
        for uuid, reason in quarantined.items():
            self._set(uuid, Health(state=State.QUARANTINED, reason=reason, since=now, next_trial=now))

    # ---- changes

    def _doubt(self, uuid: str, reason: str) -> None:
        uuid = self._parents.get(uuid, uuid)
        found, now = self.of(uuid), self._clock()
        strikes = (*(at for at in found.strikes if now - at < STRIKES_S), now)[-STRIKES:]
        if found.state is State.QUARANTINED:
            return
        if len(strikes) >= STRIKES:
            self._condemn(uuid, f"{reason} (the {STRIKES}. doubt in {STRIKES_S / 60:.0f} minutes)", Action.RESET_GPU)
            return
        self._set(uuid, Health(state=State.SUSPECT, reason=reason, since=now, next_trial=now, strikes=strikes))

    def _condemn(self, uuid: str, reason: str, action: Action, stuck: frozenset[int] = frozenset()) -> None:
        uuid = self._parents.get(uuid, uuid)
        found, now = self.of(uuid), self._clock()
        if found.state is State.QUARANTINED and action is not Action.REBOOT and not stuck:
            return  # the first reason is the cause; what follows is its consequence
        if found.state is State.QUARANTINED and found.action is action and found.stuck >= stuck:
            return
        fresh = found.state is not State.QUARANTINED
        self._set(
            uuid,
            Health(
                state=State.QUARANTINED,
                reason=reason if fresh or stuck else f"{found.reason}; {reason}",
                since=now if fresh else found.since,
                action=action,
                trials=found.trials,
                next_trial=max(found.next_trial if not fresh else 0.0, now + FIRST_TRIAL_S),
                stuck=found.stuck | stuck,
            ),
        )

    def _set(self, uuid: str, new: Health) -> None:
        if uuid and new != self._gpus.get(uuid):
            self._gpus[uuid] = new
            self._on_change(uuid)
