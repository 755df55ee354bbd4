"""seccomp: system calls that no engine needs, refused; a few refused by their arguments."""

from __future__ import annotations

import errno
import os
import struct

from engines.lockdown import foreign, kernel

_REFUSED = (
    *("ptrace", "process_vm_readv", "process_vm_writev", "kcmp", "pidfd_getfd", "process_madvise"),
    *("bpf", "perf_event_open", "userfaultfd", "add_key", "request_key", "keyctl"),
    *("mount", "umount2", "pivot_root", "chroot", "unshare", "setns", "open_tree", "move_mount", "fsopen"),
    *("fsconfig", "fsmount", "fspick", "mount_setattr", "open_by_handle_at", "name_to_handle_at"),
    *("init_module", "finit_module", "delete_module", "kexec_load", "kexec_file_load", "reboot", "swapon", "swapoff"),
    *("acct", "quotactl", "settimeofday", "clock_settime", "clock_adjtime", "personality"),
    *("syslog", "iopl", "ioperm", "modify_ldt", "lookup_dcookie", "vhangup", "msgget", "semget", "shmget"),
)
# "No such call" makes libraries take their older way; clone3 hides its flags from us, and libc falls back to clone.
_ABSENT = ("io_uring_setup", "io_uring_enter", "io_uring_register", "clone3")
_NAMESPACES = 0x7E020000  # every CLONE_NEW… flag
_TIOCSTI, _TIOCLINUX = 0x5412, 0x541C
_ARCHES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _AND, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x54, 0x06
_ALLOW, _KILL, _ERRNO = 0x7FFF0000, 0x80000000, 0x00050000
_X32 = 0x40000000
_STREAM, _SEQPACKET = 1, 5
_UNIX, _INET, _INET6 = 1, 2, 10


class _Program:
    """A filter under construction; the call's number is in the accumulator between rules."""

    def __init__(self) -> None:
        self.code: list[tuple[int, int, int, int]] = []

    def add(self, code: int, k: int, yes: int = 0, no: int = 0) -> None:
        self.code.append((code, yes, no, k & 0xFFFFFFFF))

    def load(self, offset: int) -> None:
        self.add(_LOAD, offset)

    def argument(self, index: int) -> None:
        """The low 32 bits of an argument."""
        self.load(16 + 8 * index)

    def refuse(self, error: int) -> None:
        self.add(_RETURN, _ERRNO | error)

    def for_call(self, name: str, rule: _Program) -> None:
        """Run `rule` when the call is this one; it may load arguments."""
        which = kernel.number(name)
        if which is None:
            return
        self.add(_EQUAL, which, 0, len(rule.code) + 1)
        self.code += rule.code
        self.load(0)


def _only(index: int, allowed: tuple[int, ...], error: int) -> _Program:
    """Refuse unless an argument is one of these."""
    rule = _Program()
    rule.argument(index)
    for left, value in zip(range(len(allowed), 0, -1), allowed, strict=True):
        rule.add(_EQUAL, value, left, 0)
    rule.refuse(error)
    return rule


def _none_of(index: int, refused: tuple[int, ...]) -> _Program:
    rule = _Program()
    for value in refused:
        rule.argument(index)
        rule.add(_EQUAL, value, 0, 1)
        rule.refuse(errno.EPERM)
    return rule


def _no_namespace_flags() -> _Program:
    rule = _Program()
    rule.argument(0)
    rule.add(_ANY_BIT, _NAMESPACES, 0, 1)
    rule.refuse(errno.EPERM)
    return rule


def _local_streams() -> _Program:
    """socket(2) without a network: unix streams, as CUDA makes them, and nothing else."""
    rule = _only(0, (_UNIX,), errno.EAFNOSUPPORT)
    rule.argument(1)
    rule.add(_AND, 0xF)  # without SOCK_CLOEXEC and SOCK_NONBLOCK
    rule.add(_EQUAL, _STREAM, 2, 0)
    rule.add(_EQUAL, _SEQPACKET, 1, 0)
    rule.refuse(errno.EPERM)
    return rule


def program(*, network: str, own_signals_only: bool, own_schedule_only: bool, pid: int) -> bytes:
    """The filter.

    Args:
        network: "none": no socket can be connected. "unix": unix streams can. "loopback" (meant for a network
            namespace of one's own) and "host": those and internet sockets.
        own_signals_only: signals to nobody but `pid` itself; for kernels on which nothing else keeps them in.
        own_schedule_only: affinity and scheduling class of nobody but the caller and `pid`; for engines that can name
            processes of others. No filter can tell the number of a thread of ours from a stranger's, so threads can
            then set their own, as 0, but not each other's (pthread_setaffinity_np asks by number). None of the shipped
            engines does; onnxruntime would where it chooses its number of threads itself, and works on without.
    """
    made = _Program()
    made.load(4)
    made.add(_EQUAL, _ARCHES[kernel.MACHINE], 1, 0)
    made.add(_RETURN, _KILL)
    made.load(0)
    if kernel.MACHINE == "x86_64":
        made.add(_AT_LEAST, _X32, 0, 1)
        made.refuse(errno.ENOSYS)
    signals = ("tkill", "pidfd_send_signal") if own_signals_only else ()
    refused = (*_REFUSED, *signals, *(("connect",) if network == "none" else ()))
    for names, error in ((_ABSENT, errno.ENOSYS), (refused, errno.EPERM)):
        for name in names:
            if (which := kernel.number(name)) is not None:
                made.add(_EQUAL, which, 0, 1)
                made.refuse(error)
    made.for_call("clone", _no_namespace_flags())
    made.for_call("prlimit64", _only(0, (0, pid), errno.EPERM))
    # Of a process, itself; 0 would be one's own group and user, too.
    for name, of_a_process in (("setpriority", 0), ("ioprio_set", 1)):
        made.for_call(name, _only(0, (of_a_process,), errno.EPERM))
        made.for_call(name, _only(1, (0,), errno.EPERM))
    if own_schedule_only:
        for name in ("sched_setaffinity", "sched_setscheduler", "sched_setparam", "sched_setattr"):
            made.for_call(name, _only(0, (0, pid), errno.EPERM))
    made.for_call("ioctl", _none_of(1, (_TIOCSTI, _TIOCLINUX)))
    if own_signals_only:
        for name in ("kill", "tgkill", "rt_sigqueueinfo", "rt_tgsigqueueinfo"):
            made.for_call(name, _only(0, (pid,), errno.EPERM))
    if network in ("none", "unix"):
        made.for_call("socket", _local_streams())
    else:
        made.for_call("socket", _only(0, (_UNIX, _INET, _INET6), errno.EAFNOSUPPORT))
    made.add(_RETURN, _ALLOW)
    return b"".join(struct.pack("HBBI", *each) for each in made.code)


def install(*, network: str, own_signals_only: bool, own_schedule_only: bool) -> None:
    """Filter this process and all it starts, for good. Raises OSError."""
    if kernel.MACHINE not in _ARCHES:
        raise OSError(errno.ENOSYS, "seccomp")
    only = {"own_signals_only": own_signals_only, "own_schedule_only": own_schedule_only}
    code = program(network=network, **only, pid=os.getpid())
    header = struct.pack("H6xQ", len(code) // 8, foreign.address(code))
    kernel.call("seccomp", 1, 0, header)
