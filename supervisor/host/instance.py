"""One engine instance: a process with a model in it.

Theory of operation. `open_instance` (opening.py) starts the child and yields; the lane then lets it load and hands it
runs (runs.py); leaving the block shuts the child down. One task reads frames and is the only one that touches the runs;
another looks at the process from outside (watch.py). Whoever finds that the instance has to go calls `give_up`: the
stacks are taken, every run in flight gets its fault, `over` is set, and the lane leaves the block. What ended an
instance first is its end (ends.py); what happens to the process afterwards is only noted.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import trio

from protocol import engine_wire as wire
from protocol.engine_session import EngineSession, ProtocolError, Role
from protocol.faults import Fault, FaultError
from protocol.framing import FrameDecoder, FramingError
from protocol.revision import ENGINE_WIRE, Span, agree
from supervisor.host import patience, told
from supervisor.host.cgroups import Cgroup
from supervisor.host.child import Child
from supervisor.host.ends import End, Why, judge
from supervisor.host.incidents import Incident, stack_dump, without_stacks
from supervisor.host.means import Means
from supervisor.host.runs import Runs
from supervisor.host.share import Share
from supervisor.host.watch import Watch
from supervisor.host.work import ModelSpec, Progress
from supervisor.intake.loading import End as EndLoad
from supervisor.intake.loading import LoadWatch, judge_load
from supervisor.settings import LimitsTable

log = logging.getLogger(__name__)

# Shutdown is asked for politely before SIGTERM; an engine that obeys does so at once.
SHUTDOWN_GRACE_S = 2.0
# faulthandler needs less than a millisecond; its dump is over when nothing more comes for so long.
STACKS_S = 0.5
STACKS_QUIET_S = 0.05
EXIT_NOT_CONFINED = 71  # engines/launch.py: a required layer is not verified
WHILE_LOADING = "while it loaded the model"
WHILE_RUNNING = "while it ran this job"
_EVIDENCE_LINES = 40
_OUT_OF_MEMORY = ("cuda error: out of memory", "cudaerrormemoryallocation", "failed to allocate cuda")
_LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class Instance:
    """A running instance. Made by `opening.open_instance` only.

    Attributes:
        ready: what the engine said after the load; None before.
        runs: what runs on it.
        watch: what is seen of it from outside.
        ours: the end that we decided on; None while we have not.
        over: set when the process is dead, or can no longer be trusted and is about to be ended.
    """

    def __init__(
        self, spec: ModelSpec, limits: LimitsTable, child: Child, means: Means, scratch: Path, cgroup: Cgroup | None
    ) -> None:
        self.spec, self.limits, self.child = spec, limits, child
        self.ready: wire.Ready | None = None
        self.ours: End | None = None
        self.over = trio.Event()
        self.changed: Callable[[], None] = lambda: None
        self.cgroup = cgroup
        self.runs = Runs(spec, limits, self)
        self.watch = Watch(self, means.senses, scratch)
        self._scratch = scratch
        self._cause: tuple[str, str] | None = None  # code and sentence of the fault, when the end is ours
        self._in_flight: tuple[str, ...] = ()  # labels, at the moment it was over
        self.blames_job = False  # over under a single run, a known suspect: the run's doing, not the model's
        self._session = EngineSession(Role.HOST)
        self._hello = trio.Event()
        self._loaded = trio.Event()
        self._load_fault: Fault | None = None
        self._load_watch = LoadWatch(began_at=0.0, silent_s=limits.load_s)
        self._load_phase = ""
        self._on_load_progress: Callable[[Progress], None] = lambda _progress: None
        self._said = trio.Event()  # replaced with each line on stderr
        self._lines = 0
        self._gate = told.LogGate(trio.current_time)

    @property
    def free_slots(self) -> int:
        """How many more runs it takes now."""
        if self.ready is None or self.runs.stuck is not None or self.ours is not None or self.over.is_set():
            return 0
        if self.runs.doubtful:
            return 0
        return max(0, self.ready.slots - len(self.runs.admitted))

    @property
    def loading(self) -> bool:
        """Whether it has greeted and has not answered the load yet."""
        return self._hello.is_set() and not self._loaded.is_set()

    @property
    def has(self) -> int:
        """How many runs the engine still works on, those that were given up included."""
        return len(self._session.open_runs)

    def apply(self, limits: LimitsTable, spec: ModelSpec) -> None:
        """Go on with other limits and another patience; what the process was given at its start stays."""
        self.limits, self.spec = limits, spec
        self.runs.apply(limits, spec)

    # ---- sending

    async def _send(self, message: wire.Down) -> None:
        self._session.sending(message)
        await self.child.write(*wire.encode(message))

    async def tell(self, message: wire.Down) -> None:
        """Send when the engine still listens; its death is noticed elsewhere."""
        with contextlib.suppress(BrokenPipeError, trio.ClosedResourceError):
            await self._send(message)

    # ---- load

    async def load(self, on_greeted: Callable[[], None], on_progress: Callable[[Progress], None]) -> wire.Ready:
        """Greet and load.

        Raises:
            FaultError: the engine died, hung, refused the model, or fell back to the CPU.
        """
        name = self.spec.engine.name
        start_s, load_s = self.limits.start_s, self.limits.load_s
        await patience.wait_until(lambda: self._until(self._hello), trio.current_time() + start_s)
        if not self._hello.is_set():
            text = f"Engine {name} did not say hello within {start_s:g} s; it was ended."
            await self.give_up(End(why=Why.NO_HELLO, when=f"within {start_s:g} s"), "engine_hung", text)
            raise FaultError(self.end_fault(WHILE_LOADING))
        on_greeted()
        self._on_load_progress = on_progress
        self._load_watch = LoadWatch(began_at=trio.current_time(), silent_s=load_s)
        self.moved()
        await self.tell(wire.Load(model=self.spec.model, scratch=str(self._scratch)))
        while not await patience.wait_until(lambda: self._until(self._loaded), self._load_watch.deadline):
            verdict = judge_load(self._load_watch, trio.current_time(), waiting=1)  # its lane knows who waits
            if isinstance(verdict, EndLoad):
                text = f"Engine {name} showed no progress for {load_s:g} s while loading; it was ended."
                await self.give_up(End(why=Why.LOAD_STALLED, when=f"for {load_s:g} s"), "engine_hung", text)
                break
        return self._accept_load()

    def _accept_load(self) -> wire.Ready:
        name = self.spec.engine.name
        self.watch.loaded()
        if self._load_fault is None and self.ready is None:
            raise FaultError(self.end_fault(WHILE_LOADING))
        if self.ready and self.spec.engine.sandbox.mode == "require" and not self.ready.sandbox:
            self._load_fault = Fault("load_failed", f"Engine {name} runs in no sandbox, and one is required.")
        if self._load_fault is not None or self.ready is None:
            fault = self._load_fault or Fault("load_failed", f"Engine {name} did not load its model.")
            self.ours = self.ours or End(why=Why.LOAD_REFUSED, note=fault.message)
            raise FaultError(fault)
        weak = [f"{layer}: {word}" for layer, word in self.ready.sandbox.items() if word not in ("verified", "claimed")]
        log.debug("%s is confined%s", self.spec.name, f", except {'; '.join(weak)}" if weak else " by every layer")
        return self.ready

    async def _until(self, event: trio.Event) -> None:
        """Wait for `event` or the end of the instance, whichever comes first."""
        async with trio.open_nursery() as nursery:

            async def wait(which: trio.Event) -> None:
                await which.wait()
                nursery.cancel_scope.cancel()

            nursery.start_soon(wait, event)
            nursery.start_soon(wait, self.over)

    # ---- receiving

    async def read(self) -> None:
        """Read frames until the engine dies or breaks the protocol; then every run in flight gets its fault."""
        decoder = FrameDecoder()
        try:
            share = Share()
            while data := await self.child.read():
                self.watch.heard()
                decoder.feed(data)
                for frame in decoder:
                    message = wire.decode_up(frame)
                    self._session.received(message)
                    self._take(message)
                    await share.give_way()
        except (FramingError, ProtocolError, wire.WireError) as error:
            self._broke(str(error))
        if not self.over.is_set() and self.child.exit is None:
            with trio.move_on_after(self.limits.term_grace_s):  # it closed its pipe: it dies, or it is ended
                await self.child.wait()
            if self.child.exit is None and self.ours is None:
                self.ours = End(why=Why.CLOSED_OUTPUT, when="while it ran a job" if self.runs.admitted else "")
        self._all_over()

    def _broke(self, error: str) -> None:
        """What it says cannot be trusted any more: it is killed at once, without a grace."""
        if self.ours is None:
            self.ours = End(why=Why.BROKEN_PROTOCOL, note=error)
            self._cause = ("engine_protocol", f"Engine {self.spec.engine.name} broke the protocol: {error}.")
            log.error("%s: %s", self.spec.name, self._cause[1])
        self.child.kill("it broke the protocol")
        self._all_over()

    def _take(self, message: wire.UpMessage) -> None:
        match message:
            case wire.Hello():
                self._greet(message)
            case wire.Ready():
                self.ready = message
                self._loaded.set()
            case wire.Progress(run=wire.NO_RUN):
                self._load_moves(message)
                phase = told.text(message.phase or "load", told.MAX_NAME_CHARS)
                self._on_load_progress(Progress(message.n, message.total, phase, told.text(message.text)))
            case wire.RunFault(run=wire.NO_RUN):
                self._load_fault = told.fault(message.fault)
                self._loaded.set()
            case wire.Log():
                self._log(message)
            case wire.Started() | wire.Progress() | wire.Chunk() | wire.Result() | wire.RunFault():
                self.runs.take(message)
            case wire.Pong():
                self.watch.ponged()
            case _:  # stats, valid: nothing waits for them
                pass

    def _load_moves(self, message: wire.Progress) -> None:
        """A report that is no further than the last one is no progress; a new phase counts from its own start."""
        if message.phase != self._load_phase:
            self._load_phase = message.phase
            self._load_watch = msgspec.structs.replace(self._load_watch, done=0.0, whole=0.0)
        before = self._load_watch
        self._load_watch = before.seen(trio.current_time(), float(message.n), float(message.total or 0))
        if self._load_watch is not before:
            self.moved()

    @property
    def loaded_share(self) -> float:
        """How much of its load is done, 0 to 1; 0 where that is not told."""
        return self._load_watch.share

    def _log(self, message: wire.Log) -> None:
        dropped = self._gate.admit()
        if dropped is None:
            return
        if dropped:
            log.warning("%s: %d log lines were left out: it says too much", self.spec.name, dropped)
        log.log(_LEVELS.get(message.level, logging.INFO), "%s: %s", self.spec.name, told.text(message.message))

    def _greet(self, hello: wire.Hello) -> None:
        if agree(ENGINE_WIRE, Span(hello.low, hello.high)) is None:
            text = (
                f"the engine speaks revisions {hello.low} to {hello.high}, we {ENGINE_WIRE.low} to {ENGINE_WIRE.high}"
            )
            raise wire.WireError(text)
        self.watch.greeted(hello.pid)
        self._hello.set()

    def moved(self) -> None:
        """Work was handed over or moved."""
        self.watch.moved()

    def rested(self) -> None:
        """It has no run just now."""
        self.watch.rested()

    # ---- ending

    def retire(self, end: End) -> None:
        """Take no new runs; the lane leaves the block when those it has are done."""
        if self.ours is None and not self.over.is_set():
            self.ours = end

    async def give_up(self, end: End, code: str, message: str) -> None:
        """It has to go now: take its stacks, answer every run with a fault of `code`, and set `over`."""
        if self._cause is not None or self.over.is_set():
            return
        self.ours, self._cause = end, (code, message)
        log.error("%s: %s", self.spec.name, message)
        await self.take_stacks()
        self._all_over()

    async def take_stacks(self) -> None:
        """Ask for a stack dump on stderr and wait until it is there, at most `STACKS_S`."""
        before = self._lines
        if not self.child.dump_stacks():
            return
        with trio.move_on_after(STACKS_S):
            if self._lines == before:
                await self._said.wait()
            more = True
            while more:
                with trio.move_on_after(STACKS_QUIET_S) as quiet:
                    await self._said.wait()
                more = not quiet.cancelled_caught

    def line(self, text: str) -> None:
        """A line on stderr."""
        log.debug("%s stderr: %s", self.spec.name, text)
        self._lines += 1
        self._said.set()
        self._said = trio.Event()

    def _all_over(self) -> None:
        if self.over.is_set():
            return
        self._in_flight = tuple(ticket.request.label for ticket in self.runs.admitted)
        self.blames_job = len(self._in_flight) == 1 and self.runs.admitted[0].request.alone
        self.over.set()
        self.runs.fail_all(self.end_fault(WHILE_RUNNING))
        self.changed()

    def evidence(self, code: str) -> dict[str, Any]:
        """The last lines of stderr, and for a hang what the watchdog thinks of it."""
        found: dict[str, Any] = {"stderr_tail": self.child.stderr_tail(_EVIDENCE_LINES)}
        if code == "engine_hung":
            found["diagnosis"] = str(self.watch.diagnosis)
        return found

    def end(self) -> End:
        """How it ended, as far as is known by now."""
        loading = self.ready is None
        when = WHILE_LOADING if loading else "while it ran a job" if self._in_flight else ""
        return judge(self.child.exit, self._decided(), oom=self._out_of_memory(), when=when)

    def _decided(self) -> End | None:
        """Our decision; we asked it to leave because of the run that was given up, where there was one."""
        stuck = self.runs.stuck
        if stuck is None or self.ours is None or self._cause is not None:
            return self.ours
        return End(why=Why.HUNG if stuck.code == "engine_hung" else Why.STUCK_CANCEL, note=stuck.message)

    def _out_of_memory(self) -> bool:
        """Whether the kernel killed for want of memory: in its cgroup, or anywhere since we looked last."""
        return self.watch.oom_killed() or (self.cgroup is not None and self.cgroup.oom_kills() > 0)

    def end_fault(self, when: str) -> Fault:
        """The fault that the end means for whoever it hit, with its evidence."""
        end = judge(self.child.exit, self.ours, oom=self._out_of_memory(), when=when)
        code, text = self._cause or self._told_apart(end, when)
        return Fault(code, text, detail={**end.detail(), **self.evidence(code)})

    def _told_apart(self, end: End, when: str) -> tuple[str, str]:
        """Code and sentence for a process that went by itself."""
        name, tail = self.spec.engine.name, self.child.stderr_tail(_EVIDENCE_LINES)
        if end.code == EXIT_NOT_CONFINED and tail and tail[-1].startswith("sandbox = "):
            return "load_failed", f"Engine {name} was not started: {tail[-1]}."
        text = f"{_sentence(name, end.how)} {when}".rstrip() + "."
        memory = any(sign in line.lower() for line in tail for sign in _OUT_OF_MEMORY)
        return "out_of_memory" if memory or end.why is Why.OOM_KILLED else "engine_crashed", text

    def report(self) -> Incident:
        """What an operator may want to know about a bad end; call it when the process is gone."""
        end = self.end()
        fault = self.end_fault(end.when)
        lines = self.child.stderr_tail(self.child.spec.stderr_lines)
        return Incident(
            model=self.spec.name,
            engine=self.spec.engine.name,
            pid=self.child.pid,
            how=end.phrase(),
            diagnosis=str(self.watch.diagnosis),
            facts=self.watch.facts(),
            code=fault.code,
            message=fault.message,
            stacks=tuple(stack_dump(lines)),
            stderr=tuple(without_stacks(lines)),
            runs=self._in_flight,
            sandbox=self.ready.sandbox if self.ready else {},
            gpus=self.watch.gpus(),
        )

    async def shut_down(self) -> None:
        """Ask the engine to leave. Cancellation: shielded, bounded by `SHUTDOWN_GRACE_S`."""
        self.retire(End(why=Why.ASKED))
        if self.over.is_set() or self.runs.stuck is not None:
            return
        with trio.CancelScope(shield=True), trio.move_on_after(SHUTDOWN_GRACE_S):
            await self.tell(wire.Shutdown())
            self.child.close_stdin()
            await self.child.wait()


def _sentence(name: str, how: str) -> str:
    return f"Engine {name} was {how}" if how.startswith("killed") else f"Engine {name} {how}"
