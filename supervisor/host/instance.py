"""One engine instance: a process with a model in it, from spawn to reaped.

Theory of operation. `open_instance` starts the child, greets it, loads the model and yields; leaving the block
shuts the child down. One task reads frames and is the only one that touches the runs; each run has a small task
of its own that watches its deadlines. What the engine reports as progress decides; nothing else keeps it alive.

A run that does not end within `cancel_grace_s` of a cancel is given up at once, so that its caller is answered;
the instance then takes no new runs (`draining`) and is ended when its neighbours are done: one stuck run never
kills another caller's.
"""

from __future__ import annotations

import contextlib
import logging
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import trio

from protocol import engine_wire as wire
from protocol.engine_session import EngineSession, ProtocolError, Role
from protocol.faults import Fault, FaultError, refuse
from protocol.framing import FrameDecoder, FramingError
from protocol.revision import ENGINE_WIRE, Span, agree
from supervisor.host.child import Child, ChildSpec, Exit
from supervisor.host.launching import engine_child
from supervisor.host.means import REAL_MEANS, Means
from supervisor.host.ticket import Ticket
from supervisor.host.work import Chunk, Done, ModelSpec, Progress, RunRequest, Started
from supervisor.settings import LimitsTable

log = logging.getLogger(__name__)

# Shutdown is asked for politely before SIGTERM; an engine that obeys does so at once.
SHUTDOWN_GRACE_S = 2.0
EXIT_NOT_CONFINED = 71  # engines/launch.py: a required layer is not verified
_EVIDENCE_LINES = 40
_OUT_OF_MEMORY = ("cuda error: out of memory", "cudaerrormemoryallocation", "failed to allocate cuda")
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class Instance:
    """A running instance. Made by `open_instance` only.

    Attributes:
        ready: what the engine said after the load; None before.
        admitted: tickets that hold a slot.
        succeeded: runs that ended with a result.
        draining: takes no new runs; see the module's theory.
        over: set when the process is dead, or can no longer be trusted and is about to be ended.
        exit: how the process ended, once it has.
    """

    def __init__(self, spec: ModelSpec, limits: LimitsTable, child: Child) -> None:
        self.spec, self.limits, self.child = spec, limits, child
        self.ready: wire.Ready | None = None
        self.admitted: list[Ticket] = []
        self.draining = False
        self.over = trio.Event()
        self.broken: Fault | None = None
        self.succeeded = 0
        self.changed: Callable[[], None] = lambda: None
        self._session = EngineSession(Role.HOST)
        self._runs: dict[int, Ticket] = {}
        self._next_run = wire.FIRST_RUN
        self._hello = trio.Event()
        self._loaded = trio.Event()
        self._load_fault: Fault | None = None
        self._load_sign = 0.0
        self._on_load_progress: Callable[[Progress], None] = lambda _progress: None

    @property
    def free_slots(self) -> int:
        """How many more runs it takes now."""
        if self.ready is None or self.draining or self.over.is_set():
            return 0
        return max(0, self.ready.slots - len(self.admitted))

    # ---- sending

    async def _send(self, message: wire.Down) -> None:
        self._session.sending(message)
        await self.child.write(*wire.encode(message))

    async def _send_quietly(self, message: wire.Down) -> None:
        """Send when the engine still listens; its death is noticed elsewhere."""
        with contextlib.suppress(BrokenPipeError, trio.ClosedResourceError):
            await self._send(message)

    # ---- load

    async def load(self, scratch: Path, on_progress: Callable[[Progress], None]) -> wire.Ready:
        """Greet and load.

        Raises:
            FaultError: the engine died, hung, refused the model, or fell back to the CPU.
        """
        with trio.move_on_after(self.limits.start_s):
            await self._until(self._hello)
        if not self._hello.is_set():
            raise self._died(f"did not say hello within {self.limits.start_s:g} s")
        self._on_load_progress = on_progress
        await self._send_quietly(wire.Load(model=self.spec.model, scratch=str(scratch)))
        self._load_sign = trio.current_time()
        while not self._loaded.is_set() and not self.over.is_set():
            limit = self._load_sign + self.limits.load_s
            with trio.move_on_at(limit):
                await self._until(self._loaded)
            if trio.current_time() >= self._load_sign + self.limits.load_s:
                break
        if self._load_fault is not None:
            raise FaultError(self._load_fault)
        if self.ready is None:
            raise self._died(f"showed no progress for {self.limits.load_s:g} s while loading")
        if self.spec.engine.sandbox.mode == "require" and not self.ready.sandbox:
            raise refuse("load_failed", f"Engine {self.spec.engine.name} runs in no sandbox, and one is required.")
        weak = [f"{layer}: {word}" for layer, word in self.ready.sandbox.items() if word not in ("verified", "claimed")]
        log.info("%s is confined%s", self.spec.name, f", except {'; '.join(weak)}" if weak else " by every layer")
        return self.ready

    async def _until(self, event: trio.Event) -> None:
        """Wait for `event` or the end of the instance, whichever comes first."""
        async with trio.open_nursery() as nursery:

            async def wait(which: trio.Event) -> None:
                await which.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(wait, event)
            nursery.start_soon(wait, self.over)

    def _died(self, otherwise: str) -> FaultError:
        """The fault of a start or load that ended without an answer."""
        if self.over.is_set():
            return FaultError(self.end_fault("while it loaded the model"))
        return refuse(
            "engine_hung",
            f"Engine {self.spec.engine.name} {otherwise}; it was ended.",
            stderr_tail=self.child.stderr_tail(_EVIDENCE_LINES),
        )

    # ---- runs

    def admit(self, ticket: Ticket) -> Ticket:
        """Give a run its slot; the caller has seen a free one and calls `serve` next."""
        ticket.last_sign = trio.current_time()
        self.admitted.append(ticket)
        self.changed()
        return ticket

    async def serve(self, ticket: Ticket) -> None:
        """Take an admitted run to its end; the ticket always gets one.

        Cancellation: the run ends with `worker_stopping`; the engine is not asked, it is about to be ended.
        """
        # The wire wants run numbers in order: from here to the write lock there is no checkpoint.
        run, self._next_run = self._next_run, self._next_run + 1
        self._runs[run] = ticket
        try:
            async with trio.open_nursery() as nursery:

                async def until_ended() -> None:
                    await ticket.ended.wait()
                    nursery.cancel_scope.cancel()

                nursery.start_soon(until_ended)
                nursery.start_soon(self._limit, ticket)
                nursery.start_soon(self._obey_cancel, run, ticket)
                await self._send_quietly(_run_message(run, ticket.request))
        finally:
            ticket.fail(Fault("worker_stopping", "The worker stopped before the job was done."))
            self._runs.pop(run, None)
            self.admitted.remove(ticket)
            self.changed()

    async def _limit(self, ticket: Ticket) -> None:
        """Ask for a cancel when the deadline or the time without progress is over."""
        while True:
            silent_s = self._patience_s(ticket)
            assert ticket.last_sign is not None
            until = min(ticket.deadline, ticket.last_sign + silent_s)
            await trio.sleep_until(until)
            now = trio.current_time()
            if now >= ticket.deadline:
                ticket.ask_cancel(Fault("deadline_exceeded", "The job did not end before its deadline."))
                return
            silent_s = self._patience_s(ticket)
            if now >= ticket.last_sign + silent_s:
                self.child.signal(signal.SIGUSR2)  # a stack dump for the evidence
                message = f"Engine {self.spec.engine.name} showed no progress for {silent_s:g} s."
                ticket.ask_cancel(Fault("engine_hung", message))
                return

    def _patience_s(self, ticket: Ticket) -> float:
        """How long the run may show no progress now."""
        return self.spec.stall_s or (self.limits.stall_s if ticket.produced else self.limits.first_output_s)

    async def _obey_cancel(self, run: int, ticket: Ticket) -> None:
        await ticket.cancel_asked.wait()
        await self._send_quietly(wire.Cancel(run=run))
        await trio.sleep(self.limits.cancel_grace_s)
        # It does not listen. The caller is answered now; the process goes as soon as it is empty.
        assert ticket.wanted_end is not None
        self.draining = True
        wanted = ticket.wanted_end
        if wanted.code == "engine_hung":
            detail = {**wanted.detail, "stderr_tail": self.child.stderr_tail(_EVIDENCE_LINES)}
            wanted = Fault(wanted.code, wanted.message, detail=detail)
        log.warning("%s ignored a cancel for %g s", self.spec.name, self.limits.cancel_grace_s)
        ticket.fail(wanted)

    # ---- receiving

    async def read(self) -> None:
        """Read frames until the engine dies or breaks the protocol; then every run in flight gets its fault."""
        decoder = FrameDecoder()
        try:
            while data := await self.child.read():
                decoder.feed(data)
                for frame in decoder:
                    message = wire.decode_up(frame)
                    self._session.received(message)
                    self._take(message)
        except (FramingError, ProtocolError, wire.WireError) as error:
            self.broken = Fault(
                "engine_protocol",
                f"Engine {self.spec.engine.name} broke the protocol: {error}.",
                detail={"stderr_tail": self.child.stderr_tail(_EVIDENCE_LINES)},
            )
            log.error("%s: %s", self.spec.name, self.broken.message)
            self.child.signal_group(signal.SIGKILL)
        if self.broken is None:
            with trio.move_on_after(self.limits.term_grace_s):  # it closed its pipe: it dies, or it is ended
                await self.child.wait()
        self._all_over()

    def _all_over(self) -> None:
        self.over.set()
        for ticket in list(self.admitted):
            ticket.fail(ticket.wanted_end or self.end_fault("while it ran this job"))
        self.changed()

    def end_fault(self, when: str) -> Fault:
        """The fault that the end of the process means, with its evidence."""
        if self.broken is not None:
            return self.broken
        how = self.child.exit or Exit()
        tail = self.child.stderr_tail(_EVIDENCE_LINES)
        detail: dict[str, object] = {"stderr_tail": tail}
        if how.code is not None:
            detail["exit_code"] = how.code
        if how.signal is not None:
            detail["signal"] = how.signal
        if how.code == EXIT_NOT_CONFINED and tail and tail[-1].startswith("sandbox = "):
            return Fault("load_failed", f"Engine {self.spec.engine.name} was not started: {tail[-1]}.", detail=detail)
        memory = any(sign in line.lower() for line in tail for sign in _OUT_OF_MEMORY)
        text = " ".join(["Engine", self.spec.engine.name, how.describe(), when]).rstrip() + "."
        return Fault("out_of_memory" if memory else "engine_crashed", text, detail=detail)

    def _take(self, message: wire.UpMessage) -> None:
        match message:
            case wire.Hello():
                self._greet(message)
            case wire.Ready():
                self.ready = message
                self._loaded.set()
            case wire.Progress(run=wire.NO_RUN):
                self._load_sign = trio.current_time()
                self._on_load_progress(Progress(message.n, message.total, message.phase or "load", message.text))
            case wire.RunFault(run=wire.NO_RUN):
                self._load_fault = message.fault
                self._loaded.set()
            case wire.Log():
                log.log(_LEVELS.get(message.level, logging.INFO), "%s: %s", self.spec.name, message.message)
            case wire.Started() | wire.Progress() | wire.Chunk() | wire.Result() | wire.RunFault():
                self._take_run(message)
            case _:  # pong, stats, valid: nothing waits for them yet
                pass

    def _greet(self, hello: wire.Hello) -> None:
        if agree(ENGINE_WIRE, Span(hello.low, hello.high)) is None:
            text = (
                f"the engine speaks revisions {hello.low} to {hello.high}, we {ENGINE_WIRE.low} to {ENGINE_WIRE.high}"
            )
            raise wire.WireError(text)
        self._hello.set()

    def _take_run(self, message: wire.Started | wire.Progress | wire.Chunk | wire.Result | wire.RunFault) -> None:
        ticket = self._runs.get(message.run)
        if ticket is None:
            return  # given up before; the engine has ended it after all
        match message:
            case wire.Started():
                ticket.tell(Started())
            case wire.Progress():
                ticket.tell(Progress(message.n, message.total, message.phase, message.text))
            case wire.Chunk():
                ticket.tell(Chunk(message.seq, bytes(message.data)))
            case wire.Result():
                self.succeeded += 1
                ticket.finish(Done(body=bytes(message.body), files=message.files, usage=message.usage))
            case wire.RunFault():
                cancelled = message.fault.code == "cancelled" and ticket.wanted_end is not None
                ticket.fail(ticket.wanted_end if cancelled and ticket.wanted_end else message.fault)

    async def shut_down(self) -> None:
        """Ask the engine to leave. Cancellation: shielded, bounded by `SHUTDOWN_GRACE_S`."""
        if self.over.is_set() or self.draining:
            return
        with trio.CancelScope(shield=True), trio.move_on_after(SHUTDOWN_GRACE_S):
            await self._send_quietly(wire.Shutdown())
            self.child.close_stdin()
            await self.child.wait()


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


@contextlib.asynccontextmanager
async def open_instance(
    spec: ModelSpec,
    limits: LimitsTable,
    scratch: Path,
    *,
    on_progress: Callable[[Progress], None] = lambda _progress: None,
    means: Means = REAL_MEANS,
) -> AsyncIterator[Instance]:
    """Start an engine with its model loaded; leaving the block ends it and removes its scratch folder.

    Args:
        scratch: folder of this instance; made here.
        means: how to verify files, spawn, and remove the folder.

    Raises:
        FaultError: whose fault it is and why.
    """
    await means.verify(spec)
    _make(scratch)
    try:
        try:
            opened = means.spawn(_child_spec(spec, scratch), term_grace_s=limits.term_grace_s)
            async with opened as child:
                instance = Instance(spec, limits, child)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(instance.read)
                    try:
                        await instance.load(scratch, on_progress)
                        yield instance
                    finally:
                        await instance.shut_down()
                        nursery.cancel_scope.cancel()
        except OSError as error:
            raise refuse("load_failed", f"Engine {spec.engine.name} cannot be started: {error}.") from None
    finally:
        with trio.CancelScope(shield=True):
            await means.remove(scratch)


def _make(folder: Path) -> None:
    folder.mkdir(parents=True, mode=0o700)


def _child_spec(spec: ModelSpec, scratch: Path) -> ChildSpec:
    def line(text: str) -> None:
        log.debug("%s stderr: %s", spec.name, text)

    return engine_child(spec.engine, scratch, model=spec.model, on_stderr_line=line)
