"""A cgroup per instance, where somebody gave us the right to make them.

Theory of operation. A cgroup is the only thing that holds a whole family of processes whatever they do, that ends them
all at once (`cgroup.kill`), that bounds its number whoever its user is (`pids.max`), and that stops them at a memory
ceiling without the kernel choosing another victim (`memory.max`, with `memory.oom.group` so that no half of an engine
survives). We may make one below the cgroup that we run in when that one is writable by us: a systemd unit with
`Delegate=yes`, a user's session, a container's root. A controller can be handed down only by a cgroup that holds no
process itself, so we first move into a leaf of our own, and only when we are the only ones there: other people's
processes are never moved.
Nothing here is needed to end an engine (the warden does that); it is a second rope, and the only hard memory limit.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import secrets
import time
from collections.abc import Mapping
from pathlib import Path

log = logging.getLogger(__name__)

ROOT = Path("/sys/fs/cgroup")
# Where we go ourselves when controllers have to be handed down.
OUR_LEAF = "supervisor"
_NAME_PREFIX = "bulkhead-"
# Removing waits for the last process to be gone; a stuck one keeps its cgroup.
_REMOVE_S = 2.0
_STEP_S = 0.005
# Processes and threads of one engine. Libraries make a pool of one thread per core each, some of them several.
_PROCESSES, _PROCESSES_PER_CORE = 512, 16
_CONTROLLERS = ("memory", "pids")
_OURS = 0  # a cgroup.procs takes 0 for "the writer"


class Cgroup:
    """One cgroup of ours. Made by `Cgroups.make`, or over the path of an earlier life's.

    Attributes:
        path: its folder; what joins writes its pid into `path / "cgroup.procs"`, before it forks.
        limited: whether the kernel enforces a memory ceiling on it.
    """

    def __init__(self, path: Path, *, limited: bool = False) -> None:
        self.path = path
        self.limited = limited

    def join(self, pid: int = _OURS) -> bool:
        """Move a process in (children it has already stay where they are); False when the kernel refuses."""
        return _write(self.path / "cgroup.procs", str(pid))

    def pids(self) -> list[int]:
        """Its processes, those of its sub-cgroups included."""
        found = []
        with contextlib.suppress(OSError):
            for folder, _, _ in os.walk(self.path):
                found += [int(word) for word in _read(Path(folder) / "cgroup.procs").split()]
        return found

    def kill(self) -> bool:
        """SIGKILL for all in it, at once; False when the kernel does not have that (before 5.14)."""
        return _write(self.path / "cgroup.kill", "1")

    def oom_kills(self) -> int:
        """How many of its processes died at the memory ceiling."""
        return _fields(self.path / "memory.events").get("oom_kill", 0)

    def memory_bytes(self) -> int:
        """What it holds now, page cache included; 0 without a memory controller."""
        text = _read(self.path / "memory.current").strip()
        return int(text) if text.isdigit() else 0

    def remove(self, patience_s: float = _REMOVE_S) -> bool:
        """Remove it once it is empty; blocks at most `patience_s`. False when somebody is still in it."""
        until = time.monotonic() + patience_s
        while True:
            try:
                for folder, _, _ in os.walk(self.path, topdown=False):
                    _remove_folder(Path(folder))
                return not self.path.exists()
            except OSError as error:
                if error.errno not in (errno.EBUSY, errno.ENOTEMPTY) or time.monotonic() >= until:
                    return not self.path.exists()
            time.sleep(_STEP_S)


class Cgroups:
    """Where we may make cgroups. Made by `find`.

    Attributes:
        base: new cgroups become its children.
        limits: whether they can have a memory ceiling.
        counts: whether they can have a ceiling on processes and threads.
    """

    def __init__(self, base: Path, *, limits: bool, counts: bool = False) -> None:
        self.base = base
        self.limits = limits
        self.counts = counts

    @classmethod
    def find(cls, root: Path = ROOT, own: Path = Path("/proc/self/cgroup")) -> Cgroups | None:
        """The place below our own cgroup; None when there is no cgroup v2 or it is not ours to divide.

        May move this process into a leaf of its own (see the module's theory); call it before children are started.
        """
        base = _own_cgroup(root, own)
        if base is None or not os.access(base, os.W_OK) or not os.access(base / "cgroup.procs", os.W_OK):
            return None
        if base.name == OUR_LEAF and os.access(base.parent / "cgroup.procs", os.W_OK):
            base = base.parent  # an earlier start in this unit moved us here
        handed = _hand_down(base)
        found = cls(base, limits="memory" in handed, counts="pids" in handed)
        if not found._works():
            return None
        found.remove_dead()
        return found

    def remove_dead(self) -> int:
        """Remove the empty cgroups of supervisors that are gone; how many. They cost memory of the kernel's."""
        count = 0
        for path in self.base.glob(f"{_NAME_PREFIX}*"):
            maker = re.match(rf"{_NAME_PREFIX}(\d+)-", path.name)
            if maker is None or os.path.exists(f"/proc/{maker[1]}") or _read(path / "cgroup.procs").strip():
                continue
            with contextlib.suppress(OSError):
                _remove_folder(path)
                count += 1
        return count

    def make(self, name: str, memory_bytes: int = 0, *, processes: int | None = None) -> Cgroup | None:
        """Make a cgroup for an instance; None when the kernel refuses, which is no reason not to start it.

        Args:
            name: for people, of letters, digits, dots and dashes; made unique, since supervisors may share a base.
            memory_bytes: ceiling for everything in it; 0 sets none.
            processes: how many processes and threads; None means `most_processes`.
        """
        path = self.base / f"{_NAME_PREFIX}{name}-{secrets.token_hex(4)}"
        try:
            _make_folder(path)
        except OSError as error:
            log.warning("No cgroup for %s: %s.", name, error.strerror)
            return None
        limited = bool(memory_bytes) and self.limits and _write(path / "memory.max", str(memory_bytes))
        if limited:
            # Without this an engine at its ceiling pushes its pages into swap and slows the whole box down.
            _write(path / "memory.swap.max", "0")
            _write(path / "memory.oom.group", "1")
        if self.counts:
            _write(path / "pids.max", str(processes or most_processes()))
        return Cgroup(path, limited=limited)

    def _works(self) -> bool:
        """Try it: some folders are writable and still not ours to divide."""
        trial = self.base / f"{_NAME_PREFIX}trial-{os.getpid()}"
        try:
            _make_folder(trial)
            _remove_folder(trial)
        except OSError:
            return False
        return True


def most_processes() -> int:
    """How many processes and threads an engine may have on this box."""
    return _PROCESSES + _PROCESSES_PER_CORE * (os.cpu_count() or 1)


def is_ours(path: Path) -> bool:
    """Whether a folder is a cgroup that a supervisor made for an instance."""
    return path.name.startswith(_NAME_PREFIX) and (path / "cgroup.procs").exists()


def system_oom_kills(vmstat: Path = Path("/proc/vmstat")) -> int | None:
    """How many processes the kernel killed for want of memory since the boot; None when it does not tell."""
    return _fields(vmstat).get("oom_kill")


def _own_cgroup(root: Path, own: Path) -> Path | None:
    """The folder of our cgroup in the v2 tree, be it the only one or one beside v1."""
    mount = next((place for place in (root, root / "unified") if (place / "cgroup.controllers").exists()), None)
    line = next((line for line in _read(own).splitlines() if line.startswith("0::")), None)
    if mount is None or line is None:
        return None
    path = mount / line[3:].lstrip("/")
    return path if (path / "cgroup.procs").exists() else None


def _hand_down(base: Path) -> set[str]:
    """Let children of `base` have ceilings; returns the controllers that they have."""
    there = _read(base / "cgroup.controllers").split()
    wanted = [name for name in _CONTROLLERS if name in there]

    def handed() -> set[str]:
        for name in wanted:  # works without a process of its own, and in the root of the tree
            _write(base / "cgroup.subtree_control", f"+{name}")
        return {name for name in _read(base / "cgroup.subtree_control").split() if name in wanted}

    found = handed()
    inside = {int(word) for word in _read(base / "cgroup.procs").split()}
    if found == set(wanted) or inside != {os.getpid()}:
        return found  # all there is, or somebody else lives here, who is not ours to move
    leaf = base / OUR_LEAF
    with contextlib.suppress(OSError):
        _make_folder(leaf)
    if not _write(leaf / "cgroup.procs", str(os.getpid())):
        return found
    if not (found := handed()):
        _write(base / "cgroup.procs", str(os.getpid()))  # back where we were found
    return found


def _make_folder(path: Path) -> None:
    """The kernel furnishes it; a test's stand-in for the kernel takes this function's place."""
    path.mkdir()


def _remove_folder(path: Path) -> None:
    """Only an empty one goes; the kernel's own files in it do not count."""
    path.rmdir()


def _fields(path: Path) -> Mapping[str, int]:
    """A file of "name number" lines."""
    pairs = (line.split() for line in _read(path).splitlines())
    return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _write(path: Path, text: str) -> bool:
    """One write, as cgroupfs wants it; never creates a file."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError:
        return False
    try:
        os.write(descriptor, text.encode())
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return True
