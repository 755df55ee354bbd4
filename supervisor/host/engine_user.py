"""The user that engines run as when the supervisor is root.

A supervisor that is root drops each engine to a user that owns nothing on the box but the engine's own ground. The
user `bulkhead-engine` is taken where somebody has made it. Elsewhere a number without a name does: 65520 to 65533 are
reserved by Debian's policy and listed as unused by systemd (UIDS-GIDS), whose own DynamicUser= hands out 61184 to
65519; and they fit below 65536, which is all that a container with mapped users may have. Never 65534: as "nobody" it
is shared with others, and owns what no mapping knows.
"""

from __future__ import annotations

import functools
import os
import sys
from typing import NamedTuple

NAME = "bulkhead-engine"
NAMELESS = range(65521, 65534)


class User(NamedTuple):
    """Whom an engine runs as."""

    uid: int
    gid: int


@functools.cache
def engine_user() -> User | None:
    """The user of the engines; None when the supervisor is not root and everything keeps its own."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return None
    return found()


def found() -> User | None:
    """`bulkhead-engine`, else the first of the nameless numbers that neither a user nor a group of this box has."""
    import grp
    import pwd

    try:
        entry = pwd.getpwnam(NAME)
    except KeyError:
        pass
    else:
        return User(entry.pw_uid, entry.pw_gid) if entry.pw_uid != 0 else None
    users = {entry.pw_uid for entry in pwd.getpwall()}
    groups = {entry.gr_gid for entry in grp.getgrall()}
    return next((User(number, number) for number in NAMELESS if number not in users | groups), None)
