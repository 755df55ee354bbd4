"""The user that engines run as when the supervisor is root.

A supervisor that is root drops each engine to a user that owns nothing on the box but the engine's own ground. The
user `bulkhead-engine` is taken where somebody has made it. Elsewhere a number without a name does: 65520 to 65533 are
reserved by Debian's policy and listed as unused by systemd (UIDS-GIDS), whose own DynamicUser= hands out 61184 to
65519; and they fit below 65536, which is all that a container with mapped users may have. Never 65534: as "nobody" it
is shared with others, and owns what no mapping knows.

Root of a user namespace that maps only itself (`unshare -Ur`, rootless containers) can become nobody and give files
to nobody: engines then keep its uid.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

NAME = "bulkhead-engine"
NAMELESS = range(65521, 65534)
MAPS = (Path("/proc/self/uid_map"), Path("/proc/self/gid_map"))


class User(NamedTuple):
    """Whom an engine runs as."""

    uid: int
    gid: int


@functools.cache
def engine_user() -> User | None:
    """The user of the engines; None when the supervisor is not root and everything keeps its own."""
    return found() if _is_root() else None


def why_not() -> str:
    """Why a root has no `engine_user`, in a word for the verdict; "" when it has one, or is none."""
    if not _is_root() or engine_user() is not None:
        return ""
    uids, gids = map(mapped, MAPS)
    return "none free" if any(uids(number) and gids(number) for number in NAMELESS) else "unmapped"


def _is_root() -> bool:
    return sys.platform == "linux" and os.geteuid() == 0


def mapped(path: Path) -> Callable[[int], bool]:
    """Whether a number exists in our user namespace, by its uid_map or gid_map; all do where there is no such file."""
    try:
        lines = [tuple(map(int, line.split())) for line in path.read_text().splitlines()]
    except OSError:
        return lambda _number: True
    return lambda number: any(first <= number < first + count for first, _outside, count in lines)


def found() -> User | None:
    """`bulkhead-engine`, else the first of the nameless numbers that neither a user nor a group of this box has.

    None when there is no such user in our user namespace.
    """
    uids, gids = map(mapped, MAPS)
    import grp
    import pwd

    try:
        entry = pwd.getpwnam(NAME)
    except KeyError:
        pass
    else:
        if entry.pw_uid == 0:
            return None
        if uids(entry.pw_uid) and gids(entry.pw_gid):
            return User(entry.pw_uid, entry.pw_gid)
    users = {entry.pw_uid for entry in pwd.getpwall()}
    groups = {entry.gr_gid for entry in grp.getgrall()}
    free = (number for number in NAMELESS if number not in users | groups and uids(number) and gids(number))
    return next((User(number, number) for number in free), None)
