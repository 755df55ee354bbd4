"""Waiting with a limit, fair to those who were waited for.

A limit says how long somebody may be silent while we listen. When this process itself stood still (stopped by a
signal, starved, its machine asleep), its wake-up comes late, and what was said meanwhile lies unread in the pipes. So
a wake-up that is late by more than `LATE_S` decides nothing: it gives `GRANT_S` more, in which everything is read.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio

LATE_S = 1.0
GRANT_S = 1.0


async def wait_until(wait: Callable[[], Awaitable[object]], due: float) -> bool:
    """Wait for `wait()` to return, at most until the trio time `due`; whether it did.

    `wait` may be called twice. Cancellation: only the waiting ends.
    """
    with trio.move_on_at(due):
        await wait()
        return True
    if trio.current_time() - due <= LATE_S:
        return False
    with trio.move_on_after(GRANT_S):
        await wait()
        return True
    return False


async def sleep_until(due: float) -> None:
    """Sleep until the trio time `due`, and `GRANT_S` longer when the wake-up was late."""
    await wait_until(trio.sleep_forever, due)
