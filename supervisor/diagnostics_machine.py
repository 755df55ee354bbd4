"""Facts of this machine that explain a worker: kernel, limits, cgroups, security modules, drivers, packages.

Read from files alone: no program is started, no driver is asked, and nothing here can hang longer than a read of /proc.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MAX_FILE_BYTES = 64 * 1024
# Of the environment only names are told, and the values of these.
_SHOWN_VARIABLES = ("CUDA_VISIBLE_DEVICES", "NVIDIA_VISIBLE_DEVICES", "LANG", "LC_ALL", "TZ", "INVOCATION_ID")
_FILES = {
    "os_release": "/etc/os-release",
    "kernel_command_line": "/proc/cmdline",
    "own_cgroup": "/proc/self/cgroup",
    "own_limits": "/proc/self/limits",
    "memory": "/proc/meminfo",
    "memory_pressure": "/proc/pressure/memory",
    "cpu_pressure": "/proc/pressure/cpu",
    "load": "/proc/loadavg",
    "security_modules": "/sys/kernel/security/lsm",
    "unprivileged_user_namespaces": "/proc/sys/kernel/unprivileged_userns_clone",
    "apparmor_restricts_user_namespaces": "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
    "most_user_namespaces": "/proc/sys/user/max_user_namespaces",
    "overcommit": "/proc/sys/vm/overcommit_memory",
    "nvidia_driver": "/proc/driver/nvidia/version",
    "amd_driver": "/sys/module/amdgpu/version",
    "clock_source": "/sys/devices/system/clocksource/clocksource0/current_clocksource",
}
# Of long files the lines that matter.
_LINES = {"memory": ("MemTotal", "MemAvailable", "SwapTotal", "SwapFree", "HugePages_Total")}


def machine(state: Path, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """All of it, as plain values; what this system does not have is left out."""
    uname = platform.uname()
    return {
        "system": {"name": uname.system, "release": uname.release, "version": uname.version, "machine": uname.machine},
        "python": {"version": sys.version, "executable": sys.executable, "prefix": sys.prefix},
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "user": {"uid": os.getuid(), "euid": os.geteuid()} if hasattr(os, "getuid") else {},
        "files": {name: _shown(name, text) for name, path in _FILES.items() if (text := read_text(Path(path)))},
        "cgroup": _cgroup(),
        "gpus": _listed(Path("/proc/driver/nvidia/gpus")),
        "device_files": [name for name in _listed(Path("/dev")) if name.startswith(("nvidia", "kfd", "dri"))],
        "disk": _disk(state),
        "environment": {
            "names": sorted(environ),
            "values": {name: environ[name] for name in _SHOWN_VARIABLES if name in environ},
        },
    }


@functools.cache
def packages() -> dict[str, str]:
    """Installed distribution -> version, of this interpreter."""
    found = {}
    for each in importlib.metadata.distributions():
        with contextlib.suppress(Exception):  # metadata that somebody has damaged says nothing
            found[str(each.metadata["Name"])] = each.version
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def read_text(path: Path) -> str:
    """The beginning of a file; "" when there is none."""
    try:
        with path.open("rb") as file:
            return file.read(MAX_FILE_BYTES).decode("utf-8", "replace").strip()
    except OSError:
        return ""


def _shown(name: str, text: str) -> Any:
    wanted = _LINES.get(name)
    lines = text.splitlines()
    return lines if wanted is None else [line for line in lines if line.startswith(wanted)]


def _cgroup() -> dict[str, str]:
    """Controllers and limits of our own cgroup (v2)."""
    own = read_text(Path("/proc/self/cgroup")).rpartition("::")[2].splitlines()
    if not own:
        return {}
    folder = Path("/sys/fs/cgroup") / own[0].lstrip("/")
    names = ("cgroup.controllers", "cgroup.subtree_control", "memory.max", "memory.current", "pids.max", "cpu.max")
    return {name: text for name in names if (text := read_text(folder / name))}


def _listed(folder: Path) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _disk(folder: Path) -> dict[str, Any]:
    try:
        usage = shutil.disk_usage(folder)
    except OSError as error:
        return {"path": str(folder), "problem": error.strerror}
    return {"path": str(folder), "total_bytes": usage.total, "free_bytes": usage.free}
