"""What `doctor` looks at on this machine: configuration, files, limits, memory, time, service, socket."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil  # type: ignore[import-untyped]

from supervisor.config import control_socket
from supervisor.doctor import Finding, Patient, fail, ok, warn
from supervisor.errors import SupervisorError

LEAST_FILES = 4096  # descriptors: eight models with eight pipes each, and hundreds of connections
LEAST_PROCESSES = 2048
TIME_ERROR = 5  # adjtimex(2)
LOW_MEMORY = 0.05  # share of the memory that is free


def config(patient: Patient) -> Iterator[Finding]:
    """worker.toml can be read, and is right."""
    if patient.problems:
        for problem in patient.problems:
            yield fail("config", problem, "Mend it; `supervisor config check` looks again.")
        return
    for note in patient.notes:
        yield warn("config", note, "`supervisor config check` tells more.")
    if not patient.notes:
        yield ok("config", f"{patient.config or 'No file: defaults'} has no mistakes.")


def state(patient: Patient) -> Iterator[Finding]:
    """The state folder can be written, and has room."""
    folder = patient.state
    nearest = next(each for each in (folder, *folder.parents) if each.exists())
    if not os.access(nearest, os.W_OK | os.X_OK):
        cure = "Give this user the folder, or name another with [worker] state_dir."
        yield fail("state folder", f"{nearest} cannot be written by user {_user()}.", cure)
        return
    if nearest == folder and os.name == "posix" and (folder.stat().st_mode & 0o022):
        yield warn("state folder", f"Others may write to {folder}.", f"chmod go-w {folder}")
    usage = shutil.disk_usage(nearest)
    free_gb, floor = usage.free / 2**30, 0.5 if patient.settings is None else patient.settings.holds.disk.floor_gb
    if free_gb < floor:
        cure = "Free some space; `supervisor models gc` deletes what no model names."
        yield fail("disk", f"{nearest} has {free_gb:.2f} GiB free, and work stops below {floor:g}.", cure)
    elif usage.free < usage.total * 0.05:
        cure = "Free some space before models or results do not fit any more."
        yield warn("disk", f"{nearest} has {free_gb:.1f} GiB free, less than a twentieth of its disk.", cure)
    else:
        yield ok("disk", f"{folder} can be written, and its disk has {free_gb:.0f} GiB free.")


def control(patient: Patient) -> Iterator[Finding]:
    """The control socket answers, or could be made."""
    if patient.seen is not None:
        yield ok("supervisor", f"It runs (pid {patient.seen.get('pid')}) and answers: {patient.seen.get('state')}.")
        return
    if patient.settings is None:
        return
    path = control_socket(patient.settings)
    problem = _knocked(path)
    if problem == errno.ENOENT:
        yield warn("supervisor", "None is running.", "`supervisor run`, or `supervisor service install`.")
    elif problem == errno.ECONNREFUSED:
        sentence = f"None is running; {path} was left behind by one that was killed."
        yield warn("supervisor", sentence, "The next start replaces it: `supervisor run`.")
    elif problem:
        cure = "Ask as the supervisor's own user, or as root."
        yield fail("supervisor", f"The control socket {path} cannot be used: {os.strerror(problem)}.", cure)
    else:
        sentence = f"Somebody listens at {path} and gave no status."
        yield fail("supervisor", sentence, "See its log: `supervisor service status`.")


def _knocked(path: Path) -> int:
    """0 when somebody listens, else the errno."""
    if not hasattr(socket, "AF_UNIX"):
        return errno.ENOENT
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as knock:
        knock.settimeout(2.0)
        try:
            knock.connect(str(path))
        except OSError as problem:
            return problem.errno or errno.ETIMEDOUT
    return 0


def service(patient: Patient) -> Iterator[Finding]:
    """A service manager keeps it running."""
    from supervisor.service_commands import NAME, backend

    try:
        states = [backend(NAME, system=system).state() for system in (False, True)]
    except SupervisorError as problem:
        yield warn("service", str(problem), "Start it yourself: `supervisor run`.")
        return
    found = next((each for each in sorted(states, key=lambda each: not each.active) if each.installed), None)
    if found is None:
        cure = "`supervisor service install`: then it starts by itself, also after a crash."
        yield warn("service", "It is not installed as a service.", cure)
    elif not found.active:
        cure = f"`supervisor service status` tells more; {found.unit}."
        yield fail("service", found.reason or f"The service is {found.state or 'not running'}.", cure)
    elif not found.enabled:
        cure = "`supervisor service install` enables it."
        yield warn("service", "It runs, and will not start by itself.", cure)
    else:
        yield ok("service", f"It runs as a service of this {found.scope} ({found.restarts} restarts).")


def limits(_patient: Patient) -> Iterator[Finding]:
    """Descriptors and processes are enough."""
    if sys.platform == "win32":
        return
    import resource

    for name, kind, least in (
        ("open files", resource.RLIMIT_NOFILE, LEAST_FILES),
        ("processes", getattr(resource, "RLIMIT_NPROC", None), LEAST_PROCESSES),
    ):
        if kind is None:
            continue
        soft, hard = resource.getrlimit(kind)
        most = hard if name == "open files" else soft
        if most != resource.RLIM_INFINITY and most < least:
            cure = f"Raise it (ulimit, limits.conf, or LimitNOFILE and LimitNPROC of the unit) to {least} at least."
            yield warn(f"limit of {name}", f"This user may have {most}.", cure)
        else:
            yield ok(f"limit of {name}", f"It is {'unlimited' if most == resource.RLIM_INFINITY else most}.")


def memory(_patient: Patient) -> Iterator[Finding]:
    """There is memory left, and no engine is swapped out."""
    ram, swap = psutil.virtual_memory(), psutil.swap_memory()
    total, free = ram.total / 2**30, ram.available / 2**30
    if ram.available < LOW_MEMORY * ram.total:
        cure = "End something, or give models a smaller memory_gb."
        yield warn("memory", f"{free:.1f} of {total:.0f} GiB are free.", cure)
    elif swap.total and swap.used > swap.total / 2:
        cure = "Models in swap answer slowly; serve fewer, or add memory."
        yield warn("memory", f"More than half of the swap ({swap.used / 2**30:.1f} GiB) is in use.", cure)
    else:
        yield ok("memory", f"{free:.1f} of {total:.0f} GiB are free, {swap.used / 2**30:.1f} GiB of swap are used.")


def clock(_patient: Patient) -> Iterator[Finding]:
    """The clock is set by somebody."""
    if not sys.platform.startswith("linux"):
        return
    # struct timex is 208 bytes on all 64-bit Linux; its first field asks for no change when it is 0.
    timex = ctypes.create_string_buffer(512)
    try:
        state = ctypes.CDLL(None, use_errno=True).adjtimex(timex)
    except (OSError, AttributeError) as problem:
        yield warn("clock", f"Whether it is synchronised cannot be told: {problem}.", "Look at `timedatectl`.")
        return
    if state == TIME_ERROR:
        cure = "timedatectl set-ntp true; deadlines and TLS need the right time."
        yield warn("clock", "It is not synchronised.", cure)
    elif state < 0:
        cure = "Look at `timedatectl`."
        yield warn("clock", f"Whether it is synchronised cannot be told: {os.strerror(ctypes.get_errno())}.", cure)
    else:
        yield ok("clock", "It is synchronised.")


def cgroup(patient: Patient) -> Iterator[Finding]:
    """Memory of engines can be bounded by the kernel."""
    if not sys.platform.startswith("linux"):
        return
    own = Path("/proc/self/cgroup")
    if patient.seen is not None and not patient.inside:
        own = Path(f"/proc/{int(patient.seen.get('pid') or 0)}/cgroup")
    try:
        line = next(line for line in own.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        cure = "Boot with the unified hierarchy (systemd.unified_cgroup_hierarchy=1)."
        yield warn("cgroup", "There is no cgroup v2: memory ceilings are watched, not enforced.", cure)
        return
    folder = Path("/sys/fs/cgroup") / line.removeprefix("0::").lstrip("/")
    if folder.name == "supervisor":
        folder = folder.parent
    cure = "Run it as a service (`supervisor service install`): its unit has Delegate=yes."
    if not os.access(folder / "cgroup.procs", os.W_OK) or not os.access(folder, os.W_OK):
        yield warn("cgroup", f"{folder} is not ours to divide: memory ceilings are watched, not enforced.", cure)
        return
    controllers: set[str] = set()
    with contextlib.suppress(OSError):
        controllers = set((folder / "cgroup.controllers").read_text().split())
    if missing := sorted({"memory", "pids"} - controllers):
        yield warn("cgroup", f"{folder} has no controller {' and '.join(missing)}.", cure)
    else:
        yield ok("cgroup", "Memory and processes of engines are bounded by the kernel.")


def _user() -> str:
    return str(os.geteuid()) if hasattr(os, "geteuid") else os.environ.get("USERNAME", "?")
