"""Calls that Python's standard library has no name for. Linux, x86_64 and aarch64."""

from __future__ import annotations

import errno
import os

from engines.lockdown import foreign

_SYSCALL = foreign.function("syscall", long=True)
_PRCTL = foreign.function("prctl")

PR_SET_PDEATHSIG = 1
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_GET_NO_NEW_PRIVS = 39

MACHINE = os.uname().machine

# Numbers by machine: (x86_64, aarch64); None where the machine has no such call.
NUMBERS: dict[str, tuple[int | None, int | None]] = {
    "acct": (163, 89),
    "add_key": (248, 217),
    "adjtimex": (159, 171),
    "bpf": (321, 280),
    "capset": (126, 91),
    "chroot": (161, 51),
    "clock_adjtime": (305, 266),
    "clock_settime": (227, 112),
    "clone": (56, 220),
    "clone3": (435, 435),
    "connect": (42, 203),
    "delete_module": (176, 106),
    "finit_module": (313, 273),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fsopen": (430, 430),
    "fspick": (433, 433),
    "init_module": (175, 105),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "io_uring_setup": (425, 425),
    "ioctl": (16, 29),
    "ioperm": (173, None),
    "ioprio_set": (251, 30),
    "iopl": (172, None),
    "kcmp": (312, 272),
    "kexec_file_load": (320, 294),
    "kexec_load": (246, 104),
    "keyctl": (250, 219),
    "kill": (62, 129),
    "landlock_add_rule": (445, 445),
    "landlock_create_ruleset": (444, 444),
    "landlock_restrict_self": (446, 446),
    "lookup_dcookie": (212, 18),
    "modify_ldt": (154, None),
    "mount": (165, 40),
    "mount_setattr": (442, 442),
    "move_mount": (429, 429),
    "msgget": (68, 186),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "open_tree": (428, 428),
    "perf_event_open": (298, 241),
    "personality": (135, 92),
    "pidfd_getfd": (438, 438),
    "pidfd_send_signal": (424, 424),
    "pivot_root": (155, 41),
    "prlimit64": (302, 261),
    "process_madvise": (440, 440),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "ptrace": (101, 117),
    "quotactl": (179, 60),
    "reboot": (169, 142),
    "request_key": (249, 218),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "seccomp": (317, 277),
    "semget": (64, 190),
    "setns": (308, 268),
    "setpriority": (141, 140),
    "settimeofday": (164, 170),
    "shmget": (29, 194),
    "socket": (41, 198),
    "swapoff": (168, 225),
    "swapon": (167, 224),
    "syslog": (103, 116),
    "tgkill": (234, 131),
    "tkill": (200, 130),
    "umount2": (166, 39),
    "unshare": (272, 97),
    "userfaultfd": (323, 282),
    "vhangup": (153, 58),
}


def number(name: str) -> int | None:
    """Number of a system call here; None when this machine is not in the table or has no such call."""
    column = {"x86_64": 0, "aarch64": 1}.get(MACHINE)
    return None if column is None else NUMBERS[name][column]


def call(name: str, *args: int | bytes | None) -> int:
    """Make a system call. Raises OSError, with ENOSYS where the machine is not in the table."""
    which = number(name)
    if which is None:
        raise OSError(errno.ENOSYS, name)
    result = _SYSCALL(which, *args)
    if result < 0:
        raise OSError(foreign.get_errno(), name)
    return result


def prctl(option: int, value: int = 0) -> int:
    """prctl(2) with one argument; -1 on failure."""
    return _PRCTL(option, value, 0, 0, 0)


def mount(source: bytes, target: bytes, kind: bytes | None, flags: int, options: bytes | None = None) -> None:
    """mount(2). Raises OSError."""
    call("mount", source, target, kind, flags, options)


def fork_into(flags: int) -> int:
    """fork(2) into new namespaces. Raises OSError.

    As os.fork, with the interpreter's own preparations around it; flags are CLONE_NEW….
    """
    before, in_child, in_parent = (
        foreign.function(f"PyOS_{name}") for name in ("BeforeFork", "AfterFork_Child", "AfterFork_Parent")
    )
    before()
    error: OSError | None = None
    pid = -1
    try:
        pid = call("clone", flags | 17, None, None, None, None)  # 17: SIGCHLD
    except OSError as found:
        error = found
    if pid == 0:
        in_child()
    else:
        in_parent()
    if error is not None:
        raise error
    return pid


def word(error: OSError) -> str:
    """The verdict of a layer that the kernel refused: "unavailable(EPERM)"."""
    return f"unavailable({errno.errorcode.get(error.errno or 0, '?')})"
