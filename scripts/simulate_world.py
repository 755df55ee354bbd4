"""Simulated GPUs: carries a policy's effects out in simulated time, checks them, and measures.

A GPU divides itself evenly among the instances that work on it; runs inside one instance are batched and do not
slow each other. That is processor sharing, so one virtual clock per GPU orders all ends there: it runs at
speed / working instances, and a run ends when its work has passed on it. A split instance follows the clock of its
first GPU and slows the others. Loads take `load_s`, memory returns `UNLOAD_S` after the end.

Checked at every step: what is held on a GPU, ours and other programs', never exceeds it; an instance that is ended
has no run; a run starts only in a free slot of a loaded instance; every job ends once.
"""

from __future__ import annotations

import heapq
import sys
import time
from array import array
from collections.abc import Mapping
from typing import Any, Protocol

import msgspec
from simulate_trace import Arrival, OwnUse, Trace

from supervisor.intake import effects as fx
from supervisor.intake.eviction import UNLOAD_S
from supervisor.intake.residency import GIB

# How often a line about progress is written, in seconds of real time.
PROGRESS_EVERY_S = 2.0
# More steps than this at one simulated moment mean that a policy goes in circles.
MOST_AT_ONCE = 100_000


class Policy(Protocol):
    """What is simulated."""

    def step(self, event: fx.Event, now: float) -> list[fx.Effect]:
        """See `Scheduler.step`."""

    def due(self) -> float | None:
        """See `Scheduler.due`."""


class Broken(AssertionError):
    """A policy did what must never happen."""


class Figures(msgspec.Struct, kw_only=True):
    """What came out. Times in simulated seconds; `wait` is from a job's arrival to its start.

    Attributes:
        busy: share of the GPUs' time in which at least one run worked there.
        loading: share of the GPUs' time in which a model was being loaded there and nothing ran.
        lasted_s: until the last job had ended.
        decide_us: mean real time of one step of the policy, in microseconds.
    """

    policy: str
    jobs: int
    done: int
    refused: int
    busy: float
    loading: float
    wait_p50_s: float
    wait_p99_s: float
    wait_oldest_s: float
    wait_mean_s: float
    loads: int
    evictions: int
    cancelled_loads: int
    lasted_s: float
    most_waiting: int
    decide_us: float
    took_s: float


class _Gpu:
    """One GPU with its virtual clock."""

    __slots__ = (
        "at", "busy_s", "clock", "ends", "foreign", "loading", "loading_s", "ours", "speed", "total", "turn",
        "wanted", "working",
    )  # fmt: skip

    def __init__(self, total: int, speed: float) -> None:
        self.total, self.speed = total, speed
        self.ours = self.foreign = self.wanted = self.loading = self.turn = 0
        self.clock = self.at = self.busy_s = self.loading_s = 0.0
        self.working: dict[int, int] = {}  # instance -> runs
        self.ends: list[tuple[float, int, int, fx.Job]] = []  # on this clock

    def advance(self, now: float) -> None:
        """Bring the clock up to `now`."""
        passed = now - self.at
        if self.working:
            self.clock += passed * self.speed / len(self.working)
            self.busy_s += passed
        elif self.loading:
            self.loading_s += passed
        self.at = now


class _Instance:
    __slots__ = ("ended", "first", "model", "ready", "runs", "shares", "started")

    def __init__(self, model: Any, shares: Mapping[str, int], first: _Gpu, now: float) -> None:
        self.model, self.shares, self.first, self.started = model, dict(shares), first, now
        self.ready = self.ended = False
        self.runs = 0


class World:
    """One policy on one trace. `run` once."""

    def __init__(self, trace: Trace, policy: Policy, name: str, *, quiet: bool = True) -> None:
        self._trace, self._policy, self._name, self._quiet = trace, policy, name, quiet
        self._gpus = {plan.uuid: _Gpu(plan.total_bytes, plan.speed) for plan in trace.devices()}
        self._nowhere = _Gpu(0, 1.0)  # models outside the GPUs work here
        self._models = {model.name: model for model in trace.spec.models}
        self._instances: dict[int, _Instance] = {}
        self._work: dict[str, float] = {}
        self._later: list[tuple[float, int, Any, Any]] = []
        self._seq = self._loads = self._evictions = self._cancelled = self._refused = self._done = 0
        self._waits = array("d")
        self._held: set[str] = set()
        self._now = self._last_end = self._decide_s = 0.0
        self._steps = self._most = 0

    def run(self) -> Figures:
        """Simulate to the end.

        Raises:
            Broken: the policy broke one of the rules above, or went in circles.
        """
        began = told = time.perf_counter()
        coming = self._trace.happenings()
        happening = next(coming, None)
        count, before, circles = 0, -1.0, 0
        while True:
            at_end = self._later[0][0] if self._later else float("inf")
            at_job = happening.t if happening else float("inf")
            due = self._policy.due() if self._work or self._later or happening else None
            at_tick = float("inf") if due is None else max(due, self._now)
            now = min(at_end, at_job, at_tick)
            if now == float("inf"):
                break
            circles = circles + 1 if now == before else 0
            if circles > MOST_AT_ONCE:
                raise Broken(f"{self._name} goes in circles at {now:.3f} s")
            self._now = before = now
            if at_end <= now:
                _at, _seq, act, what = heapq.heappop(self._later)
                act(what)
            elif happening is not None and at_job <= now:
                count += isinstance(happening, Arrival)
                self._happens(happening, count)
                happening = next(coming, None)
            else:
                self._step(fx.Tick())
            if not self._quiet and not count & 1023 and time.perf_counter() > told + PROGRESS_EVERY_S:
                told = time.perf_counter()
                print(f"\r{self._name}: {count:,} of {self._trace.count:,} jobs", end="", file=sys.stderr, flush=True)
        if self._work:
            raise Broken(f"{self._name} left {len(self._work)} jobs waiting for ever")
        if not self._quiet:
            print(f"\r{self._name}: {count:,} jobs, done" + " " * 20, file=sys.stderr, flush=True)
        return self._figures(count, time.perf_counter() - began)

    # ---- what happens

    def _happens(self, happening: Arrival | OwnUse, number: int) -> None:
        if isinstance(happening, OwnUse):
            gpu = self._gpus[happening.gpu]
            (self._held.add if happening.hold else self._held.discard)(happening.gpu)
            gpu.wanted = int(happening.foreign_gb * GIB)
            if happening.hold:
                self._step(fx.HoldPut(happening.gpu, happening.hold, unload=True))
            self._grow(happening.gpu)
            if not happening.hold:
                self._step(fx.HoldLifted(happening.gpu))
            return
        if len(self._held) == len(self._gpus):
            self._refused += 1  # admission declines while everything is held: the coordinator asks another worker
            return
        job = fx.Job(id=str(number), model=happening.model, at=self._now, priority=happening.priority)
        self._work[job.id] = happening.work_s
        self._most = max(self._most, len(self._work))
        self._step(fx.Arrives(job))

    def _grow(self, uuid: str) -> None:
        """Other programs take what they want as far as it is there: a driver gives nobody what is taken."""
        gpu = self._gpus[uuid]
        foreign = min(gpu.wanted, gpu.total - gpu.ours)
        if foreign != gpu.foreign:
            gpu.foreign = foreign
            self._step(fx.Reading(uuid, foreign))

    def _run_end(self, what: tuple[_Gpu, int]) -> None:
        gpu, turn = what
        if turn != gpu.turn:
            return  # overtaken by a change
        gpu.advance(self._now)
        _end, _seq, number, job = heapq.heappop(gpu.ends)
        instance = self._instances[number]
        instance.runs -= 1
        if not instance.runs:
            self._works(number, instance, False)
        self._next_end(gpu)
        self._done += 1
        self._last_end = self._now
        self._step(fx.RunEnds(number, self._work.pop(job.id) / gpu.speed))

    def _load_end(self, number: int) -> None:
        instance = self._instances.get(number)
        if instance is None or instance.ended:
            return  # cancelled meanwhile
        instance.ready = True
        self._loads_there(instance, -1)
        self._step(fx.LoadEnds(number, instance.model.load_s))

    def _gone(self, number: int) -> None:
        instance = self._instances.pop(number)
        for uuid, share in instance.shares.items():
            self._gpus[uuid].ours -= share
        self._step(fx.Gone(number))
        for uuid in instance.shares:
            self._grow(uuid)

    # ---- effects

    def _step(self, event: fx.Event) -> None:
        began = time.perf_counter()
        effects = self._policy.step(event, self._now)
        self._decide_s += time.perf_counter() - began
        self._steps += 1
        for effect in effects:
            match effect:
                case fx.StartRun(instance, job):
                    self._start(instance, job)
                case fx.Load(instance, model, shares):
                    self._load(instance, model, shares)
                case fx.Evict(instance, _):
                    self._evictions += 1
                    self._end(instance)
                case fx.CancelLoad(instance, _):
                    self._cancelled += 1
                    self._loads_there(self._instances[instance], -1)
                    self._end(instance)
                case fx.Refuse(job_id, _, _):
                    del self._work[job_id]
                    self._refused += 1
                case fx.Waits():
                    pass

    def _start(self, number: int, job: fx.Job) -> None:
        instance = self._instances.get(number)
        if instance is None or not instance.ready or instance.ended or instance.runs >= instance.model.slots:
            raise Broken(f"{self._name} starts job {job.id} on instance {number}, which has no slot for it")
        gpu = instance.first
        gpu.advance(self._now)
        instance.runs += 1
        self._waits.append(self._now - job.at)
        self._seq += 1
        heapq.heappush(gpu.ends, (gpu.clock + self._work[job.id], self._seq, number, job))
        if instance.runs == 1:
            self._works(number, instance, True)
        if instance.runs == 1 or gpu.ends[0][1] == self._seq:
            self._next_end(gpu)

    def _load(self, number: int, model: str, shares: Mapping[str, int]) -> None:
        for uuid, share in shares.items():
            gpu = self._gpus[uuid]
            gpu.ours += share
            if gpu.ours + gpu.foreign > gpu.total:
                over = (gpu.ours + gpu.foreign - gpu.total) / GIB
                raise Broken(f"{self._name} loads {model} and exceeds {uuid} by {over:.2f} GiB at {self._now:.1f} s")
        first = self._gpus[next(iter(shares))] if shares else self._nowhere
        instance = self._instances[number] = _Instance(self._models[model], shares, first, self._now)
        self._loads += 1
        self._loads_there(instance, 1)
        self._after(instance.model.load_s, self._load_end, number)

    def _end(self, number: int) -> None:
        instance = self._instances[number]
        if instance.runs or instance.ended:
            raise Broken(f"{self._name} ends instance {number} with {instance.runs} runs")
        instance.ended = True
        self._after(UNLOAD_S, self._gone, number)

    def _after(self, delay_s: float, act: Any, what: Any) -> None:
        self._seq += 1
        heapq.heappush(self._later, (self._now + delay_s, self._seq, act, what))

    def _loads_there(self, instance: _Instance, step: int) -> None:
        for uuid in instance.shares:
            self._gpus[uuid].advance(self._now)
            self._gpus[uuid].loading += step

    def _works(self, number: int, instance: _Instance, works: bool) -> None:
        """It begins or stops to work on its GPUs: everybody else there gets slower or faster."""
        for gpu in [self._gpus[uuid] for uuid in instance.shares] or [self._nowhere]:
            gpu.advance(self._now)
            if works:
                gpu.working[number] = 1
            else:
                del gpu.working[number]
            if gpu is not instance.first:
                self._next_end(gpu)

    def _next_end(self, gpu: _Gpu) -> None:
        gpu.turn += 1
        if gpu.ends:
            rest = max(0.0, gpu.ends[0][0] - gpu.clock)
            self._after(rest * len(gpu.working) / gpu.speed, self._run_end, (gpu, gpu.turn))

    # ---- figures

    def _figures(self, count: int, took_s: float) -> Figures:
        ordered = sorted(self._waits)
        for gpu in self._gpus.values():
            gpu.advance(self._last_end)
        whole = self._last_end * len(self._gpus) or 1.0
        return Figures(
            policy=self._name,
            jobs=count,
            done=self._done,
            refused=self._refused,
            busy=sum(gpu.busy_s for gpu in self._gpus.values()) / whole,
            loading=sum(gpu.loading_s for gpu in self._gpus.values()) / whole,
            wait_p50_s=quantile(ordered, 0.5),
            wait_p99_s=quantile(ordered, 0.99),
            wait_oldest_s=quantile(ordered, 1.0),
            wait_mean_s=sum(ordered) / max(1, len(ordered)),
            loads=self._loads,
            evictions=self._evictions,
            cancelled_loads=self._cancelled,
            lasted_s=self._last_end,
            most_waiting=self._most,
            decide_us=self._decide_s / max(1, self._steps) * 1e6,
            took_s=took_s,
        )


def quantile(ordered: list[float], q: float) -> float:
    """Nearest rank; 0 of nothing."""
    return ordered[min(len(ordered) - 1, int(len(ordered) * q))] if ordered else 0.0
