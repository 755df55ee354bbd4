"""Residency: which models may be in GPU memory together. Pure: measured memory and what is loaded in, a verdict out.

Every number is per device, because a model has to fit one device set and not the sum of all GPUs. Free memory is
what the driver measures, so other programs' use counts as taken; from it go the promises made to loads that are
still growing, and the margin. What is missing is found among our own models: those that are leaving already, then
the idle ones whose end costs least (`intake.eviction`), then those that work. Models of one exclusive group are
never loaded together. What not even an empty GPU has is refused at once. Where nothing can be measured everything
fits, and the verdict says that it is not known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from supervisor.intake.eviction import UNLOAD_S, Tenant, cheapest, harm
from supervisor.intake.placement import CONTEXT_BYTES

GIB = 2**30
# Weights are stored a little larger in memory: alignment, dequantised norms, graph buffers.
FILE_FACTOR = 1.1
# Keys and values of one token in an 8 B model with grouped queries: 32 layers x 2 x 1024 values x 2 bytes.
KV_BYTES_PER_TOKEN = 128 * 1024
DEFAULT_TOKENS = 4096


class Need(msgspec.Struct, frozen=True):
    """What a load will take of each of its devices.

    Attributes:
        source: "operator", "learned", "estimated" or "none". An estimate may delay a load, never refuse it.
    """

    bytes: int
    source: str


def need_of(*, told: int, learned: int | None, file_bytes: int, kv_tokens: int) -> Need:
    """What a load will take, from the best source there is.

    Args:
        told: the operator's `vram_gb` in bytes; 0 when not given.
        learned: peak seen earlier with these files, this configuration and this device; None when never seen.
        file_bytes: size of all its files; 0 when it has none, then nothing is claimed.
        kv_tokens: tokens of context that it keeps (all slots together); 0 for engines without.
    """
    if told > 0:
        return Need(told, "operator")
    if learned is not None:
        return Need(learned, "learned")
    if file_bytes <= 0:
        return Need(0, "none")
    return Need(int(file_bytes * FILE_FACTOR) + kv_tokens * KV_BYTES_PER_TOKEN + CONTEXT_BYTES, "estimated")


class Device(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU as measured.

    Attributes:
        free_bytes, total_bytes: as the driver says; other programs' use is taken.
        promised_bytes: what loads in progress will still take, beyond what they hold already.
        tainted: sentence about memory that did not come back; "" when all is well.
    """

    uuid: str
    free_bytes: int
    total_bytes: int
    promised_bytes: int = 0
    tainted: str = ""


class Resident(msgspec.Struct, frozen=True, kw_only=True):
    """A model of ours that holds GPU memory, or is about to.

    Attributes:
        holds: device -> bytes that come back when it ends.
        idle_since: seconds on any monotonic clock; None while it works or loads.
        wanted: whether somebody waits for it.
        pinned: never ended for another.
        leaving: told to end; its memory is on its way back.
        group: exclusive group; "" for none.
        load_s: how long a load of it took; 0 when never seen.
        per_s: its demand, in jobs per second (`eviction.Demand`).
    """

    name: str
    holds: Mapping[str, int]
    idle_since: float | None = None
    wanted: bool = False
    pinned: bool = False
    leaving: bool = False
    group: str = ""
    load_s: float = 0.0
    per_s: float = 0.0

    @property
    def idle(self) -> bool:
        """Whether ending it costs nobody an answer."""
        return self.idle_since is not None and not self.wanted and not self.pinned and not self.leaving


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """A model that wants to load. `devices` is its device set; each of them needs `need`.

    Attributes:
        group: exclusive group, of which no other may be loaded; "" for none.
        load_s: how long its load is going to take; 0 when not known.
    """

    name: str
    devices: tuple[str, ...]
    need: Need
    group: str = ""
    load_s: float = 0.0


class Fits(msgspec.Struct, frozen=True):
    """Load now. `takes` is what to promise it of each device; `note` says when that is not known."""

    takes: Mapping[str, int] = {}
    note: str = ""


class Evict(msgspec.Struct, frozen=True):
    """End these first, in this order."""

    who: tuple[str, ...]
    reason: str


class Wait(msgspec.Struct, frozen=True):
    """Not now. `on` names models of ours whose end would make room; empty when only other programs could."""

    reason: str
    on: tuple[str, ...] = ()


class Never(msgspec.Struct, frozen=True):
    """Not on this box."""

    reason: str


Verdict = Fits | Evict | Wait | Never


def judge(wish: Wish, devices: Sequence[Device], residents: Sequence[Resident], margin_bytes: int) -> Verdict:
    """Judge whether a model may load now.

    Args:
        devices: every GPU that is measured; a device of the wish that is not among them counts as unknown.
        residents: all models that hold memory or were promised some, the wish's own excepted.
        margin_bytes: what stays free on each device.
    """
    others = [resident for resident in residents if resident.name != wish.name]
    if wish.group and (rivals := [resident for resident in others if resident.group == wish.group]):
        return _end_rivals(wish, rivals)
    known = {device.uuid: device for device in devices}
    if not wish.devices or wish.need.bytes <= 0:
        return Fits()
    if any(uuid not in known for uuid in wish.devices):
        return Fits(note="the GPU's memory is not known, so nothing is held back for it")
    own = [known[uuid] for uuid in wish.devices]
    takes = {device.uuid: _claim(wish.need, device, margin_bytes) for device in own}
    for device in own:
        if takes[device.uuid] > device.total_bytes - margin_bytes:
            return Never(_never(wish, device, devices, margin_bytes))
    missing = _missing(own, takes, margin_bytes)
    if not missing:
        return Fits(takes)
    return _make_room(wish, own, missing, others)


def _end_rivals(wish: Wish, rivals: Sequence[Resident]) -> Evict | Wait:
    """All others of its exclusive group go first, pinned ones excepted: a pin is the operator's stronger word."""
    why = f"only one model of the group {wish.group} may be loaded"
    if pinned := [resident for resident in rivals if resident.pinned]:
        return Wait(f"waits for {_names(pinned)}: {why}, and a pinned one stays")
    if working := [resident for resident in rivals if not resident.idle and not resident.leaving]:
        return Wait(f"waits for {_names(working)}: {why}", _who(working))
    if idle := [resident for resident in rivals if resident.idle]:
        return Evict(_who(idle), f"{wish.name} takes its turn: {why}")
    return Wait(f"waits for {_names(rivals)} to end: {why}", _who(rivals))


def _claim(need: Need, device: Device, margin_bytes: int) -> int:
    """What a load claims of a device.

    An estimate that exceeds the whole GPU claims the whole GPU: engines can keep a part of a model outside. What was
    once seen on this GPU fits it, though it left less than the margin: it is not refused for ever.
    """
    seen = need.source == "learned" and need.bytes <= device.total_bytes
    if need.source == "estimated" or seen:
        return max(0, min(need.bytes, device.total_bytes - margin_bytes))
    return need.bytes


def _missing(own: Sequence[Device], takes: Mapping[str, int], margin_bytes: int) -> dict[str, int]:
    """Device -> bytes that are missing; without the devices that have enough."""
    lacks = {d.uuid: takes[d.uuid] - (d.free_bytes - d.promised_bytes - margin_bytes) for d in own}
    return {uuid: lack for uuid, lack in lacks.items() if lack > 0}


def _make_room(
    wish: Wish, own: Sequence[Device], missing: Mapping[str, int], residents: Sequence[Resident]
) -> Evict | Wait:
    leaving = [resident for resident in residents if resident.leaving]
    want = _sentence(missing)
    rest = _less(missing, leaving)
    if not rest:
        return Wait(f"waits for {want}: {_names(leaving)} {_is(leaving)} ending", _who(leaving))
    idle = sorted((r for r in residents if r.idle), key=lambda r: r.idle_since or 0.0)
    if chosen := _cheapest(wish, idle, rest):
        return Evict(_who(chosen), f"{wish.name} needs {want}")
    # Those that cost the least wait go first: the idle ones, then the working ones.
    ours = [resident for resident in residents if not resident.pinned and not resident.leaving]
    ours.sort(key=lambda r: (not r.idle, r.idle_since or 0.0))
    if chosen := _cheapest(wish, ours, rest):
        working = [resident for resident in chosen if not resident.idle]
        return Wait(f"waits for {want}: {_names(working)} {_is(working)} working", _who(chosen))
    return Wait(f"waits for {want}: {_foreign(own, missing, residents)}")


def _cheapest(wish: Wish, candidates: Sequence[Resident], missing: Mapping[str, int]) -> Sequence[Resident]:
    """Those whose end costs callers the least, in the given order; empty when all together do not suffice."""
    tenants = [Tenant(resident.name, resident.holds, price_of(wish, resident)) for resident in candidates]
    names = {tenant.name for tenant in cheapest(tenants, missing)}
    return [resident for resident in candidates if resident.name in names]


def price_of(wish: Wish, resident: Resident) -> float:
    """What ending this one for that one costs callers, in job-seconds; 0 while its load time is not known."""
    if not resident.load_s:
        return 0.0
    swap_s = wish.load_s + resident.load_s + UNLOAD_S
    return harm(queued=int(resident.wanted), per_s=resident.per_s, swap_s=swap_s)


def _less(missing: Mapping[str, int], residents: Sequence[Resident]) -> dict[str, int]:
    """What is still missing when these have gone."""
    rest = {uuid: lack - sum(r.holds.get(uuid, 0) for r in residents) for uuid, lack in missing.items()}
    return {uuid: lack for uuid, lack in rest.items() if lack > 0}


# ---- sentences


def gib(count: int) -> str:
    """Bytes for people."""
    return f"{count / GIB:.1f} GiB"


def short(uuid: str) -> str:
    """A GPU's UUID as people can tell it from another."""
    return uuid if len(uuid) <= 12 else f"{uuid[:12]}…"


def _sentence(missing: Mapping[str, int]) -> str:
    return " and ".join(f"{gib(lack)} on {short(uuid)}" for uuid, lack in missing.items())


def _who(residents: Sequence[Resident]) -> tuple[str, ...]:
    return tuple(resident.name for resident in residents)


def _names(residents: Sequence[Resident]) -> str:
    return ", ".join(_who(residents))


def _is(residents: Sequence[Resident]) -> str:
    return "is" if len(residents) == 1 else "are"


def _foreign(own: Sequence[Device], missing: Mapping[str, int], residents: Sequence[Resident]) -> str:
    parts = []
    for device in own:
        if device.uuid in missing:
            ours = sum(resident.holds.get(device.uuid, 0) for resident in residents)
            foreign = max(0, device.total_bytes - device.free_bytes - ours)
            parts.append(device.tainted or f"other programs hold {gib(foreign)} there")
    return "; ".join(parts)


def _never(wish: Wish, device: Device, devices: Sequence[Device], margin_bytes: int) -> str:
    largest = max(devices, key=lambda each: each.total_bytes)
    text = f"{wish.name} needs {gib(wish.need.bytes)} of GPU memory"
    if largest.uuid == device.uuid:
        text += f", and the largest GPU has {gib(device.total_bytes)}"
    else:
        text += f", and {short(device.uuid)} has {gib(device.total_bytes)}"
    kept = f" ({gib(margin_bytes)} of it stay free)" if margin_bytes else ""
    cure = "vram_gb of the model says so" if wish.need.source == "operator" else "it took that much before"
    return f"{text}{kept}; {cure}."
