"""The runs of one instance: slots, limits, cancels, and who is to blame when they end badly.

Theory of operation. Each run has a small task of its own that hands it to the engine and watches how long it shows no
progress; the deadline is watched by whoever waits for the run. What the engine reports as progress decides; nothing
else keeps a run alive.

A run that has to be cancelled is answered within `ANSWER_S`, whatever the engine does: a deadline is a promise to the
caller. Its slot stays taken until the engine lets go of it. One that does not within `cancel_grace_s` is given up. The
engine still has it, so the instance is not to be trusted any more: it takes no new runs and is ended when the
neighbours are done, or as soon as none of them moves either. One stuck run never ends another caller's.

How long a run took the engine (`compute_ms` of its usage) is measured here, from the hand-over to the result. Runs that
share an engine count their own time each, so their sum may be more than the time that the engine was busy.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
import trio

from protocol import engine_wire as wire
from protocol.faults import Fault
from supervisor.host import patience, told
from supervisor.host.ticket import Ticket
from supervisor.host.work import Chunk, Done, ModelSpec, Progress, RunRequest, Started
from supervisor.settings import LimitsTable

log = logging.getLogger(__name__)

# A caller waits no longer than this for an engine to obey a cancel; the slot stays taken until it does, or is given up.
ANSWER_S = 0.25
# Beside a run that ignored its cancel, neighbours are believed alive for this share of their own patience: the whole
# process is probably stuck, and every one of them would sit out its limit for nothing.
STUCK_SHARE = 0.5

RunMessage = wire.Started | wire.Progress | wire.Chunk | wire.Result | wire.RunFault


class Engine(Protocol):
    """The instance, as its runs see it."""

    async def tell(self, message: wire.Down) -> None:
        """Send; nothing when it does not listen any more."""

    async def take_stacks(self) -> None:
        """Get a stack dump onto its stderr."""

    def evidence(self, code: str) -> dict[str, Any]:
        """What a fault with this code should carry: the last lines of stderr, and why nothing came."""

    def moved(self) -> None:
        """A run was handed over or showed progress."""

    def rested(self) -> None:
        """The engine has no run just now."""

    @property
    def has(self) -> int:
        """How many runs the engine still works on, those that were given up included."""


class Runs:
    """See the module.

    Attributes:
        admitted: tickets that hold a slot.
        succeeded, done: runs that the engine ended with a result; that it ended at all.
        stuck: why the instance is not to be trusted any more: what the run that was given up had to end with.
        changed: called when a slot was taken or left, or the engine is late to obey a cancel.
    """

    def __init__(self, spec: ModelSpec, limits: LimitsTable, engine: Engine) -> None:
        self.admitted: list[Ticket] = []
        self.succeeded = 0
        self.done = 0
        self.stuck: Fault | None = None
        self.changed: Callable[[], None] = lambda: None
        self._spec, self._limits, self._engine = spec, limits, engine
        self._runs: dict[int, Ticket] = {}
        self._left: dict[int, trio.Event] = {}  # set when the engine has let go of the run, or it was given up
        self._overdue: set[int] = set()  # answered, and still with the engine
        self._next_run = wire.FIRST_RUN

    @property
    def alone(self) -> bool:
        """Whether a run that wants to be alone holds a slot."""
        return any(ticket.request.alone for ticket in self.admitted)

    @property
    def doubtful(self) -> bool:
        """Whether the engine is late to obey a cancel. Until it does or is given up, nobody is handed to it."""
        return bool(self._overdue)

    @property
    def hopeless(self) -> bool:
        """Whether, beside a stuck run, no other has moved for `STUCK_SHARE` of its patience either."""
        now = trio.current_time()
        return self.stuck is not None and all(
            ticket.last_sign is not None and now - ticket.last_sign >= STUCK_SHARE * self._patience_s(ticket)
            for ticket in self.admitted
        )

    def apply(self, limits: LimitsTable, spec: ModelSpec) -> None:
        """Go on with other limits, from the next sign of each run on."""
        self._limits, self._spec = limits, spec

    # ---- one run

    def admit(self, ticket: Ticket) -> Ticket:
        """Give a run its slot; the caller has seen a free one and calls `serve` next."""
        ticket.last_sign = trio.current_time()
        self.admitted.append(ticket)
        self._engine.moved()
        self.changed()
        return ticket

    async def serve(self, ticket: Ticket) -> None:
        """Take an admitted run to its end; the ticket always gets one.

        Cancellation: the run ends with `worker_stopping`; the engine is not asked, it is about to be ended.
        """
        # The wire wants run numbers in order: from here to the write lock there is no checkpoint.
        run, self._next_run = self._next_run, self._next_run + 1
        self._runs[run] = ticket
        self._left[run] = trio.Event()
        try:
            async with trio.open_nursery() as nursery:

                async def until_left(left: trio.Event) -> None:
                    await left.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(until_left, self._left[run])
                nursery.start_soon(self._limit, ticket)
                nursery.start_soon(self._obey_cancel, run, ticket, nursery)
                ticket.hand_over()
                await self._engine.tell(_run_message(run, ticket.request))
        finally:
            ticket.fail(Fault("worker_stopping", "The worker stopped before the job was done."))
            self._runs.pop(run, None)
            self._left.pop(run, None)
            self._overdue.discard(run)
            self.admitted.remove(ticket)
            self.changed()

    async def _limit(self, ticket: Ticket) -> None:
        """Ask for a cancel when the time without progress is over."""
        while True:
            assert ticket.last_sign is not None
            await patience.sleep_until(ticket.last_sign + self._patience_s(ticket))
            silent_s = self._patience_s(ticket)
            if trio.current_time() >= ticket.last_sign + silent_s:
                message = f"Engine {self._spec.engine.name} showed no progress for {silent_s:g} s."
                blame = self._blame()
                diagnosis = self._engine.evidence("engine_hung")["diagnosis"]
                ticket.ask_cancel(Fault("engine_hung", message, detail={**blame, "diagnosis": diagnosis}))
                await self._engine.take_stacks()
                return

    def _patience_s(self, ticket: Ticket) -> float:
        """How long the run may show no progress now."""
        return self._spec.stall_s or (self._limits.stall_s if ticket.produced else self._limits.first_output_s)

    async def _obey_cancel(self, run: int, ticket: Ticket, nursery: trio.Nursery) -> None:
        """See the module's theory. `nursery` holds what goes on as long as the run has its slot."""
        await ticket.cancel_asked.wait()
        asked = trio.current_time()
        due = asked + self._limits.cancel_grace_s
        # An engine that computes may empty its pipe later, and one that was stopped never.
        nursery.start_soon(self._engine.tell, wire.Cancel(run=run))
        await patience.sleep_until(min(due, asked + ANSWER_S))
        assert ticket.wanted_end is not None
        self._overdue.add(run)
        self.changed()
        ticket.fail(self._proven(ticket.wanted_end))
        await patience.sleep_until(due)
        # It does not listen. The process goes as soon as it is empty.
        log.warning("%s ignored a cancel for %g s", self._spec.name, self._limits.cancel_grace_s)
        if self.stuck is None or ticket.wanted_end.code == "engine_hung":
            self.stuck = ticket.wanted_end
        self._left[run].set()

    # ---- what the engine says

    def take(self, message: RunMessage) -> None:
        """A message of a run; one for a run that was given up means nothing any more."""
        if isinstance(message, wire.Result | wire.RunFault):
            self.done += 1
            if not self._engine.has:
                self._engine.rested()  # here, because the next run may be handed over before this one has left
        ticket = self._runs.get(message.run)
        if ticket is None:
            return
        self._engine.moved()
        match message:
            case wire.Started():
                ticket.tell(Started())
            case wire.Progress():
                phase, words = told.text(message.phase, told.MAX_NAME_CHARS), told.text(message.text)
                ticket.tell(Progress(message.n, message.total, phase, words))
            case wire.Chunk():
                ticket.tell(Chunk(message.seq, bytes(message.data)))
            case wire.Result():
                self.succeeded += ticket.end is None
                # Measured here for every engine; one that tells its own time knows better.
                usage = {"compute_ms": ticket.compute_ms} | told.usage(message.usage)
                ticket.finish(Done(body=bytes(message.body), files=message.files, usage=usage))
                self._left[message.run].set()
            case wire.RunFault():
                obeyed = message.fault.code == "cancelled" and ticket.wanted_end is not None
                fault = told.fault(message.fault)
                ticket.fail(self._proven(ticket.wanted_end) if obeyed and ticket.wanted_end else fault)
                self._left[message.run].set()

    def fail_all(self, fault: Fault) -> None:
        """The instance is over: answer everybody at once. A run that was to be cancelled ends as wanted."""
        blamed = with_detail(fault, self._blame())
        for ticket in list(self.admitted):
            ticket.fail(self._proven(ticket.wanted_end) if ticket.wanted_end else blamed)
        for left in self._left.values():
            left.set()

    def _blame(self) -> dict[str, Any]:
        """Who was in flight: the coordinator runs suspects again alone, and counts only what crashed alone."""
        count = self._engine.has
        return {"alone": True} if count == 1 else {"suspects": count} if count else {}

    def _proven(self, wanted: Fault) -> Fault:
        return with_detail(wanted, self._engine.evidence(wanted.code)) if wanted.code == "engine_hung" else wanted


def with_detail(fault: Fault, more: dict[str, Any]) -> Fault:
    """The fault with more detail; what it says already stays."""
    return msgspec.structs.replace(fault, detail={**more, **fault.detail})


def _run_message(run: int, request: RunRequest) -> wire.Run:
    return wire.Run(
        run=run,
        kind=request.kind,
        params=msgspec.Raw(request.params),
        inputs={name: str(path) for name, path in request.inputs.items()},
        folder=str(request.folder),
        stream=request.stream,
        log=request.label,
    )
