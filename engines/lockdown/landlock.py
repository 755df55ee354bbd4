"""Landlock: which files may be touched, no TCP, no signals out of the domain; as much as the kernel knows."""

from __future__ import annotations

import os
import stat
import struct

from engines.lockdown import kernel

TYPE_CHECKING = False  # what start.py says of `typing`
if TYPE_CHECKING:
    from typing import Any

_EXECUTE, _WRITE_FILE, _READ_FILE, _READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
_MAKE_CHAR, _MAKE_BLOCK = 1 << 6, 1 << 11
_REFER, _TRUNCATE, _IOCTL_DEV, _CONNECT_UNIX = 1 << 13, 1 << 14, 1 << 15, 1 << 16
_ON_FILES = _EXECUTE | _WRITE_FILE | _READ_FILE | _TRUNCATE | _IOCTL_DEV | _CONNECT_UNIX
_READ = _READ_FILE | _READ_DIR
_BIND_TCP, _CONNECT_TCP = 1, 2
_SCOPE_ABSTRACT_UNIX, _SCOPE_SIGNAL = 1, 2
_VERSION_FLAG = 1
_PATH_BENEATH = 1


def abi() -> int:
    """Version of the interface that the kernel has. Raises OSError where it has none."""
    return kernel.call("landlock_create_ruleset", None, 0, _VERSION_FLAG)


def _handled(version: int) -> int:
    rights = (1 << 13) - 1
    for since, right in ((2, _REFER), (3, _TRUNCATE), (5, _IOCTL_DEV), (9, _CONNECT_UNIX)):
        if version >= since:
            rights |= right
    return rights


def restrict(policy: dict[str, Any]) -> int:
    """Confine this process and all it starts to the paths of the policy; returns the ABI. Raises OSError.

    A path that does not exist grants nothing and harms nothing: one missing device node must not cost the layer.
    """
    version = abi()
    handled = _handled(version)
    network = (_BIND_TCP | _CONNECT_TCP) if version >= 4 and policy.get("network", "none") in ("none", "unix") else 0
    scope = (_SCOPE_ABSTRACT_UNIX | _SCOPE_SIGNAL) if version >= 6 else 0
    attributes = struct.pack("QQQ", handled, network, scope)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = kernel.call("landlock_create_ruleset", attributes, len(attributes), 0)
    grants = (
        ("read", _READ),
        ("execute", _READ | _EXECUTE),
        ("write", handled & ~(_EXECUTE | _MAKE_CHAR | _MAKE_BLOCK | _IOCTL_DEV)),
        ("devices", _READ | _WRITE_FILE | _IOCTL_DEV),
    )
    for name, rights in grants:
        for path in policy.get(name, ()):
            _grant(ruleset, path, rights & handled)
    if policy.get("names_threads"):
        alone = bool(policy.get("private_proc")) and os.geteuid() != 0
        _grant_thread_names(ruleset, handled, for_programs=alone and bool(policy.get("spawns")))
    kernel.call("landlock_restrict_self", ruleset, 0)
    os.close(ruleset)
    return version


def _grant(ruleset: int, path: str, rights: int) -> None:
    try:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:
        return
    _grant_at(ruleset, fd, rights)
    os.close(fd)


def _grant_at(ruleset: int, fd: int, rights: int) -> None:
    if not stat.S_ISDIR(os.fstat(fd).st_mode):
        rights &= _ON_FILES
    kernel.call("landlock_add_rule", ruleset, _PATH_BENEATH, struct.pack("=Qi", rights, fd), 0)


def _grant_thread_names(ruleset: int, handled: int, *, for_programs: bool) -> None:
    """CUDA >= 570 fails with error 304 unless it may write its own threads' names.

    For programs of the engine the rule cannot name their tasks yet: they get the whole of a /proc that shows nobody
    else. Root does not: uid 0 may write sysctls there without any capability.

    The rule hangs on a dentry of procfs, which the kernel may drop when memory is short, and the rule with it: the
    descriptor stays open for the life of the engine and pins it.
    """
    try:
        fd = os.open("/proc" if for_programs else "/proc/self/task", os.O_PATH)
    except OSError:
        return
    _grant_at(ruleset, fd, (_READ | _WRITE_FILE | _TRUNCATE) & handled)
    os.set_inheritable(fd, True)
    pinned.append(fd)


pinned: list[int] = []  # descriptors that must outlive exec
