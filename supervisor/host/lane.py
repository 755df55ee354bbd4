"""One lane: it owns an instance of a model, and says when another one may be started.

Theory of operation. A lane decides nothing about who runs where: `supervisor.deciding` orders it to start an instance,
hands it runs, and orders its end. One task owns the lane, and it alone steps through the states of lifecycle.py. It
waits for an order, opens an instance, tells what becomes of it, and when the instance has ended it judges what
follows: nothing, after an end that we wanted; a pause, none after the first bad end and then growing (restart.py); or
a quarantine, which ends when a probe passes. It takes no orders meanwhile, so that no memory is kept for it. A load
that failed fails everything that waits, and the same fault answers new runs until the pause is over, so that nobody
waits for a model that cannot load.

A model has as many lanes as it may have copies; its ground is shared, records and quarantines are each lane's own.
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Callable, Mapping

import msgspec
import trio

from protocol.faults import Fault, FaultError
from supervisor.deciding import Deciding
from supervisor.host.ends import End, Why
from supervisor.host.ground import Ground
from supervisor.host.instance import Instance
from supervisor.host.lifecycle import Event, Life, State
from supervisor.host.means import REAL_MEANS, Forgetful, Means
from supervisor.host.opening import open_instance
from supervisor.host.order import Order
from supervisor.host.quarantine import Standing
from supervisor.host.ticket import Ticket
from supervisor.host.work import InstanceStatus, ModelSpec, Progress
from supervisor.intake import effects as fx
from supervisor.intake.loading import NEARLY
from supervisor.settings import LimitsTable

log = logging.getLogger(__name__)

# Told the model, the GPUs that the process may hold, and its pid.
OnUnkillable = Callable[[ModelSpec, tuple[str, ...], int], None]


class _Story:
    """What became of one instance, for the judgement after its end."""

    def __init__(self) -> None:
        self.end = End(why=Why.NOT_STARTED)
        self.fault: Fault | None = None  # it could not be loaded
        self.loaded_at = math.inf
        self.succeeded = False
        self.instance: Instance | None = None


class Lane:
    """See the module. `run` is its only task; everything else posts to it. It is a `Runner` and an `Occupant`.

    Args:
        ground: where the model's instances work.
        deciding: who orders, and whom it tells.
        copy: which of its model's lanes it is; the first one's quarantines outlive the supervisor.
        on_change: called after every change that `status` would show.
        on_unkillable, on_late_death: called when a process could not be killed, and when it died after all.
    """

    def __init__(
        self,
        spec: ModelSpec,
        limits: LimitsTable,
        ground: Ground,
        deciding: Deciding,
        *,
        copy: int = 0,
        on_change: Callable[[], None] = lambda: None,
        on_unkillable: OnUnkillable = lambda _spec, _devices, _pid: None,
        on_late_death: OnUnkillable = lambda _spec, _devices, _pid: None,
        means: Means = REAL_MEANS,
    ) -> None:
        self.spec, self.limits, self.ground, self.copy = spec, limits, ground, copy
        self._deciding = deciding
        self._on_change = on_change
        self._on_unkillable, self._on_late_death = on_unkillable, on_late_death
        self._means = means if copy == 0 else means._replace(memory=Forgetful())
        self._orders: deque[Order] = deque()
        self._order: Order | None = None
        self._devices: tuple[str, ...] = ()
        self._nursery: trio.Nursery | None = None  # of the runs
        self._bell = trio.Event()
        self._life = Life()
        self._standing = Standing(spec, limits, self._means)
        self._instance: Instance | None = None
        self._reason, self._last_end = "", ""
        self._sandbox: dict[str, str] = {}
        self._idle_since: float | None = None
        self._starts = 0
        self._blocked: Fault | None = None
        self._pausing = False
        self._recalled_s = self._standing.recalled()
        if self._recalled_s is not None:
            self._step(Event.BAR)

    # ---- as told by whoever decides

    @property
    def refusal(self) -> Fault | None:
        """What new runs are answered with at once."""
        return self._standing.fault or self._blocked

    @property
    def usable(self) -> bool:
        """Whether it takes orders: it is in no quarantine and sits out no pause."""
        return self._standing.fault is None and not self._pausing

    @property
    def load(self) -> int:
        """Orders that it has not brought to their end."""
        return len(self._orders) + (self._order is not None)

    def order(self, number: int, shares: Mapping[str, int]) -> None:
        """Start an instance, after the one before it has gone."""
        self._orders.append(Order(number, self.spec, shares))
        self._ring()

    def begin(self, number: int, ticket: Ticket) -> None:
        """Hand a run to the instance, which has a slot for it."""
        instance, order = self._instance, self._order
        assert instance is not None
        assert order is not None
        assert order.number == number
        assert self._nursery is not None
        self._nursery.start_soon(self._serve, order, instance, instance.runs.admit(ticket))

    def end(self, number: int, reason: str, *, idle: bool = False) -> None:
        """End the instance, which has no run."""
        if self._instance is not None and self._order is not None and self._order.number == number:
            self._order.leaves = True
            self._instance.retire(End(why=Why.IDLE if idle else Why.EVICTED, note=reason))
            self._ring()

    def cancel_load(self, number: int, reason: str) -> None:
        """Nobody waits for this load any more."""
        if self._order is not None and self._order.number == number:
            self._order.drop(reason)
            return
        for order in [each for each in self._orders if each.number == number]:
            self._orders.remove(order)
            self._deciding.gone(number)

    def explain(self, text: str) -> None:
        """Why its model waits."""
        if self._instance is None:
            self._reason = text
            self._on_change()

    # ---- asking

    @property
    def devices(self) -> tuple[str, ...]:
        """GPUs of its instance, or of the one before; empty where nothing is known of them."""
        return self._devices or self.spec.model.devices

    def status(self) -> InstanceStatus:
        """Snapshot for people and for what is announced."""
        instance = self._instance
        ready = instance.ready if instance else None
        rss = instance.watch.rss_bytes if instance else 0
        return InstanceStatus(
            model=self.spec.name,
            engine=self.spec.engine.name,
            state=str(self._life.state),
            pid=self.pid,
            running=len(instance.runs.admitted) if instance else 0,
            queued=0 if self.copy else self._deciding.queued(self.spec.name),
            slots=ready.slots if ready else 1,
            restarts=max(0, self._starts - 1),
            reason=self._standing.fault.message if self._standing.fault else self._reason,
            blocked=self.refusal is not None,
            device=ready.device if ready else "",
            limits=ready.limits if ready else {},
            rss_bytes=rss or (ready.peak_rss_bytes if ready else 0),
            vram_bytes=self._means.senses.vram_bytes(self.spec.name) if instance else 0,
            sandbox=self._sandbox,
            idle_s=None if self._idle_since is None else trio.current_time() - self._idle_since,
            last_end=self._last_end,
            copy=self.copy,
            gpus=self._order.spec.model.devices if self._order else (),
            job_vram_bytes=self._deciding.most_of(self.spec.name),
        )

    @property
    def pid(self) -> int:
        """Leader of its instance's family; 0 without one."""
        return self._instance.child.pid if self._instance else 0

    @property
    def idle_since(self) -> float | None:
        """trio time since when it has been loaded without work; None when it works or is not loaded."""
        return self._idle_since

    def apply(self, limits: LimitsTable, spec: ModelSpec) -> None:
        """Go on with other limits, and with the patience that `spec` has; see `Host.apply`."""
        self.limits = limits
        self.spec = msgspec.structs.replace(self.spec, stall_s=spec.stall_s)
        self._standing.apply(limits)
        if self._instance is not None:
            self._instance.apply(limits, self.spec)

    # ---- the task

    async def run(self) -> None:
        """Own the lane until cancelled; then end the instance."""
        try:
            if self._recalled_s is not None:
                await self._sit_out(self._recalled_s)
            while True:
                order = await self._next_order()
                story = await self._one_instance(order)
                await self._follow(order, story)
        finally:
            self._step(Event.SHUT)

    async def _next_order(self) -> Order:
        while not self._orders:
            await self._next_bell()
        self._order = order = self._orders.popleft()
        self._devices = order.spec.model.devices
        return order

    async def _one_instance(self, order: Order) -> _Story:
        """One instance from start to end; failures are told in the story, never raised."""
        story = _Story()
        self._starts += 1
        self._reason = ""  # what its model waited for is there
        self._step(Event.DEMAND)
        try:
            with order.wanted():
                await self._means.verify(order.spec)
            if not order.dropped:
                async with self._means.room.place(self, order.number, order.shares):
                    await self._live(story, order)
        except FaultError as error:
            self._refuse(story, order, error.fault)
        except BaseExceptionGroup as group:
            faults, rest = group.split(FaultError)
            if rest is not None or faults is None:
                raise
            self._refuse(story, order, _first_fault(faults))
        if order.dropped and story.instance is None and story.fault is None:
            story.end = End(why=Why.EVICTED, note=order.dropped)
        self._stopping()
        return story

    async def _live(self, story: _Story, order: Order) -> None:
        began = trio.current_time()
        try:
            opened = open_instance(order.spec, self.limits, self.ground, order.number, means=self._means)
            async with opened as instance:
                self._instance = story.instance = instance
                instance.changed = instance.runs.changed = self._changed
                try:
                    await self._load(order, instance)
                    if order.dropped:
                        instance.retire(End(why=Why.EVICTED, note=order.dropped))
                    elif instance.ready is not None:
                        self._sandbox = dict(instance.ready.sandbox)
                        story.loaded_at = self._idle_since = trio.current_time()
                        self._reason = ""
                        self._step(Event.LOADED)
                        self._tell_loaded(instance, story.loaded_at - began)
                        loaded = fx.LoadEnds(order.number, story.loaded_at - began, slots=instance.ready.slots)
                        await self._serve_all(order, instance, loaded)
                except FaultError as error:
                    self._refuse(story, order, error.fault)
                finally:
                    self._stopping()
        finally:
            self._instance = None  # its pid may be somebody else's by now
            if story.instance is not None:
                story.end = story.instance.end()
                story.succeeded = story.instance.runs.succeeded > 0
                if force := story.instance.child.force:
                    self._means.witness.forced(self.spec.name, self.spec.engine.name, force)
                if story.end.why is Why.UNKILLABLE:
                    self._abandon(story.instance)

    async def _load(self, order: Order, instance: Instance) -> None:
        def progressed(progress: Progress) -> None:
            if not order.nearly and instance.loaded_share >= NEARLY:
                order.nearly = True
                self._deciding.tell(fx.NearlyLoaded(order.number))
            self._deciding.pass_on(self.spec.name, progress)
            self._on_change()

        with order.wanted():
            await instance.load(lambda: self._step(Event.GREETED), progressed)

    async def _serve_all(self, order: Order, instance: Instance, loaded: fx.LoadEnds) -> None:
        """Have it work; return when it is over or has done its last."""
        async with trio.open_nursery() as self._nursery:
            self._nursery.start_soon(self._ring_when_over, instance)
            if not instance.over.is_set():  # it may have died of its first words after the load
                self._deciding.tell(loaded)
            while True:
                self._retire_worn(instance)
                self._tell(order, instance)
                leaving = instance.ours is not None or instance.runs.stuck is not None
                if instance.over.is_set() or (leaving and not instance.runs.admitted):
                    break
                await self._next_bell()
            self._stopping()
            self._nursery.cancel_scope.cancel()
        self._nursery = None

    async def _serve(self, order: Order, instance: Instance, ticket: Ticket) -> None:
        began = trio.current_time()
        try:
            await instance.runs.serve(ticket)
        finally:
            self._deciding.tell(fx.RunEnds(order.number, trio.current_time() - began))

    def _tell(self, order: Order, instance: Instance) -> None:
        """Say whether the instance takes runs."""
        ends = instance.over.is_set() or instance.ours is not None or instance.runs.stuck is not None
        if ends and not order.leaves:
            order.leaves = True
            self._deciding.tell(fx.Leaves(order.number))
        elif not ends and order.accepts == instance.runs.doubtful:
            order.accepts = not instance.runs.doubtful
            self._deciding.tell(fx.Accepts(order.number, order.accepts))

    def _retire_worn(self, instance: Instance) -> None:
        """Let an instance that is worn take no more runs."""
        if instance.ours is None and (worn := instance.watch.worn()):
            log.info("%s is replaced between two jobs: %s", self.spec.name, worn)
            instance.retire(End(why=Why.RECYCLED, note=worn))
            if self._life.state is State.BUSY:
                self._step(Event.DRAIN)

    async def _ring_when_over(self, instance: Instance) -> None:
        await instance.over.wait()
        self._ring()

    # ---- what follows

    async def _follow(self, order: Order, story: _Story) -> None:
        """Judge an instance that ended, and sit out what its end deserves.

        A long life, or a job done well, clears the record first: so a bad job costs those behind it no pause, and an
        engine that dies of everything is paced. A suspect that ends its engine again while it is alone there has
        proved its own guilt: that end is not the model's.
        """
        end = story.end
        self._last_end = end.phrase()
        if not end.bad:
            log.info("%s: %s", self.spec.name, end.phrase())
            self._reason = "" if end.why in (Why.ASKED, Why.RECYCLED) else f"It was {end.phrase()}."
            if end.why is Why.RECYCLED:
                self._deciding.want(self.spec.name)
            self._gone(order)
            return
        log.warning("%s: %s", self.spec.name, end.phrase())
        fault = self._cause(story)
        self._reason = fault.message
        if end.why is Why.UNKILLABLE:
            await self._sit_out(self._standing.barred(fault).pause_s, order)
            return
        if not end.counts or (story.instance is not None and story.instance.blames_job):
            self._gone(order)
            return
        well = story.succeeded or trio.current_time() - story.loaded_at >= self.limits.restart.healthy_s
        following = self._standing.bad_end(fault, well=well, loading=story.fault is not None)
        if following.quarantined:
            await self._sit_out(following.pause_s, order)
        elif following.pause_s:
            await self._pause(following.pause_s, order)
        else:
            self._gone(order)

    def _gone(self, order: Order, event: Event = Event.GONE) -> None:
        """The process has ended and its memory is back: say so, and another may be ordered."""
        self._order = None
        self._step(event)
        self._deciding.gone(order.number)

    async def _pause(self, pause_s: float, order: Order) -> None:
        self._pausing = True
        self._deciding.recount(self.spec.name)
        self._gone(order, Event.PAUSE)
        await trio.sleep(pause_s)
        self._blocked = None  # the next one who asks may try again
        self._pausing = False
        self._step(Event.RETRY)
        self._deciding.recount(self.spec.name)

    def _cause(self, story: _Story) -> Fault:
        """The fault that stands for a bad end; where there was a process, a report of it is kept."""
        instance = story.instance
        if instance is None:
            return story.fault or Fault("worker_failed", f"Engine {self.spec.engine.name} was not started.")
        if self._means.incidents is not None:
            self._means.incidents.keep(instance.report())
        if story.end.why is Why.UNKILLABLE:
            return Fault("engine_hung", self._unkillable(instance), detail=instance.evidence("engine_hung"))
        return story.fault or instance.end_fault(story.end.when)

    def _unkillable(self, instance: Instance) -> str:
        devices = _devices_of(instance)
        where = f" It may still hold {', '.join(devices)}." if devices else ""
        return (
            f"Process {instance.child.stuck_pid} of engine {self.spec.engine.name} hangs and cannot be killed.{where}"
        )

    def _tell_loaded(self, instance: Instance, seconds: float) -> None:
        ready, name = instance.ready, self.spec.name
        assert ready is not None
        self._means.witness.loaded(
            name,
            self.spec.engine.name,
            seconds,
            device=ready.device,
            vram_bytes=ready.vram_bytes or self._means.senses.vram_bytes(name),
            rss_bytes=instance.watch.rss_bytes or ready.peak_rss_bytes,
        )

    def _abandon(self, instance: Instance) -> None:
        """A process that nobody can kill: its GPUs are not to be used any more, everything else goes on."""
        devices, pid = _devices_of(instance), instance.child.stuck_pid
        instance.child.on_late_death = lambda _how: self._on_late_death(self.spec, devices, pid)
        self._standing.abandon(instance.child)
        self._on_unkillable(self.spec, devices, pid)

    async def _sit_out(self, pause_s: float, order: Order | None = None) -> None:
        """Quarantine, until a probe passes. Whoever waits is answered before `order` is said to be gone."""
        log.error("%s is in quarantine for %.0f s: %s", self.spec.name, pause_s, self._reason)
        self._blocked = None
        self._deciding.recount(self.spec.name)
        if order is not None:
            self._gone(order, Event.BAR)
        for later in list(self._orders):
            self.cancel_load(later.number, "its model is in quarantine")
        await self._standing.serve(pause_s)
        self._reason = ""
        log.info("%s is back: its probe passed", self.spec.name)
        self._step(Event.LIFT)
        self._deciding.recount(self.spec.name)

    # ---- small parts

    def _refuse(self, story: _Story, order: Order, fault: Fault) -> None:
        """The model cannot be loaded: answer everybody who waits, now, and everybody who asks for a while."""
        story.fault = fault
        if story.instance is None:
            story.end = End(why=Why.NOT_STARTED, note=fault.message)
        self._reason = fault.message
        log.error("%s cannot be loaded: %s", self.spec.name, fault.message)
        self._blocked = fault
        self._deciding.load_failed(order.number, self.spec.name, fault)

    async def _next_bell(self) -> None:
        await self._bell.wait()
        self._bell = trio.Event()

    def _ring(self) -> None:
        self._bell.set()
        self._on_change()

    def _changed(self) -> None:
        """Something about the instance or its runs changed: step, and say so."""
        instance, state = self._instance, self._life.state
        if instance is not None and not instance.over.is_set():
            running = len(instance.runs.admitted)
            if state is State.READY and running:
                self._idle_since = None
                self._life.step(Event.TAKE)
            elif state is State.BUSY and (instance.ours is not None or instance.runs.stuck is not None):
                self._life.step(Event.DRAIN)
            elif state is State.BUSY and not running:
                self._idle_since = trio.current_time()
                self._life.step(Event.EMPTIED)
        if instance is not None and self._order is not None and self._nursery is not None:
            self._tell(self._order, instance)
        self._ring()

    def _stopping(self) -> None:
        self._idle_since = None
        if self._life.state is not State.STOPPING:
            self._step(Event.END)

    def _step(self, event: Event) -> None:
        self._life.step(event)
        self._on_change()


def _devices_of(instance: Instance) -> tuple[str, ...]:
    """GPUs that an instance may hold."""
    ready = instance.ready
    return instance.spec.model.devices or ((ready.device,) if ready and ready.device != "cpu" else ())


def _first_fault(group: BaseExceptionGroup[FaultError]) -> Fault:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, FaultError)
    return error.fault
