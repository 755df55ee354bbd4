"""Ceilings on what an engine may use: its cgroup, and how many processes and threads it may have."""

from __future__ import annotations

import errno
import os
import resource

from engines.lockdown import kernel

# Before, the limit counted all processes of the user on the box, whichever user namespace they were in.
_COUNTED_BY_NAMESPACE = (5, 14)
# A user of their own but no namespace: all engines together are counted.
_ENGINES_AT_ONCE = 8


def join(cgroup: str) -> str:
    """Move this process into a cgroup, with all it will start; the verdict."""
    try:
        fd = os.open(os.path.join(cgroup, "cgroup.procs"), os.O_RDWR | os.O_CLOEXEC)
        try:
            os.write(fd, b"0")
        finally:
            os.close(fd)
        with open(os.path.join(cgroup, "cgroup.procs")) as file:
            inside = str(os.getpid()) in file.read().split()
    except OSError as error:
        return kernel.word(error)
    return "verified" if inside else "failed"


def counted(cgroup: str) -> bool:
    """Whether the kernel bounds the number of processes in a cgroup, as its file says."""
    try:
        with open(os.path.join(cgroup, "pids.max")) as file:
            return file.read().strip().isdigit()
    except OSError:
        return False


def processes(most: int, *, own_namespace: bool, own_user: bool) -> str:
    """Allow at most so many processes and threads; the verdict, from trying one too many.

    Root is never held by this limit. Nor can it be put on a person's own user: whoever has a thousand threads open in
    a browser could start no engine. A user namespace of one's own counts for itself since Linux 5.14; the limit has to
    be set inside, for one that was set before counts the whole user again.
    """
    if os.geteuid() == 0:
        return "unavailable(root)"
    if not own_user and (not own_namespace or _release() < _COUNTED_BY_NAMESPACE):
        return "unavailable(shared user)"
    if not own_namespace:
        most *= _ENGINES_AT_ONCE
    ceiling = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    if ceiling != resource.RLIM_INFINITY:
        most = min(most, ceiling)
    resource.setrlimit(resource.RLIMIT_NPROC, (1, most))
    try:
        held = _cannot_fork()
    finally:
        resource.setrlimit(resource.RLIMIT_NPROC, (most, most))
    return "verified" if held else "failed"


def _cannot_fork() -> bool:
    try:
        pid = os.fork()
    except OSError as error:
        return error.errno == errno.EAGAIN
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
    return False


def _release() -> tuple[int, ...]:
    words = os.uname().release.split("-")[0].split(".")
    return tuple(int(word) for word in words[:2] if word.isdigit())
