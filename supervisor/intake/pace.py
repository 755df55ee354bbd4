"""Pace: whether a model still runs as fast as it did, and whether its weights lie where they should. Pure.

Drivers and engines may put a part of a model into the box's RAM instead of failing (the Windows driver's system
memory fallback, layers that an engine keeps outside): the answers are right and ten times slower, and
nobody is told. Two things give it away: tokens per second against the model's own history, and memory of the GPU
against what the load was expected to take while the process grew in RAM by as much.
"""

from __future__ import annotations

import statistics

import msgspec

# Rates remembered; enough to know a model, few enough to follow a new driver within a day.
REMEMBERED = 32
# Nothing is said about a model before it was measured this often.
ENOUGH = 8
# Collapsed: the last three all below a quarter of the median. One slow answer is a long prompt; the factor is above
# what prompts, batching (a slot of eight gets a third to a half) and a hot GPU (a fifth less) explain.
LAST, COLLAPSED, RECOVERED = 3, 0.25, 0.5
# Spilled: less than this share of what was expected lies on the GPU, and RAM holds most of the rest.
SPILLED = 0.8
SLACK_BYTES = 256 * 2**20


class Pace(msgspec.Struct, frozen=True):
    """Rates of one model on one device set, in tokens (or steps, or seconds of audio) per second.

    Attributes:
        healthy: the last `REMEMBERED` rates while it was not collapsed: what is slow never becomes normal.
        last: the last `LAST`.
        collapsed: what it fell to; 0 while it is well.
    """

    healthy: tuple[float, ...] = ()
    last: tuple[float, ...] = ()
    collapsed: float = 0.0

    @property
    def usual(self) -> float:
        """Median of the healthy rates; 0 until enough are known."""
        return statistics.median(self.healthy) if len(self.healthy) >= ENOUGH else 0.0

    def seen(self, rate: float) -> Pace:
        """With the rate of one more run; rates of 0 say nothing."""
        if rate <= 0:
            return self
        last = (*self.last, rate)[-LAST:]
        usual = self.usual
        if self.collapsed:
            if statistics.median(last) >= RECOVERED * usual:
                return Pace((*self.healthy, rate)[-REMEMBERED:], last)
            return Pace(self.healthy, last, statistics.median(last))
        if usual and len(last) == LAST and max(last) < COLLAPSED * usual:
            # The slow ones of just now were taken for healthy when they came; too few without them is no history.
            healthy = tuple(each for each in self.healthy if each >= COLLAPSED * usual)
            kept = healthy if len(healthy) >= ENOUGH else self.healthy
            return Pace(kept, last, statistics.median(last))
        return Pace((*self.healthy, rate)[-REMEMBERED:], last)


def collapse_sentence(name: str, pace: Pace) -> str:
    """What to tell about a model whose speed collapsed; "" when it is well."""
    if not pace.collapsed:
        return ""
    return (
        f"{name} runs at {pace.collapsed:.1f} a second instead of {pace.usual:.1f}: a part of it may lie in the box's "
        "RAM, another program may use the GPU, or the GPU is throttled."
    )


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """An instance's memory once its model is loaded and idle, in bytes.

    Attributes:
        expected: what the load was to take of the GPUs: told by the operator or learned, not a mere estimate.
        on_gpu: what it holds there, measured.
        in_ram: anonymous and shared memory of its processes (not pages of mapped files, which the kernel may drop).
        usual_ram: the same in its healthy loads; 0 when not known.
    """

    expected: int
    on_gpu: int
    in_ram: int
    usual_ram: int = 0


def spilled(memory: Memory) -> int:
    """Bytes of the model that lie in RAM though they belong on the GPU; 0 when all is well or cannot be told."""
    lacks = memory.expected - memory.on_gpu
    if memory.expected <= 0 or memory.on_gpu <= 0 or memory.on_gpu >= SPILLED * memory.expected:
        return 0
    more = memory.in_ram - memory.usual_ram
    if lacks < SLACK_BYTES or more < lacks / 2:
        return 0
    return min(lacks, more)


def spill_sentence(name: str, memory: Memory) -> str:
    """What to tell about a model that spilled; "" when it did not."""
    count = spilled(memory)
    if not count:
        return ""
    return (
        f"{name} holds {memory.on_gpu / 2**30:.1f} of {memory.expected / 2**30:.1f} GiB on the GPU and about "
        f"{count / 2**30:.1f} GiB of the rest in the box's RAM, which is many times slower: free GPU memory, or "
        "choose a smaller model or context."
    )
