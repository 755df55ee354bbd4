"""A synchronous host for tests of engines: the real child, the real wire, no supervisor."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from engines.catalog import CATALOG
from protocol import engine_wire as wire
from protocol import work
from protocol.engine_session import EngineSession, Role
from protocol.faults import Fault
from protocol.framing import FrameDecoder

ROOT = Path(__file__).parents[2]
PATIENCE_S = 60.0


class Ended(Exception):
    """The child's pipe closed; `returncode` and `stderr` say how it ended."""

    def __init__(self, returncode: int, stderr: str) -> None:
        super().__init__(f"ended with {returncode}: {stderr[-2000:]}")
        self.returncode, self.stderr = returncode, stderr


class Answer(msgspec.Struct, kw_only=True):
    """Everything that one run sent up."""

    result: wire.Result | None = None
    fault: Fault | None = None
    chunks: list[Any] = []
    progress: list[wire.Progress] = []
    started: bool = False
    folder: Path = Path()
    kind: str = ""

    @property
    def body(self) -> Any:
        """The result struct; fails the test with the fault when there is none."""
        assert self.result is not None, self.fault
        return msgspec.msgpack.decode(self.result.body, type=work.RESULTS.get(self.kind, work.FreeResult))

    @property
    def files(self) -> list[Path]:
        assert self.result is not None, self.fault
        return [self.folder / file.name for file in self.result.files]


class Child:
    """One engine child. Every wait is bounded by `PATIENCE_S`."""

    def __init__(self, module: str, folder: Path) -> None:
        self.folder = folder
        self.session = EngineSession(Role.HOST)
        self._decoder = FrameDecoder()
        self._inbox: list[Any] = []
        self._stderr = (folder / "stderr").open("wb+")
        self._runs = 0
        spec = {"root": str(ROOT), "module": module, "python": sys.executable, "scratch": str(folder)}
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-S", str(ROOT / "engines" / "launch.py"), json.dumps(spec)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            start_new_session=True,
        )
        assert isinstance(self.receive(), wire.Hello)

    def stderr(self) -> str:
        return (self.folder / "stderr").read_text(errors="replace")

    def send(self, message: wire.Down) -> None:
        self.session.sending(message)
        assert self.process.stdin is not None
        for part in wire.encode(message):
            self.process.stdin.write(part)
        self.process.stdin.flush()

    def receive(self, timeout: float = PATIENCE_S) -> Any:
        """Next message. Raises Ended when the child is gone, TimeoutError when it is silent."""
        assert self.process.stdout is not None
        fd, until = self.process.stdout.fileno(), time.monotonic() + timeout
        while not self._inbox:
            if not select.select([fd], [], [], max(0, until - time.monotonic()))[0]:
                raise TimeoutError(f"silent for {timeout} s\n{self.stderr()[-2000:]}")
            data = os.read(fd, 2**20)
            if not data:
                raise Ended(self.process.wait(PATIENCE_S), self.stderr())
            self._decoder.feed(data)
            self._inbox.extend(wire.decode_up(frame) for frame in self._decoder)
        message = self._inbox.pop(0)
        self.session.received(message)
        return message

    def load(self, model: wire.Model) -> wire.Ready | Fault:
        self.send(wire.Load(model=model, scratch=str(self.folder)))
        while True:
            match self.receive():
                case wire.Ready() as ready:
                    return ready
                case wire.RunFault(fault=fault):
                    return fault

    def begin(
        self, kind: str, params: Mapping[str, Any], *, stream: bool = False, inputs: Mapping[str, Any] | None = None
    ) -> Answer:
        """Send a run; collect its answer with `finish`."""
        self._runs += 1
        folder = self.folder / f"run{self._runs}"
        folder.mkdir()
        self.send(
            wire.Run(
                run=self._runs,
                kind=kind,
                params=wire.pack(dict(params)),
                inputs={name: str(path) for name, path in (inputs or {}).items()},
                folder=str(folder),
                stream=stream,
            )
        )
        return Answer(folder=folder, kind=kind)

    def finish(self, answer: Answer, run: int | None = None, timeout: float = PATIENCE_S) -> Answer:
        """Receive until the run (the latest one by default) has ended."""
        wanted = run or self._runs
        while True:
            message = self.receive(timeout)
            if getattr(message, "run", None) != wanted:
                continue
            match message:
                case wire.Started():
                    answer.started = True
                case wire.Chunk(data=data):
                    answer.chunks.append(msgspec.msgpack.decode(data))
                case wire.Progress():
                    answer.progress.append(message)
                case wire.Result():
                    answer.result = message
                    return answer
                case wire.RunFault(fault=fault):
                    answer.fault = fault
                    return answer

    def run(self, kind: str, params: Mapping[str, Any], **options: Any) -> Answer:
        return self.finish(self.begin(kind, params, **options))

    def close(self) -> None:
        with contextlib.suppress(Exception):
            self.process.stdin.close()  # type: ignore[union-attr]
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(PATIENCE_S)
        self.process.stdout.close()  # type: ignore[union-attr]
        self._stderr.close()


@contextlib.contextmanager
def _children(folder: Path) -> Iterator[Callable[[str], Child]]:
    started: list[Child] = []

    def start(name: str) -> Child:
        own = folder / f"engine{len(started)}"
        own.mkdir()
        started.append(Child(CATALOG[name].module if name in CATALOG else name, own))
        return started[-1]

    try:
        yield start
    finally:
        for child in started:
            child.close()


@pytest.fixture
def spawn(tmp_path: Path) -> Iterator[Callable[[str], Child]]:
    """Start an engine child by catalogue name or module; ended with the test."""
    with _children(tmp_path) as start:
        yield start


@pytest.fixture(scope="module")
def spawn_shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Child]]:
    """As `spawn`, for a child that all tests of a module share: a library takes half a second to import."""
    with _children(tmp_path_factory.mktemp("shared")) as start:
        yield start
