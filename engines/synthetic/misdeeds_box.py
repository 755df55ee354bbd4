"""Misdeeds of an engine against the box: its memory, disk and processes. For engines/synthetic/misbehave.py."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from engines.runtime.contract import Job
from engines.synthetic.misdeeds_life import LONGEST_S, TICK_S, hang

MOST_PROCESSES = 300
MOST_DISK_MIB = 4096


def grow(mib: int) -> list[bytearray]:
    """Touch so many MiB, page by page, so that they are resident."""
    held = []
    for _ in range(mib):
        block = bytearray(2**20)
        block[::4096] = b"x" * 256
        held.append(block)
    return held


_kept: list[bytearray] = []


def _memory(job: Job, argument: str) -> str:
    """Grow by so many MiB, with progress, and keep them for ever."""
    for n in range(int(argument or 64)):
        _kept.extend(grow(1))
        job.progress(n + 1, None, "grow")
        job.check_cancelled()
    return f"holds {len(_kept)} MiB"


def _hoard(job: Job, argument: str) -> str:
    """Grow by so many MiB and sit on them, with progress all the time: only a ceiling on memory ends this."""
    _memory(job, argument)
    return _sit(job)


def _disk(job: Job, argument: str) -> str:
    """Write so many MiB into its own folder and sit on them, with progress: only a ceiling on disk ends this."""
    with Path("filler").open("wb", buffering=0) as file:
        for n in range(min(int(argument or 64), MOST_DISK_MIB)):
            file.write(os.urandom(2**10) * 2**10)
            job.progress(n + 1, None, "fill")
            job.check_cancelled()
    return _sit(job)


def _disk_many(job: Job, argument: str) -> str:
    """As `_disk`, in files of 1 MiB: no limit on the size of one file stops this."""
    for n in range(min(int(argument or 64), MOST_DISK_MIB)):
        Path(f"filler{n}").write_bytes(os.urandom(2**10) * 2**10)
        job.progress(n + 1, None, "fill")
        job.check_cancelled()
    return _sit(job)


def _sit(job: Job) -> str:
    for n in range(int(LONGEST_S / TICK_S)):
        job.progress(n + 1, None, "sit")
        if job.cancelled.wait(TICK_S):
            job.check_cancelled()
    return "sat"


def _descriptors(job: Job, argument: str) -> str:
    """Open so many descriptors and keep them."""
    _open.extend(os.open(os.devnull, os.O_RDONLY) for _ in range(int(argument or 100)))
    return f"holds {len(_open)} descriptors"


_open: list[int] = []


# ---- processes


def _linger() -> None:
    """What a stray process does: nothing, for a bounded time."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(LONGEST_S)
    while True:
        signal.pause()


def _fork(job: Job, argument: str) -> str:
    """Leave a grandchild in a session of its own that holds the wire open; answer with its pid.

    With the argument "exit" the engine then ends at once, and the pipe stays open without it.
    """
    pid = os.fork()
    if pid == 0:
        os.setsid()
        _linger()
    return _go_on(pid, argument)


def _daemon(job: Job, argument: str) -> str:
    """Leave a daemon by the book: fork, new session, fork again, a folder and descriptors of its own."""
    told, tell = os.pipe()
    middle = os.fork()
    if middle == 0:
        os.setsid()
        if os.fork():
            os._exit(0)
        os.chdir("/")
        os.write(tell, str(os.getpid()).encode())
        os.closerange(3, 64)
        _linger()
    os.waitpid(middle, 0)
    return _go_on(int(os.read(told, 32)), argument)


def _go_on(pid: int, argument: str) -> str:
    sys.stderr.write(f"grandchild {pid}\n")
    if argument == "exit":
        os._exit(9)
    return str(pid)


def _fork_bomb(job: Job, argument: str) -> str:
    """Every process forks two more, in sessions of their own, until there are so many; then the engine hangs.

    The count is a pipe with one byte for each process that may still be made, so the bomb cannot outgrow it, here or
    where nothing contains it.
    """
    left, allow = os.pipe()
    os.write(allow, b"x" * min(int(argument or 100), MOST_PROCESSES))
    os.close(allow)
    if _multiply(left):
        _linger()
    return hang(job, "")


def _multiply(left: int) -> bool:
    """Fork while there are bytes left; whether this is one of the new processes."""
    made, new = 0, False
    while made < 2 and os.read(left, 1):
        if os.fork():
            made += 1
            continue
        made, new = 0, True
        os.setsid()
        time.sleep(TICK_S)
    return new


MISDEEDS: dict[str, Callable[[Job, str], str]] = {
    "memory": _memory,
    "hoard": _hoard,
    "disk": _disk,
    "disk-many": _disk_many,
    "descriptors": _descriptors,
    "fork": _fork,
    "daemon": _daemon,
    "fork-bomb": _fork_bomb,
}
