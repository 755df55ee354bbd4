"""Between a store and the event loop: calls into it, and rings out of it."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from functools import partial
from typing import ParamSpec, TypeVar

import anyio
from anyio.to_thread import run_sync

from coordinator.store.base import Store

P = ParamSpec("P")
T = TypeVar("T")


class StoreThreads:
    """Runs store functions in worker threads: as many writes at once as the store takes, reads beside them.

    Cancellation: waits until the transaction that has begun is over; it cannot be half-cancelled.
    """

    def __init__(self, readers: int = 4, writers: int = 1) -> None:
        self._writer, self._readers = anyio.CapacityLimiter(writers), anyio.CapacityLimiter(readers)

    async def write(self, function: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Run a function that changes rows."""
        return await run_sync(partial(function, *args, **named), limiter=self._writer)

    async def read(self, function: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Run a function that only reads."""
        return await run_sync(partial(function, *args, **named), limiter=self._readers)


async def hear(store: Store, ring: Callable[[], None]) -> None:
    """Call `ring` on the event loop when the store says that another coordinator made work due, until cancelled."""
    here, there = socket.socketpair()
    with here, there:
        for end in (here, there):
            end.setblocking(False)

        def rung() -> None:
            with contextlib.suppress(OSError):  # full: it has been rung; closed: nobody listens any more
                there.send(b".")

        store.listen(rung)
        while True:
            await anyio.wait_readable(here)
            with contextlib.suppress(BlockingIOError):
                here.recv(4096)
            ring()
