"""Holds: the reasons for not taking work, as one list. Pure; the time comes in.

A hold has a source that put it there, and only that source takes it away: `resume` lifts the operator's, and what
is left says why the worker is still paused. Times are seconds of the wall clock, because a hold outlives the
process and the boot: "until nine in the evening" is meant so.

A hold without a scope is about the whole worker. One with a GPU or a task kind (a cordon) is about work of that kind
on that GPU alone, and the rest of the worker goes on.

A hold that unloads remembers which models were loaded when it began (`warm`), and they come back when nothing
unloads any more. So that the order of several holds does not matter, whatever ends while another hold still keeps
its models away hands its memory on to that one; `to_reload` names those that may come back.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Sequence

import msgspec


class Source(enum.StrEnum):
    """Who put a hold there. One hold a source and scope: a new one replaces the old."""

    OPERATOR = "operator"
    SCHEDULE = "schedule"
    PRESENCE = "presence"
    BATTERY = "battery"
    THERMAL = "thermal"
    FOREIGN_VRAM = "foreign-vram"
    APPLICATION = "application"
    DISK = "disk"
    NETWORK = "network"
    ENGINE_FAILURES = "engine-failures"
    COORDINATOR = "coordinator"
    UPDATE = "update"


class Mode(enum.StrEnum):
    """How far a hold goes."""

    STOP = "stop accepting"
    UNLOAD = "stop accepting and unload"
    ABORT = "abort and free VRAM now"


_PHRASES = {
    Source.OPERATOR: "held by the operator",
    Source.SCHEDULE: "held by the schedule",
    Source.PRESENCE: "held because the machine is in use",
    Source.BATTERY: "held to spare the battery",
    Source.THERMAL: "held because a GPU is too hot or short of power",
    Source.FOREIGN_VRAM: "held because another program uses the GPU",
    Source.APPLICATION: "held because another program wants the machine",
    Source.DISK: "held because the disk is nearly full",
    Source.NETWORK: "held because the network is metered",
    Source.ENGINE_FAILURES: "held after engines failed in a row",
    Source.COORDINATOR: "held by the coordinator",
    Source.UPDATE: "held for an update",
}


class Hold(msgspec.Struct, frozen=True, kw_only=True):
    """One reason for not taking work.

    Attributes:
        reason: why, for people; "" when none was given.
        since, until: seconds since the epoch; `until` is None for "until it is lifted".
        gpu: UUID of the only GPU that is held; "" means every device, the CPU too.
        kind: the only task kind that is held; "" means every kind.
        warm: models that were loaded when it began and are to come back after it.
    """

    source: Source
    reason: str = ""
    since: float
    until: float | None = None
    mode: Mode = Mode.STOP
    gpu: str = ""
    kind: str = ""
    warm: tuple[str, ...] = ()

    @property
    def key(self) -> tuple[Source, str, str]:
        """What makes it one and the same hold."""
        return self.source, self.gpu, self.kind

    @property
    def unloads(self) -> bool:
        """Whether models leave because of it."""
        return self.mode is not Mode.STOP

    def about(self, kind: str = "", gpu: str = "") -> bool:
        """Whether it is about work of this kind on this GPU; both empty ask about the worker as a whole."""
        return self.gpu in ("", gpu) and self.kind in ("", kind)

    @property
    def phrase(self) -> str:
        """For people; begins with "held"."""
        parts = [text for text in (self.kind, f"GPU {self.gpu}" if self.gpu else "", self.reason) if text]
        return _PHRASES[self.source] + (f" ({': '.join(parts)})" if parts else "")


class Sight(msgspec.Struct, frozen=True, kw_only=True):
    """What one rule sees now, whether it holds or not.

    Attributes:
        gpu: UUID of the GPU that it is about; "" is the whole worker.
        text: a phrase with its numbers.
        unknown: it cannot be told; `text` says why.
    """

    source: Source
    gpu: str = ""
    text: str
    unknown: bool = False


class Coming(msgspec.Struct, frozen=True, kw_only=True):
    """A hold that is known to begin: at `at`, in seconds since the epoch. `text` is a phrase."""

    source: Source
    text: str
    at: float


class Holds(msgspec.Struct, frozen=True):
    """All holds, the oldest first."""

    items: tuple[Hold, ...] = ()

    def put(self, hold: Hold) -> Holds:
        """With this hold; an earlier one of its source and scope is replaced, its warm models are kept."""
        old = [each for each in self.items if each.key == hold.key]
        rest = tuple(each for each in self.items if each.key != hold.key)
        if not hold.unloads:
            return Holds(_hand_on((*rest, msgspec.structs.replace(hold, warm=())), old))
        warm = _union((name for each in old for name in each.warm), hold.warm)
        return Holds((*rest, msgspec.structs.replace(hold, warm=warm)))

    def lift(self, source: Source, *, gpu: str = "", kind: str = "") -> Holds:
        """Without the hold of this source and scope: `resume` lifts a pause, and leaves cordons alone."""
        return self._without([each for each in self.items if each.key == (source, gpu, kind)])

    def at(self, now: float) -> Holds:
        """Without those that have run out."""
        return self._without([each for each in self.items if each.until is not None and each.until <= now])

    def _without(self, gone: Sequence[Hold]) -> Holds:
        return Holds(_hand_on([each for each in self.items if each not in gone], gone)) if gone else self

    def next_end(self) -> float | None:
        """When the next hold runs out by itself; None when none does."""
        return min((each.until for each in self.items if each.until is not None), default=None)

    def about(self, kind: str = "", gpu: str = "") -> tuple[Hold, ...]:
        """Those that keep work of this kind from this GPU; without either, those that pause the whole worker."""
        return tuple(each for each in self.items if each.about(kind, gpu))

    def cordons(self, kind: str, gpus: Iterable[str] = ()) -> tuple[Hold, ...]:
        """Those that keep this task kind in particular from a model on these GPUs; every one of them has to be free."""
        where = ("", *gpus)
        return tuple(each for each in self.items if each.kind == kind and each.gpu in where)

    def kinds_held(self, kinds: Iterable[str], gpus: Iterable[str] = ()) -> dict[str, str]:
        """Kind -> why a model on these GPUs takes no jobs of it, as a phrase; kinds that are not held are left out."""
        found = {kind: "; ".join(each.phrase for each in self.cordons(kind, tuple(gpus))) for kind in kinds}
        return {kind: why for kind, why in found.items() if why}

    def forget(self, models: Iterable[str]) -> Holds:
        """Without these models among those that come back: somebody unloaded them for good meanwhile."""
        gone = frozenset(models)
        return Holds(
            tuple(
                msgspec.structs.replace(each, warm=tuple(name for name in each.warm if name not in gone))
                for each in self.items
            )
        )

    def scoped(self) -> tuple[Hold, ...]:
        """Cordons: those about one GPU or one task kind."""
        return tuple(each for each in self.items if each.gpu or each.kind)

    @property
    def until(self) -> float | None:
        """When the worker may take work again by itself; None when somebody has to act (or nothing pauses it)."""
        return last_end(self.about())

    def reason(self, kind: str = "", gpu: str = "") -> str:
        """Why no work of this kind is taken for this GPU, as a phrase; "" when it is.

        Without either: why the whole worker takes none. Cordons do not count then.
        """
        return "; ".join(each.phrase for each in self.about(kind, gpu))

    def mode(self, kind: str = "", gpu: str = "") -> Mode | None:
        """How far the strictest of them goes; None when there is none."""
        modes = {each.mode for each in self.about(kind, gpu)}
        return next((mode for mode in (Mode.ABORT, Mode.UNLOAD, Mode.STOP) if mode in modes), None)


def last_end(items: Iterable[Hold]) -> float | None:
    """When the last of these runs out; None when one never does, or there is none."""
    latest = max((math.inf if each.until is None else each.until for each in items), default=math.inf)
    return None if math.isinf(latest) else latest


def to_reload(before: Holds, after: Holds) -> tuple[str, ...]:
    """Models that were warm before the holds that ended, and that no other hold keeps away.

    Args:
        before, after: the list around one change (`put`, `lift`, `at`).
    """
    keys = {each.key for each in after.items if each.unloads}
    ended = [each for each in before.items if each.unloads and each.key not in keys]
    rest = [each for each in after.items if each.unloads]
    back = (name for each in ended if not any(_covers(other, each) for other in rest) for name in each.warm)
    return _union(back, ())


def _hand_on(rest: Sequence[Hold], gone: Sequence[Hold]) -> tuple[Hold, ...]:
    """What ended gives the models it remembers to every hold that still keeps some of them away."""
    found = []
    for hold in rest:
        names = [name for each in gone if hold.unloads and _overlap(hold, each) for name in each.warm]
        found.append(msgspec.structs.replace(hold, warm=_union(hold.warm, names)) if names else hold)
    return tuple(found)


def _overlap(one: Hold, other: Hold) -> bool:
    return all(not (mine and theirs) or mine == theirs for mine, theirs in _scopes(one, other))


def _covers(one: Hold, other: Hold) -> bool:
    """Whether everything that `other` is about, `one` is about too."""
    return all(mine in ("", theirs) for mine, theirs in _scopes(one, other))


def _scopes(one: Hold, other: Hold) -> tuple[tuple[str, str], tuple[str, str]]:
    return (one.gpu, other.gpu), (one.kind, other.kind)


def _union(first: Iterable[str], second: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys((*first, *second)))


# ---- on disk


def encode(holds: Holds) -> bytes:
    """As a file that people can read."""
    return msgspec.json.format(msgspec.json.encode(holds)) + b"\n"


def decode(data: bytes) -> tuple[Holds, str]:
    """Read a file back, hold by hold: what a newer or broken file has and we cannot read is named, not fatal.

    Returns:
        The holds, and a sentence about what was left out ("" when nothing was).
    """
    try:
        items = msgspec.json.decode(data, type=dict[str, list[msgspec.Raw]]).get("items", [])
    except msgspec.MsgspecError as error:
        return Holds(), f"the file of holds cannot be read: {error}"
    good, bad = [], []
    for item in items:
        try:
            good.append(msgspec.json.decode(item, type=Hold))
        except msgspec.MsgspecError as error:
            bad.append(str(error))
    return Holds(_distinct(good)), "; ".join(f"a hold cannot be read: {text}" for text in bad)


def _distinct(items: Iterable[Hold]) -> tuple[Hold, ...]:
    holds = Holds()
    for hold in items:
        holds = holds.put(hold)
    return holds.items
