"""Reads what else this machine does: programs by name, free space, and GPUs without what is ours on them.

Only the worker's own load is never a reason to pause: everything here leaves out our own processes.
"""

from __future__ import annotations

import fnmatch
import os
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import msgspec
import psutil  # type: ignore[import-untyped]

from supervisor.intake.observed import Disk, Gpu, Unknown
from supervisor.machine.readings import Device, GpuReading, foreign_bytes

# comm of Linux: a name of more bytes is cut off there, and that of a Windows program under Wine stays so.
_CUT = 15
# Memory in use that no program is needed for: what the driver keeps for itself and for each context.
_NOBODY_BYTES = 512 * 2**20


class Ours(msgspec.Struct, frozen=True, kw_only=True):
    """What is ours on this machine now.

    Attributes:
        pids: of every process of every instance, and of the supervisor.
        held: GPU -> bytes that our instances hold or are promised. Where the driver lists no processes this alone
            says what is ours, and while a model loads it is ahead of what is listed.
        works: GPUs on which a run of ours is going on.
    """

    pids: frozenset[int] = frozenset()
    held: Mapping[str, int] = {}
    works: frozenset[str] = frozenset()


def foreign(readings: Mapping[str, GpuReading], ours: Ours) -> tuple[Gpu, ...]:
    """Every GPU without what is ours. A GPU in MIG mode is seen as a whole: heat knows no slices."""
    return tuple(_foreign(uuid, gpu, ours) for uuid, gpu in readings.items())


def _foreign(uuid: str, gpu: GpuReading, ours: Ours) -> Gpu:
    if gpu.mig:
        parts = [_held_by_others(part.uuid, part, ours) for part in gpu.mig]
        held = None if None in parts else sum(part or 0 for part in parts)
        works = any(part.uuid in ours.works for part in gpu.mig) or uuid in ours.works
    else:
        held, works = _held_by_others(uuid, gpu, ours), uuid in ours.works
    return Gpu(
        uuid=uuid,
        foreign_bytes=held,
        foreign_busy=0.0 if _alone(gpu, ours, held) else None if works else gpu.busy,
        temperature_c=gpu.temperature_c,
        power_w=gpu.power_w,
        power_limit_w=gpu.power_limit_w,
        slowed=gpu.throttled,
    )


def _alone(gpu: GpuReading, ours: Ours, held: int | None) -> bool:
    """Whether all processes that the driver lists are ours and nothing else holds memory there.

    What keeps it busy is ours then, also when no run goes on: a load, or a trial.
    """
    parts: tuple[Device, ...] = (gpu, *gpu.mig)
    listed = [process.pid for part in parts for process in part.processes]
    return bool(listed) and ours.pids.issuperset(listed) and held is not None and held < _NOBODY_BYTES


def _held_by_others(uuid: str, device: Device, ours: Ours) -> int | None:
    return foreign_bytes(device, ours.pids, ours.held.get(uuid, 0))


def free_space(folder: Path) -> Disk | Unknown:
    """Free space for us where a folder lies. May block on a network disk."""
    try:
        return Disk(folder=str(folder), free_bytes=shutil.disk_usage(folder).free)
    except OSError as error:
        return Unknown(f"{folder}: {error.strerror}")


Processes = Callable[[], Iterable[tuple[int, str]]]


def processes() -> Iterable[tuple[int, str]]:
    """(pid, name) of every process. psutil keeps what it read, so that a second look costs little."""
    for process in psutil.process_iter(("name",)):
        yield process.pid, process.info["name"] or ""


def descends(pid: int, root: int | None = None) -> bool:
    """Whether a process is `root` (this process) or one that it started, over any number of generations.

    One that has ended belongs to nobody any more.
    """
    root = os.getpid() if root is None else root
    try:
        return pid == root or any(parent.pid == root for parent in psutil.Process(pid).parents())
    except psutil.Error:
        return False


def running(
    names: Sequence[str],
    own: Collection[int],
    look: Processes = processes,
    ours: Callable[[int], bool] = descends,
) -> tuple[str, ...] | Unknown:
    """Names of running programs that match; each once, in order.

    Args:
        names: patterns with "*" and "?"; capitals and ".exe" do not matter.
        own: pids that do not count.
        ours: whether a process is one of ours that `own` has not yet, or that runs no model: the coordinator, a
            download, a probe. It is asked of those that match, which are few.
    """
    patterns = [_plain(name) for name in names]
    try:
        found = {name for pid, name in look() if pid not in own and _matches(name, patterns) and not ours(pid)}
    except (psutil.Error, OSError) as error:
        return Unknown(str(error))
    return tuple(sorted(found))


def _plain(name: str) -> str:
    return name.lower().removesuffix(".exe")


def _matches(name: str, patterns: Iterable[str]) -> bool:
    plain = _plain(name)
    # A name that was cut off may have lost any part of ".exe", and matches what it is the beginning of.
    cut = plain if len(name.encode()) == _CUT else ""
    return any(
        fnmatch.fnmatchcase(plain, pattern) or (cut and f"{pattern}.exe".startswith(cut)) for pattern in patterns
    )
