"""One model's lane: its queue, its instance, and when to start another one.

Theory of operation. One task owns a lane. It waits for demand, opens an instance, hands it tickets while it has
free slots, and when the instance ends it decides: a first crash is followed by a new instance at once, further
ones by growing, jittered pauses; a load that failed fails everything that waits, and the same fault answers new
runs until the pause is over, so that nobody waits for a model that cannot load. An instance that did a
job, or stayed well for `HEALTHY_S`, clears the record.

    cold ──demand──► starting ──► loading ──► ready ◄─► busy ──► stopping ──► cold
                        └───── failed / crashed ─────► backoff ──► starting
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Callable
from pathlib import Path

import trio

from protocol.faults import Fault, FaultError
from supervisor.host.instance import Instance, open_instance
from supervisor.host.means import REAL_MEANS, Means
from supervisor.host.ticket import Ticket
from supervisor.host.work import InstanceStatus, ModelSpec, Progress
from supervisor.settings import LimitsTable

log = logging.getLogger(__name__)

HEALTHY_S = 60.0
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0


def pause_s(failures: int, jitter: float) -> float:
    """Pause before the next start after `failures` ends in a row; `jitter` in [0, 1).

    The first crash costs no pause: most are one bad request, and the next caller should not wait.
    """
    if failures <= 1:
        return 0.0
    return min(FIRST_PAUSE_S * 2.0 ** (failures - 2), LONGEST_PAUSE_S) * (0.75 + 0.5 * jitter)


class Lane:
    """The lane of one model. `run` is its only task; everything else posts to it.

    Args:
        scratch: folder below which instances get theirs.
        on_change: called after every change that `status` would show.
    """

    def __init__(
        self,
        spec: ModelSpec,
        limits: LimitsTable,
        scratch: Path,
        *,
        on_change: Callable[[], None] = lambda: None,
        means: Means = REAL_MEANS,
    ) -> None:
        self.spec, self.limits = spec, limits
        self._scratch = scratch
        self._on_change = on_change
        self._means = means
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._bell = trio.Event()
        self._instance: Instance | None = None
        self._state, self._reason = "cold", ""
        self._failures = 0
        self._starts = 0
        self._blocked: Fault | None = None
        self._wanted = False  # load without a run: preload

    # ---- asking

    def add(self, ticket: Ticket) -> None:
        """Queue a run; answered at once with the fault of the last load while that is being paced."""
        if self._blocked is not None:
            ticket.fail(self._blocked)
            return
        self._waiting.append(ticket)
        self._ring()

    def drop(self, ticket: Ticket, fault: Fault) -> None:
        """End a run that has not been handed to an engine yet, or ask the engine to end it."""
        if ticket in self._waiting:
            self._waiting.remove(ticket)
            ticket.fail(fault)
            self._on_change()
        else:
            ticket.ask_cancel(fault)

    def preload(self) -> None:
        """Load the model now, without a run."""
        self._wanted = True
        self._ring()

    def status(self) -> InstanceStatus:
        """Snapshot for people and for what is announced."""
        instance = self._instance
        ready = instance.ready if instance else None
        return InstanceStatus(
            model=self.spec.name,
            engine=self.spec.engine.name,
            state=self._state,
            pid=instance.child.pid if instance else 0,
            running=len(instance.admitted) if instance else 0,
            queued=len(self._waiting),
            slots=ready.slots if ready else 1,
            restarts=max(0, self._starts - 1),
            reason=self._reason,
            device=ready.device if ready else "",
            limits=ready.limits if ready else {},
            rss_bytes=ready.peak_rss_bytes if ready else 0,
        )

    # ---- the task

    async def run(self) -> None:
        """Own the lane until cancelled; then end the instance and everything that waits."""
        try:
            while True:
                await self._demand()
                await self._one_instance()
                await self._pace()
        finally:
            self._fail_waiting(Fault("worker_stopping", "The worker stopped before the job was done."))
            self._set("cold")

    async def _demand(self) -> None:
        while not self._waiting and not self._wanted:
            await self._bell.wait()
            self._bell = trio.Event()

    async def _one_instance(self) -> None:
        """One instance from start to end; failures are counted, never raised."""
        self._wanted = False
        self._starts += 1
        self._set("starting")
        folder = self._scratch / f"i{self._starts}"
        try:
            async with open_instance(
                self.spec, self.limits, folder, on_progress=self._loading, means=self._means
            ) as instance:
                self._instance = instance
                instance.changed = self._changed
                began = trio.current_time()
                await self._hand_out(instance)
                self._judge(instance, trio.current_time() - began)
        except FaultError as error:
            self._load_failed(error.fault)
        except BaseExceptionGroup as group:
            faults, rest = group.split(FaultError)
            if rest is not None or faults is None:
                raise
            self._load_failed(_first_fault(faults))
        finally:
            self._instance = None

    def _loading(self, progress: Progress) -> None:
        if self._state != "loading":
            self._set("loading")
        for ticket in self._waiting:
            ticket.tell(progress)

    async def _hand_out(self, instance: Instance) -> None:
        """Give the instance tickets while it has slots; return when it is over or has drained."""
        self._changed()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._ring_when_over, instance)
            while not instance.over.is_set() and not (instance.draining and not instance.admitted):
                while self._waiting and instance.free_slots:
                    ticket = self._waiting.popleft()
                    nursery.start_soon(instance.serve, instance.admit(ticket))
                await self._bell.wait()
                self._bell = trio.Event()
            self._set("stopping")
            nursery.cancel_scope.cancel()

    async def _ring_when_over(self, instance: Instance) -> None:
        await instance.over.wait()
        self._ring()

    def _judge(self, instance: Instance, uptime_s: float) -> None:
        """Count an instance that ended; a long life, or a job done well, clears the record first.

        So a bad job costs those behind it no pause, and an engine that dies of everything is paced.
        """
        if uptime_s >= HEALTHY_S or instance.succeeded:
            self._failures = 0
        self._failures += 1
        fault = instance.end_fault("") if instance.over.is_set() else None
        self._reason = fault.message if fault else "An ignored cancel: the instance was replaced."
        log.warning("%s: %s", self.spec.name, self._reason)

    def _load_failed(self, fault: Fault) -> None:
        self._failures += 1
        self._reason = fault.message
        log.error("%s cannot be loaded: %s", self.spec.name, fault.message)
        self._fail_waiting(fault)
        self._blocked = fault

    async def _pace(self) -> None:
        """Pause after failures; a blocked lane pauses even after the first."""
        failures = self._failures + 1 if self._blocked else self._failures
        pause = pause_s(failures, self._means.jitter())
        self._set("failed" if self._blocked else "backoff" if pause else "cold")
        await trio.sleep(pause)
        self._blocked = None  # the next one who asks may try again
        self._set("cold")

    # ---- small parts

    def _fail_waiting(self, fault: Fault) -> None:
        while self._waiting:
            self._waiting.popleft().fail(fault)

    def _ring(self) -> None:
        self._bell.set()
        self._on_change()

    def _changed(self) -> None:
        """Something about the instance's runs changed: derive the state again and look at the queue."""
        instance = self._instance
        if instance is not None and not instance.over.is_set() and self._state != "stopping":
            self._state = "busy" if instance.admitted else "ready"
            self._reason = ""
        self._ring()

    def _set(self, state: str) -> None:
        self._state = state
        self._on_change()


def _first_fault(group: BaseExceptionGroup[FaultError]) -> Fault:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, FaultError)
    return error.fault
