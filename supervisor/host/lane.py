"""One model's lane: its queue, its instance, and when to start another one.

Theory of operation. One task owns a lane, and it alone steps through the states of lifecycle.py. It waits for demand,
waits for room, opens an instance, hands it tickets while it has free slots, and when the instance has ended it
decides what follows: nothing, after an end that we wanted; a pause, none after the first bad end and then growing
(restart.py); or a quarantine, which ends when a probe passes. A load that failed fails everything that waits, and the
same fault answers new runs until the pause is over, so that nobody waits for a model that cannot load.

The queue is first come, first served. A run that wants to be alone waits at its head until the instance is empty, and
those behind it wait until it is done: neither can starve.
"""

from __future__ import annotations

import collections
import logging
import math
from collections.abc import Callable
from pathlib import Path

import trio

from protocol.faults import Fault, FaultError
from supervisor.host.ends import End, Why
from supervisor.host.ground import Ground
from supervisor.host.instance import Instance
from supervisor.host.lifecycle import ALIVE, LOADED, Event, Life, State
from supervisor.host.means import REAL_MEANS, Means
from supervisor.host.opening import open_instance
from supervisor.host.quarantine import Standing
from supervisor.host.ticket import Ticket
from supervisor.host.work import InstanceStatus, ModelSpec, Progress
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
    """The lane of one model. `run` is its only task; everything else posts to it. It is an `Occupant` of the room.

    Args:
        scratch: the model's own folder, made here: see ground.py.
        on_change: called after every change that `status` would show.
        on_unkillable, on_late_death: called when a process could not be killed, and when it died after all.
    """

    def __init__(
        self,
        spec: ModelSpec,
        limits: LimitsTable,
        scratch: Path,
        *,
        on_change: Callable[[], None] = lambda: None,
        on_unkillable: OnUnkillable = lambda _spec, _devices, _pid: None,
        on_late_death: OnUnkillable = lambda _spec, _devices, _pid: None,
        means: Means = REAL_MEANS,
    ) -> None:
        self.spec, self.limits = spec, limits
        self.ground = Ground(scratch, limit_bytes=int(limits.scratch_gb * 2**30))
        self._on_change = on_change
        self._on_unkillable, self._on_late_death = on_unkillable, on_late_death
        self._means = means
        self._waiting: collections.deque[Ticket] = collections.deque()
        self._bell = trio.Event()
        self._life = Life()
        self._standing = Standing(spec, limits, means)
        self._instance: Instance | None = None
        self._evicted = ""  # why, when the instance shall go and is not ready yet
        self._reason, self._last_end = "", ""
        self._sandbox: dict[str, str] = {}
        self._idle_since: float | None = None
        self._ready_since: float | None = None
        self._starts = 0
        self._blocked: Fault | None = None
        self._wanted = False  # load without a run: preload
        self._recalled_s = self._standing.recalled()
        if self._recalled_s is not None:
            self._bar()

    # ---- asking

    def add(self, ticket: Ticket) -> None:
        """Queue a run; answered at once while the model cannot be loaded or is in quarantine."""
        if (refusal := self._refusal) is not None:
            ticket.fail(refusal)
            return
        self._waiting.append(ticket)
        self._ring()

    def drop(self, ticket: Ticket, fault: Fault) -> None:
        """End a run that has not been handed to an engine yet, or ask the engine to end it."""
        if ticket in self._waiting:
            self._waiting.remove(ticket)
            ticket.fail(fault)
            self._ring()  # it may have been what the others waited for
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
        rss = instance.watch.rss_bytes if instance else 0
        return InstanceStatus(
            model=self.spec.name,
            engine=self.spec.engine.name,
            state=str(self._life.state),
            pid=self.pid,
            running=len(instance.runs.admitted) if instance else 0,
            queued=len(self._waiting),
            slots=ready.slots if ready else 1,
            restarts=max(0, self._starts - 1),
            reason=self._standing.fault.message if self._standing.fault else self._reason,
            blocked=self._refusal is not None,
            device=ready.device if ready else "",
            limits=ready.limits if ready else {},
            rss_bytes=rss or (ready.peak_rss_bytes if ready else 0),
            vram_bytes=self._means.senses.vram_bytes(self.spec.name) if instance else 0,
            sandbox=self._sandbox,
            idle_s=None if self._idle_since is None else trio.current_time() - self._idle_since,
            last_end=self._last_end,
        )

    # ---- as an occupant of the room

    @property
    def pid(self) -> int:
        """Leader of its instance's family; 0 without one."""
        return self._instance.child.pid if self._instance else 0

    @property
    def wanted(self) -> bool:
        """Whether runs wait for it or run on it."""
        return bool(self._waiting) or bool(self._instance and self._instance.runs.admitted)

    @property
    def idle_since(self) -> float | None:
        """trio time since when it has been loaded without work; None when it works or is not loaded."""
        return self._idle_since

    @property
    def ready_since(self) -> float | None:
        """trio time since when its model is loaded, with or without work; None while it is not."""
        return self._ready_since if self._life.state in LOADED else None

    def evict(self, reason: str) -> None:
        """End the instance as soon as it has no run. Nothing without one, or while runs wait for its load."""
        if self._life.state in LOADED or (self._life.state in ALIVE and not self._waiting):
            self._evicted = reason
            self._retire()
            self._ring()

    def tell(self, progress: Progress) -> None:
        """Pass a sign of progress of the load, or of the wait for room, to those who wait for the model."""
        if progress.phase == "room":
            self._reason = progress.text
        for ticket in self._waiting:
            ticket.tell(progress)
        self._on_change()

    # ---- the task

    async def run(self) -> None:
        """Own the lane until cancelled; then end the instance and everything that waits."""
        try:
            if self._recalled_s is not None:
                await self._sit_out(self._recalled_s)
            while True:
                await self._demand()
                story = await self._one_instance()
                await self._follow(story)
        finally:
            self._fail_waiting(Fault("worker_stopping", "The worker stopped before the job was done."))
            self._step(Event.SHUT)

    async def _demand(self) -> None:
        while not self._waiting and not self._wanted:
            await self._next_bell()

    async def _one_instance(self) -> _Story:
        """One instance from start to end; failures are told in the story, never raised."""
        story = _Story()
        self._wanted, self._evicted = False, ""
        self._starts += 1
        self._step(Event.DEMAND)
        try:
            await self._means.verify(self.spec)
            async with self._means.room.place(self):
                await self._live(story)
        except FaultError as error:
            self._refuse(story, error.fault)
        except BaseExceptionGroup as group:
            faults, rest = group.split(FaultError)
            if rest is not None or faults is None:
                raise
            self._refuse(story, _first_fault(faults))
        self._stopping()
        return story

    async def _live(self, story: _Story) -> None:
        try:
            opened = open_instance(self.spec, self.limits, self.ground, self._starts, means=self._means)
            async with opened as instance:
                self._instance = story.instance = instance
                instance.changed = instance.runs.changed = self._changed
                try:
                    ready = await instance.load(lambda: self._step(Event.GREETED), self.tell)
                    self._sandbox = dict(ready.sandbox)
                    story.loaded_at = self._idle_since = self._ready_since = trio.current_time()
                    self._reason = ""
                    self._step(Event.LOADED)
                    await self._hand_out(instance)
                except FaultError as error:
                    self._refuse(story, error.fault)
                finally:
                    self._stopping()
        finally:
            self._instance = None  # its pid may be somebody else's by now
            if story.instance is not None:
                story.end = story.instance.end()
                story.succeeded = story.instance.runs.succeeded > 0
                if story.end.why is Why.UNKILLABLE:
                    self._abandon(story.instance)

    async def _hand_out(self, instance: Instance) -> None:
        """Give the instance tickets while it has slots; return when it is over or has done its last."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._ring_when_over, instance)
            while True:
                self._retire()
                while (ticket := self._next_for(instance)) is not None:
                    nursery.start_soon(instance.runs.serve, instance.runs.admit(ticket))
                leaving = instance.ours is not None or instance.runs.stuck is not None
                if instance.over.is_set() or (leaving and not instance.runs.admitted):
                    break
                with trio.move_on_at(self._idle_until()) as patience:
                    await self._next_bell()
                if patience.cancelled_caught and self._idle_until() <= trio.current_time():
                    instance.retire(End(why=Why.IDLE, note=f"idle for {self.spec.keep_alive_s:g} s"))
            self._stopping()
            nursery.cancel_scope.cancel()

    def _next_for(self, instance: Instance) -> Ticket | None:
        """The next ticket that the instance may have now."""
        if not self._waiting or not instance.free_slots:
            return None
        alone = self._waiting[0].request.alone or instance.runs.alone
        if alone and instance.runs.admitted:
            return None
        return self._waiting.popleft()

    def _idle_until(self) -> float:
        if self._idle_since is None or not self.spec.keep_alive_s:
            return math.inf
        return self._idle_since + self.spec.keep_alive_s

    def _retire(self) -> None:
        """Let an instance that is worn or not wanted take no more runs."""
        instance = self._instance
        if instance is None or instance.ready is None or instance.ours is not None:
            return
        if self._evicted:
            instance.retire(End(why=Why.EVICTED, note=self._evicted))
        elif worn := instance.watch.worn():
            log.info("%s is replaced between two jobs: %s", self.spec.name, worn)
            instance.retire(End(why=Why.RECYCLED, note=worn))
        else:
            return
        if self._life.state is State.BUSY:
            self._step(Event.DRAIN)

    async def _ring_when_over(self, instance: Instance) -> None:
        await instance.over.wait()
        self._ring()

    # ---- what follows

    async def _follow(self, story: _Story) -> None:
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
            self._wanted = self._wanted or end.why is Why.RECYCLED
            self._step(Event.GONE)
            return
        log.warning("%s: %s", self.spec.name, end.phrase())
        fault = self._cause(story)
        self._reason = fault.message
        if end.why is Why.UNKILLABLE:
            await self._sit_out(self._standing.barred(fault).pause_s)
            return
        if not end.counts or (story.instance is not None and story.instance.blames_job):
            self._step(Event.GONE)
            return
        if story.instance is None and fault.code == "gpu_failed":
            await self._pause(self.limits.restart.first_pause_s)  # the GPU's fault, not the model's: it is not counted
            return
        well = story.succeeded or trio.current_time() - story.loaded_at >= self.limits.restart.healthy_s
        following = self._standing.bad_end(fault, well=well, loading=story.fault is not None)
        if following.quarantined:
            await self._sit_out(following.pause_s)
        elif following.pause_s:
            await self._pause(following.pause_s)
        else:
            self._step(Event.GONE)

    async def _pause(self, pause_s: float) -> None:
        self._step(Event.PAUSE)
        await trio.sleep(pause_s)
        self._blocked = None  # the next one who asks may try again
        self._step(Event.RETRY)

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
        devices = self._devices(instance)
        where = f" It may still hold {', '.join(devices)}." if devices else ""
        return (
            f"Process {instance.child.stuck_pid} of engine {self.spec.engine.name} hangs and cannot be killed.{where}"
        )

    def _devices(self, instance: Instance) -> tuple[str, ...]:
        """GPUs that an instance may hold."""
        ready = instance.ready
        return self.spec.model.devices or ((ready.device,) if ready and ready.device != "cpu" else ())

    def _abandon(self, instance: Instance) -> None:
        """A process that nobody can kill: its GPUs are not to be used any more, everything else goes on."""
        devices, pid = self._devices(instance), instance.child.stuck_pid
        instance.child.on_late_death = lambda _how: self._on_late_death(self.spec, devices, pid)
        self._standing.abandon(instance.child)
        self._on_unkillable(self.spec, devices, pid)

    async def _sit_out(self, pause_s: float) -> None:
        """Quarantine, until a probe passes."""
        log.error("%s is in quarantine for %.0f s: %s", self.spec.name, pause_s, self._reason)
        if self._life.state is not State.QUARANTINED:
            self._bar()
        await self._standing.serve(pause_s)
        self._reason = ""
        log.info("%s is back: its probe passed", self.spec.name)
        self._step(Event.LIFT)

    def _bar(self) -> None:
        if self._standing.fault is not None:
            self._fail_waiting(self._standing.fault)
        self._blocked = None
        self._step(Event.BAR)

    @property
    def _refusal(self) -> Fault | None:
        """What new runs are answered with at once."""
        return self._standing.fault or self._blocked

    # ---- small parts

    def _refuse(self, story: _Story, fault: Fault) -> None:
        """The model cannot be loaded: answer everybody who waits, now, and everybody who asks for a while."""
        story.fault = fault
        if story.instance is None:
            story.end = End(why=Why.NOT_STARTED, note=fault.message)
        self._reason = fault.message
        log.error("%s cannot be loaded: %s", self.spec.name, fault.message)
        self._blocked = fault
        self._fail_waiting(fault)

    def _fail_waiting(self, fault: Fault) -> None:
        while self._waiting:
            self._waiting.popleft().fail(fault)

    async def _next_bell(self) -> None:
        await self._bell.wait()
        self._bell = trio.Event()

    def _ring(self) -> None:
        self._bell.set()
        self._on_change()

    def _changed(self) -> None:
        """Something about the instance's runs changed: step, and look at the queue."""
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
        self._ring()

    def _stopping(self) -> None:
        self._idle_since = None
        if self._life.state is not State.STOPPING:
            self._step(Event.END)

    def _step(self, event: Event) -> None:
        self._life.step(event)
        self._on_change()


def _first_fault(group: BaseExceptionGroup[FaultError]) -> Fault:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, FaultError)
    return error.fault
