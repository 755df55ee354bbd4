"""Benchmarks of the scheduler: what its decisions bring, and how long one takes with many models and many jobs.

Each row names its bar. The box is the worst kind for a scheduler: eight GPUs, 200 models of which a third fit at
once, every model with a queue, so that each end of a run may start a swap. Time is the thread's CPU time. All runs of
one size take the same steps, so that the median of a step over the runs leaves out most of what others do to a
shared machine; a single run's own p99 is told beside it.
"""

from __future__ import annotations

import heapq
import math
import random
import statistics
import time
from typing import Any, NamedTuple

from simulate_road import SHIPPED, TRACES, simulate
from simulate_trace import read
from simulate_world import Figures

from supervisor.intake import effects as fx
from supervisor.intake.eviction import UNLOAD_S
from supervisor.intake.residency import GIB
from supervisor.intake.scheduler import Scheduler

WAITING, MODELS = 10_000, 200
EVENTS = 30_000
RUNS = 5
# What is varied around WAITING and MODELS.
SIZES = (1_000, 10_000, 100_000)
CROWDS = (20, 200, 2_000, 20_000)
BAR_US = 50.0
Row = dict[str, Any]


class Costs(NamedTuple):
    """Of one size, in microseconds of CPU time: steps by their medians over the runs.

    Attributes:
        alone_p99: p99 of a single run, the median of all runs'.
        best: mean of the steps by the best of the runs instead: their growth is not that of the machine's load.
        looks: the same of those in which a waiting model is looked at because its time has come.
        events: the same of the others.
    """

    mean: float
    p50: float
    p99: float
    alone_p99: float
    best: float
    looks: float
    events: float


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
        self.times: list[int] = []  # of each step, in nanoseconds
        self.ticks: list[bool] = []
        for number in range(waiting):
            self._arrive(plans[number % models].name)
        self.times.clear()
        self.ticks.clear()

    def _arrive(self, name: str) -> None:
        self._number += 1
        self._tell(fx.Arrives(fx.Job(id=str(self._number), model=name, at=self._now)))

    def _tell(self, event: fx.Event) -> None:
        began = time.thread_time_ns()
        effects = self.scheduler.step(event, self._now)
        self.times.append(time.thread_time_ns() - began)
        self.ticks.append(isinstance(event, fx.Tick))
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

    def run(self, events: int) -> list[int]:
        """Nanoseconds of each of so many steps."""
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


def piece() -> int:
    """Nanoseconds of a fixed piece of Python of about a look's length: what the machine makes of it is the floor."""
    began = time.thread_time_ns()
    books = {number: (number, str(number)) for number in range(40)}
    sum(number for number, name in books.values() if len(name) == 2)
    return time.thread_time_ns() - began


def costs(waiting: int, models: int, runs: int) -> Costs:
    """Measure one size."""
    taken, ticks, alone = list[list[int]](), list[bool](), list[float]()
    for _ in range(runs):
        crowd = Crowd(waiting, models=models)
        taken.append(crowd.run(EVENTS))
        ticks = crowd.ticks
        alone.append(_share(sorted(crowd.times), 0.99) / 1e3)
    steps = [statistics.median(times) / 1e3 for times in zip(*taken, strict=True)]
    best = [min(times) / 1e3 for times in zip(*taken, strict=True)]
    return Costs(
        mean=statistics.fmean(steps),
        p50=statistics.median(steps),
        p99=_share(sorted(steps), 0.99),
        alone_p99=statistics.median(alone),
        best=statistics.fmean(best),
        looks=statistics.fmean(cost for cost, tick in zip(best, ticks, strict=True) if tick),
        events=statistics.fmean(cost for cost, tick in zip(best, ticks, strict=True) if not tick),
    )


def _share(ordered: list[Any], share: float) -> float:
    return float(ordered[int(len(ordered) * share)])


def bench_schedule() -> list[Row]:
    """One decision at 10,000 waiting jobs and 200 models, and how it grows with the queue and with the models."""
    usual = costs(WAITING, MODELS, RUNS)
    pieces = sorted(piece() / 1e3 for _ in range(EVENTS))
    sizes = {count: usual if count == WAITING else costs(count, MODELS, 3) for count in SIZES}
    crowds = {count: usual if count == MODELS else costs(WAITING, count, 3) for count in CROWDS}
    jobs_log = math.log(SIZES[-1]) / math.log(SIZES[0])
    models_log = math.log(CROWDS[-1]) / math.log(CROWDS[0])
    return [
        {
            "what": f"one decision of the scheduler, {WAITING:,} jobs waiting, {MODELS} models, 8 GPUs: CPU time, mean",
            "floor": f"bar: {BAR_US:g} µs",
            "ours": f"mean {usual.mean:.1f} µs, p50 {usual.p50:.1f} µs",
            "ratio": round(usual.mean / BAR_US, 2),
        },
        {
            "what": f"the same, p99 (each step's median of {RUNS} runs)",
            "floor": f"bar: {BAR_US:g} µs; a fixed piece of Python: best {pieces[0]:.1f} µs, "
            f"p99 {_share(pieces, 0.99):.1f} µs",
            "ours": f"{usual.p99:.1f} µs; of a single run {usual.alone_p99:.1f} µs",
            "ratio": round(usual.p99 / BAR_US, 2),
        },
        {
            "what": f"the mean with {SIZES[0]:,} to {SIZES[-1]:,} jobs waiting (best of 3 runs)",
            "floor": f"bar: grows no faster than log n, which is {jobs_log:.2f} times",
            "ours": ", ".join(f"{count:,}: {each.best:.1f} µs" for count, each in sizes.items()),
            "ratio": round(sizes[SIZES[-1]].best / sizes[SIZES[0]].best / jobs_log, 2),
        },
        {
            # With few models all are loaded and little has to be looked at: the kinds of steps are told apart.
            "what": f"with {CROWDS[0]} to {CROWDS[-1]:,} models: looks at what waits / other events",
            "floor": f"bar: neither grows faster than log n, which is {models_log:.2f} times",
            "ours": ", ".join(
                f"{count:,}: {each.looks:.1f} / {each.events:.1f} µs (mean {each.best:.1f} µs)"
                for count, each in crowds.items()
            ),
            "ratio": round(
                max(
                    crowds[CROWDS[-1]].looks / crowds[CROWDS[0]].looks,
                    crowds[CROWDS[-1]].events / crowds[CROWDS[0]].events,
                )
                / models_log,
                2,
            ),
        },
    ]


def bench_simulate() -> list[Row]:
    """The shipped traces at their own size: ours against first come, first served + least recently used."""
    rows: list[Row] = []
    for name in SHIPPED:
        trace = read(TRACES / f"{name}.toml")
        ours, fifo = simulate(trace, ("bulkhead", "fifo+lru"), quiet=True)
        rows.append(
            {
                "what": f"simulated {name}, {trace.count:,} jobs (ratio: wait p99)",
                "floor": f"fifo+lru: {_told(fifo)}",
                "ours": f"{_told(ours)}; simulated in {ours.took_s:.1f} s",
                "ratio": float(f"{ours.wait_p99_s / fifo.wait_p99_s:.2g}"),
            }
        )
    return rows


def _told(each: Figures) -> str:
    return (
        f"GPUs busy {each.busy:.1%}, wait p50 {each.wait_p50_s:.1f} s, p99 {each.wait_p99_s:.1f} s, "
        f"{each.loads} loads, {each.evictions} evictions"
    )


if __name__ == "__main__":
    for row in bench_schedule():
        print(row)
