"""What a misbehaving engine may have left behind or touched: processes, files, and things laid out to be touched.

Nothing is believed of the engine. Its processes are found by a mark in their environment, which every child of theirs
inherits. What it must not reach are canaries: a file of the user's and one of another engine's, readable for everybody
as files go, listeners of ours, and this very process.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import socket
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NamedTuple

import psutil  # type: ignore[import-untyped]
import trio

# Ignored by default, and what the kit's engine sends.
HARMLESS = getattr(signal, "SIGURG", None)
_STRAYS = ("/dev/shm", "/tmp", "/var/tmp")
_LINUX = sys.platform.startswith("linux")


class Trace(NamedTuple):
    """A process, so that a later one with its pid is not taken for it."""

    pid: int
    began: float


def marked(name: str, value: str) -> set[Trace]:
    """Living processes with this variable in their environment; blocks for some milliseconds."""
    return {Trace(process.pid, process.create_time()) for process in _with(name, value)}


def _with(name: str, value: str) -> Iterator[psutil.Process]:
    for pid in psutil.pids():
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(pid)
            if process.environ().get(name) == value and process.status() != psutil.STATUS_ZOMBIE:
                process.create_time()
                yield process


def alive(traces: set[Trace]) -> set[Trace]:
    """Those that still live."""
    found = set()
    for trace in traces:
        with contextlib.suppress(psutil.Error, OSError):
            process = psutil.Process(trace.pid)
            if process.create_time() == trace.began and process.status() != psutil.STATUS_ZOMBIE:
                found.add(trace)
    return found


def files_below(folder: Path) -> list[str]:
    """Everything below a folder that is not a folder."""
    found = []
    for where, folders, names in os.walk(folder):
        names += [name for name in folders if os.path.islink(os.path.join(where, name))]
        found += [os.path.relpath(os.path.join(where, name), folder) for name in names]
    return found


class Ourselves(NamedTuple):
    """What the kernel thinks of this process; none of it may change."""

    nice: int
    tracer: str
    oom_score_adj: str
    affinity: tuple[int, ...]

    @classmethod
    def now(cls) -> Ourselves:
        """Read it."""
        if not _LINUX:
            return cls(os.getpriority(os.PRIO_PROCESS, 0), "0", "", ())
        status = Path("/proc/self/status").read_text()
        tracer = next((line.split()[1] for line in status.splitlines() if line.startswith("TracerPid:")), "0")
        adj = Path("/proc/self/oom_score_adj").read_text().strip()
        return cls(os.getpriority(os.PRIO_PROCESS, 0), tracer, adj, tuple(sorted(os.sched_getaffinity(0))))


class Canaries:
    """What one case lays out. Made by `open_canaries` only."""

    def __init__(self, folder: Path) -> None:
        self.token = secrets.token_hex(4)
        self.touched: list[str] = []
        self._home = folder / "home"
        self.secret = self._home / "secret.txt"
        self._words = f"the user's own words {secrets.token_hex(16)}\n"
        self.neighbours = folder / "instances" / "another" / "i1"
        self._theirs = self.neighbours / "work.bin"
        names = [*_STRAYS, os.path.expanduser("~")]
        self._strays = [Path(name) / f".bh-{self.token}" for name in names if os.path.isdir(name)]
        self._before = Ourselves.now()
        self._addresses = ""

    def plant(self) -> None:
        """Lay out the files; blocks. Everybody may touch them as far as file modes go: the sandbox is to refuse."""
        self._home.mkdir(mode=0o777)
        self._home.chmod(0o777)
        self.secret.write_text(self._words)
        self.secret.chmod(0o666)
        self.neighbours.mkdir(parents=True)
        self.neighbours.parent.chmod(0o777)
        self.neighbours.chmod(0o777)
        self._theirs.write_text(self._words)
        self._theirs.chmod(0o666)

    async def listen(self, nursery: trio.Nursery, folder: Path) -> None:
        """Open the listeners; whoever reaches one is noted."""
        plugs = [trio.socket.socket(), trio.socket.socket(type=socket.SOCK_DGRAM)]
        for plug in plugs:
            await plug.bind(("127.0.0.1", 0))
        path, abstract = str(folder / "plug"), f"bh-{self.token}"
        if _LINUX:
            for address in (path, f"\0{abstract}"):
                plug = trio.socket.socket(socket.AF_UNIX)
                await plug.bind(address)
                plugs.append(plug)
            os.chmod(path, 0o777)
        for plug in plugs:
            if plug.type != socket.SOCK_DGRAM:
                plug.listen()
        names = ("TCP connection", "datagram", "connection to a unix socket", "connection to an abstract socket")
        for name, plug in zip(names, plugs, strict=False):
            nursery.start_soon(self._hear, name, plug)
        ports = [plug.getsockname()[1] for plug in plugs[:2]]
        self._addresses = f"{ports[0]},{ports[1]},{path},{abstract}"

    async def _hear(self, name: str, plug: trio.socket.SocketType) -> None:
        with plug:
            if plug.type == socket.SOCK_DGRAM:
                while True:
                    await plug.recvfrom(64)
                    self.touched.append(f"a {name} reached us")
            while True:
                theirs, _ = await plug.accept()
                theirs.close()
                self.touched.append(f"a {name} reached us")

    async def hear_signals(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Note signals that the kit's engine sends; only one case at a time may."""
        if HARMLESS is None:
            task_status.started()
            return
        with trio.open_signal_receiver(HARMLESS) as signals:
            task_status.started()
            async for number in signals:
                self.touched.append(f"{signal.Signals(number).name} reached the supervisor")

    def fill_in(self, prompt: str) -> str:
        """Put the canaries' addresses into a prompt."""
        return prompt.format(
            victim=os.getpid(),
            secret=self.secret,
            secret_size=len(self._words),
            neighbour=self._theirs,
            sockets=self._addresses,
            strays=",".join(map(str, self._strays)),
        )

    def knows(self, text: str) -> bool:
        """Whether a text gives away the secret."""
        return self._words.strip() in text

    def harmed(self) -> list[str]:
        """What was touched, in words; blocks. Removes what was left where it must not be."""
        found = list(self.touched)
        for what, path in (("the user's file", self.secret), ("another engine's file", self._theirs)):
            try:
                if path.read_text() != self._words:
                    found.append(f"{what} was changed")
            except OSError as error:
                found.append(f"{what} is gone ({error.strerror})")
        if extra := [name for name in os.listdir(self._home) if name != self.secret.name]:
            found.append(f"new in the user's folder: {', '.join(extra)}")
        for path in self._strays:
            if path.exists():
                found.append(f"{path.parent} was written to")
                path.unlink()
        for name, before, after in zip(Ourselves._fields, self._before, Ourselves.now(), strict=True):
            if before != after:
                found.append(f"our {name} went from {before} to {after}")
        return found


@contextlib.asynccontextmanager
async def open_canaries(folder: Path, *, sockets: bool, signals: bool) -> AsyncIterator[Canaries]:
    """Lay out the canaries of one case below its folder; leaving the block closes the listeners."""
    canaries = Canaries(folder)
    async with trio.open_nursery() as nursery:
        if sockets:
            await canaries.listen(nursery, folder)
        if signals:
            await nursery.start(canaries.hear_signals)
        yield canaries
        nursery.cancel_scope.cancel()
