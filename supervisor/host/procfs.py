"""What /proc tells about a process, read so that a stuck process cannot make the reader stuck too.

Only files that the kernel fills without the process's memory lock are read: stat, statm, status, wchan, schedstat and
the lists of children. `cmdline`, `environ`, `maps` and `smaps` take that lock, and a process that hangs in the kernel
while it holds it (a page fault on a dead disk, a GPU driver's ioctl) would take the supervisor with it.
Every function answers None, "" or [] for a process that is gone and on systems without /proc.
"""

from __future__ import annotations

import functools
import os

import msgspec

ROOT = "/proc"
PAGE_BYTES = 4096 if not hasattr(os, "sysconf") else os.sysconf("SC_PAGE_SIZE")
TICKS_PER_S = 100 if not hasattr(os, "sysconf") else os.sysconf("SC_CLK_TCK")


class Stat(msgspec.Struct, frozen=True, kw_only=True):
    """One line of /proc/<pid>/stat, of a process or of a thread.

    Attributes:
        state: one letter: R runs, S sleeps, D sleeps and takes no signal, T stopped, t traced, Z dead, I idle.
        ticks: CPU time spent, in units of 1 / `TICKS_PER_S`.
        faults: pages it had to be given; grows while a mapped file is read in.
        started: ticks between the boot and its start; with the pid and the boot it names a process for good.
    """

    comm: str
    state: str
    parent: int
    session: int
    ticks: int
    faults: int
    started: int


def parse_stat(line: str) -> Stat | None:
    """Read one line of `stat`; None when it is not one. The name in parentheses may hold spaces and parentheses."""
    opening, closing = line.find("("), line.rfind(")")
    fields = line[closing + 2 :].split()
    if opening < 0 or closing < 0 or len(fields) < 20:
        return None
    try:
        return Stat(
            comm=line[opening + 1 : closing],
            state=fields[0],
            parent=int(fields[1]),
            session=int(fields[3]),
            faults=int(fields[7]) + int(fields[9]),
            ticks=int(fields[11]) + int(fields[12]),
            started=int(fields[19]),
        )
    except ValueError:
        return None


def stat(pid: int, thread: int | None = None) -> Stat | None:
    """The process as a whole, or one of its threads."""
    where = f"{ROOT}/{pid}/stat" if thread is None else f"{ROOT}/{pid}/task/{thread}/stat"
    return parse_stat(_text(where))


def threads(pid: int) -> list[int]:
    """Its threads, the first one first.

    The first has the process's own number. The numbers say nothing of the order otherwise:
    they wrap around (`kernel.pid_max`), and a thread may have a lower one than its process.
    """
    try:
        numbers = [int(name) for name in os.listdir(f"{ROOT}/{pid}/task")]
    except OSError:
        return []
    return sorted(numbers, key=lambda number: (number != pid, number))


def wchan(pid: int, thread: int | None = None) -> str:
    """The kernel function it waits in; "" when it runs or the kernel does not tell."""
    where = f"{ROOT}/{pid}/wchan" if thread is None else f"{ROOT}/{pid}/task/{thread}/wchan"
    name = _text(where).strip("\n\0 ")
    return "" if name == "0" else name


def ran_ns(pid: int, thread: int) -> int | None:
    """Nanoseconds that a thread has spent on a CPU; finer than the ticks of `stat`."""
    words = _text(f"{ROOT}/{pid}/task/{thread}/schedstat").split()
    return int(words[0]) if words else None


def own_number(pid: int) -> int | None:
    """The number under which a process knows itself, in its own pid namespace."""
    found = _status(pid, "NSpid:")
    return int(found.split()[-1]) if found else None


def real_uid(pid: int) -> int | None:
    """Real user id of a process."""
    found = _status(pid, "Uid:")
    return int(found.split()[0]) if found else None


def children(pid: int) -> list[int]:
    """Children of a process, the oldest first as long as one thread made them all."""
    found: list[int] = []
    for thread in threads(pid):
        found += [int(word) for word in _text(f"{ROOT}/{pid}/task/{thread}/children").split()]
    return found


def resident_bytes(pid: int) -> tuple[int, int]:
    """Resident memory of a process, and how much of it is shared (mapped files, shared memory)."""
    words = _text(f"{ROOT}/{pid}/statm").split()
    return (int(words[1]) * PAGE_BYTES, int(words[2]) * PAGE_BYTES) if len(words) > 2 else (0, 0)


def pids() -> list[int]:
    """Every process there is."""
    try:
        return [int(name) for name in os.listdir(ROOT) if name.isdigit()]
    except OSError:
        return []


@functools.cache
def boot_id() -> str:
    """Names this boot of the machine; "" where there is none."""
    return _text(f"{ROOT}/sys/kernel/random/boot_id").strip()


def _status(pid: int, field: str) -> str:
    for line in _text(f"{ROOT}/{pid}/status").splitlines():
        if line.startswith(field):
            return line[len(field) :]
    return ""


def _text(path: str) -> str:
    # Not Path.read_text: hundreds of these are read in one go on the trio thread, and this takes a third of the time.
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError):
        return ""
    try:
        parts = []
        while part := os.read(descriptor, 2**16):
            parts.append(part)
    except OSError:  # ESRCH: it died between open and read
        return ""
    finally:
        os.close(descriptor)
    return b"".join(parts).decode(errors="replace")
