"""Misdeeds of an engine against others: the supervisor, the user, other engines. For engines/synthetic/misbehave.py.

Each answers with JSON: `managed`, the names of the attempts that worked, and `refused`, name -> errno of the others.
What an attempt does when it works is harmless on purpose, since it may be run on anybody's box.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import os
import resource
import signal
import socket
from collections.abc import Callable
from pathlib import Path

from engines.runtime.contract import Job
from engines.synthetic.misdeeds_life import hang
from protocol.engine_wire import OutputFile

# Ignored by default, so a victim without a handler does not notice.
HARMLESS = signal.SIGURG
PATIENCE_S = 2.0
_PTRACE_SEIZE = 0x4206  # does not stop the victim; our end detaches
# (x86_64, aarch64)
_CALLS = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "pidfd_open": (434, 434),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "tkill": (200, 130),
}


def _call(name: str, *args: int) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.syscall.restype = ctypes.c_long
    number = _CALLS[name][os.uname().machine == "aarch64"]
    result = int(libc.syscall(ctypes.c_long(number), *(ctypes.c_void_p(arg) for arg in args)))
    if result < 0:
        raise OSError(ctypes.get_errno(), name)
    return result


def _attempts(tries: dict[str, Callable[[], object]]) -> str:
    managed, refused = [], {}
    for name, attempt in tries.items():
        try:
            attempt()
        except TimeoutError:
            refused[name] = "no answer"
        except OSError as error:
            refused[name] = errno.errorcode.get(error.errno or 0, "?")
        else:
            managed.append(name)
    return json.dumps({"managed": managed, "refused": refused})


def _read(path: str, size: int = 64) -> bytes:
    with open(path, "rb") as file:
        # The kernel's other way to refuse: the file opens and is empty.
        if not (found := file.read(size)):
            raise OSError(errno.ENODATA, path)
        return found


# ---- the supervisor


def _memory_of(victim: int) -> None:
    maps = _read(f"/proc/{victim}/maps").split(b"-")[0]
    with open(f"/proc/{victim}/mem", "rb") as file:
        file.seek(int(maps, 16))
        file.read(8)


def _vm_read(victim: int) -> None:
    buffer = ctypes.create_string_buffer(8)
    here = (ctypes.c_void_p * 2)(ctypes.addressof(buffer), 8)
    # Address 0 is nobody's: EFAULT says that looking was allowed.
    there = (ctypes.c_void_p * 2)(0, 8)
    try:
        _call("process_vm_readv", victim, ctypes.addressof(here), 1, ctypes.addressof(there), 1, 0)
    except OSError as error:
        if error.errno != errno.EFAULT:
            raise


def _descriptor_of(victim: int) -> None:
    pidfd = _call("pidfd_open", victim, 0)
    try:
        os.close(_call("pidfd_getfd", pidfd, 0, 0))
    finally:
        os.close(pidfd)


def _spy(job: Job, argument: str) -> str:
    """Look into the process with this pid."""
    victim = int(argument)
    return _attempts(
        {
            "ptrace": lambda: _call("ptrace", _PTRACE_SEIZE, victim, 0, 0),
            "environment": lambda: _read(f"/proc/{victim}/environ"),
            "command line": lambda: _read(f"/proc/{victim}/cmdline"),
            "memory": lambda: _memory_of(victim),
            "process_vm_readv": lambda: _vm_read(victim),
            "descriptors": lambda: _descriptor_of(victim),
            "working folder": lambda: os.readlink(f"/proc/{victim}/cwd"),
        }
    )


def _signal(job: Job, argument: str) -> str:
    """Send a harmless signal to the process with this pid, by every call there is."""
    victim = int(argument)

    def by_pidfd() -> None:
        pidfd = _call("pidfd_open", victim, 0)
        try:
            _call("pidfd_send_signal", pidfd, int(HARMLESS), 0, 0)
        finally:
            os.close(pidfd)

    return _attempts(
        {
            "kill": lambda: os.kill(victim, HARMLESS),
            "tkill": lambda: _call("tkill", victim, int(HARMLESS)),
            "pidfd_send_signal": by_pidfd,
        }
    )


def _signal_parent(job: Job, argument: str) -> str:
    """Stop, then kill whoever is our parent (the warden, or the first process of the namespace); then hang."""
    for number in (signal.SIGSTOP, signal.SIGKILL):
        try:
            os.kill(os.getppid(), number)
        except OSError as error:
            os.write(2, f"{number}: {error}\n".encode())
    return hang(job, "")


def _stop_parent(job: Job, argument: str) -> str:
    """Stop whoever holds our leash, then hang."""
    try:
        os.kill(os.getppid(), signal.SIGSTOP)
    except OSError as error:
        os.write(2, f"{error}\n".encode())
    return hang(job, "")


def _meddle(job: Job, argument: str) -> str:
    """Change what the kernel thinks of the process with this pid, to what it thinks already."""
    victim = int(argument)

    def oom() -> None:
        path = f"/proc/{victim}/oom_score_adj"
        known = _read(path)
        with open(path, "wb", buffering=0) as file:
            file.write(known)

    return _attempts(
        {
            "nice": lambda: os.setpriority(os.PRIO_PROCESS, victim, os.getpriority(os.PRIO_PROCESS, victim)),
            "limits": lambda: resource.prlimit(victim, resource.RLIMIT_CORE),
            "affinity": lambda: os.sched_setaffinity(victim, os.sched_getaffinity(victim)),
            "oom score": oom,
        }
    )


# ---- the user


def _home(job: Job, argument: str) -> str:
    """Read this file, list its folder, and leave a file beside it; what was read is in the answer."""
    path = Path(argument)
    seen: list[str] = []
    told = json.loads(
        _attempts(
            {
                "read": lambda: seen.append(_read(argument, 4096).decode(errors="replace")),
                "list": lambda: os.listdir(path.parent),
                "write": lambda: path.with_name(f"{path.name}.left").write_bytes(b"x"),
                "remove": path.unlink,
            }
        )
    )
    return json.dumps(told | {"seen": seen})


def _leave(job: Job, argument: str) -> str:
    """Leave a file at each of these paths, separated by commas."""
    return _attempts({path: functools.partial(Path(path).write_bytes, b"x") for path in argument.split(",")})


def _sockets(job: Job, argument: str) -> str:
    """Reach TCPPORT,UDPPORT,UNIXPATH,ABSTRACTNAME of this box, and listen."""
    tcp, udp, path, abstract = argument.split(",")

    def reach(family: int, kind: int, address: object) -> None:
        with socket.socket(family, kind) as plug:
            plug.settimeout(PATIENCE_S)
            plug.connect(address)  # type: ignore[arg-type]
            plug.send(b"x")

    def listen() -> None:
        with socket.socket() as plug:
            plug.bind(("127.0.0.1", 0))
            plug.listen()

    return _attempts(
        {
            "TCP": lambda: reach(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", int(tcp))),
            "UDP": lambda: reach(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", int(udp))),
            "unix socket": lambda: reach(socket.AF_UNIX, socket.SOCK_STREAM, path),
            "abstract socket": lambda: reach(socket.AF_UNIX, socket.SOCK_STREAM, f"\0{abstract}"),
            "listen": listen,
            "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close(),
        }
    )


# ---- other engines and jobs


def _wreck(job: Job, argument: str) -> str:
    """Read, overwrite and remove this file of another engine's folder."""
    path = Path(argument)
    return _attempts(
        {
            "read": lambda: _read(argument),
            "list": lambda: os.listdir(path.parent),
            "overwrite": lambda: path.write_bytes(b"x"),
            "remove": path.unlink,
        }
    )


def _symlink(job: Job, argument: str) -> str:
    """PATH,SIZE: hand out a link to that file as this run's output."""
    target, size = argument.rsplit(",", 1)
    (job.folder / "loot.txt").symlink_to(target)
    job._record(OutputFile("loot.txt", "text/plain", int(size), "0" * 64))
    return "linked"


MISDEEDS: dict[str, Callable[[Job, str], str]] = {
    "spy": _spy,
    "signal": _signal,
    "signal-parent": _signal_parent,
    "stop-parent": _stop_parent,
    "meddle": _meddle,
    "home": _home,
    "leave": _leave,
    "sockets": _sockets,
    "wreck": _wreck,
    "symlink": _symlink,
}
