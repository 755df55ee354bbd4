"""Who decides in a supervisor that runs: the scheduler of `intake`, fed with what happens, its effects carried out.

Theory of operation. `intake.scheduler` is pure; the simulator drives it by a trace, and this module by the real
world. Lanes (host/lane.py) tell what becomes of their instances, the room (room.py) what the GPUs hold; both by
`tell`, on the trio thread. A step is short and its effects are calls to lanes, so that they are carried out before
`tell` returns; what a lane tells from inside such a call waits until then. One task sleeps until `Scheduler.due`.

Before a model is loaded from nothing, its files are looked at again (`Room.need`): they may have changed, or have
been learned about. Until then the scheduler does not load it.

Nobody else keeps jobs waiting: whoever waits for a model is here, by the job's number, until it is handed to a lane.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import trio

from protocol.faults import Fault, refuse
from supervisor.host.means import Room
from supervisor.host.ticket import Ticket
from supervisor.host.work import ModelSpec, Progress
from supervisor.intake import effects as fx
from supervisor.intake.scheduler import Scheduler

log = logging.getLogger(__name__)

# Sign of life for those who wait, though nothing changed.
TELL_AGAIN_S = 10.0
# A guess at a load's length until one was seen; it only weighs one model against another.
LOAD_S = 5.0
STOPPED = Fault("worker_stopping", "The worker stopped before the job was done.")


class Runner(Protocol):
    """A lane, as far as it is told what to do. Nothing here waits."""

    spec: ModelSpec

    @property
    def refusal(self) -> Fault | None:
        """What new runs are answered with at once; None when they may wait for it."""

    @property
    def usable(self) -> bool:
        """Whether it takes orders: it is in no quarantine and sits out no pause."""

    @property
    def load(self) -> int:
        """Orders that it has not brought to their end."""

    def order(self, number: int, shares: Mapping[str, int]) -> None:
        """Start an instance with this number on these devices."""

    def begin(self, number: int, ticket: Ticket) -> None:
        """Give an instance a run."""

    def end(self, number: int, reason: str, *, idle: bool) -> None:
        """End an instance that has no run."""

    def cancel_load(self, number: int, reason: str) -> None:
        """End an instance that still loads, or has not been started."""

    def explain(self, text: str) -> None:
        """Take note of why its model waits."""


class Deciding:
    """See the module. Made with the host; `adopt` the lanes, then `run`.

    Args:
        room: measures the GPUs, or says that there is nothing to measure.
        threshold_bytes: most that one job may say it needs; 0 sets no limit.
    """

    def __init__(self, specs: Sequence[ModelSpec], room: Room, *, threshold_bytes: int = 0) -> None:
        self._specs = {spec.name: spec for spec in specs}
        self._room = room
        self._scheduler = Scheduler(
            [_plan(spec) for spec in specs],
            None if room.measures else (),
            margin_bytes=room.margin_bytes,
            threshold_bytes=threshold_bytes,
        )
        self._lanes: dict[str, list[Runner]] = {}
        self._of: dict[int, Runner] = {}  # instance -> its lane
        self._alive: Counter[str] = Counter()  # model -> instances
        self._waiting: dict[str, dict[str, Ticket]] = {spec.name: {} for spec in specs}
        self._jobs: dict[Ticket, str] = {}
        self._on_gone: dict[str, Callable[[], None]] = {}
        self._numbers = itertools.count(1)
        self._faults: dict[str, Fault] = {}
        self._unread: deque[ModelSpec] = deque()
        self._reading: set[str] = set()
        self._events: deque[fx.Event] = deque()
        self._stepping = self._closed = False
        self._bell = trio.Event()
        self._wakes_at: float | None = None
        room.bind(self)

    def join(self, spec: ModelSpec, lanes: Sequence[Runner]) -> None:
        """One more model, with the lanes that hold its instances. Its name is free."""
        self._specs[spec.name] = spec
        self._waiting[spec.name] = {}
        self._lanes[spec.name] = list(lanes)
        self.tell(fx.ModelJoins(_plan(spec)))
        self.recount(spec.name)

    def part(self, model: str, reason: str, on_gone: Callable[[], None]) -> None:
        """Have no more of a model: what waits for it is refused, what runs ends, and `on_gone` is told of the end."""
        self._on_gone[model] = on_gone
        self.tell(fx.ModelParts(model, reason))

    def adopt(self, model: str, lanes: Sequence[Runner]) -> None:
        """These lanes hold the instances of a model."""
        self._lanes[model] = list(lanes)
        self.recount(model)

    # ---- asking

    def add(self, ticket: Ticket) -> None:
        """Queue a run; it always gets an end."""
        request = ticket.request
        refusals = [lane.refusal for lane in self._lanes[request.model]]
        if self._closed:
            ticket.fail(STOPPED)
        elif refusals and all(refusals):
            ticket.fail(refusals[0] or STOPPED)
        else:
            self._look_at_files(request.model)
            job = fx.Job(
                id=str(next(self._numbers)),
                model=request.model,
                at=trio.current_time(),
                priority=request.priority,
                vram_bytes=request.vram_bytes,
                alone=request.alone,
            )
            self._waiting[request.model][job.id] = ticket
            self._jobs[ticket] = job.id
            self.tell(fx.Arrives(job))

    def drop(self, ticket: Ticket, fault: Fault) -> None:
        """End a run that waits, or ask its engine to end it."""
        job = self._jobs.get(ticket)
        if job is None:
            ticket.ask_cancel(fault)
            return
        self._forget(ticket.request.model, job)
        ticket.fail(fault)
        self.tell(fx.Cancelled(job))

    def want(self, model: str, *, ordered: bool = False) -> None:
        """Load a model before anybody asks for it: see `Wanted` of intake/effects.py."""
        self._look_at_files(model)
        self.tell(fx.Wanted(model, ordered))

    def unload(self, model: str, reason: str, *, again: bool) -> None:
        """End all instances of a model, each after its last run; with `again` it is then loaded anew."""
        self.tell(fx.Unload(model, reason, again))

    def tune(self, specs: Sequence[ModelSpec], threshold_bytes: int) -> None:
        """Go on with another `keep_alive_s` of models, and another limit of what a job may say it needs."""
        self.tell(fx.Tuned(threshold_bytes, {spec.name: spec.keep_alive_s for spec in specs}))

    def queued(self, model: str) -> int:
        """Runs that wait for a model."""
        return len(self._waiting.get(model, ()))

    def most_of(self, model: str) -> int:
        """The most GPU memory in bytes that one job of a model may say it needs; 0 sets no limit."""
        return self._scheduler.most_of(model)

    def why(self) -> dict[str, str]:
        """Model -> why it is not loaded or has no slot, for every model that somebody waits for."""
        return self._scheduler.why()

    def waits(self) -> dict[str, str]:
        """The same, only for models that wait to be loaded."""
        return self._scheduler.waits()

    # ---- told

    def tell(self, event: fx.Event) -> None:
        """Something happened: decide, and carry out what was decided."""
        self._events.append(event)
        if self._stepping or self._closed:
            return
        self._stepping = True
        try:
            while self._events:
                for effect in self._scheduler.step(self._events.popleft(), trio.current_time()):
                    self._carry_out(effect)
        finally:
            self._stepping = False
        if self._scheduler.due() != self._wakes_at:
            self._bell.set()

    def load_failed(self, number: int, model: str, fault: Fault) -> None:
        """A load has failed; `gone` follows. Whoever waits gets this very fault."""
        self._faults[model] = fault
        self.tell(fx.LoadEnds(number, problem=fault.message))

    def gone(self, number: int) -> None:
        """The process of an instance has ended and its memory is back, or it was never started."""
        lane = self._of.pop(number, None)
        if lane is None:
            return
        model = lane.spec.name
        self._alive[model] -= 1
        if not self._alive[model] and self.queued(model):
            self._look_at_files(model)
        self.tell(fx.Gone(number))

    def recount(self, model: str) -> None:
        """A lane takes no orders any more, or takes them again."""
        lanes = self._lanes.get(model, [])
        barred = [lane.refusal for lane in lanes if not lane.usable]
        problem = next((fault for fault in barred if fault is not None), None)
        if problem is not None:
            self._faults[model] = problem
        self.tell(fx.Copies(model, sum(lane.usable for lane in lanes), problem.message if problem else ""))

    def pass_on(self, model: str, progress: Progress) -> None:
        """Tell those who wait for a model how far it is."""
        for ticket in list(self._waiting.get(model, {}).values()):
            ticket.tell(progress)

    # ---- effects

    def _carry_out(self, effect: fx.Effect) -> None:
        match effect:
            case fx.StartRun(number, job):
                ticket = self._forget(job.model, job.id)
                self._of[number].begin(number, ticket)
            case fx.Load(number, model, shares):
                lane = min((each for each in self._lanes[model] if each.usable), key=lambda each: each.load)
                self._of[number] = lane
                self._alive[model] += 1
                lane.order(number, shares)
            case fx.Evict(number, reason, idle):
                self._of[number].end(number, reason, idle=idle)
            case fx.CancelLoad(number, reason):
                self._of[number].cancel_load(number, reason)
            case fx.Refuse(job_id, code, reason):
                self._refuse(job_id, code, reason)
            case fx.Waits(model, _reason):
                self._explain(model)
            case fx.ModelGone(model):
                books: tuple[dict[str, Any], ...] = (self._specs, self._waiting, self._lanes, self._faults)
                for book in books:
                    book.pop(model, None)
                self._on_gone.pop(model)()

    def _explain(self, model: str) -> None:
        if not (text := self._scheduler.waits_of(model)):
            return
        log.info("%s %s", model, text)
        for lane in self._lanes[model]:
            lane.explain(text)
        self.pass_on(model, Progress(0, phase="room", text=text))

    def _refuse(self, job_id: str, code: str, reason: str) -> None:
        model = next(name for name, jobs in self._waiting.items() if job_id in jobs)
        ticket = self._forget(model, job_id)
        if code in ("load_failed", "quarantined"):
            fault = self._faults.get(model) or Fault(code, reason)
        elif code == "parted":
            fault = Fault("worker_stopping", reason)
        elif code == "gpu_failed":
            fault = refuse("gpu_failed", reason).fault
        else:
            hint = "another GPU, a smaller model, or a smaller context"
            fault = refuse("out_of_memory", reason, hint=hint).fault
        ticket.fail(fault)

    def _forget(self, model: str, job: str) -> Ticket:
        ticket = self._waiting[model].pop(job)
        del self._jobs[ticket]
        return ticket

    # ---- what a load will take

    def _look_at_files(self, model: str) -> None:
        """Unless an instance of it lives: then what is known of it is as good as it gets."""
        spec = self._specs.get(model)
        if (
            spec is None
            or not self._room.measures
            or spec.model.device == "cpu"
            or self._alive[model]
            or model in self._reading
        ):
            return
        self._reading.add(model)
        self._unread.append(spec)
        self.tell(fx.Unread(model))
        self._bell.set()

    async def _read(self, spec: ModelSpec) -> None:
        try:
            need = await self._room.need(spec)
        except OSError as error:
            log.warning("%s: its files cannot be looked at: %s", spec.name, error)
            need = (0, True)
        self._reading.discard(spec.name)
        self.tell(fx.Learned(spec.name, *need))

    # ---- the task

    async def run(self) -> None:
        """Step when it is time to. Runs until cancelled; then whoever still waits is answered."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._room.open)
                nursery.start_soon(self._keep_telling)
                while True:
                    while self._unread:
                        nursery.start_soon(self._read, self._unread.popleft())
                    await self._sleep()
        finally:
            self._closed = True
            for jobs in self._waiting.values():
                for ticket in jobs.values():
                    ticket.fail(STOPPED)
                jobs.clear()
            self._jobs.clear()

    async def _sleep(self) -> None:
        due = self._wakes_at = self._scheduler.due()
        self._bell = trio.Event()
        with trio.move_on_at(float("inf") if due is None else due):
            await self._bell.wait()
        if due is not None and trio.current_time() >= due:
            self.tell(fx.Tick())

    async def _keep_telling(self) -> None:
        while True:
            await trio.sleep(TELL_AGAIN_S)
            for model, text in self.waits().items():
                self.pass_on(model, Progress(0, phase="room", text=text))


def _plan(spec: ModelSpec) -> fx.ModelPlan:
    return fx.ModelPlan(
        name=spec.name,
        need_bytes=0,
        estimated=True,
        copies=spec.copies,
        load_s=LOAD_S,
        pin=spec.pin,
        group=spec.group,
        keep_alive_s=spec.keep_alive_s,
        split=spec.split,
        devices=spec.model.devices,
        gpu=spec.model.device != "cpu",
    )
