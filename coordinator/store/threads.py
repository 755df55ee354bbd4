"""Calls into a store from the event loop."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

import anyio
from anyio.to_thread import run_sync

P = ParamSpec("P")
T = TypeVar("T")


class StoreThreads:
    """Runs store functions in worker threads: writes one at a time, reads beside them.

    Cancellation: waits until the transaction that has begun is over; it cannot be half-cancelled.
    """

    def __init__(self, readers: int = 4) -> None:
        self._writer, self._readers = anyio.CapacityLimiter(1), anyio.CapacityLimiter(readers)

    async def write(self, function: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Run a function that changes rows."""
        return await run_sync(partial(function, *args, **named), limiter=self._writer)

    async def read(self, function: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Run a function that only reads."""
        return await run_sync(partial(function, *args, **named), limiter=self._readers)
