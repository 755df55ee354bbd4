"""The smallest possible host, for the conformance suite: one engine child, its session, every wait bounded.

It is not the supervisor's host on purpose: the suite must show what the engine does on the wire, and the real host
would repair and retry.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import itertools
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import trio

from protocol import engine_wire as wire
from protocol.engine_session import EngineSession, ProtocolError, Role
from protocol.faults import Fault
from protocol.framing import FrameDecoder, FramingError
from supervisor.host.child import Child, Exit, open_child
from supervisor.host.launching import engine_child
from supervisor.host.work import EngineSpec


class CaseFailed(Exception):
    """The engine did not do what the suite asks; the text says what, for people."""


class CaseSkipped(Exception):
    """The engine cannot be asked this; the text says why."""


class CaseData(msgspec.Struct, frozen=True, kw_only=True):
    """A case of the fixture, as mode `describe` prints it."""

    kind: str
    params: dict[str, Any]
    inputs: dict[str, str] = {}
    stream: bool = False


class Description(msgspec.Struct, frozen=True, kw_only=True):
    """What mode `describe` prints."""

    name: str
    kinds: tuple[str, ...]
    model: wire.Model
    cases: tuple[CaseData, ...]
    licence: str = ""
    backends: tuple[str, ...] = ("",)
    endless: CaseData | None = None
    refused: tuple[tuple[str, dict[str, Any]], ...] = ()


class Answer(msgspec.Struct, kw_only=True):
    """What one run sent up."""

    run: int
    case: CaseData
    folder: Path
    started: bool = False
    chunks: list[Any] = []
    result: wire.Result | None = None
    fault: Fault | None = None

    @property
    def ended(self) -> bool:
        """Whether the run has its result or fault."""
        return self.result is not None or self.fault is not None


class Instance:
    """One serving child. Every message it sends is judged by the session table."""

    def __init__(self, child: Child, folder: Path, patience_s: float) -> None:
        self.child = child
        self.folder = folder
        self.patience_s = patience_s
        self.session = EngineSession(Role.HOST)
        self.ready: wire.Ready | None = None
        self.hello: wire.Hello | None = None
        self.answers: dict[int, Answer] = {}
        self.pongs: set[int] = set()
        self._decoder = FrameDecoder()
        self._runs = itertools.count(1)

    @property
    def slots(self) -> int:
        """Runs it takes at once."""
        return self.ready.slots if self.ready else 1

    async def send(self, message: wire.Down) -> None:
        """Send one message. Raises CaseFailed when the child is gone."""
        self.session.sending(message)
        try:
            await self.child.write(*wire.encode(message))
        except (BrokenPipeError, trio.ClosedResourceError):
            raise CaseFailed(await self._death()) from None

    async def receive(self, until: Callable[[], bool], patience_s: float | None = None, what: str = "") -> None:
        """Take messages in until `until()` holds.

        Raises:
            CaseFailed: silence for too long, death, a byte that is no frame, or a message the table forbids.
        """
        with trio.move_on_after(patience_s or self.patience_s) as scope:
            while not until():
                data = await self.child.read()
                if not data:
                    raise CaseFailed(await self._death())
                self._take(data)
        if scope.cancelled_caught and not until():
            raise CaseFailed(f"no {what or 'answer'} within {patience_s or self.patience_s:g} s")

    def _take(self, data: bytes) -> None:
        try:
            self._decoder.feed(data)
            for frame in self._decoder:
                message = wire.decode_up(frame)
                self.session.received(message)
                self._keep(message)
        except (FramingError, wire.WireError) as error:
            raise CaseFailed(f"something on the wire is not a frame: {error}") from None
        except ProtocolError as error:
            raise CaseFailed(f"the session table forbids it: {error}") from None

    def _keep(self, message: wire.Up) -> None:
        match message:
            case wire.Hello():
                self.hello = message
            case wire.Ready():
                self.ready = message
            case wire.Pong(n=n):
                self.pongs.add(n)
            case wire.Started(run=run):
                self.answers[run].started = True
            case wire.Chunk(run=run, data=data):
                self.answers[run].chunks.append(msgspec.msgpack.decode(data))
            case wire.Result(run=run):
                self.answers[run].result = message
            case wire.RunFault(run=run, fault=fault):
                self.answers[run].fault = fault
            case wire.Valid(run=run):
                self.answers[run].started = True

    async def load(self, model: wire.Model) -> Fault | None:
        """Load; returns the fault when the engine refuses."""
        self.answers[wire.NO_RUN] = Answer(run=0, case=CaseData(kind="", params={}), folder=self.folder)
        await self.send(wire.Load(model=model, scratch=str(self.folder)))
        load = self.answers[wire.NO_RUN]
        await self.receive(lambda: self.ready is not None or load.ended, what="ready")
        return load.fault

    async def begin(self, case: CaseData, *, stream: bool = False, params: Any = None) -> Answer:
        """Send a run; `params` replaces those of the case."""
        answer = self._answer(case)
        answer.folder.mkdir()
        await self.send(
            wire.Run(
                run=answer.run,
                kind=case.kind,
                params=wire.pack(case.params if params is None else params),
                inputs=case.inputs,
                folder=str(answer.folder),
                stream=stream,
                log="conformance",
            )
        )
        return answer

    async def validate(self, kind: str, params: Any) -> Answer:
        """Ask whether these parameters are good; the answer is complete."""
        answer = self._answer(CaseData(kind=kind, params={}))
        await self.send(wire.Validate(run=answer.run, kind=kind, params=wire.pack(params)))
        await self.receive(lambda: answer.ended or answer.started, what="valid")
        return answer

    def _answer(self, case: CaseData) -> Answer:
        number = next(self._runs)
        self.answers[number] = Answer(run=number, case=case, folder=self.folder / f"run{number}", chunks=[])
        return self.answers[number]

    async def finish(self, answer: Answer, patience_s: float | None = None) -> Answer:
        """Wait for the end of a run."""
        await self.receive(lambda: answer.ended, patience_s, what=f"end of run {answer.run}")
        return answer

    async def run(self, case: CaseData, **options: Any) -> Answer:
        """Send a run and wait for its end."""
        return await self.finish(await self.begin(case, **options))

    async def ping(self, number: int, patience_s: float) -> None:
        """Wait for the pong."""
        await self.send(wire.Ping(n=number))
        await self.receive(lambda: number in self.pongs, patience_s, what="pong")

    async def ended(self, patience_s: float) -> Exit:
        """Wait for the child's own end, reading what it still says. Raises CaseFailed when it stays."""
        with trio.move_on_after(patience_s):
            while data := await self.child.read():
                self._take(data)
            return await self.child.wait()
        raise CaseFailed(f"the process is still there after {patience_s:g} s")

    @property
    def pending_bytes(self) -> int:
        """Bytes of a frame that never became whole."""
        return self._decoder.pending_bytes

    async def _death(self) -> str:
        with trio.move_on_after(self.patience_s):
            await self.child.wait()
        how = self.child.exit.describe() if self.child.exit else "its pipe is closed"
        tail = self.child.stderr_tail(3)
        return f"the engine is gone ({how})" + (f": {' | '.join(tail)}" if tail else "")


@contextlib.asynccontextmanager
async def open_instance(engine: EngineSpec, folder: Path, patience_s: float) -> AsyncIterator[Instance]:
    """Start a serving child in `folder`; it is ended with the block."""
    try:
        async with open_child(engine_child(engine, folder), term_grace_s=1.0) as child:
            instance = Instance(child, folder, patience_s)
            await instance.receive(lambda: instance.hello is not None, what="hello")
            yield instance
    except* CaseFailed as failures:  # the child's nursery wraps what the block raises
        failed = failures
    else:
        return
    raise failed.exceptions[0]


async def describe(engine: EngineSpec, folder: Path, backend: str, patience_s: float) -> Description:
    """Ask the engine for its fixture. Raises CaseFailed."""
    args = ["describe", *(["--backend", backend] if backend else [])]
    output = await _say(engine, folder, args, b"", patience_s)
    try:
        return msgspec.json.decode(output, type=Description)
    except msgspec.MsgspecError as error:
        raise CaseFailed(f"mode describe printed something else: {error}") from None


async def check(engine: EngineSpec, folder: Path, backend: str, number: int, answer: Answer) -> str:
    """Let the engine's own fixture judge an answer; "" when it is right."""
    assert answer.result is not None
    asked = {
        "case": number,
        "body": base64.b64encode(answer.result.body).decode(),
        "files": [str(answer.folder / file.name) for file in answer.result.files],
    }
    args = ["check", *(["--backend", backend] if backend else [])]
    output = await _say(engine, folder, args, msgspec.json.encode(asked), 60.0)
    try:
        return str(msgspec.json.decode(output)["wrong"])
    except (msgspec.MsgspecError, KeyError):
        raise CaseFailed(f"mode check printed something else: {output[:200]!r}") from None


async def _say(engine: EngineSpec, folder: Path, args: list[str], stdin: bytes, patience_s: float) -> bytes:
    """Run one of the JSON modes: stdin in, one line out. Raises CaseFailed."""
    output = bytearray()
    async with open_child(engine_child(engine, folder, args), term_grace_s=1.0) as child:
        with trio.move_on_after(patience_s) as scope:
            with contextlib.suppress(BrokenPipeError):
                await child.write(stdin)
            child.close_stdin()
            while data := await child.read():
                output += data
            await child.wait()
    if scope.cancelled_caught:
        raise CaseFailed(f"mode {args[0]} gave no answer within {patience_s:g} s")
    if not output:
        raise CaseFailed(f"mode {args[0]} said nothing: {' | '.join(child.stderr_tail(4))}")
    return bytes(output)


def file_lies(answer: Answer) -> str:
    """What the result says of its files that is not true; "" when all is."""
    assert answer.result is not None
    for file in answer.result.files:
        path = answer.folder / file.name
        if "/" in file.name or not path.is_file():
            return f"the result names the file {file.name!r}, which is not in the run's folder"
        data = path.read_bytes()
        if len(data) != file.size or hashlib.sha256(data).hexdigest() != file.sha256:
            return f"size or sha256 of {file.name!r} are not those of the file"
    return ""
