"""What an instance looks like from outside, about once a second: heartbeat, memory, scratch folder, wear.

Nothing here judges work: a run's progress and its deadline do that (runs.py). This ends an instance early in four
cases only: the watchdog has seen twice in a row that waiting is pointless, the memory or the scratch folder is over
its ceiling, or one run ignores its cancel and no other moves either. And it notices wear, so that the lane can
replace a leaking engine between two jobs.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import psutil  # type: ignore[import-untyped]
import trio

from protocol import engine_wire as wire
from supervisor.host import recycle
from supervisor.host.ends import End, Why
from supervisor.host.patience import GRANT_S, LATE_S
from supervisor.host.scratch import POLL_S
from supervisor.host.senses import Senses
from supervisor.host.watchdog import STRIKES, Diagnosis
from supervisor.host.work import ModelSpec

if TYPE_CHECKING:
    from supervisor.host.instance import Instance

TICK_S = 1.0
# A thread that has not left the kernel for so long will not: a driver that hangs, a mount that is gone.
STUCK_IN_KERNEL_S = 30.0
# Wear is judged when no run holds memory of its own; an instance that never rests is judged as it is after this long.
RESTLESS_S = 300.0
OOM_LOOKS = 4
_SHARE_OF_BOX = 0.9
_GIB = 2**30


@functools.cache
def _box_bytes() -> int:
    return int(psutil.virtual_memory().total)


def ceiling_bytes(spec: ModelSpec) -> int:
    """Most resident memory of an instance of this model."""
    return spec.memory_bytes or int(_SHARE_OF_BOX * _box_bytes())


class Watch:
    """The watch over one instance; `run` is its task.

    Attributes:
        rss_bytes: resident memory of its processes at the latest look.
    """

    def __init__(self, instance: Instance, senses: Senses, scratch: Path) -> None:
        self.rss_bytes = 0
        self._instance, self._senses = instance, senses
        self._pid = instance.child.pid
        self._dog = senses.watchdog(self._pid)
        self._dog.on_gpu = instance.spec.model.device != "cpu"  # until the engine says where it really is
        limit = int(instance.limits.scratch_gb * _GIB)
        self._scratch = senses.scratch(scratch, limit, lambda: senses.members(self._pid))
        # The kernel counts when it kills; a large process needs a while to be dead, so what was a few looks ago counts.
        self._oom_kills = collections.deque([senses.oom_kills()], maxlen=OOM_LOOKS)
        self._began = trio.current_time()
        self._measured = self._rested = self._began
        self._pinged = self._active = False
        self._base: recycle.Baseline | None = None
        self._reading = recycle.Reading(jobs=0, age_s=0)

    # ---- told by the instance

    def greeted(self, pid: int) -> None:
        """It said hello, and under which number it knows itself."""
        self._dog.told = pid

    def heard(self) -> None:
        """Bytes came from it."""
        self._dog.beat()

    def ponged(self) -> None:
        """It answered a ping."""
        self._pinged = False

    def moved(self) -> None:
        """Work was handed over or moved."""
        self._dog.progress()

    def loaded(self) -> None:
        """The load is over, well or not."""
        self._dog.rest()
        ready = self._instance.ready
        self._dog.on_gpu = ready is not None and ready.device.startswith("cuda")

    # ---- asked

    @property
    def diagnosis(self) -> Diagnosis:
        """What the engine was doing when it was last looked at."""
        return self._dog.diagnosis

    def facts(self) -> Mapping[str, Any]:
        """What the watchdog saw."""
        found: Mapping[str, Any] = msgspec.to_builtins(self._dog.facts())
        return found

    def gpus(self) -> tuple[Mapping[str, Any], ...]:
        """Readings of its GPUs."""
        return self._senses.gpus(self._instance.spec)

    def oom_killed(self) -> bool:
        """Whether the kernel has killed for want of memory within the latest `OOM_LOOKS` looks."""
        before, now = self._oom_kills[0], self._senses.oom_kills()
        return now is not None and before is not None and now > before

    def worn(self) -> str:
        """Why the instance should be replaced when its runs are done; "" when it should not."""
        jobs, age_s = self._instance.runs.done, trio.current_time() - self._began
        now = msgspec.structs.replace(self._reading, jobs=jobs, age_s=age_s)
        return recycle.due(self._base, now, self._instance.limits.recycle)

    def rested(self) -> None:
        """No run holds memory just now: look at what it keeps, at most once per `TICK_S`."""
        if trio.current_time() - self._rested >= TICK_S or self._instance.runs.done <= recycle.BASELINE_JOBS:
            self._look()

    # ---- the task

    async def run(self) -> None:
        """Look until the instance is over."""
        over = self._instance.over
        async with trio.open_nursery() as nursery:
            while not over.is_set():
                due = trio.current_time() + TICK_S
                await trio.sleep_until(due)
                if trio.current_time() - due > LATE_S:
                    self._dog.beat()  # it was we who stood still: read first what it said meanwhile
                    await trio.sleep(GRANT_S)
                await self._tick(nursery)
            nursery.cancel_scope.cancel()

    async def _tick(self, nursery: trio.Nursery) -> None:
        instance = self._instance
        active = instance.loading or instance.has > 0
        if active and not self._active:
            self._dog.beat()  # nobody asked it anything while it had nothing to do
        self._active = active
        if active:
            self._ping(nursery)
            self._dog.gpu_share = self._senses.gpu_share(instance.spec)
            await self._dog.sample()
            await self._end_hopeless()
            await self._end_untidy()
        else:
            self._dog.rest()
        self.rss_bytes = self._senses.rss_bytes(self._pid)
        await self._end_greedy()
        self._oom_kills.append(self._senses.oom_kills())
        if instance.ready is not None and (not active or trio.current_time() - self._rested >= RESTLESS_S):
            self._look()
            instance.changed()

    def _ping(self, nursery: trio.Nursery) -> None:
        """One ping at a time, in a task of its own: an engine that was stopped does not empty its pipe."""
        if not self._pinged:
            self._pinged = True
            nursery.start_soon(self._instance.tell, wire.Ping())

    def _look(self) -> None:
        now = trio.current_time()
        self._rested = now
        self.rss_bytes = self._senses.rss_bytes(self._pid)
        self._reading = recycle.Reading(
            jobs=self._instance.runs.done,
            age_s=now - self._began,
            rss_bytes=self.rss_bytes,
            vram_bytes=self._senses.vram_bytes(self._instance.spec.name),
        )
        self._base = recycle.baseline(self._base, self._reading)

    # ---- ending it early

    async def _end_hopeless(self) -> None:
        instance, seen = self._instance, self._dog.diagnosis
        name = instance.spec.engine.name
        in_kernel = seen is Diagnosis.UNINTERRUPTIBLE and self._dog.facts().state_s >= STUCK_IN_KERNEL_S
        if self._dog.strikes >= STRIKES or in_kernel:
            text = f"Engine {name} will not go on: it is {seen.value}. {seen.describe()} It was ended."
            await instance.give_up(End(why=Why.WEDGED, note=seen.value), "engine_hung", text)
        elif instance.runs.admitted and instance.runs.hopeless:
            text = f"Engine {name} ignored a cancel, and none of its other runs moves either; it was ended."
            await instance.give_up(End(why=Why.HUNG, note="no run moved"), "engine_hung", text)

    async def _end_greedy(self) -> None:
        instance, ceiling = self._instance, ceiling_bytes(self._instance.spec)
        kernel_does = instance.cgroup is not None and instance.cgroup.limited
        if self.rss_bytes > ceiling and not kernel_does:
            taken = f"{self.rss_bytes / _GIB:.2f} GiB of memory, and its ceiling is {ceiling / _GIB:.2f} GiB"
            text = f"Engine {instance.spec.engine.name} took {taken}; it was ended."
            await instance.give_up(End(why=Why.MEMORY, note=taken), "out_of_memory", text)

    async def _end_untidy(self) -> None:
        instance = self._instance
        if trio.current_time() - self._measured < POLL_S:
            return
        with trio.move_on_after(POLL_S):  # a file system that hangs must not blind the watch
            await self._scratch.measure()
        self._measured = trio.current_time()
        if self._scratch.exceeded:
            sentence = self._scratch.describe()
            text = f"Engine {instance.spec.engine.name} was ended. {sentence}"
            await instance.give_up(End(why=Why.SCRATCH, note=sentence), "engine_crashed", text)
