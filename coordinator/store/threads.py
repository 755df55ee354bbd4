"""Between a store and the event loop: calls into it, and rings out of it."""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Generic, ParamSpec, TypeVar

import anyio
from anyio.to_thread import run_sync

from coordinator.counting import STORE_S, Histogram
from coordinator.store.base import Store

P = ParamSpec("P")
T = TypeVar("T")
A = TypeVar("A")
R = TypeVar("R")

MOST_TOGETHER = 256  # at 70 µs each, a call that comes alone waits no longer than two syncs of a busy disk


class StoreThreads:
    """Runs store functions in worker threads: as many writes at once as the store takes, reads beside them.

    Cancellation: waits until the transaction that has begun is over; it cannot be half-cancelled.
    """

    def __init__(self, readers: int = 4, writers: int = 1) -> None:
        self._writer, self._readers = anyio.CapacityLimiter(writers), anyio.CapacityLimiter(readers)
        self.timings = {"write": Histogram(STORE_S), "read": Histogram(STORE_S)}  # in seconds, waiting for a turn too

    async def write(self, function: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Run a function that changes rows."""
        with self._timed("write"):
            return await run_sync(partial(function, *args, **named), limiter=self._writer)

    async def read(self, function: Callable[P, T], *args: P.args, **named: P.kwargs) -> T:
        """Run a function that only reads."""
        with self._timed("read"):
            return await run_sync(partial(function, *args, **named), limiter=self._readers)

    @contextlib.contextmanager
    def _timed(self, what: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            self.timings[what].observe(time.monotonic() - began)


class Together(Generic[A, R]):
    """Calls that many tasks make at about the same time, as one write of the store.

    A call that comes alone is written at once; those that come while it is written go together in the next one. So
    nothing waits for company, and under load one sync of the disk serves many.

    Args:
        threads: runs the writes.
        function: takes arguments, returns the answer of each; a single one that raises must change nothing.
    """

    def __init__(self, threads: StoreThreads, function: Callable[[Sequence[A]], Sequence[R]]) -> None:
        self._threads, self._function = threads, function
        self._waiting: list[_Call[A, R]] = []
        self._turn = anyio.Lock(fast_acquire=True)

    async def __call__(self, argument: A) -> R:
        """Write; raises what the function raises for this argument.

        Cancellation: a write that has begun is finished, one that has not is not made.
        """
        call = _Call[A, R](argument)
        self._waiting.append(call)
        try:
            async with self._turn:
                while not call.done:
                    now, self._waiting = self._waiting[:MOST_TOGETHER], self._waiting[MOST_TOGETHER:]
                    with anyio.CancelScope(shield=True):
                        await self._write(now)
        finally:
            if not call.done and call in self._waiting:
                self._waiting.remove(call)
        if call.error is not None:
            raise call.error
        return call.answers[0]

    async def _write(self, calls: Sequence[_Call[A, R]]) -> None:
        try:
            answers = await self._threads.write(self._function, [call.argument for call in calls])
        except Exception as error:
            if len(calls) > 1:  # it may be the fault of one of them
                for call in calls:
                    await self._write([call])
                return
            calls[0].error, calls[0].done = error, True
            return
        for call, answer in zip(calls, answers, strict=True):
            call.answers, call.done = [answer], True


@dataclasses.dataclass(eq=False)
class _Call(Generic[A, R]):
    """One call of `Together`; `answers` has one when it went well."""

    argument: A
    done: bool = False
    answers: list[R] = dataclasses.field(default_factory=list)
    error: Exception | None = None


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
