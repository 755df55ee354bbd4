"""From root to a user that owns nothing: the first thing done to an engine of a supervisor that is root.

It is tried before it is done for good: what the engine needs may lie where only root can go (an interpreter below
/root, most often), and an engine that cannot start is no safer than one that starts. So the effective user changes
first and everything needed is looked at as that user. The way back stays open until the namespaces are made: where a
box lets nobody but root make them, root still does. Then each of the processes closes it for itself (`finish`).
"""

from __future__ import annotations

import errno
import os
import stat

from engines.lockdown import kernel

TYPE_CHECKING = False  # what start.py says of `typing`
if TYPE_CHECKING:
    from typing import Any

_PR_SET_DUMPABLE = 4
_MOST_LOOKED_AT = 2000  # files of a model folder
_STREAMS = (0, 1, 2)


class _Way:
    """How far we have come: the user that we are becoming, and a file that it must not be able to open."""

    uid = 0
    secret = -1


def drop(user: dict[str, Any], devices: list[str]) -> str:
    """Become the user as far as can be taken back, or stay root. Raises OSError: the kernel refuses to change.

    Returns "claimed", or why it stays root.

    Args:
        user: `uid`, `gid`, and what it must reach: `runs` (programs, and folders just to be entered), `reads`
            (folders with all their files), `writes`.
        devices: nodes to be opened; groups that own them are kept, where others may not open them.
    """
    uid, gid = user["uid"], user["gid"]
    before = os.getgroups()
    refused = "error"
    try:
        os.setgroups(_groups_of(devices))
        os.setresgid(gid, gid, gid)
        os.setresuid(uid, uid, 0)
        refused = _out_of_reach(user)
    finally:
        if refused:
            os.setresuid(0, 0, 0)
            os.setresgid(0, 0, 0)
            os.setgroups(before)
        _be_dumpable()
    if refused:
        return f"unavailable({refused})"
    os.seteuid(0)
    _Way.secret = _secret()
    for fd in _STREAMS:
        if _is_pipe(fd):  # else /dev/stderr, which opens the pipe again, would be root's alone
            os.fchown(fd, uid, -1)
    os.seteuid(uid)
    _be_dumpable()
    _Way.uid = uid
    return "claimed"


def be_root() -> bool:
    """Take the change back for a moment, if it can be; whether we are root now."""
    if _Way.uid and os.geteuid() != 0:
        os.seteuid(0)
        _be_dumpable()
    return os.geteuid() == 0


def finish() -> None:
    """Close the way back, when there is one. What asks to die with the parent must ask again."""
    if _Way.uid:
        os.setresuid(_Way.uid, _Way.uid, _Way.uid)
        _be_dumpable()


def judge() -> str:
    """The verdict, from trying to go back and to open what is root's."""
    found = {
        "root": _fails(lambda: os.setuid(0)),
        "files": _fails(lambda: os.open(f"/proc/self/fd/{_Way.secret}", os.O_RDONLY)),
    }
    os.close(_Way.secret)
    open_ = [name for name, refused in found.items() if not refused]
    return f"partial({', '.join(open_)} open)" if open_ else "verified"


def _be_dumpable() -> None:
    """A change of user makes the /proc files of a process root's; but it has to write the maps of its namespace."""
    kernel.prctl(_PR_SET_DUMPABLE, 1)


def _secret() -> int:
    """A file that only root may open, without a name that anybody knows."""
    fd = os.memfd_create("secret")
    os.fchmod(fd, 0o600)
    return fd


def _fails(attempt: Any) -> bool:
    try:
        attempt()
    except OSError as error:
        return error.errno in (errno.EPERM, errno.EACCES, errno.EINVAL)  # the last: no such user in our namespace
    return False


def _is_pipe(fd: int) -> bool:
    try:
        return stat.S_ISFIFO(os.fstat(fd).st_mode)
    except OSError:
        return False


def _groups_of(devices: list[str]) -> list[int]:
    """Groups through which the nodes can be opened (render, video); root's own is never one of them."""
    found = []
    for path in devices:
        try:
            state = os.stat(path)
        except OSError:
            continue
        everybody = state.st_mode & 0o006 == 0o006
        if state.st_mode & 0o060 == 0o060 and not everybody and state.st_gid != 0 and state.st_gid not in found:
            found.append(state.st_gid)
    return found


def _out_of_reach(user: dict[str, Any]) -> str:
    """The error, and the topmost path that makes it; "" when everything is in reach."""
    wanted = (("runs", os.R_OK | os.X_OK), ("reads", os.R_OK), ("writes", os.R_OK | os.W_OK | os.X_OK))
    for name, mode in wanted:
        for path in user.get(name, ()):
            for each in _below(path) if name == "reads" else [path]:
                if not os.access(each, mode | (os.X_OK if os.path.isdir(each) else 0)):
                    return f"{errno.errorcode[errno.EACCES]} {_topmost(each)}"
    return ""


def _below(path: str) -> list[str]:
    found = [path]
    for where, _folders, names in os.walk(path):
        found += [os.path.join(where, name) for name in names]
        if len(found) > _MOST_LOOKED_AT:
            break
    return found


def _topmost(path: str) -> str:
    """The folder on the way, links followed, at which it ends; else the path itself."""
    real = os.path.realpath(path)
    for folder in (path, real):
        parts = folder.split("/")
        for number in range(2, len(parts)):
            above = "/".join(parts[:number])
            if not os.access(above, os.X_OK):
                return above
    return path
