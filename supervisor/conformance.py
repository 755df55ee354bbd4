"""The conformance suite: what every engine must do on the wire, run on any engine in any interpreter.

    engine-probe --conformance NAME [--module their_pkg.engine] [--python PATH]

The suite knows engines only by their fixture (mode `describe`) and judges answers by the engine's own checks (mode
`check`), so it fits kinds named `x-…` as well. Each case works on a loaded instance; one that a case has broken is
replaced, so one failure does not spoil the rest.
"""

from __future__ import annotations

import contextlib
import shutil
import signal
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Literal

import msgspec
import trio

from protocol import engine_wire as wire
from protocol.faults import Fault, Owner
from protocol.revision import ENGINE_WIRE, Span, agree
from protocol.work import is_free_kind, is_kind
from supervisor.columns import columns
from supervisor.conformance_host import (
    Answer,
    CaseData,
    CaseFailed,
    CaseSkipped,
    Description,
    Instance,
    check,
    describe,
    file_lies,
    open_instance,
)
from supervisor.host.family import speaks_for
from supervisor.host.work import EngineSpec

PATIENCE_S = 60.0  # for what may load a library on a busy box
PONG_S = 1.0
CANCEL_S = 5.0
EXIT_S = 5.0


class CaseResult(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the report; `reason` says why it was skipped or failed."""

    name: str
    status: Literal["ok", "failed", "skipped"]
    reason: str = ""
    ms: float = 0.0


class Suite:
    """One engine under test, with the instance that the cases share."""

    def __init__(self, engine: EngineSpec, backend: str, told: Description, folder: Path) -> None:
        self.engine, self.backend, self.told, self.folder = engine, backend, told, folder
        self._stack = contextlib.AsyncExitStack()
        self._instance: Instance | None = None
        self._count = 0

    def new_folder(self) -> Path:
        """A fresh private folder; short, because engines put sockets there."""
        self._count += 1
        folder = self.folder / str(self._count)
        folder.mkdir()
        return folder

    def open(self) -> contextlib.AbstractAsyncContextManager[Instance]:
        """A new instance, greeted and not loaded."""
        return open_instance(self.engine, self.new_folder(), PATIENCE_S)

    async def loaded(self) -> Instance:
        """The shared instance, loaded; a new one when the last was given up."""
        if self._instance is None:
            instance = await self._stack.enter_async_context(self.open())
            if fault := await instance.load(self.told.model):
                raise CaseFailed(f"the fixture does not load: {fault.message}")
            self._instance = instance
        return self._instance

    async def give_up(self) -> None:
        """End the shared instance; the next case gets a new one."""
        self._instance = None
        await self._stack.aclose()
        self._stack = contextlib.AsyncExitStack()

    async def judge(self, number: int, answer: Answer) -> None:
        """Fail unless the run gave a right answer to case `number`."""
        if answer.fault is not None:
            raise CaseFailed(f"case {number}: {answer.fault.code}: {answer.fault.message}")
        if lie := file_lies(answer):
            raise CaseFailed(f"case {number}: {lie}")
        if wrong := await check(self.engine, self.new_folder(), self.backend, number, answer):
            raise CaseFailed(f"case {number} is answered wrongly: {wrong}")


# ---- the cases, in the order they run ----------------------------------------------------------------------


async def _hello(suite: Suite) -> None:
    async with suite.open() as instance:
        hello = instance.hello
        assert hello is not None
        if agree(ENGINE_WIRE, Span(hello.low, hello.high)) is None:
            raise CaseFailed(f"it speaks revisions {hello.low} to {hello.high}, we {ENGINE_WIRE.low} to ours")
        if not speaks_for(instance.child.pid, hello.pid):
            raise CaseFailed("`pid` of hello is not the pid of the process")
        if set(hello.kinds) != set(suite.told.kinds) or not all(is_kind(kind) for kind in hello.kinds):
            raise CaseFailed(f"`kinds` of hello are {hello.kinds}, the class says {suite.told.kinds}")


async def _ready(suite: Suite) -> None:
    ready = (await suite.loaded()).ready
    assert ready is not None
    if ready.slots < 1:
        raise CaseFailed(f"`slots` is {ready.slots}")
    if ready.device.split(":")[0] not in ("cpu", "cuda", "mps", "rocm", "sycl", "vulkan"):
        raise CaseFailed(f"`device` is {ready.device!r}: expected where it really runs, such as cpu or cuda:0")
    if any(is_free_kind(kind) for kind in suite.told.kinds) and not ready.schema:
        raise CaseFailed("a kind named x-… needs `schema` in ready: the JSON schema of its parameters")


async def _answers(suite: Suite) -> None:
    if not suite.told.cases:
        raise CaseFailed("the fixture has no case: nothing proves that this engine works")
    for number, case in enumerate(suite.told.cases):
        instance = await suite.loaded()
        await suite.judge(number, await instance.run(case))


async def _streams(suite: Suite) -> None:
    asked = [(number, case) for number, case in enumerate(suite.told.cases) if case.stream]
    if not asked:
        raise CaseSkipped("no case of the fixture streams")
    for number, case in asked:
        instance = await suite.loaded()
        answer = await instance.run(case, stream=True)  # order and gaps are judged by the session table
        await suite.judge(number, answer)
        if not answer.chunks:
            raise CaseFailed(f"case {number} asks for a stream and got no chunk")
        if case.kind == "llm":
            _same_text(number, answer)


def _same_text(number: int, answer: Answer) -> None:
    assert answer.result is not None
    said = msgspec.msgpack.decode(answer.result.body).get("content") or ""
    streamed = "".join((chunk.get("delta") or {}).get("content") or "" for chunk in answer.chunks)
    if said != streamed:
        raise CaseFailed(f"case {number}: the chunks say {streamed[:80]!r}, the result says {said[:80]!r}")


async def _no_stream(suite: Suite) -> None:
    instance = await suite.loaded()
    if (await instance.run(suite.told.cases[0])).chunks:
        raise CaseFailed("it sends chunks although `stream` is false")


async def _valid(suite: Suite) -> None:
    instance = await suite.loaded()
    case = suite.told.cases[0]
    answer = await instance.validate(case.kind, case.params)
    if answer.fault is not None:
        raise CaseFailed(f"validate refuses its own case: {answer.fault.message}")


async def _refused(suite: Suite) -> None:
    if not suite.told.refused:
        raise CaseSkipped("the fixture names no parameters that only the model can refuse")
    for kind, params in suite.told.refused:
        instance = await suite.loaded()
        inputs = next((case.inputs for case in suite.told.cases if case.kind == kind), {})
        asked = CaseData(kind=kind, params=params, inputs=inputs)
        for answer in (await instance.validate(kind, params), await instance.run(asked)):
            if answer.fault is None:
                raise CaseFailed(f"{_short(params)} is accepted")
            _must_be_callers(answer.fault, f"{_short(params)}")
            if not answer.fault.field:
                raise CaseFailed(f"{_short(params)} is refused without naming the field: {answer.fault.message}")


def _must_be_callers(fault: Fault, what: str) -> None:
    if fault.owner is not Owner.CALLER:
        raise CaseFailed(f"{what} is answered by {fault.code} of the {fault.owner}: expected a fault of the caller")


async def _unknown_kind(suite: Suite) -> None:
    instance = await suite.loaded()
    answer = await instance.run(CaseData(kind="x-no-such-kind", params={}))
    if answer.fault is None:
        raise CaseFailed("it ran a kind that it does not serve")
    _must_be_callers(answer.fault, "an unknown kind")


async def _broken_params(suite: Suite) -> None:
    case = suite.told.cases[0]
    broken: list[object] = [["not", "an", "object"], None, 7]
    if not is_free_kind(case.kind):
        broken.append(dict(case.params) | {"no_such_parameter": 1})
    for params in broken:
        instance = await suite.loaded()
        # pack(None) would fall back to the case's own parameters
        answer = await instance.begin(case, params=msgspec.Raw(b"\xc0") if params is None else params)
        await instance.finish(answer)
        if answer.fault is None:
            raise CaseFailed(f"it ran with the parameters {params!r}")
        _must_be_callers(answer.fault, f"parameters {params!r}")


async def _ping(suite: Suite) -> None:
    instance = await suite.loaded()
    answer = await instance.begin(suite.told.endless or suite.told.cases[0])
    await instance.receive(lambda: answer.started or answer.ended, what="started")
    await instance.ping(1, PONG_S)
    if not answer.ended:
        await instance.send(wire.Cancel(run=answer.run))
        await instance.finish(answer, CANCEL_S)


async def _cancel(suite: Suite) -> None:
    if suite.told.endless is None:
        raise CaseSkipped("the fixture has no endless run")
    instance = await suite.loaded()
    answer = await instance.begin(suite.told.endless)
    await instance.receive(lambda: answer.started or answer.ended, what="started")
    if answer.ended:
        raise CaseFailed("the endless run ended at once")
    await instance.send(wire.Cancel(run=answer.run))
    await instance.finish(answer, CANCEL_S)
    if answer.fault is not None and answer.fault.code != "cancelled":
        raise CaseFailed(f"a cancelled run ended with {answer.fault.code}: {answer.fault.message}")
    await suite.judge(0, await instance.run(suite.told.cases[0]))


async def _together(suite: Suite) -> None:
    instance = await suite.loaded()
    if instance.slots < 2:
        raise CaseSkipped("it has one slot")
    endless = await instance.begin(suite.told.endless) if suite.told.endless else None
    first = [await instance.begin(suite.told.cases[0]) for _ in range(1 if endless else 2)]
    for answer in first:
        await suite.judge(0, await instance.finish(answer))
    if endless is not None:
        if endless.ended:
            raise CaseFailed("the endless run did not go on beside another run")
        await instance.send(wire.Cancel(run=endless.run))
        await instance.finish(endless, CANCEL_S)


async def _shutdown(suite: Suite) -> None:
    instance = await suite.loaded()
    await instance.send(wire.Shutdown())
    how = await instance.ended(EXIT_S)
    await suite.give_up()
    if how.code != 0:
        raise CaseFailed(f"after shutdown it {how.describe()}: expected exit code 0")
    if instance.pending_bytes:
        raise CaseFailed(f"it left {instance.pending_bytes} bytes on the wire that are no whole frame")


async def _bad_model(suite: Suite) -> None:
    if not suite.told.model.files:
        raise CaseSkipped("its model names no files")
    async with suite.open() as instance:
        missing = {role: str(instance.folder / "no-such-file") for role in suite.told.model.files}
        fault = await instance.load(msgspec.structs.replace(suite.told.model, files=missing))
        if fault is None:
            raise CaseFailed("it is ready although its model files do not exist")
        if fault.owner is Owner.CALLER:
            raise CaseFailed(f"a missing model file is answered by {fault.code}, which blames the caller")
        await instance.ping(1, PONG_S)  # a bad model costs the load, not the process


async def _sigterm(suite: Suite) -> None:
    async with suite.open() as instance:
        if suite.told.endless is not None and await instance.load(suite.told.model) is None:
            answer = await instance.begin(suite.told.endless)
            await instance.receive(lambda: answer.started or answer.ended, what="started")
        instance.child.signal(signal.SIGTERM)
        await instance.ended(EXIT_S)


async def _end_of_input(suite: Suite) -> None:
    async with suite.open() as instance:
        instance.child.close_stdin()
        await instance.ended(EXIT_S)


Case = Callable[[Suite], Awaitable[None]]
CASES: tuple[tuple[str, Case], ...] = (
    ("hello comes first and speaks our revision", _hello),
    ("the fixture loads and ready is sane", _ready),
    ("every case of the fixture is answered right", _answers),
    ("streams add up to the result, in order", _streams),
    ("no chunks unless a stream was asked for", _no_stream),
    ("validate accepts good parameters", _valid),
    ("what the model cannot serve is refused, naming the field", _refused),
    ("an unknown kind is refused", _unknown_kind),
    ("broken parameters are refused", _broken_params),
    ("ping is answered while a run works", _ping),
    ("cancel ends an endless run; the next run works", _cancel),
    ("runs share the instance when it has slots", _together),
    ("a missing model file is a fault of the load; the process lives", _bad_model),
    ("SIGTERM ends it, also in the middle of a run", _sigterm),
    ("the end of its input ends it", _end_of_input),
    ("shutdown ends it with 0 and no noise on the wire", _shutdown),
)


async def run_suite(engine: EngineSpec, *, backend: str = "") -> list[CaseResult]:
    """Run every case on one engine and backend.

    Cancellation: all children are ended and reaped.
    """
    folder = await trio.to_thread.run_sync(lambda: Path(tempfile.mkdtemp(prefix="bh-")))
    try:
        (folder / "0").mkdir()
        # What one child wrote, another one judges.
        sandbox = msgspec.structs.replace(engine.sandbox, write=(*engine.sandbox.write, str(folder)))
        engine = msgspec.structs.replace(engine, sandbox=sandbox)
        try:
            told = await describe(engine, folder / "0", backend, PATIENCE_S)
        except CaseFailed as failure:
            return [CaseResult(name="the engine describes its fixture", status="failed", reason=str(failure))]
        suite = Suite(engine, backend, told, folder)
        try:
            return [await _one(suite, name, case) for name, case in CASES]
        finally:
            await suite.give_up()
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(lambda: shutil.rmtree(folder, ignore_errors=True))


async def _one(suite: Suite, name: str, case: Case) -> CaseResult:
    began = time.monotonic()
    status: Literal["ok", "failed", "skipped"] = "ok"
    reason = ""
    try:
        await case(suite)
    except CaseSkipped as skip:
        status, reason = "skipped", str(skip)
    except (CaseFailed, OSError) as failure:
        status, reason = "failed", str(failure)
        await suite.give_up()
    return CaseResult(name=name, status=status, reason=reason, ms=(time.monotonic() - began) * 1000)


# ---- report ------------------------------------------------------------------------------------------------


def passed(results: Sequence[CaseResult]) -> bool:
    """Whether no case failed."""
    return all(result.status != "failed" for result in results)


def render(results: Sequence[CaseResult]) -> str:
    """A table for people."""
    rows = [(result.name, result.status, f"{result.ms:.0f}", result.reason) for result in results]
    counts = [f"{sum(1 for r in results if r.status == status)} {status}" for status in ("ok", "failed", "skipped")]
    return columns(("case", "verdict", "ms", "reason"), rows, right=(2,)) + "\n\n" + ", ".join(counts)


def to_json(results: Sequence[CaseResult]) -> str:
    """An array of objects for programs."""
    return msgspec.json.format(msgspec.json.encode(results)).decode()


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 100 else text[:97] + "..."
