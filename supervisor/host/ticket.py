"""One run as the host follows it, from the queue to its end."""

from __future__ import annotations

import trio

from protocol.faults import Fault
from supervisor.host import patience
from supervisor.host.work import Chunk, Failed, OnEvent, RunEnd, RunEvent, RunRequest, Started


class Ticket:
    """A run: what is asked, what has been seen of it, and its end, which is set exactly once.

    Attributes:
        deadline: trio time after which the run is worthless.
        last_sign: trio time of the latest sign of progress; None before the run was sent to an engine.
        handed_at: trio time when the run was handed to the engine's process; None before.
        started: the engine validated the run and works.
        produced: it has shown progress since.
        streamed: whether a chunk went out.
        wanted_end: the fault that the run shall end with when the engine obeys a cancel of ours.
    """

    def __init__(self, request: RunRequest, on_event: OnEvent, deadline: float) -> None:
        self.request = request
        self.deadline = deadline
        self.started = False
        self.produced = False
        self.streamed = False
        self.last_sign: float | None = None
        self.handed_at: float | None = None
        self.wanted_end: Fault | None = None
        self.end: RunEnd | None = None
        self.ended = trio.Event()
        self.cancel_asked = trio.Event()
        self._on_event = on_event
        self._waiting: trio.CancelScope | None = None

    async def wait(self) -> bool:
        """Wait for the end, at most until the deadline; whether it came. Cancellation: only the waiting ends."""
        while not self.ended.is_set():
            due = self.deadline
            if await patience.wait_until(self._ended_or_hastened, due):
                continue
            if trio.current_time() >= self.deadline:
                break
        return self.ended.is_set()

    async def _ended_or_hastened(self) -> None:
        with trio.CancelScope() as self._waiting:
            await self.ended.wait()

    def hasten(self, by_s: float, least_s: float) -> None:
        """Bring the deadline forward by the time that the clock missed, but leave at least `least_s`."""
        soonest = trio.current_time() + least_s
        self.deadline = min(self.deadline, max(soonest, self.deadline - by_s))
        if self._waiting is not None:
            self._waiting.cancel()  # wait anew

    def tell(self, event: RunEvent) -> None:
        """Pass an event on, and take note of what it proves."""
        if self.end is not None:
            return
        self.last_sign = trio.current_time()
        self.produced = self.produced or (self.started and not isinstance(event, Started))
        self.started = self.started or isinstance(event, Started)
        self.streamed = self.streamed or isinstance(event, Chunk)
        self._on_event(event)

    def hand_over(self) -> None:
        """The run goes to the engine's process now."""
        self.handed_at = trio.current_time()

    @property
    def compute_ms(self) -> float:
        """Milliseconds since the engine has had the run, to a tenth; 0 before."""
        return 0.0 if self.handed_at is None else round((trio.current_time() - self.handed_at) * 1000, 1)

    def finish(self, end: RunEnd) -> None:
        """Set the end; a second one is ignored, because an engine may die while its result is on the way."""
        if self.end is None:
            self.end = end
            self.ended.set()

    def fail(self, fault: Fault) -> None:
        """End with a fault."""
        self.finish(Failed(fault=fault, streamed=self.streamed))

    def ask_cancel(self, fault: Fault) -> None:
        """Want the run to end with `fault`; the first wish counts."""
        if self.wanted_end is None:
            self.wanted_end = fault
        self.cancel_asked.set()
