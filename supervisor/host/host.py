"""The host: every model's lanes and who decides for them, behind one call that runs a job.

Cancelling `Host.run` cancels the run: the caller goes on within `ANSWER_S`; the engine is asked, and given up after
`cancel_grace_s`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import trio

from protocol.faults import Fault, FaultError, refuse
from supervisor.deciding import Deciding
from supervisor.host import removal
from supervisor.host.ground import Ground
from supervisor.host.lane import Lane, OnUnkillable
from supervisor.host.means import REAL_MEANS, Means
from supervisor.host.patience import GRANT_S
from supervisor.host.runs import ANSWER_S
from supervisor.host.ticket import Ticket
from supervisor.host.work import Failed, InstanceStatus, ModelSpec, OnEvent, RunEnd, RunRequest
from supervisor.settings import LimitsTable

log = logging.getLogger(__name__)

TIDY_S = 10.0  # for removing what engines left, when all have ended; the next life removes the rest
_CANCELLED = Fault("cancelled", "The job was cancelled.")


class Host:
    """Runs jobs on engine instances. Made by `open_host` only.

    What these raise is logged and goes no further.

    Attributes:
        on_change: called after every change that `snapshot` would show.
        on_unkillable: called with a model, its GPUs and a pid when a process of it cannot be killed: what else uses
            them should be withdrawn. The lane itself goes into quarantine.
        on_late_death: called with the same when that process is dead after all.
    """

    def __init__(self, deciding: Deciding, limits: LimitsTable, scratch: Path, means: Means) -> None:
        self._deciding = deciding
        self._lanes: dict[str, list[Lane]] = {}
        self._homes: dict[str, _Home] = {}
        self._limits, self._scratch, self._means = limits, scratch, means
        self._numbers = itertools.count()
        self._nursery: trio.Nursery | None = None
        self._tickets: dict[str, Ticket] = {}  # by label
        self._live: set[Ticket] = set()
        self._stopped = False
        self._scope = trio.CancelScope()
        self.on_change: Callable[[], None] | None = None
        self.on_unkillable: OnUnkillable | None = None
        self.on_late_death: OnUnkillable | None = None

    async def run(self, request: RunRequest, on_event: OnEvent) -> RunEnd:
        """Run one job to its end: queue for its model, load on first use.

        Returns:
            Done or Failed; nothing that an engine does is raised.

        Cancellation: the run is cancelled; at most `ANSWER_S` later the cancellation goes on.
        """
        if request.model not in self._lanes:
            return Failed(fault=refuse("model_not_found", f"There is no model {request.model!r} here.").fault)
        if self._stopped:
            return Failed(fault=Fault("worker_stopping", "The worker is stopping."))
        seconds = self._limits.job_s if request.deadline_s is None else request.deadline_s
        ticket = Ticket(request, on_event, trio.current_time() + seconds)
        self._live.add(ticket)
        if request.label:
            self._tickets[request.label] = ticket
        try:
            self._deciding.add(ticket)
            await self._wait(ticket)
        finally:
            self._live.discard(ticket)
            self._tickets.pop(request.label, None)
        assert ticket.end is not None
        return ticket.end

    async def _wait(self, ticket: Ticket) -> None:
        try:
            if not await ticket.wait():
                self._deciding.drop(ticket, Fault("deadline_exceeded", "The job did not end before its deadline."))
                await ticket.ended.wait()
        except trio.Cancelled:
            self._deciding.drop(ticket, _CANCELLED)
            with trio.CancelScope(shield=True), trio.move_on_after(2 * ANSWER_S + GRANT_S):
                await ticket.ended.wait()
            raise

    def cancel(self, label: str) -> None:
        """Ask the run with this label to end; nothing when it has ended already."""
        if found := self._tickets.get(label):
            self._deciding.drop(found, _CANCELLED)

    def slept(self, seconds: float) -> None:
        """The machine slept, and our clock stood still meanwhile while the deadlines of jobs did not.

        Deadlines come nearer by as much. One that passed in the sleep is answered by a cancel, and its run has
        `cancel_grace_s` to finish; limits of silence do not count the sleep at all.
        """
        log.info("the machine slept for %.0f s", seconds)
        for ticket in self._live:
            ticket.hasten(seconds, self._limits.cancel_grace_s)

    def apply(self, limits: LimitsTable, models: Sequence[ModelSpec]) -> None:
        """Go on with other limits, from the next wait on; jobs that run keep the deadline that they have.

        Args:
            models: the same as at the start, with another `stall_s` or `keep_alive_s`; the rest of them is not read.
        """
        self._limits = limits
        self._deciding.tune(models, _threshold(limits))
        for spec in models:
            for lane in self._lanes.get(spec.name, ()):
                lane.apply(limits, spec)

    def preload(self, model: str, *, ordered: bool = False) -> None:
        """Load a model before anybody asks for it, as soon as there is room.

        Args:
            ordered: its owner says so: models without work make room. Otherwise nobody is ended for it.
        """
        self._deciding.want(model, ordered=ordered)

    def unload(self, model: str, reason: str, *, again: bool) -> None:
        """End all instances of a model, each after its last run; with `again` it is then loaded anew."""
        self._deciding.unload(model, reason, again=again)

    def take_on(self, spec: ModelSpec) -> None:
        """Serve one more model from now on; nothing is loaded yet.

        Raises:
            ValueError: there is a model of this name, and be it one that is just let go, or the host has stopped.
        """
        if spec.name in self._homes or self._stopped:
            raise ValueError(f"there is a model {spec.name!r} already, or none can be taken on any more")
        home = self._settle(spec)
        self._deciding.join(spec, home.lanes)
        self._lanes[spec.name] = home.lanes
        assert self._nursery is not None
        self._start(home, self._nursery)
        self._changed()

    async def let_go(self, model: str, reason: str) -> None:
        """Serve a model no more: what waits for it is refused, its instances end, each after its last run.

        Returns when its processes have ended and its folders are removed; at once when there is no such model.

        Cancellation: it goes all the same.
        """
        home = self._homes.get(model)
        if home is None:
            return
        if not home.leaving:
            home.leaving = True
            assert self._nursery is not None
            self._nursery.start_soon(self._see_off, model, home)
            self._deciding.part(model, reason, lambda: self._gone(home))
        await home.gone.wait()

    async def _see_off(self, model: str, home: _Home) -> None:
        try:
            await home.ended.wait()
            await self._means.remove(home.ground.root)
            del self._homes[model]
        finally:
            home.gone.set()

    def _settle(self, spec: ModelSpec) -> _Home:
        """The lanes of a model, and where they work."""
        ground = Ground(self._scratch / f"m{next(self._numbers)}", limit_bytes=int(self._limits.scratch_gb * 2**30))
        lanes = [
            Lane(
                spec,
                self._limits,
                ground,
                self._deciding,
                copy=copy,
                on_change=self._changed,
                on_unkillable=self._unkillable,
                on_late_death=self._died_late,
                means=self._means,
            )
            for copy in range(spec.copies)
        ]
        home = self._homes[spec.name] = _Home(ground, lanes)
        return home

    def _gone(self, home: _Home) -> None:
        """No instance of it is left: its lanes end, whatever they wait for."""
        del self._lanes[home.lanes[0].spec.name]
        for scope in home.scopes:
            scope.cancel()
        self._changed()

    def _start(self, home: _Home, nursery: trio.Nursery) -> None:
        for lane, scope in zip(home.lanes, home.scopes, strict=True):
            nursery.start_soon(home.live, lane, scope)

    @property
    def occupants(self) -> Sequence[Lane]:
        """All lanes, in the order of the configuration, then those of models that came later."""
        return [lane for lanes in self._lanes.values() for lane in lanes]

    @property
    def deciding(self) -> Deciding:
        """Who decides what is loaded and run."""
        return self._deciding

    def ground(self, model: str) -> Ground:
        """Where the engines of a model work, for the folders of its attempts.

        Raises:
            FaultError: it is served no more.
        """
        home = self._homes.get(model)
        if home is None:
            raise FaultError(Fault("worker_stopping", f"The model {model} is not served here any more."))
        return home.ground

    def snapshot(self) -> list[InstanceStatus]:
        """State of every lane, in the order of `occupants`; a model has one lane for each copy."""
        return [lane.status() for lane in self.occupants]

    def _changed(self) -> None:
        _call(self.on_change)

    def _unkillable(self, spec: ModelSpec, devices: tuple[str, ...], pid: int) -> None:
        _call(self.on_unkillable, spec, devices, pid)

    def _died_late(self, spec: ModelSpec, devices: tuple[str, ...], pid: int) -> None:
        _call(self.on_late_death, spec, devices, pid)

    async def _own(self, task_status: trio.TaskStatus[None]) -> None:
        with self._scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._deciding.run)
                for home in self._homes.values():
                    self._start(home, nursery)
                self._nursery = nursery
                task_status.started()


class _Home:
    """What the host has of one model. `ended`: none of its lanes runs any more; `gone`: its name is free, too."""

    def __init__(self, ground: Ground, lanes: list[Lane]) -> None:
        self.ground, self.lanes = ground, lanes
        self.scopes = [trio.CancelScope() for _lane in lanes]
        self.leaving = False
        self.ended, self.gone = trio.Event(), trio.Event()
        self._left = len(lanes)

    async def live(self, lane: Lane, scope: trio.CancelScope) -> None:
        """Own a lane until it is cancelled."""
        try:
            with scope:
                await lane.run()
        finally:
            self._left -= 1
            if not self._left:
                self.ended.set()


def _threshold(limits: LimitsTable) -> int:
    """The most GPU memory in bytes that one job may say it needs; 0 sets no limit."""
    return int(limits.vram_threshold_gb * 2**30)


def _call(whom: Callable[..., None] | None, *what: object) -> None:
    """Tell somebody. What goes wrong there is theirs: a lane must not end of it, its callers would wait for ever."""
    if whom is None:
        return
    try:
        whom(*what)
    except Exception:
        log.exception("a change of the host could not be passed on")


@contextlib.asynccontextmanager
async def open_host(
    models: Sequence[ModelSpec],
    limits: LimitsTable,
    scratch: Path,
    *,
    means: Means = REAL_MEANS,
) -> AsyncIterator[Host]:
    """Own the instances of `models`; leaving the block ends them all and removes their folders.

    Args:
        scratch: absolute; whatever an earlier life left in it is removed.
    """
    removal.empty_tree(scratch)
    deciding = Deciding(models, means.room, threshold_bytes=_threshold(limits))
    host = Host(deciding, limits, scratch, means)
    for spec in models:
        host._lanes[spec.name] = lanes = host._settle(spec).lanes
        deciding.adopt(spec.name, lanes)
    async with trio.open_nursery() as nursery:
        await nursery.start(host._own)
        try:
            yield host
        finally:
            host._stopped = True
            host._scope.cancel()
    with trio.CancelScope(shield=True), trio.move_on_after(TIDY_S):
        for home in list(host._homes.values()):  # after a clean end the next life has nothing to clear up
            await means.remove(home.ground.root)
