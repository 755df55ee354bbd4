"""What the tests of replicas share."""

from __future__ import annotations

import time
from collections.abc import Callable

import anyio

from coordinator.testing import Running

PATIENCE_S = 60.0
LONG_MS = 600_000  # of silence, after which a replica is taken for gone: no machine is so slow
Start = Callable[[], Running]
SECRET = "a-secret-of-all-replicas"


def until(condition: Callable[[], object]) -> None:
    """Wait for what has no event of its own."""
    end = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("it did not come true")
        time.sleep(0.01)


async def came_true(condition: Callable[[], object]) -> None:
    """`until` on an event loop; within somebody else's bound."""
    while not condition():  # noqa: ASYNC110 - what is waited for has no event
        await anyio.sleep(0.005)
