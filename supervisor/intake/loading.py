"""Loads in progress: how long they may still take, and when nobody wants them any more. Pure.

A load's length depends on the disk, the model and what else the box does, so no fixed timeout is right: 70 GB from
a network disk takes minutes and is healthy while it moves. What bounds it is silence. A load that moves so slowly
that it would take hours is told to the operator, and bounded by `most_s`.
"""

from __future__ import annotations

import msgspec

# A load that is this far is finished though nobody waits: ending it would cost more than it frees.
NEARLY = 0.9


class LoadWatch(msgspec.Struct, frozen=True, kw_only=True):
    """One load as seen so far. Times are seconds on one clock.

    Attributes:
        silent_s: longest that it may show no progress; before the first sign, its process and driver start in it too.
        most_s: longest in all, whatever it shows; 0 sets no limit.
        moved_at: when the last sign of progress came.
        done, whole: in units that the engine chose; `whole` is 0 when it is not told.
    """

    began_at: float
    silent_s: float
    most_s: float = 0.0
    moved_at: float = 0.0
    done: float = 0.0
    whole: float = 0.0

    def seen(self, now: float, done: float, whole: float = 0.0) -> LoadWatch:
        """After a report. Only one that is further than the last counts as progress."""
        if done <= self.done and self.done:
            return self
        return msgspec.structs.replace(self, moved_at=now, done=done, whole=whole or self.whole)

    @property
    def deadline(self) -> float:
        """When it is given up unless it moves before."""
        silent = max(self.moved_at, self.began_at) + self.silent_s
        return min(silent, self.began_at + self.most_s) if self.most_s else silent

    @property
    def share(self) -> float:
        """How much of it is done, 0 to 1; 0 when that is not told."""
        return min(1.0, self.done / self.whole) if self.whole > 0 else 0.0

    def left_s(self, now: float) -> float | None:
        """How long it will still take at its pace so far; None when that cannot be told."""
        passed = now - self.began_at
        if not self.share or passed <= 0:
            return None
        return passed * (1 - self.share) / self.share


class Keep(msgspec.Struct, frozen=True):
    """Let it go on; look again at `until`."""

    until: float


class End(msgspec.Struct, frozen=True):
    """End it. `owner` is "engine" for one that stands still, "" for one that nobody wants."""

    reason: str
    owner: str = ""


def judge_load(watch: LoadWatch, now: float, *, waiting: int, wanted: bool = False) -> Keep | End:
    """Whether a load goes on.

    Args:
        waiting: jobs that wait for it.
        wanted: somebody other than a job wants it: a pin, a preload, an operator.
    """
    if now >= watch.deadline:
        if watch.most_s and now >= watch.began_at + watch.most_s:
            return End(f"the load took longer than {watch.most_s:g} s", "engine")
        return End(f"the load made no progress for {watch.silent_s:g} s{_at(watch)}", "engine")
    if not waiting and not wanted and watch.share < NEARLY:
        return End(f"nobody waits for it any more{_at(watch)}")
    return Keep(watch.deadline)


def _at(watch: LoadWatch) -> str:
    return f" (it was {watch.share:.0%} done)" if watch.share else ""
