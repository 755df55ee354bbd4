"""Stands in for an engine's boot.py: tries everything that an engine must not, and what it must, and says what came.

    python attacks.py ROOT MODULE '{"victim": PID, "private": FILE, …}'

Each line of the table is "open" or "denied"; run by the real launcher in its locked-down process. What is written to
folders that may be private ones ("left in …") is judged by the caller, who looks for it outside.
"""

import ctypes
import errno
import json
import mmap
import os
import resource
import signal
import socket
import sys
import threading

given = json.loads(sys.argv[3])
victim, private, readable, roots = given["victim"], given["private"], given["model"], given["roots"]
tcp, unix, udp, ground, neighbour = given["tcp"], given["unix"], given["udp"], given["ground"], given["neighbour"]
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
ARM = os.uname().machine == "aarch64"
# The caller looks at the signals it got: SIGWINCH is ignored by default.
HARMLESS = signal.SIGWINCH


def call(x86: int, arm: int, *args: int) -> int:
    result = libc.syscall(ctypes.c_long(arm if ARM else x86), *(ctypes.c_void_p(arg) for arg in args))
    if result < 0:
        raise OSError(ctypes.get_errno(), "refused")
    return result


def read(path: str) -> object:
    with open(path, "rb") as file:
        return len(file.read(1)) or nothing()


def nothing() -> None:
    """The kernel's other way to refuse: the file opens and is empty."""
    raise OSError(errno.ENODATA, "refused")


def write(path: str) -> None:
    with open(path, "ab"):
        pass


def connect(family: int, kind: int, address: object) -> None:
    with socket.socket(family, kind) as plug:
        plug.settimeout(2)
        plug.connect(address)
        plug.send(b"x")


def bind(family: int, address: object) -> None:
    with socket.socket(family, socket.SOCK_STREAM) as plug:
        plug.bind(address)


def execute() -> None:
    pid = os.posix_spawn("/bin/sh", ["sh", "-c", "exit 0"], {})
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) != 0:
        raise OSError(errno.EACCES, "refused")


def keyctl() -> None:
    call(250, 219, 0, -3 & 0xFFFFFFFFFFFFFFFF, 1)  # KEYCTL_GET_KEYRING_ID of the session


def new_user_namespace() -> None:
    pid = os.fork()
    if pid == 0:
        try:
            call(272, 97, 0x10000000)
        except OSError:
            os._exit(1)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
        raise OSError(errno.EPERM, "refused")


def io_uring() -> None:
    try:
        call(425, 425, 1, 0)
    except OSError as error:
        if error.errno != errno.EFAULT:  # it got as far as looking at its arguments
            raise


def ptrace() -> None:
    call(101, 117, 0x4206, victim, 0, 0)  # PTRACE_SEIZE: does not stop it; our end detaches


def replace_inputs() -> None:
    os.rename(f"{ground}/in/j", f"{ground}/in/k")
    os.rename(f"{ground}/in/k", f"{ground}/in/j")


def take_descriptor() -> None:
    pidfd = os.pidfd_open(victim)
    try:
        os.close(call(438, 438, pidfd, 0, 0))
    finally:
        os.close(pidfd)


def io_priority() -> None:
    call(251, 30, 1, victim, 2 << 13 | 4)  # of one process, best effort, the usual level


def forget_parent() -> None:
    if libc.prctl(1, 0, 0, 0, 0):
        raise OSError(errno.EPERM, "refused")


def become_root() -> None:
    """Where we are root the call changes nothing; it must fail where we are not."""
    if os.fork() == 0:
        try:
            os.setuid(0)
        except OSError:
            os._exit(1)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.wait()[1]):
        raise OSError(errno.EPERM, "refused")


ATTACKS = {
    "read a private file": lambda: read(private),
    "read /etc/passwd": lambda: read("/etc/passwd"),
    "write beside the private file": lambda: write(os.path.join(os.path.dirname(private), "new")),
    "write to the model folder": lambda: write(os.path.join(readable, "new")),
    "read what is root's alone": lambda: read(roots),
    "read a neighbour's scratch": lambda: read(f"{neighbour}/i1/key"),
    "write a neighbour's scratch": lambda: write(f"{neighbour}/i1/new"),
    "read a neighbour's input": lambda: read(f"{neighbour}/in/j/audio"),
    "write a neighbour's output": lambda: write(f"{neighbour}/out/j/new"),
    "write its own inputs": lambda: write(f"{ground}/in/j/audio"),
    "replace its own inputs": replace_inputs,
    "left in /tmp": lambda: write(f"/tmp/{given['token']}"),
    "left in /dev/shm": lambda: write(f"/dev/shm/{given['token']}"),
    "TCP connect": lambda: connect(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", tcp)),
    "TCP bind": lambda: bind(socket.AF_INET, ("127.0.0.1", 0)),
    "UDP send": lambda: connect(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", udp)),
    "vsock": lambda: socket.socket(socket.AF_VSOCK, socket.SOCK_STREAM).close(),
    "netlink": lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW).close(),
    "unix socket by path": lambda: connect(socket.AF_UNIX, socket.SOCK_STREAM, unix),
    "abstract unix socket": lambda: connect(socket.AF_UNIX, socket.SOCK_STREAM, "\0" + unix),
    "signal": lambda: os.kill(victim, HARMLESS),
    "ptrace": ptrace,
    "environ": lambda: read(f"/proc/{victim}/environ"),
    "descriptors": lambda: os.listdir(f"/proc/{victim}/fd"),
    "pidfd_getfd": take_descriptor,
    "cmdline": lambda: read(f"/proc/{victim}/cmdline"),
    "memory": lambda: read(f"/proc/{victim}/maps"),
    "renice": lambda: os.setpriority(os.PRIO_PROCESS, victim, 0),
    "prlimit": lambda: resource.prlimit(victim, resource.RLIMIT_CORE),
    "affinity": lambda: os.sched_setaffinity(victim, os.sched_getaffinity(0)),
    "scheduler": lambda: os.sched_setscheduler(victim, os.SCHED_OTHER, os.sched_param(0)),
    "I/O priority": io_priority,
    "oom_score_adj": lambda: write(f"/proc/{victim}/oom_score_adj"),
    "io_uring": io_uring,
    "new user namespace": new_user_namespace,
    "keyctl": keyctl,
    "exec /bin/sh": execute,
    "become root": become_root,
    "forget its parent": forget_parent,
}


def scratch() -> None:
    write("mine")
    os.rename("mine", "yours")
    os.unlink("yours")


def threads() -> None:
    thread = threading.Thread(target=lambda: None)
    thread.start()
    thread.join()


def own_schedule() -> None:
    os.sched_setaffinity(0, os.sched_getaffinity(0))
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))
    os.sched_setaffinity(os.getpid(), os.sched_getaffinity(0))
    os.setpriority(os.PRIO_PROCESS, 0, os.getpriority(os.PRIO_PROCESS, 0))


NEEDS = {
    "read its inputs": lambda: read(f"{ground}/in/j/audio"),
    "write its outputs": lambda: write(f"{ground}/out/j/a.png"),
    "read the model folder": lambda: read(os.path.join(readable, "model")),
    "write the scratch folder": scratch,
    "memfd": lambda: os.close(os.memfd_create("x")),
    "socketpair": lambda: [each.close() for each in socket.socketpair()],
    "threads": threads,
    "its own schedule": own_schedule,
    "fork": lambda: os.waitpid(os.fork() or os._exit(0), 0),
    "read /sys": lambda: os.listdir("/sys/devices/system/cpu"),
    "own /proc": lambda: read("/proc/self/status"),
    "import a native module": lambda: __import__("decimal"),
    "executable memory": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC).close(),
    "signal itself": lambda: os.kill(os.getpid(), HARMLESS),
    "abort of a thread (tgkill)": lambda: signal.pthread_kill(threading.get_ident(), HARMLESS),
    "random": lambda: read("/dev/urandom"),
}


def tried(attempt) -> str:
    try:
        attempt()
    except OSError as error:
        return f"denied {errno.errorcode.get(error.errno or 0, '?')}"
    return "open"


REPORT = {
    "attacks": {name: tried(attempt) for name, attempt in ATTACKS.items()},
    "needs": {name: tried(attempt) for name, attempt in NEEDS.items()},
    "verdicts": json.loads(os.environ["BULKHEAD_SANDBOX"]),
}
sys.stdout.write(json.dumps(REPORT))
