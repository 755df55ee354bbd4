"""Benchmark of the scheduler: how long one decision takes with many models and many jobs waiting.

Each row names its bar. The box is the worst kind for a scheduler: eight GPUs, 200 models of which a third fit at
once, every model with a queue, so that each end of a run may start a swap.
"""

from __future__ import annotations

import heapq
import math
import random
import statistics
import time
from typing import Any

from supervisor.intake import effects as fx
from supervisor.intake.eviction import UNLOAD_S
from supervisor.intake.residency import GIB
from supervisor.intake.scheduler import Scheduler

MODELS = 200
EVENTS = 30_000
SIZES = (1_000, 10_000, 100_000)
BAR_US = 50.0
GROWTH = math.log(SIZES[-1]) / math.log(SIZES[0])
Row = dict[str, Any]


class Crowd:
    """A scheduler in a closed loop: for every job that starts another one of its model arrives, so that queues stay."""

    def __init__(self, waiting: int, seed: int = 1, models: int = MODELS) -> None:
        self._dice = random.Random(seed)
        plans = [
            fx.ModelPlan(name=f"m{n}", need_bytes=(2 + n % 11) * GIB, slots=1 + n % 4, copies=1 + n % 2, load_s=5.0)
            for n in range(models)
        ]
        gpus = [fx.DevicePlan(uuid=f"g{n}", total_bytes=(24, 48, 80)[n % 3] * GIB) for n in range(8)]
        self.scheduler = Scheduler(plans, gpus)
        self._later: list[tuple[float, int, fx.Event | str]] = []
        self._seq = self._number = 0
        self._now = 0.0
        self.times: list[float] = []
        for number in range(waiting):
            self._arrive(plans[number % models].name)
        self.times.clear()

    def _arrive(self, name: str) -> None:
        self._number += 1
        self._tell(fx.Arrives(fx.Job(id=str(self._number), model=name, at=self._now)))

    def _tell(self, event: fx.Event) -> None:
        began = time.perf_counter()
        effects = self.scheduler.step(event, self._now)
        self.times.append(time.perf_counter() - began)
        for effect in effects:
            match effect:
                case fx.StartRun(instance, job):
                    self._after(self._dice.expovariate(0.2), fx.RunEnds(instance, 5.0))
                    self._after(0.0, job.model)
                case fx.Load(instance):
                    self._after(5.0, fx.LoadEnds(instance, 5.0))
                case fx.Evict(instance):
                    self._after(UNLOAD_S, fx.Gone(instance))
                case _:
                    pass

    def _after(self, delay_s: float, event: fx.Event | str) -> None:
        self._seq += 1
        heapq.heappush(self._later, (self._now + delay_s, self._seq, event))

    def run(self, events: int) -> list[float]:
        """Seconds of each of so many steps."""
        while len(self.times) < events:
            due = self.scheduler.due()
            if due is not None and (not self._later or due < self._later[0][0]):
                self._now = max(self._now, due)
                self._tell(fx.Tick())
                continue
            self._now, _seq, event = heapq.heappop(self._later)
            if isinstance(event, str):
                self._arrive(event)
            else:
                self._tell(event)
        return self.times


def bench_schedule() -> list[Row]:
    """One decision at 10,000 waiting jobs and 200 models, and how it grows with the queue."""
    means: dict[int, float] = {}
    p99s: dict[int, float] = {}
    for waiting in SIZES:
        times = sorted(Crowd(waiting).run(EVENTS))
        means[waiting] = statistics.fmean(times) * 1e6
        p99s[waiting] = times[int(len(times) * 0.99)] * 1e6
    grown = means[SIZES[-1]] / means[SIZES[0]]
    rows: list[Row] = [
        {
            "what": f"one decision of the scheduler, 10,000 jobs waiting, {MODELS} models, 8 GPUs",
            "floor": f"bar: {BAR_US:g} µs",
            "ours": f"mean {means[10_000]:.1f} µs, p99 {p99s[10_000]:.1f} µs",
            "ratio": round(means[10_000] / BAR_US, 2),
        },
        {
            "what": f"the same with {SIZES[0]:,} to {SIZES[-1]:,} jobs waiting",
            "floor": f"bar: grows no faster than log n, which is {GROWTH:.1f} times",
            "ours": ", ".join(f"{count:,}: {mean:.1f} µs" for count, mean in means.items()),
            "ratio": round(grown / GROWTH, 2),
        },
    ]
    return rows


if __name__ == "__main__":
    for row in bench_schedule():
        print(row)
