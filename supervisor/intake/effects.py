"""What the scheduler is told and what it answers: models, devices, events, effects. Data only.

Times are seconds on one clock that never runs backwards (the caller's choice), memory is bytes, devices are named by
UUID. An instance is numbered by the scheduler when it orders the load, and never twice.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec


class Job(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One accepted attempt that wants to run.

    Attributes:
        at: when it came.
        priority: each step counts like `queues.PRIORITY_S` seconds of waiting, so that no priority starves another.
        vram_bytes: its own estimate of what it needs; 0 says nothing.
        alone: nothing else may run in its instance beside it (a suspect of an earlier crash).
    """

    id: str
    model: str
    at: float
    priority: int = 0
    vram_bytes: int = 0
    alone: bool = False


class ModelPlan(msgspec.Struct, frozen=True, kw_only=True):
    """A model that this box serves.

    Attributes:
        need_bytes: what a load takes of one device when it lies there whole; 0 for a model outside the GPUs.
        estimated: `need_bytes` is only an estimate: it may delay a load and never refuses one.
        slots: runs at once in one instance.
        copies: most instances of it at once.
        load_s: how long a load takes; the first guess, replaced by what is seen.
        pin: never ended for another.
        group: of one exclusive group only one model is loaded; "" for none.
        keep_alive_s: an instance without work is ended after this long; 0 keeps it.
        split: its engine can lie on several devices.
        devices: UUIDs it may use; empty means any.
        gpu: it uses GPUs at all; what does not is no matter of holds that free their memory.
    """

    name: str
    kind: str = ""
    need_bytes: int = 0
    estimated: bool = False
    slots: int = 1
    copies: int = 1
    load_s: float = 10.0
    pin: bool = False
    group: str = ""
    keep_alive_s: float = 0.0
    split: bool = False
    devices: tuple[str, ...] = ()
    gpu: bool = True


class DevicePlan(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU. `speed` is relative to the box's slowest."""

    uuid: str
    total_bytes: int
    speed: float = 1.0


# ---- events


class Arrives(msgspec.Struct, frozen=True):
    """A job."""

    job: Job


class Cancelled(msgspec.Struct, frozen=True):
    """A job that has not started will not be wanted. One that runs ends with `RunEnds` like any other."""

    job: str


class RunEnds(msgspec.Struct, frozen=True):
    """A run has ended, in whichever way; `took_s` is what it took."""

    instance: int
    took_s: float = 0.0


class LoadEnds(msgspec.Struct, frozen=True):
    """A load has ended; `problem` is a sentence when it failed, and `Gone` follows when its process has ended.

    `slots` is how many runs at once the instance turned out to take; 0 says what was planned.
    """

    instance: int
    took_s: float = 0.0
    problem: str = ""
    slots: int = 0


class NearlyLoaded(msgspec.Struct, frozen=True):
    """A load is so far that ending it would cost more than it frees (`loading.NEARLY`)."""

    instance: int


class Accepts(msgspec.Struct, frozen=True):
    """Whether a loaded instance takes runs just now: one that is late to obey a cancel gets none until it has."""

    instance: int
    accepts: bool


class Leaves(msgspec.Struct, frozen=True):
    """An instance takes no more runs and ends by itself: it broke, or is worn. `Gone` follows."""

    instance: int


class Gone(msgspec.Struct, frozen=True):
    """The process of an instance has ended and its memory is back. Comes after the `RunEnds` of all its runs."""

    instance: int


class Reading(msgspec.Struct, frozen=True):
    """What other programs hold of a device, measured; `held` is what our instances were seen to hold there."""

    uuid: str
    foreign_bytes: int
    held: Mapping[int, int] = {}


class Settles(msgspec.Struct, frozen=True):
    """What an idle instance was seen to hold is what it takes, though it was given more. Device -> bytes."""

    instance: int
    held: Mapping[str, int]


class Learned(msgspec.Struct, frozen=True):
    """What a load of a model takes of one device, as far as is known now. What is loaded keeps its shares."""

    model: str
    need_bytes: int
    estimated: bool = False


class Unread(msgspec.Struct, frozen=True):
    """What a load of a model takes is being found out; `Learned` follows, and it is not loaded before."""

    model: str


class Wanted(msgspec.Struct, frozen=True):
    """Load a model though no job waits for it. Once loaded it is forgotten, and `Unload` takes it back.

    Into free memory only, it ends nobody; unless `ordered` by the owner: then models without work make room.
    """

    model: str
    ordered: bool = False


class Unload(msgspec.Struct, frozen=True):
    """End all instances of a model, each after its last run; with `again` it is then loaded anew.

    Without, a pin does not bring it back; the next job or `Wanted` does.
    """

    model: str
    reason: str
    again: bool = False


class Tuned(msgspec.Struct, frozen=True):
    """The owner has changed limits; models that are not named keep theirs."""

    threshold_bytes: int
    keep_alive_s: Mapping[str, float]


class Copies(msgspec.Struct, frozen=True):
    """How many instances of a model can be had now. With none and a `problem`, whoever waits for it is refused."""

    model: str
    count: int
    problem: str = ""


class ModelJoins(msgspec.Struct, frozen=True):
    """A model that this box serves from now on. Its name is free: `ModelGone` was told of an older one."""

    plan: ModelPlan


class ModelParts(msgspec.Struct, frozen=True):
    """A model that this box serves no more: who waits for it is refused, its instances end after their last runs.

    `ModelGone` follows when none is left. Nothing that is told of it meanwhile brings it back.
    """

    model: str
    reason: str


class Listed(msgspec.Struct, frozen=True):
    """The devices that there are now. What is loaded on one that vanished stays in the books until it is gone."""

    devices: tuple[DevicePlan, ...]


class Broken(msgspec.Struct, frozen=True):
    """A device takes no loads, for a fault; "" ends that. Jobs whose model fits nowhere else are refused."""

    uuid: str
    reason: str


class HoldPut(msgspec.Struct, frozen=True):
    """Nothing starts on a device (cordon), or anywhere when `uuid` is "". `unload` also ends what is loaded there.

    With `finish` the jobs that came before are still done: what has work stays, and what can load nowhere else loads
    there after all. Then a hold of the whole box is about memory only, and models outside the GPUs stay.
    """

    uuid: str
    reason: str
    unload: bool = False
    finish: bool = False


class HoldLifted(msgspec.Struct, frozen=True):
    """The hold of this device, or the one of the whole box, is over."""

    uuid: str


class Tick(msgspec.Struct, frozen=True):
    """It is as late as `Scheduler.due()` said."""


Event = (
    Arrives
    | Cancelled
    | RunEnds
    | LoadEnds
    | NearlyLoaded
    | Accepts
    | Leaves
    | Gone
    | Reading
    | Settles
    | Learned
    | Unread
    | Tuned
    | Wanted
    | Unload
    | Copies
    | ModelJoins
    | ModelParts
    | Listed
    | Broken
    | HoldPut
    | HoldLifted
    | Tick
)


# ---- effects


class StartRun(msgspec.Struct, frozen=True):
    """Run this job on this instance."""

    instance: int
    job: Job


class Load(msgspec.Struct, frozen=True):
    """Start an instance and load the model. `shares` says how much of which device: more than one is a tensor split."""

    instance: int
    model: str
    shares: Mapping[str, int]


class Evict(msgspec.Struct, frozen=True):
    """End an instance; it has no run. `idle`: for want of work, not for another."""

    instance: int
    reason: str
    idle: bool = False


class CancelLoad(msgspec.Struct, frozen=True):
    """End an instance that is still loading."""

    instance: int
    reason: str


class Waits(msgspec.Struct, frozen=True):
    """Why a model's jobs wait, told when it changes."""

    model: str
    reason: str


class Refuse(msgspec.Struct, frozen=True):
    """This job is not going to run here.

    `code` as in `protocol.link_wire.Decline`, or "load_failed", "never_fits", "gpu_failed", "quarantined",
    "parted".
    """

    job: str
    code: str
    reason: str


class ModelGone(msgspec.Struct, frozen=True):
    """A model that was to part has no instance left, and its name is free."""

    model: str


Effect = StartRun | Load | Evict | CancelLoad | Waits | Refuse | ModelGone
