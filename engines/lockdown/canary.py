"""Verdicts from trying: forbidden things are attempted in the locked process, and only a refusal counts.

Each layer is tried right after it was put on, before the next one could refuse in its place.
"""

from __future__ import annotations

import _socket
import errno
import os

from engines.lockdown import kernel

TYPE_CHECKING = False  # what start.py says of `typing`
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_NETLINK = 16
_NOWHERE = ("192.0.2.1", 9)  # TEST-NET-1: never a real host; connecting a datagram socket sends nothing


def _refused(attempt: Callable[[], object], *expected: int) -> bool:
    try:
        attempt()
    except OSError as error:
        return error.errno in expected
    return False


def _judge(found: dict[str, bool]) -> str:
    open_ = [name for name, refused in found.items() if not refused]
    if not open_:
        return "verified"
    return "failed" if len(open_) == len(found) else f"partial({', '.join(open_)} open)"


def namespaces(verdicts: dict[str, str], parent: int) -> None:
    """Judge what `claimed` to be a namespace; `parent` is the supervisor's pid outside."""
    if verdicts.get("pid") == "claimed":
        unseen = parent <= 2 or _refused(lambda: os.kill(parent, 0), errno.ESRCH)
        verdicts["pid"] = _judge({"pids": os.getpid() == 2, "signals": unseen})
    if verdicts.get("proc") == "claimed":
        seen = [name for name in os.listdir("/proc") if name.isdigit()]
        verdicts["proc"] = _judge({"processes": sorted(seen) == ["1", "2"]})
    if verdicts.get("net") == "claimed":
        names = [name for _, name in _socket.if_nameindex()]
        verdicts["net"] = _judge({"interfaces": names == ["lo"], "udp": _refused(_reach_out, errno.ENETUNREACH)})


def _reach_out() -> None:
    plug = _socket.socket(_socket.AF_INET, _socket.SOCK_DGRAM)
    try:
        plug.connect(_NOWHERE)
    finally:
        plug.close()


def privileges() -> str:
    """Judge the drop of privileges."""
    return _judge(
        {
            "chroot": _refused(lambda: os.chroot("/"), errno.EPERM),
            "exec": kernel.prctl(kernel.PR_GET_NO_NEW_PRIVS) == 1,
        }
    )


def landlock(policy: dict[str, Any], version: int) -> str:
    """Judge Landlock; what this kernel's version cannot do is listed as open."""
    found = {"files": _refused(lambda: os.open("/", os.O_RDONLY), errno.EACCES)}
    if policy.get("network", "none") in ("none", "unix"):
        found["tcp"] = version >= 4 and _refused(_listen, errno.EACCES)
    found["signals"] = version >= 6 and _refused(lambda: os.kill(os.getppid(), 0), errno.EPERM)
    return _judge(found)


def _listen() -> None:
    plug = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
    try:
        plug.bind(("127.0.0.1", 0))
    finally:
        plug.close()


def seccomp() -> str:
    """Judge the filter."""
    return _judge(
        {
            "unshare": _refused(lambda: kernel.call("unshare", 0), errno.EPERM),
            "io_uring": _refused(lambda: kernel.call("io_uring_setup", 0, None), errno.ENOSYS),
            "netlink": _refused(lambda: _socket.socket(_NETLINK, _socket.SOCK_RAW).close(), errno.EAFNOSUPPORT),
        }
    )
