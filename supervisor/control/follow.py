"""What is numbered and followed: where a reader goes on, and the pieces of its stream.

Numbers begin anew with every life of the supervisor, so what a reader keeps is an id, `BOOT-NUMBER`: with the word of
another life it is told that there is a gap, instead of missing what it has not seen.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Awaitable
from typing import NamedTuple

import trio

from supervisor.control.exchange import KEEP_ALIVE_S, Refused, Request, event

BOOT = secrets.token_hex(4)  # of this life
_ID = re.compile(r"(?:([0-9a-f]{1,32})-)?([0-9]{1,18})", re.ASCII)


class Cursor(NamedTuple):
    """Where a reader goes on.

    Attributes:
        after: number of the latest that it has seen.
        lost: it comes from an earlier life, so nobody knows what it has missed.
    """

    after: int
    lost: bool = False


def wanted(request: Request, since: str) -> str:
    """The id from which a reader goes on: `since`, else the header that browsers repeat; "" when it names none."""
    return since or request.headers.get("last-event-id", "")


def cursor(text: str, last: int, boot: str) -> Cursor:
    """Read an id.

    Args:
        text: an id, or a mere number, which is taken for one of this life.
        last: number of the latest.

    Raises:
        Refused: it is none.
    """
    found = _ID.fullmatch(text)
    if found is None:
        raise Refused(400, f"since must be an id of this stream, or 0 for all that is kept, not {text[:60]!r}.")
    number = int(found[2])
    if found[1] not in (None, boot) or number > last:
        return Cursor(0, lost=True)
    return Cursor(number)


def numbered(name: str, data: object, number: int, boot: str) -> bytes:
    """One server-sent event with its id."""
    return b"id: %s-%d\n" % (boot.encode(), number) + event(name, data)


async def or_quiet(wait: Awaitable[None]) -> bool:
    """Wait, but not longer than a stream may be quiet; False when it was that long."""
    with trio.move_on_after(KEEP_ALIVE_S):
        await wait
        return True
    return False
