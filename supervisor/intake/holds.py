"""Holds: the reasons for not taking work, as one list. Pure; the time comes in.

A hold has a source that put it there, and only that source takes it away: `resume` lifts the operator's, and what
is left says why the worker is still paused. Times are seconds of the wall clock, because a hold outlives the
process and the boot: "until nine in the evening" is meant so.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable

import msgspec


class Source(enum.StrEnum):
    """Who put a hold there. One hold a source: a new one replaces the old."""

    OPERATOR = "operator"


class Mode(enum.StrEnum):
    """How far a hold goes."""

    STOP = "stop accepting"
    UNLOAD = "stop accepting and unload"


class Hold(msgspec.Struct, frozen=True, kw_only=True):
    """One reason for not taking work.

    Attributes:
        reason: a phrase for people; "" when none was given.
        since, until: seconds since the epoch; `until` is None for "until it is lifted".
    """

    source: Source
    reason: str = ""
    since: float
    until: float | None = None
    mode: Mode = Mode.STOP


class Holds(msgspec.Struct, frozen=True):
    """All holds, the oldest first."""

    items: tuple[Hold, ...] = ()

    def put(self, hold: Hold) -> Holds:
        """With this hold; an earlier one of its source is replaced."""
        return Holds((*(each for each in self.items if each.source != hold.source), hold))

    def lift(self, source: Source) -> Holds:
        """Without the hold of this source."""
        return Holds(tuple(each for each in self.items if each.source != source))

    def at(self, now: float) -> Holds:
        """Without those that have run out."""
        return Holds(tuple(each for each in self.items if each.until is None or each.until > now))

    def next_end(self) -> float | None:
        """When the next hold runs out by itself; None when none does."""
        return min((each.until for each in self.items if each.until is not None), default=None)

    @property
    def until(self) -> float | None:
        """When work may be taken again by itself; None when somebody has to act (or there is no hold)."""
        ends = [math.inf if each.until is None else each.until for each in self.items]
        latest = max(ends, default=math.inf)
        return None if math.isinf(latest) else latest

    def reason(self) -> str:
        """A phrase for the coordinator: why no work is taken; "" when there is no hold."""
        return "; ".join(_phrase(each) for each in self.items)


def _phrase(hold: Hold) -> str:
    return f"held by the {hold.source}" + (f" ({hold.reason})" if hold.reason else "")


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
