"""What is seen of an instance from outside its wire; tests under a virtual clock replace it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from supervisor.host import family, scratch
from supervisor.host.cgroups import system_oom_kills
from supervisor.host.watchdog import Diagnosis, Facts, Watchdog
from supervisor.host.work import ModelSpec


class Watcher(Protocol):
    """See `supervisor.host.watchdog.Watchdog`."""

    told: int | None
    gpu_share: float | None
    on_gpu: bool
    diagnosis: Diagnosis
    strikes: int

    def beat(self) -> None:
        """The engine answered."""

    def progress(self) -> None:
        """Work was handed to it, or moved."""

    def rest(self) -> None:
        """No work is in flight any more."""

    def facts(self) -> Facts:
        """What the latest sample saw."""

    async def sample(self) -> Diagnosis:
        """Look at the process once."""


class ScratchWatch(Protocol):
    """See `supervisor.host.scratch.Watch`."""

    @property
    def exceeded(self) -> bool:
        """Whether the latest measurement was over the limit."""

    def describe(self) -> str:
        """One sentence, once the limit is passed."""

    async def measure(self) -> object:
        """Measure once."""


def _watch_scratch(folder: Path, limit_bytes: int, pids: Callable[[], Iterable[int]]) -> ScratchWatch:
    return scratch.Watch(folder, limit_bytes, pids=pids)


class Senses(NamedTuple):
    """What to call.

    Attributes:
        watchdog: makes the watchdog of an instance from the pid of its leader.
        members: the processes of an instance, from its leader.
        rss_bytes: their resident memory.
        scratch: makes the watch over a scratch folder: (folder, limit in bytes, its processes).
        oom_kills: how often the kernel has killed for want of memory since the boot.
        vram_bytes: GPU memory that a model's instance holds; 0 unknown. Wired to the GPU telemetry.
        gpu_share: how busy a model's GPUs are, 0 to 1; None unknown. Wired to the GPU telemetry.
        gpus: readings of a model's GPUs for an incident report. Wired to the GPU telemetry.
    """

    watchdog: Callable[[int], Watcher] = Watchdog
    members: Callable[[int], list[int]] = family.members
    rss_bytes: Callable[[int], int] = family.rss_bytes
    scratch: Callable[[Path, int, Callable[[], Iterable[int]]], ScratchWatch] = _watch_scratch
    oom_kills: Callable[[], int | None] = system_oom_kills
    vram_bytes: Callable[[str], int] = lambda _model: 0
    gpu_share: Callable[[ModelSpec], float | None] = lambda _spec: None
    gpus: Callable[[ModelSpec], tuple[Mapping[str, Any], ...]] = lambda _spec: ()
