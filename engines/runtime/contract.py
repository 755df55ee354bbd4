"""What an engine is: one class with five methods, plus a fixture that proves it.

    probe     what the library claims, without a model
    load      one model into this process
    validate  what needs the model: grammar, vocabulary, context, voices
    run       the work itself, on a worker thread
    cancel    make a running `run` return soon

An engine module names its class as `ENGINE`. `engine-probe --conformance NAME` runs the whole suite on it,
wherever it lives.
"""

from __future__ import annotations

import abc
import hashlib
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from protocol.engine_wire import Model, OutputFile, Ready
from protocol.faults import FaultError, refuse

LoadProgress = Callable[[int, "int | None", str], None]


class CancelledRun(Exception):
    """Raised inside `run` when the host asked to cancel; the runtime answers fault `cancelled`."""


class Claims(msgspec.Struct, frozen=True, omit_defaults=True, kw_only=True):
    """What a backend says about itself. A claim is worth nothing until an answer was checked.

    Attributes:
        versions: library -> version.
        devices: devices that the library claims to support here: "cpu", "cuda".
        notes: facts for people (build flags, compiled CUDA version).
    """

    versions: dict[str, str]
    devices: tuple[str, ...] = ("cpu",)
    notes: tuple[str, ...] = ()


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """One question to the fixture model whose answer is known.

    Attributes:
        check: (result struct, paths of output files) -> "" when right, else what is wrong, for people.
        stream: ask for chunks as well.
    """

    kind: str
    params: dict[str, Any]
    check: Callable[[Any, Sequence[Path]], str]
    inputs: dict[str, str] = {}
    stream: bool = False


class Fixture(msgspec.Struct, frozen=True, kw_only=True):
    """The shipped tiny model and what it must answer.

    Attributes:
        model: what to load, with absolute paths.
        cases: questions with checkable answers; the first is what `engine-probe` asks.
        endless: parameters of a run that takes at least several seconds, for tests of cancel; None when the
            engine cannot be made to run long.
        refused: (kind, params) that pass protocol/work.py and that `validate` must refuse.
    """

    model: Model
    cases: tuple[Case, ...]
    endless: Case | None = None
    refused: tuple[tuple[str, dict[str, Any]], ...] = ()


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What `run` returns: the result struct of the kind, and what was used."""

    body: Any
    usage: dict[str, float] = {}


class Job:
    """One run, as the engine sees it. Made by the runtime, used on the run's worker thread.

    Attributes:
        kind: the task kind.
        params: the params struct of protocol/work.py (a dict for kinds named `x-…`).
        inputs: name -> path of an input file.
        folder: where outputs go; exists and is empty at the start.
        stream: whether chunks are wanted.
        cancelled: set when the host wants the run to end; poll it in every loop.
        log: words for log lines.
    """

    def __init__(
        self,
        kind: str,
        params: Any,
        *,
        inputs: Mapping[str, Path] | None = None,
        folder: Path | None = None,
        stream: bool = False,
        emit: Callable[[Any], None] = lambda _data: None,
        report: Callable[[int, int | None, str, str], None] = lambda *_: None,
        log: str = "",
    ) -> None:
        self.kind = kind
        self.params = params
        self.inputs = dict(inputs or {})
        self.folder = folder or Path()
        self.stream = stream
        self.cancelled = threading.Event()
        self.files: list[OutputFile] = []
        self.log = log
        self._emit = emit
        self._report = report

    def emit(self, data: Any) -> None:
        """Send one chunk (a chunk struct of protocol/work.py); does nothing when no stream is wanted."""
        if self.stream:
            self._emit(data)

    def progress(self, n: int, total: int | None = None, phase: str = "", text: str = "") -> None:
        """Report work done. Call it from the work loop: the watchdog judges by this counter alone."""
        self._report(n, total, phase, text)

    def check_cancelled(self) -> None:
        """Raise `CancelledRun` when the host asked to cancel."""
        if self.cancelled.is_set():
            raise CancelledRun

    def save(self, name: str, mime: str, data: bytes) -> OutputFile:
        """Write an output file into the run's folder and record it for the result."""
        (self.folder / name).write_bytes(data)
        return self._record(OutputFile(name, mime, len(data), hashlib.sha256(data).hexdigest()))

    def adopt(self, name: str, mime: str) -> OutputFile:
        """Record a file that the run has already written into its folder."""
        path = self.folder / name
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        return self._record(OutputFile(name, mime, path.stat().st_size, digest))

    def _record(self, file: OutputFile) -> OutputFile:
        self.files.append(file)
        return file


class Engine(abc.ABC):
    """Base of every engine. One object = one model in one process.

    Threads: `probe`, `load`, `validate` and `run` are called on worker threads; up to `slots` runs at once, so
    `run` must be as thread-safe as `slots` says. `cancel` and `close` come from the I/O thread and must not block.
    """

    name: ClassVar[str]
    kinds: ClassVar[tuple[str, ...]]
    licence: ClassVar[str] = "MIT"
    backends: ClassVar[tuple[str, ...]] = ("",)

    @classmethod
    @abc.abstractmethod
    def probe(cls, backend: str) -> Claims:
        """Import the library and say what it claims.

        Raises:
            ImportError: the library is not installed (the probe says so and names the extra).
        """

    @classmethod
    @abc.abstractmethod
    def fixture(cls, backend: str) -> Fixture:
        """The shipped model and its questions."""

    @abc.abstractmethod
    def load(self, model: Model, scratch: Path, progress: LoadProgress) -> Ready:
        """Load the model; `Ready.device` says where it really runs.

        Raises:
            FaultError: the model or its options are bad; say which in `field` or the message.
        """

    def validate(self, kind: str, params: Any) -> None:  # noqa: B027  many engines have nothing to add
        """Refuse parameters that this model cannot serve.

        Raises:
            FaultError: an owner-caller fault that names the field.
        """

    @abc.abstractmethod
    def run(self, job: Job) -> Outcome:
        """Do the work.

        Raises:
            CancelledRun: `job.cancelled` was seen.
            FaultError: a typed end. Any other exception becomes `engine_failed`.
        """

    def cancel(self, job: Job) -> None:  # noqa: B027  polling `job.cancelled` is enough for most
        """`job.cancelled` has just been set; wake the library if polling alone would be too slow."""

    def close(self) -> None:  # noqa: B027  the process ends right after
        """Give up what outlives the process (a server of its own, say)."""


def option(model: Model, name: str, type_: Any, default: Any) -> Any:
    """Read one load option with its type checked.

    Args:
        type_: anything msgspec can convert to, ranges included: `Annotated[int, msgspec.Meta(ge=1)]`.

    Raises:
        FaultError: `load_failed`, naming `options.NAME`.
    """
    if name not in model.options:
        return default
    try:
        return msgspec.convert(model.options[name], type=type_)
    except msgspec.ValidationError as error:
        raise refuse("load_failed", f"options.{name}: {error}.", f"options.{name}") from None


def known_options(model: Model, names: Sequence[str]) -> None:
    """Refuse misspelt load options. Raises FaultError, naming the first unknown one."""
    for name in model.options:
        if name not in names:
            known = ", ".join(sorted(names)) or "none"
            raise refuse("load_failed", f"There is no load option {name!r}; known options: {known}.", f"options.{name}")


def main_file(model: Model, role: str = "model") -> Path:
    """Path of the model file or folder with this role. Raises FaultError when it is not there."""
    if role not in model.files:
        raise refuse("load_failed", f"Model {model.name!r} names no file with the role {role!r}.", f"files.{role}")
    path = Path(model.files[role])
    if not path.exists():
        raise refuse("load_failed", f"{path} does not exist.", f"files.{role}")
    return path


__all__ = [
    "CancelledRun",
    "Case",
    "Claims",
    "Engine",
    "FaultError",
    "Fixture",
    "Job",
    "LoadProgress",
    "Model",
    "Outcome",
    "OutputFile",
    "Ready",
    "known_options",
    "main_file",
    "option",
    "refuse",
]
