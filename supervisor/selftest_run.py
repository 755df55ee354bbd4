"""Running the misbehaviour kit: each case through the real host, with a healthy neighbour that is asked all the time.

Theory of operation. A case has a folder, a host with two models (the misbehaving one and a neighbour), and canaries
of its own, so that whatever is left afterwards is its doing. The misbehaving model is loaded, the neighbour is asked
without a pause, the misdeed is asked, its processes are counted until they are gone, the model is asked again until
it answers rightly, and the host is closed. Then processes, files and canaries are looked at. Cancelling at any point
ends every child of the case and removes its folder.
"""

from __future__ import annotations

import functools
import itertools
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import trio

from protocol.engine_wire import Model
from protocol.faults import FaultError
from supervisor.host.ground import Attempt, Ground
from supervisor.host.host import Host, open_host
from supervisor.host.work import Done, EngineSpec, Failed, ModelSpec, OnEvent, Progress, RunEnd, RunRequest, Sandbox
from supervisor.selftest_cases import Case
from supervisor.selftest_judge import Asked, Row, Seen, judge, said_by
from supervisor.selftest_traces import Canaries, Trace, alive, files_below, marked, open_canaries

BAD, GOOD = "synthetic-bad", "synthetic-neighbour"
MARK = "BULKHEAD_SELFTEST"
AT_ONCE = 4  # most of a case is waiting for a limit
# The rest of a case's time, besides its own bound: start of two engines on a busy box, escalation, recovery.
CASE_S = 60.0
LATE_S = 10.0  # so long after its bound nobody waits for an answer any more
GONE_S = 6.0  # escalation takes 0.3 s + 2 s + as long as the kernel needs
RECOVERY_S = 10.0
CLOSED_S = 2.0
PING_EVERY_S = 0.02
LEAST_PINGS = 3  # some cases are over before the neighbour has said anything
COUNT_EVERY_S = 0.1
_POLL_S = 0.01


def specs(case: Case, folder: Path, mark: str, mode: str) -> list[ModelSpec]:
    """The misbehaving model and its neighbour."""
    switch = str(folder / "switch")
    sandbox = Sandbox(mode=mode, write=(str(folder / "attempts"),))
    options: dict[str, object] = {"switch": switch} if case.load or case.start else {}
    if case.load:
        options["load"] = case.load
    bad_env = {MARK: f"{mark}-bad"} | (
        {"MISBEHAVE_START": case.start, "MISBEHAVE_SWITCH": switch} if case.start else {}
    )
    engine = functools.partial(EngineSpec, python=sys.executable, sandbox=sandbox)
    return [
        ModelSpec(
            name=BAD,
            engine=engine(name="misbehave", module="engines.synthetic.misbehave", env=bad_env),
            model=Model(name=BAD, device="cpu", options=options),
            memory_bytes=case.memory_mib * 2**20,
        ),
        ModelSpec(
            name=GOOD,
            engine=engine(name="synthetic", module="engines.synthetic.engine", env={MARK: f"{mark}-good"}),
            model=Model(name=GOOD, device="cpu"),
        ),
    ]


class Trial:
    """One case while it runs. `seen` fills up as it goes."""

    def __init__(self, case: Case, folder: Path, canaries: Canaries, mode: str) -> None:
        self.case, self.canaries, self.seen = case, canaries, Seen()
        self.mark = canaries.token
        self._ground = Ground(folder / "attempts" / "all")
        self._instances = folder / "instances"
        self._switch = folder / "switch"
        self._numbers = itertools.count(1)
        self._there: set[Trace] = set()
        self._heard = trio.Event()
        self._specs = specs(case, folder, self.mark, mode)

    async def run(self) -> None:
        """Take the case through; what cannot even be tried is noted in `seen.trouble`."""
        self._ground.root.parent.mkdir(mode=0o711)  # an engine of root's passes through
        self._ground.make()
        self._switch.write_text("on")
        self._switch.chmod(0o644)
        async with open_host(self._specs, self.case.limits, self._instances) as host:
            await trio.to_thread.run_sync(self.canaries.plant)
            if not await self._warmed(host):
                return
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._neighbour, host)
                await self._misdeed(host)
                with trio.move_on_after(RECOVERY_S):
                    await self._heard.wait()
                nursery.cancel_scope.cancel()
        await self._afterwards()

    async def _warmed(self, host: Host) -> bool:
        """Load both models; the misbehaving one only when its misdeed is not in the load itself."""
        names = [GOOD] if self.case.load or self.case.start else [GOOD, BAD]
        ends: dict[str, RunEnd | None] = {}

        async def warm(name: str) -> None:
            ends[name] = await self._ask(host, name, "warm", within_s=CASE_S)

        async with trio.open_nursery() as nursery:
            for name in names:
                nursery.start_soon(warm, name)
        for name, end in ends.items():
            if not _is_right(end, "warm"):
                self.seen.trouble = f"{name} could not be started: {_words(end)}"
        return not self.seen.trouble

    # ---- asking

    async def _ask(
        self,
        host: Host,
        model: str,
        prompt: str,
        *,
        within_s: float,
        deadline_s: float | None = None,
        cancel_after_s: float | None = None,
        on_event: OnEvent = lambda _event: None,
        judge_files: bool = False,
    ) -> RunEnd | None:
        """One run to its end; None when there is none after `within_s` and more."""
        name = f"{self.case.name}.{next(self._numbers)}"
        attempt = await trio.to_thread.run_sync(self._ground.open_attempt, name)
        request = RunRequest(
            model=model,
            kind="llm",
            params=msgspec.msgpack.encode({"prompt": prompt}),
            folder=attempt.outputs,
            stream=True,
            deadline_s=deadline_s,
            label=name,
        )
        end: RunEnd | None = None
        try:
            async with trio.open_nursery() as nursery:
                if cancel_after_s is not None:
                    nursery.start_soon(_hang_up, host, name, cancel_after_s)
                with trio.move_on_after(within_s + LATE_S):
                    end = await host.run(request, on_event)
                nursery.cancel_scope.cancel()
            if judge_files and isinstance(end, Done):
                self._look_at_files(end, attempt)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(attempt.remove)
        return end

    def _look_at_files(self, end: Done, attempt: Attempt) -> None:
        """Open the outputs as an upload would: a link must be refused."""
        for file in end.files:
            try:
                descriptor = attempt.open_output(file)
            except FaultError as error:
                self.seen.refused = error.fault.message
                continue
            with open(descriptor, "rb") as content:
                text = content.read().decode(errors="replace")
            self.seen.leaked = self.seen.leaked or self.canaries.knows(text)

    async def _neighbour(self, host: Host) -> None:
        for number in itertools.count(1):
            words = f"ping {number}"
            began = trio.current_time()
            end = await self._ask(host, GOOD, words, within_s=CASE_S)
            self.seen.worst_s = max(self.seen.worst_s, trio.current_time() - began)
            if _is_right(end, words):
                self.seen.answers += 1
            else:
                self.seen.wrong.append(_words(end))
            if number >= LEAST_PINGS:
                self._heard.set()
            await trio.sleep(PING_EVERY_S)

    # ---- the misdeed

    async def _misdeed(self, host: Host) -> None:
        case = self.case
        pid = _pid(host)
        self._there = await self._processes()
        for _ in range(case.runs):
            async with trio.open_nursery() as nursery:
                if case.beside:
                    await nursery.start(self._beside, host)
                counting = trio.CancelScope()
                if case.spawns:
                    nursery.start_soon(self._count, counting)
                prompt = self.canaries.fill_in(case.prompt) if case.prompt else "hello"
                began = trio.current_time()
                end = await self._ask(
                    host,
                    BAD,
                    prompt,
                    within_s=case.within_s,
                    deadline_s=case.deadline_s,
                    cancel_after_s=case.cancel_after_s,
                    judge_files=True,
                )
                self.seen.asked.append(Asked(end=end, seconds=trio.current_time() - began))
                counting.cancel()
            await trio.sleep(case.pause_s)
        if isinstance(end, Done):
            self.seen.leaked = self.seen.leaked or self.canaries.knows(said_by(end))
        self.seen.sandbox = host.snapshot()[0].sandbox
        ended = trio.current_time() - case.pause_s
        if case.ends:
            await self._see_it_go(ended)
        self._switch.write_text("off")
        await self._recover(host, ended)
        self.seen.sandbox = self.seen.sandbox or host.snapshot()[0].sandbox
        self.seen.replaced = _pid(host) != pid

    async def _beside(self, host: Host, *, task_status: trio.TaskStatus[None]) -> None:
        """A run that works well in the same instance; started when it has shown progress."""
        told = False

        def on_event(event: object) -> None:
            nonlocal told
            if isinstance(event, Progress) and event.phase == "decode" and not told:
                told = True
                task_status.started()

        self.seen.beside = await self._ask(host, BAD, "progress", within_s=CASE_S, on_event=on_event)

    async def _count(self, scope: trio.CancelScope) -> None:
        """Take note of every process that the misdeed makes."""
        with scope:
            while True:
                self._there |= await self._processes()
                await trio.sleep(COUNT_EVERY_S)

    async def _see_it_go(self, ended: float) -> None:
        """Wait until every process that was seen until now is gone."""
        there = self._there | await self._processes()
        self.seen.processes = len(there)
        with trio.move_on_after(GONE_S):
            while there:
                there = await trio.to_thread.run_sync(alive, there)
                await trio.sleep(_POLL_S if there else 0)
            self.seen.gone_s = trio.current_time() - ended

    async def _processes(self) -> set[Trace]:
        return await trio.to_thread.run_sync(marked, MARK, f"{self.mark}-bad")

    async def _recover(self, host: Host, ended: float) -> None:
        with trio.move_on_after(RECOVERY_S):
            while True:
                end = await self._ask(host, BAD, "and again", within_s=RECOVERY_S)
                if _is_right(end, "and again"):
                    self.seen.recovered_s = trio.current_time() - ended
                    return
                self.seen.recovery = _words(end)
                await trio.sleep(_POLL_S)

    # ---- afterwards

    async def _afterwards(self) -> None:
        """Look for what is left, now that the host is closed."""
        there = await trio.to_thread.run_sync(self._marked)
        with trio.move_on_after(CLOSED_S):
            while there:
                await trio.sleep(_POLL_S)
                there = await trio.to_thread.run_sync(alive, there)
        self.seen.strays = len(there)
        self.seen.harmed += await trio.to_thread.run_sync(self.canaries.harmed)
        shutil.rmtree(self.canaries.neighbours, ignore_errors=True)
        self.seen.files = await trio.to_thread.run_sync(files_below, self._instances)

    def _marked(self) -> set[Trace]:
        return marked(MARK, f"{self.mark}-bad") | marked(MARK, f"{self.mark}-good")


async def _hang_up(host: Host, label: str, after_s: float) -> None:
    await trio.sleep(after_s)
    host.cancel(label)


def _pid(host: Host) -> int:
    return host.snapshot()[0].pid


def _is_right(end: RunEnd | None, words: str) -> bool:
    return isinstance(end, Done) and said_by(end) == words


def _words(end: RunEnd | None) -> str:
    match end:
        case Failed(fault=fault):
            return f"{fault.code}: {fault.message}"
        case Done():
            return f"the answer {said_by(end)[:40]!r}"
    return "no answer"


async def run_case(case: Case, folder: Path, *, mode: str = "best-effort") -> Row:
    """Run one case in a folder of its own, which is made and removed here.

    Args:
        mode: of the sandbox, as in `[engines.NAME] sandbox`.

    Cancellation: its children are ended and reaped, its folder removed.
    """
    await trio.to_thread.run_sync(functools.partial(folder.mkdir, mode=0o711))
    trial: Trial | None = None
    try:
        with trio.move_on_after(case.within_s + CASE_S) as scope:
            try:
                opened = open_canaries(folder, sockets="{sockets}" in case.prompt, signals=case.name == "signal")
                async with opened as canaries:
                    trial = Trial(case, folder, canaries, mode)
                    await trial.run()
            except Exception as error:  # a bug of ours is a result too: the very thing that must not happen
                seen = trial.seen if trial else Seen()
                seen.trouble = f"the supervisor failed: {_innermost(error)!r}"
        seen = trial.seen if trial else Seen()
        if scope.cancelled_caught:
            seen.trouble = f"the supervisor was not done after {case.within_s + CASE_S:.0f} s"
        return judge(case, seen)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(functools.partial(shutil.rmtree, folder, ignore_errors=True))


def _innermost(error: BaseException) -> BaseException:
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def run_kit(
    cases: Sequence[Case],
    folder: Path,
    *,
    rows: dict[str, Row],
    on_change: Callable[[list[str]], None] = lambda _running: None,
    at_once: int = AT_ONCE,
    mode: str = "best-effort",
) -> None:
    """Run cases, a few at a time.

    Args:
        rows: name -> row, filled as they come; what is there after a cancel was judged to its end.
        on_change: called with the names that run now.
        mode: of the sandbox, as in `[engines.NAME] sandbox`.
    """
    limiter = trio.CapacityLimiter(at_once)
    running: list[str] = []

    async def one(number: int, case: Case) -> None:
        async with limiter:
            running.append(case.name)
            on_change(running)
            rows[case.name] = await run_case(case, folder / str(number), mode=mode)
            running.remove(case.name)
            on_change(running)

    async with trio.open_nursery() as nursery:
        for number, case in enumerate(cases):
            nursery.start_soon(one, number, case)
