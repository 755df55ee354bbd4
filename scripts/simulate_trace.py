"""Traces for the simulator: what GPUs and models a box has, and which jobs come when.

A trace is a file of one of two kinds. JSON lines: the first object has `gpus` and `models`, every further one is a
job `{"t": 12.5, "model": "chat", "work_s": 3.1, "priority": 0}` or the owner's own use of a GPU
`{"t": 60, "gpu": "desk", "foreign_gb": 9.0, "hold": "a game"}` (0 GB ends it), in order of time. TOML: the same GPUs
and models, and how jobs are drawn from a seed; `scripts/simulate --write` turns one into the other.
"""

from __future__ import annotations

import json
import math
import random
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta

from supervisor.intake.effects import DevicePlan, ModelPlan
from supervisor.intake.residency import GIB

Positive = Annotated[float, Meta(gt=0)]


class GpuSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One GPU. `speed` is relative to the box's slowest."""

    name: str
    gb: Positive
    speed: Positive = 1.0


class ModelSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model.

    Attributes:
        share: of all jobs, relative to the others' shares.
        work_s: median seconds that a job needs on the slowest GPU with nobody beside it.
        spread: standard deviation of the logarithm of that.
    """

    name: str
    gb: float
    kind: str = "llm"
    load_s: Positive = 10.0
    slots: int = 1
    copies: int = 1
    pin: bool = False
    group: str = ""
    keep_alive_s: float = 0.0
    split: bool = False
    share: float = 1.0
    work_s: Positive = 5.0
    spread: float = 0.5


class OwnerSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The owner uses a GPU for a while, again and again."""

    gpu: str
    gb: float
    first_s: float
    for_s: Positive
    every_s: Positive


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A trace that is drawn.

    Attributes:
        jobs: how many, unless the command says so.
        every_s: mean seconds between two jobs.
        stay: chance that a job asks for the model of the job before it: people work on one thing for a while.
        burst: jobs that come together, on average.
        wave: how much busier than the mean the busiest hour of the day is, 0 to 1.
        urgent: share of jobs with priority 1.
    """

    gpus: list[GpuSpec]
    models: list[ModelSpec]
    about: str = ""
    seed: int = 1
    jobs: int = 20_000
    every_s: Positive = 5.0
    stay: float = 0.0
    burst: float = 1.0
    wave: float = 0.0
    urgent: float = 0.0
    owner: list[OwnerSpec] = []


class Arrival(msgspec.Struct, frozen=True):
    """A job of the trace."""

    t: float
    model: str
    work_s: float
    priority: int = 0


class OwnUse(msgspec.Struct, frozen=True):
    """From now on other programs hold this much of a GPU; with a reason, we step aside."""

    t: float
    gpu: str
    foreign_gb: float
    hold: str = ""


Happening = Arrival | OwnUse


class Trace(msgspec.Struct, frozen=True):
    """GPUs, models, and what happens in order of time (drawn anew for every reader)."""

    name: str
    spec: Spec
    count: int
    seed: int
    file: Path | None = None

    def happenings(self) -> Iterator[Happening]:
        """All of it, from the beginning."""
        if self.file is not None:
            return _read_lines(self.file, self.count)
        return draw(self.spec, self.count, self.seed)

    def devices(self) -> list[DevicePlan]:
        """For the scheduler."""
        return [DevicePlan(uuid=gpu.name, total_bytes=int(gpu.gb * GIB), speed=gpu.speed) for gpu in self.spec.gpus]

    def plans(self) -> list[ModelPlan]:
        """For the scheduler."""
        return [
            ModelPlan(
                name=model.name,
                kind=model.kind,
                need_bytes=int(model.gb * GIB),
                slots=model.slots,
                copies=model.copies,
                load_s=model.load_s,
                pin=model.pin,
                group=model.group,
                keep_alive_s=model.keep_alive_s,
                split=model.split,
            )
            for model in self.spec.models
        ]


def read(path: Path, *, jobs: int | None = None, seed: int | None = None) -> Trace:
    """Read a trace.

    Raises:
        ValueError: one sentence that names the file and the field.
    """
    try:
        if path.suffix == ".toml":
            spec = msgspec.convert(tomllib.loads(path.read_text()), Spec)
            file = None
        else:
            with path.open() as lines:
                spec = msgspec.json.decode(lines.readline(), type=Spec)
            file = path
    except (msgspec.MsgspecError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a trace: {error}.") from error
    names = {gpu.name for gpu in spec.gpus}
    for owner in spec.owner:
        if owner.gpu not in names:
            raise ValueError(f"{path}: the owner uses {owner.gpu!r}, which is not one of the gpus.")
    if not spec.gpus or not spec.models:
        raise ValueError(f"{path}: a trace has at least one of [[gpus]] and one of [[models]].")
    count = spec.jobs if jobs is None else jobs
    return Trace(path.name.split(".")[0], spec, count, spec.seed if seed is None else seed, file)


def write(trace: Trace, path: Path) -> None:
    """Write it as JSON lines."""
    with path.open("w") as out:
        head = msgspec.to_builtins(trace.spec)
        out.write(json.dumps({**head, "jobs": trace.count, "seed": trace.seed, "owner": []}) + "\n")
        for happening in trace.happenings():
            out.write(msgspec.json.encode(happening).decode() + "\n")


def _read_lines(path: Path, count: int) -> Iterator[Happening]:
    with path.open() as lines:
        next(lines)
        jobs, last = 0, 0.0
        for number, line in enumerate(lines, 2):
            kind = OwnUse if '"gpu"' in line else Arrival
            try:
                happening: Happening = msgspec.json.decode(line, type=kind)
            except msgspec.MsgspecError as error:
                raise ValueError(f"{path}, line {number}: {error}.") from error
            if happening.t < last:
                raise ValueError(f"{path}, line {number}: t goes back from {last:g} to {happening.t:g}.")
            last = happening.t
            jobs += isinstance(happening, Arrival)
            if jobs > count:
                return
            yield happening


def draw(spec: Spec, count: int, seed: int) -> Iterator[Happening]:
    """Draw a trace: the same seed gives the same jobs."""
    dice = random.Random(seed)
    own = _own_use(spec)
    coming = next(own, None)
    names, shares = spec.models, [model.share for model in spec.models]
    model, t, left, using = spec.models[0], 0.0, 0, set[str]()
    for _ in range(count):
        if left <= 0:
            busier = 1 + spec.wave * math.sin(2 * math.pi * t / 86_400)
            t += dice.expovariate(busier / (spec.every_s * spec.burst))
            left = 1 if spec.burst <= 1 else min(1000, 1 + int(dice.expovariate(1 / (spec.burst - 0.5))))
            if dice.random() >= spec.stay:
                model = dice.choices(names, shares)[0]
        left -= 1
        while coming is not None and coming.t <= t:
            using.symmetric_difference_update({coming.gpu})
            yield coming
            coming = next(own, None)
        work = model.work_s * math.exp(dice.gauss(0, model.spread))
        yield Arrival(t, model.name, work, int(dice.random() < spec.urgent))
    while using and coming is not None:  # no use outlasts the trace
        if coming.gpu in using:
            using.remove(coming.gpu)
            yield coming
        coming = next(own, None)


def _own_use(spec: Spec) -> Iterator[OwnUse]:
    """Without end, in order of time."""
    nexts = [(owner.first_s, True, number) for number, owner in enumerate(spec.owner)]
    while nexts:
        at, begins, number = min(nexts)
        nexts.remove((at, begins, number))
        owner = spec.owner[number]
        yield OwnUse(at, owner.gpu, owner.gb if begins else 0.0, "the owner uses this GPU" if begins else "")
        nexts.append((at + (owner.for_s if begins else owner.every_s - owner.for_s), not begins, number))
