"""Finds and ends what an earlier life of this supervisor left behind.

Theory of operation. A supervisor that is killed cuts its children's lifelines, and their wardens end them within
milliseconds. What is left after that is rare and matters: a process that hung in the kernel and came back, a child
without a warden, a folder of gigabytes. So each child is written down in a small file while it lives, and the next
life goes through these files before it claims any memory. A pid alone proves nothing, because the kernel gives it to
somebody else; pid, start time and boot together name one process for good. Processes that lost their leader are
found by two more signs: they are in a cgroup that we made for it, or they are orphans of our own user that work in
our folder of scratch folders. Everything else is left alone.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import secrets
import signal
import socket
import stat
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any

import msgspec
import psutil  # type: ignore[import-untyped]

from supervisor.host import family, procfs, removal
from supervisor.host.cgroups import Cgroup, is_ours

log = logging.getLogger(__name__)

# A killed process is gone within milliseconds; one that is not hangs in the kernel, and waiting longer helps nobody.
WAIT_S = 5.0
# How often a family is looked through for processes that it started while it was being stopped.
_ROUNDS = 5
_SUFFIX = ".json"
# Who adopts the orphans of a service or of a session, when it is not the first process of the machine.
_ADOPTERS = frozenset({"systemd", "init", "launchd", "tini", "dumb-init", "catatonit", "docker-init"})


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """One child that was started.

    Attributes:
        started: ticks from the boot to its start (Linux), else its start in seconds since the epoch.
        boot: names the boot; "" where the start time alone is enough.
        scratch: its folder; "" for a child without one.
        cgroup: path of the cgroup made for it; "" without one.
    """

    pid: int
    started: float
    boot: str = ""
    name: str = ""
    scratch: str = ""
    cgroup: str = ""


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """One process of an earlier life that was still there.

    Attributes:
        why: how it was recognised: "recorded", "family", "cgroup" or "orphan".
        gone: False when it was still there `WAIT_S` after SIGKILL.
    """

    pid: int
    name: str
    why: str
    gone: bool


class Swept(msgspec.Struct, frozen=True, kw_only=True):
    """What a sweep found.

    Attributes:
        processes: those that were ended, or could not be.
        folders, sockets: how many were removed.
    """

    processes: tuple[Found, ...] = ()
    folders: int = 0
    sockets: int = 0

    @property
    def unkillable(self) -> tuple[Found, ...]:
        """Those that are still there: what they hold (GPU memory) is still taken."""
        return tuple(found for found in self.processes if not found.gone)

    def describe(self) -> str:
        """One sentence for people; "" when nothing was found."""
        parts = []
        if self.processes:
            names = ", ".join(f"{found.name or 'a process'} (pid {found.pid})" for found in self.processes)
            parts.append(f"ended {names}")
        if self.unkillable:
            parts.append(f"{len(self.unkillable)} of them cannot be ended and need a reboot")
        if self.folders:
            parts.append(f"removed {self.folders} scratch folders")
        if self.sockets:
            parts.append(f"removed {self.sockets} stale sockets")
        return f"Left by an earlier life: {'; '.join(parts)}." if parts else ""


def start_of(pid: int) -> float | None:
    """When a process started, in the units of `Record.started`; None when it is gone or a zombie."""
    if procfs.boot_id():
        found = procfs.stat(pid)
        return None if found is None or found.state in "ZXx" else float(found.started)
    try:  # no /proc: macOS, Windows
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.Error:
        return None


class Ledger:
    """The children of this life, on disk. A disk that refuses costs the record, never the child."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def spawned(self, pid: int, *, name: str, scratch: Path | None = None, cgroup: Path | None = None) -> Path | None:
        """Write a child down right after its start; returns the record, for `ended`."""
        started = start_of(pid)
        if started is None:
            return None
        record = Record(
            pid=pid,
            started=started,
            boot=procfs.boot_id(),
            name=name,
            scratch=str(scratch or ""),
            cgroup=str(cgroup or ""),
        )
        path = self.folder / f"{pid}-{secrets.token_hex(4)}{_SUFFIX}"
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            with os.fdopen(descriptor, "wb") as file:
                file.write(msgspec.json.encode(record))
        except OSError as error:
            log.warning("The start of %s could not be written down: %s.", name, error.strerror)
            self.ended(path)  # a full disk may have taken the name and not the record
            return None
        return path

    def ended(self, record: Path | None) -> None:
        """Strike a child off: it was reaped."""
        if record is not None:
            with contextlib.suppress(OSError):
                record.unlink()

    def records(self) -> list[tuple[Path, Record | None]]:
        """Every record with its file; None for a file that is no record (a disk that was full)."""
        found: list[tuple[Path, Record | None]] = []
        with contextlib.suppress(OSError):
            for path in sorted(self.folder.iterdir()):
                record = None
                with contextlib.suppress(OSError, msgspec.MsgspecError):
                    record = msgspec.json.decode(path.read_bytes(), type=Record)
                found.append((path, record))
        return found

    def recording(self, spawn: Callable[..., AbstractAsyncContextManager[Any]]) -> Callable[..., Any]:
        """`spawn` (as `open_child`), with each child written down while it lives.

        A child that could not be killed stays in the ledger: the next life has to know of it.
        """

        @contextlib.asynccontextmanager
        async def recorded(spec: Any, **options: Any) -> AsyncIterator[Any]:
            record: Path | None = None
            child: Any = None
            try:
                async with spawn(spec, **options) as child:
                    record = self.spawned(child.pid, name=spec.name, scratch=spec.cwd, cgroup=spec.cgroup)
                    yield child
            finally:
                if child is not None and not (child.exit is not None and child.exit.unkillable):
                    self.ended(record)

        return recorded


def sweep(ledger: Ledger, *, scratch: Iterable[Path] = (), sockets: Iterable[Path] = ()) -> Swept:
    """End and remove what earlier lives left; call it once, at the start, while the state folder is held alone.

    Args:
        scratch: folders of which everything in them is of earlier lives; orphans are recognised by working there.
        sockets: unix sockets that are removed when nobody listens on them.

    Blocks: a few milliseconds when there is nothing, at most `WAIT_S` + the time of removing folders.
    """
    scratch = [folder.absolute() for folder in scratch]
    suspects = _recorded(ledger)
    for pid in _orphans(scratch):
        suspects.setdefault(pid, ("", "orphan"))
    processes = _end(suspects)
    gone = {found.pid for found in processes if found.gone}
    for path, record in ledger.records():
        group = None if record is None else _group(record)
        held = group is not None and not group.remove()
        if record is None or (not held and (record.pid in gone or not _is_still(record))):
            ledger.ended(path)
    swept = Swept(
        processes=tuple(processes),
        folders=sum(_empty(folder) for folder in scratch),
        sockets=sum(_remove_stale(path) for path in sockets),
    )
    if text := swept.describe():
        log.warning("%s", text)
    return swept


# ---- recognising


def _is_still(record: Record) -> bool:
    """Whether the process of a record is there: the same number, the same start, the same boot."""
    return record.boot == procfs.boot_id() and record.pid > 1 and start_of(record.pid) == record.started


def _recorded(ledger: Ledger) -> dict[int, tuple[str, str]]:
    """pid -> name and sign, of recorded processes, their families and the members of their cgroups."""
    found: dict[int, tuple[str, str]] = {}
    for _, record in ledger.records():
        if record is None or record.boot != procfs.boot_id():
            continue
        if _is_still(record):
            found[record.pid] = (record.name, "recorded")
            for pid in family.members(record.pid):
                found.setdefault(pid, (record.name, "family"))
        if (group := _group(record)) is not None:
            for pid in group.pids():
                found.setdefault(pid, (record.name, "cgroup"))
    return found


def _group(record: Record) -> Cgroup | None:
    """The cgroup of a record, if it is still there and one that we made."""
    path = Path(record.cgroup)
    return Cgroup(path) if record.cgroup and is_ours(path) else None


def _orphans(folders: list[Path]) -> list[int]:
    """Processes of our user that init adopted and that work below one of `folders`."""
    if not folders:
        return []
    ours = os.getuid() if hasattr(os, "getuid") else None
    found = []
    for pid in procfs.pids():
        try:
            works_in = Path(os.readlink(f"/proc/{pid}/cwd"))
        except OSError:
            continue  # not ours, or gone
        if not any(works_in.is_relative_to(folder) for folder in folders):
            continue
        # Root's engines may run as another user; everybody else's are their own.
        if ours == 0 or procfs.real_uid(pid) == ours:
            if _is_orphan(pid):
                found += family.members(pid)
    return found


def _lineage() -> set[int]:
    """We ourselves and those who started us: never ended, whatever the signs say."""
    found, pid = set(), os.getpid()
    while pid > 0 and pid not in found:
        found.add(pid)
        seen = procfs.stat(pid)
        pid = seen.parent if seen is not None else 0
    return found | {0, 1}


def _is_orphan(pid: int) -> bool:
    seen = procfs.stat(pid)
    if seen is None or seen.state in "ZXx":
        return False
    parent = procfs.stat(seen.parent)
    return seen.parent <= 1 or parent is None or parent.comm in _ADOPTERS


# ---- ending


def _end(suspects: dict[int, tuple[str, str]]) -> list[Found]:
    """SIGKILL for each and for what they started; waits until they are gone, at most `WAIT_S`.

    They are stopped first: a family that forks while it is ended one by one would get away.
    """
    until = time.monotonic() + WAIT_S
    spared = _lineage()
    starts: dict[int, float] = {}
    for _ in range(_ROUNDS):
        for pid in list(suspects):
            for member in family.members(pid):
                suspects.setdefault(member, (suspects[pid][0], "family"))
        new = {pid: start_of(pid) for pid in suspects if pid not in starts and pid not in spared}
        fresh = {pid: started for pid, started in new.items() if started is not None}
        if not fresh:
            break
        for pid, started in fresh.items():
            _signal(pid, started, "SIGSTOP")
        starts.update(fresh)
    for pid, started in starts.items():
        _signal(pid, started, "SIGKILL")
    return [
        Found(pid=pid, name=suspects[pid][0], why=suspects[pid][1], gone=_wait_gone(pid, started, until))
        for pid, started in starts.items()
    ]


def _signal(pid: int, started: float, name: str) -> None:
    """Signal this very process: the number is checked after it was pinned. Without pidfds, right before."""
    number = getattr(signal, name, signal.SIGTERM)
    try:
        pidfd = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else -1
    except OSError:
        return
    try:
        if start_of(pid) != started:
            return
        if pidfd >= 0:
            signal.pidfd_send_signal(pidfd, number)
        else:
            os.kill(pid, number)
    except OSError as error:
        log.warning("pid %d of an earlier life could not be signalled: %s.", pid, error.strerror)
    finally:
        if pidfd >= 0:
            os.close(pidfd)


def _wait_gone(pid: int, started: float, until: float) -> bool:
    while start_of(pid) == started:
        if time.monotonic() >= until:
            return False
        time.sleep(0.002)
    return True


# ---- removing


def _empty(folder: Path) -> int:
    """Remove what is in a folder, which engines may have prepared; returns how many entries are gone."""
    try:
        names = os.listdir(folder)
    except OSError:
        return 0
    return sum(removal.remove_tree(folder / name) for name in names)


def _remove_stale(path: Path) -> bool:
    """Remove a socket on which nobody listens."""
    try:
        if not stat.S_ISSOCK(path.lstat().st_mode):
            return False
    except OSError:
        return False
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(0.2)
        try:
            probe.connect(str(path))
        except OSError as error:
            if error.errno not in (errno.ECONNREFUSED, errno.ENOENT):
                return False
        else:
            return False
    with contextlib.suppress(OSError):
        path.unlink()
        return True
    return False
