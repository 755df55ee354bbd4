"""The host: every model's lane, behind one call that runs a job.

Cancelling `Host.run` cancels the run: the engine is asked first, and given up after `cancel_grace_s`.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import trio

from protocol.faults import Fault, refuse
from supervisor.host.lane import Lane
from supervisor.host.means import REAL_MEANS, Means
from supervisor.host.ticket import Ticket
from supervisor.host.work import Failed, InstanceStatus, ModelSpec, OnEvent, RunEnd, RunRequest
from supervisor.settings import LimitsTable

_CANCELLED = Fault("cancelled", "The job was cancelled.")


class Host:
    """Runs jobs on engine instances. Made by `open_host` only."""

    def __init__(self, lanes: Sequence[Lane], limits: LimitsTable) -> None:
        self._lanes = {lane.spec.name: lane for lane in lanes}
        self._limits = limits
        self._tickets: dict[str, tuple[Lane, Ticket]] = {}
        self._stopped = False
        self._scope = trio.CancelScope()
        self.on_change: Callable[[], None] | None = None

    async def run(self, request: RunRequest, on_event: OnEvent) -> RunEnd:
        """Run one job to its end: queue on the model's lane, load on first use.

        Returns:
            Done or Failed; nothing that an engine does is raised.

        Cancellation: the run is cancelled; at most `cancel_grace_s` later the cancellation goes on.
        """
        lane = self._lanes.get(request.model)
        if lane is None:
            return Failed(fault=refuse("model_not_found", f"There is no model {request.model!r} here.").fault)
        if self._stopped:
            return Failed(fault=Fault("worker_stopping", "The worker is stopping."))
        seconds = self._limits.job_s if request.deadline_s is None else request.deadline_s
        ticket = Ticket(request, on_event, trio.current_time() + seconds)
        if request.label:
            self._tickets[request.label] = (lane, ticket)
        try:
            lane.add(ticket)
            await self._wait(lane, ticket)
        finally:
            self._tickets.pop(request.label, None)
        assert ticket.end is not None
        return ticket.end

    async def _wait(self, lane: Lane, ticket: Ticket) -> None:
        try:
            with trio.move_on_at(ticket.deadline):
                await ticket.ended.wait()
            if not ticket.ended.is_set():
                lane.drop(ticket, Fault("deadline_exceeded", "The job did not end before its deadline."))
                await ticket.ended.wait()
        except trio.Cancelled:
            lane.drop(ticket, _CANCELLED)
            with trio.CancelScope(shield=True), trio.move_on_after(self._limits.cancel_grace_s + 1):
                await ticket.ended.wait()
            raise

    def cancel(self, label: str) -> None:
        """Ask the run with this label to end; nothing when it has ended already."""
        if found := self._tickets.get(label):
            found[0].drop(found[1], _CANCELLED)

    def preload(self, model: str) -> None:
        """Load a model before anybody asks for it."""
        self._lanes[model].preload()

    def snapshot(self) -> list[InstanceStatus]:
        """State of every model, in the order of the configuration."""
        return [lane.status() for lane in self._lanes.values()]

    async def stop(self, grace_s: float) -> None:
        """Take no more runs, wait at most `grace_s` for those in flight, then end every instance."""
        self._stopped = True
        with trio.move_on_after(grace_s):
            for _lane, ticket in list(self._tickets.values()):
                await ticket.ended.wait()
        self._scope.cancel()

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change()

    async def _own(self) -> None:
        with self._scope:
            async with trio.open_nursery() as nursery:
                for lane in self._lanes.values():
                    nursery.start_soon(lane.run)


@contextlib.asynccontextmanager
async def open_host(
    models: Sequence[ModelSpec],
    limits: LimitsTable,
    scratch: Path,
    *,
    means: Means = REAL_MEANS,
) -> AsyncIterator[Host]:
    """Own the instances of `models`; leaving the block ends them all and empties `scratch`.

    Args:
        scratch: absolute; whatever an earlier life left in it is removed.
    """
    _make_empty(scratch)
    host = Host([], limits)
    lanes = [
        Lane(
            spec,
            limits,
            scratch / f"m{number}",
            on_change=host._changed,
            means=means,
        )
        for number, spec in enumerate(models)
    ]
    host._lanes.update({lane.spec.name: lane for lane in lanes})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(host._own)
        try:
            yield host
        finally:
            host._stopped = True
            host._scope.cancel()


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, mode=0o700)
