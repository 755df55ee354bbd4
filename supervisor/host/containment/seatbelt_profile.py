"""The seatbelt profile of one engine: the launcher's policy (grants.py) in the words of macOS's sandbox language.

`sandbox-exec` has been marked deprecated since macOS 10.13 and is still the only way to confine a program that is no
app bundle (apple/containerization#737); the system's own daemons and the large browsers use the same language.

Everything is denied but: what every program of the system starts with (`system.sb`, kept by Apple with the dynamic
linker it belongs to), the granted paths, the network of the policy, and for a GPU the one user client and the one
service that Metal was found to need (tetsuo-ai/agenc-core#1488, nolabs-ai/nono#635: measured on Apple Silicon;
Macs with Intel or AMD graphics have other classes and stay on the CPU).
The kernel compares paths after following links, /tmp and /var among them, so every path stands here as it really is.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import PurePosixPath
from typing import Any

SANDBOX_EXEC = "/usr/bin/sandbox-exec"  # by its full path: never a namesake on PATH

_HEAD = """\
(version 1)
(deny default)
(import "system.sb")
(allow sysctl-read)
(allow process-info* (target self))
(allow ipc-posix-sem)
; OpenMP runtimes announce themselves in a piece of shared memory
(allow ipc-posix-shm* (ipc-posix-name-regex #"^/__KMP_REGISTERED_LIB_[0-9]+"))
(allow file-read* file-write-data file-ioctl (literal "/dev/null") (literal "/dev/zero"))
(allow file-read* (literal "/dev/random") (literal "/dev/urandom") (literal "/"))
"""
_METAL = """\
(allow iokit-open (iokit-user-client-class "AGXDeviceUserClient"))
(allow mach-lookup (global-name "com.apple.MTLCompilerService"))
"""
_LOOPBACK = """\
(allow network-bind network-inbound (local ip "localhost:*"))
(allow network-outbound (remote ip "localhost:*"))
"""
_HOST = """\
(allow network*)
(allow system-socket)
(allow mach-lookup (global-name "com.apple.trustd.agent") (global-name "com.apple.dnssd.service"))
(allow file-read* (literal "/private/etc/hosts") (literal "/private/etc/resolv.conf"))
"""
_SPAWNS = """\
(allow process-fork)
(allow signal (target same-sandbox))
"""
_ALONE = """\
(allow signal (target self))
"""


def profile(
    policy: dict[str, Any],
    *,
    metal: bool,
    launcher: Iterable[str] = (),
    real: Callable[[str], str] = os.path.realpath,
    exists: Callable[[str], bool] = os.path.exists,
) -> str:
    """The profile's text.

    Args:
        policy: as in engines/launch.py: `read`, `execute`, `write`, `network`, `spawns`.
        metal: whether the engine may use the GPU.
        launcher: what the code that tries the sandbox from inside needs: our interpreter's installation.
        real: a path with its links followed.
        exists: paths that do not exist (Linux's, in shared lists) are left out: a typing error in the configuration
            is told by `config check`, not here.

    Raises:
        ValueError: a path holds control characters; it cannot be a file's that somebody means to grant.
    """

    def found(*names: str) -> list[str]:
        paths = [path for name in names for path in policy.get(name, ())]
        return sorted({real(path) for path in paths if exists(path)})

    execute = sorted({*found("execute"), *(real(path) for path in launcher if exists(path))})
    read, write = found("read"), found("write")
    parts = [
        _HEAD,
        _SPAWNS if policy.get("spawns") else _ALONE,
        _rule("process-exec*", execute),
        # No execution from folders that can be written.
        _rule("file-read* file-map-executable", [*read, *execute]),
        _rule("file-read* file-write*", write),
        _rule("file-read-metadata", _ancestors([*read, *execute, *write]), "literal"),
        _network(policy.get("network", "none"), write),
        _METAL if metal else "",
    ]
    return "".join(parts)


def _network(network: str, write: list[str]) -> str:
    """The loopback is the machine's own, not a private one: a "loopback" engine can reach other local servers."""
    if network == "host":
        return _HOST
    if network == "loopback":
        return _LOOPBACK
    if network == "unix" and write:
        where = " ".join(f"(subpath {quoted(path)})" for path in write)
        return f"(allow network-bind network-inbound network-outbound {where})\n"
    return ""


def _rule(operations: str, paths: Iterable[str], filter_name: str = "subpath") -> str:
    """One `allow`; none at all without paths, for a rule without a filter would allow everything."""
    filters = "".join(f"\n  ({filter_name} {quoted(path)})" for path in paths)
    return f"(allow {operations}{filters})\n" if filters else ""


def _ancestors(paths: Iterable[str]) -> list[str]:
    """Every folder above the paths: programs look at them when they resolve names."""

    def above() -> Iterator[str]:
        for path in paths:
            yield from map(str, PurePosixPath(path).parents)

    return sorted(set(above()))


def quoted(path: str) -> str:
    """A path as a string of the profile language."""
    if not path.isprintable():
        raise ValueError(f"a path with control characters cannot be granted: {path!r}")
    return '"' + path.replace("\\", "\\\\").replace('"', '\\"') + '"'


def confined_argv(text: str, argv: Iterable[str]) -> tuple[str, ...]:
    """argv that runs a program under a profile."""
    return (SANDBOX_EXEC, "-p", text, "--", *argv)
