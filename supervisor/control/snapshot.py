"""What the owner is shown, as data. Gathered in one place (gather.py), read by routes, sentences and metrics."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from supervisor.intake.holds import Coming, Hold, Sight


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """The connection to the coordinator. `reason` says why there is none."""

    url: str = ""
    connected: bool = False
    reason: str = ""


class ModelView(msgspec.Struct, frozen=True, kw_only=True):
    """One model; fields as in `supervisor.host.work.InstanceStatus`.

    Attributes:
        kinds: task kinds that it serves; `held_kinds` says why some of them are not taken now (cordons).
        reason: why it does not serve, or what ended it last; "" when there is nothing to say.
        unserved: why it is not offered to anybody; "" when it is.
        slow: why it is slower than it was; "" when it is not.
        waits: why it is not loaded yet although it is wanted; "" when it does not wait for room.
        gpus: UUIDs of its device set; empty means any GPU, or none when `device` is "cpu".
        on: UUIDs of the GPUs that its instance was started on; empty when that is not known or there is none.
        held: GPU -> bytes that it was last seen to hold.
        ends: cause -> how often an instance of it ended so.
    """

    name: str
    engine: str
    state: str
    kinds: tuple[str, ...] = ()
    held_kinds: Mapping[str, str] = {}
    reason: str = ""
    unserved: str = ""
    slow: str = ""
    waits: str = ""
    device: str = ""
    gpus: tuple[str, ...] = ()
    on: tuple[str, ...] = ()
    pid: int = 0
    running: int = 0
    queued: int = 0
    slots: int = 1
    restarts: int = 0
    rss_bytes: int = 0
    vram_bytes: int = 0
    held: Mapping[str, int] = {}
    idle_s: float | None = None
    sandbox: Mapping[str, str] = {}
    last_end: str = ""
    ends: Mapping[str, int] = {}


class GpuView(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU.

    Attributes:
        ours_bytes: held by our engines; `foreign_bytes`: by everybody else, None when it is not known.
        promised_bytes: what loads in progress will still take.
        busy: share of the last second with a kernel running, 0 to 1.
        fault: why it is not used; "" when it is.
        tainted: memory that did not come back.
        why: why it is idle, in one sentence; "" when it works.
    """

    uuid: str
    name: str = ""
    total_bytes: int | None = None
    free_bytes: int | None = None
    ours_bytes: int = 0
    foreign_bytes: int | None = None
    promised_bytes: int = 0
    busy: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    fault: str = ""
    tainted: str = ""
    why: str = ""


class IncidentView(msgspec.Struct, frozen=True, kw_only=True):
    """One bad end of an instance."""

    time: str
    model: str
    how: str = ""
    code: str = ""
    message: str = ""
    diagnosis: str = ""


class Snapshot(msgspec.Struct, frozen=True, kw_only=True):
    """Everything at one moment.

    Attributes:
        state: starting, idle, busy, draining, paused, offline.
        why: why it is not working, or will take no more jobs, in few sentences; "" when it works and goes on.
        drain_until: seconds since the epoch at which the drain ends what still runs; None when it has no end.
        now: seconds since the epoch, so that a reader can tell how old this is.
        sights: what each rule of holds sees now; those that cannot see are marked as unknown.
        coming: holds that are known to begin ("quiet hours"), the next one first.
        gpu_reason: why nothing is known of GPUs; "" when something is.
    """

    version: str
    worker: str = ""
    pid: int = 0
    now: float = 0.0
    uptime_s: float = 0.0
    state: str = "starting"
    why: str = ""
    draining: str = ""
    drain_until: float | None = None
    link: Link = Link()
    jobs: int = 0
    holds: tuple[Hold, ...] = ()
    sights: tuple[Sight, ...] = ()
    coming: tuple[Coming, ...] = ()
    models: tuple[ModelView, ...] = ()
    gpus: tuple[GpuView, ...] = ()
    gpu_reason: str = ""
    incidents: tuple[IncidentView, ...] = ()
