"""How many CPU threads a run gets: one rule for every engine.

Libraries count the cores of the machine, not those that this process may use, and some take half or four of them on
any machine. In a container of two cores on a host of 64 that is a crowd that only waits for itself.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Annotated

import msgspec

from engines.runtime.contract import option
from protocol.engine_wire import Model

_CPU_MAX = Path("/sys/fs/cgroup/cpu.max")  # of our own cgroup inside a container: "QUOTA PERIOD" or "max PERIOD"

_Threads = Annotated[int, msgspec.Meta(ge=0, le=1024)]


def threads_of(model: Model, *, at_once: int = 1, most: int = 1024) -> int:
    """CPU threads of one run: the load option `threads`; when it is 0 or not given, a share of the usable cores.

    Args:
        at_once: runs that go on side by side, each with threads of its own. Runs that share one pool are one.
        most: what the engine has a use for; a number given in the options may be larger.

    Raises:
        FaultError: `load_failed`, naming `options.threads`.
    """
    asked: int = option(model, "threads", _Threads, 0)
    return asked or max(1, min(most, usable_cores() // at_once))


def usable_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its container where there is one."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(cores, _quota(cores)))


def _quota(cores: int) -> int:
    """The CPU quota in whole cores, rounded up; `cores` when there is none."""
    try:
        quota, period = _CPU_MAX.read_text().split()
    except (OSError, ValueError):  # no container, another system, or the sandbox hides it
        return cores
    return cores if quota == "max" else math.ceil(int(quota) / int(period))
