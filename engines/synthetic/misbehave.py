"""An engine that really does what must never happen, so that the supervisor can be tested against it.

The prompt of an llm run chooses, as "word" or "word:argument" (see `MISDEEDS`); so do the load option `load`
and, before the greeting, the environment variable MISBEHAVE_START. Anything else is answered with an echo.
Like the synthetic engine it loads only models named synthetic.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar, NoReturn

from engines.runtime.contract import (
    Claims,
    Engine,
    Fixture,
    Job,
    LoadProgress,
    Model,
    Outcome,
    Ready,
    known_options,
    option,
    refuse,
)
from engines.runtime.stdio import Wire
from engines.synthetic.engine import SyntheticEngine, require_synthetic
from protocol import engine_wire, work

# Orphans and sleepers end by themselves after this long, so that a failed test leaves nothing behind.
LONGEST_S = 120
TICK_S = 0.005


def _start() -> None:
    """Misdeeds before the greeting; runs when the module is imported."""
    word, _, argument = os.environ.get("MISBEHAVE_START", "").partition(":")
    if word == "hang":
        time.sleep(LONGEST_S)
    elif word == "exit":
        os._exit(int(argument or 1))
    elif word == "crash":
        _crash(argument or "SIGSEGV")
    elif word == "noise":
        sys.stdout.write("printed at import\n")
        os.write(1, b"written to descriptor 1 at import\n")


class Misbehave(Engine):
    """Load options: load ("slow:S", "stall", "fault", "raise", "crash:SIGNAL", "exit:CODE", "memory:MIB"), slots."""

    name: ClassVar[str] = "misbehave"
    kinds: ClassVar[tuple[str, ...]] = ("llm",)

    @classmethod
    def probe(cls, backend: str) -> Claims:
        """Nothing is needed."""
        return Claims(versions={})

    @classmethod
    def fixture(cls, backend: str) -> Fixture:
        """The synthetic engine's first case: left alone, this engine answers well."""
        fixture = SyntheticEngine.fixture(backend)
        model = Model(name="synthetic-misbehave", device="cpu")
        return Fixture(model=model, cases=fixture.cases[:1])

    def load(self, model: Model, scratch: Path, progress: LoadProgress) -> Ready:
        """Load as the option `load` says."""
        require_synthetic(model)
        known_options(model, ("load", "slots"))
        word, _, argument = option(model, "load", str, "").partition(":")
        if word == "slow":
            until = time.monotonic() + float(argument)
            for step in range(1, 10**9):
                if time.monotonic() >= until:
                    break
                progress(step, None, "load")
                time.sleep(TICK_S)
        elif word == "stall":
            time.sleep(LONGEST_S)
        elif word == "fault":
            raise refuse("model_corrupt", "The model is broken, as asked.", "files.model")
        elif word == "raise":
            raise RuntimeError("load raised, as asked")
        elif word == "crash":
            _crash(argument or "SIGSEGV")
        elif word == "exit":
            os._exit(int(argument or 1))
        elif word == "memory":
            self._held = _grow(int(argument))
        return Ready(device="cpu", slots=option(model, "slots", int, 4))

    def run(self, job: Job) -> Outcome:
        """Misbehave as the prompt says, else echo."""
        params: work.LlmParams = job.params
        last = params.messages[-1].content if params.messages else params.prompt
        prompt = last if isinstance(last, str) else ""
        word, _, argument = prompt.partition(":")
        said = MISDEEDS[word](job, argument) if word in MISDEEDS else prompt
        job.emit(work.LlmChunk(delta=work.Delta(content=said)))
        usage: dict[str, float] = {"prompt_tokens": 1, "completion_tokens": 1}
        return Outcome(body=work.LlmResult(content=said), usage=usage)

    def cancel(self, job: Job) -> None:
        """Raise when the run is of the kind "cancel-raises"; the run itself obeys."""
        if job.params.prompt == "cancel-raises":
            raise RuntimeError("cancel raised, as asked")


# ---- dying


def _crash(name: str) -> NoReturn:
    """Die of a signal as native code would: a real bad access, a real abort, else the signal itself."""
    if name == "SIGSEGV":
        ctypes.string_at(0)
    elif name == "SIGABRT":
        os.abort()
    number = signal.Signals[name]
    with contextlib.suppress(OSError, ValueError):
        ctypes.CDLL(None).signal(int(number), 0)  # SIG_DFL; signal.signal works on the main thread alone
    os.kill(os.getpid(), number)
    time.sleep(LONGEST_S)
    os._exit(99)


def _crash_run(job: Job, argument: str) -> str:
    _crash(argument or "SIGSEGV")


def _crash_after_chunks(job: Job, argument: str) -> str:
    for number in range(int(argument or 3)):
        job.emit(work.LlmChunk(delta=work.Delta(content=f"{number} ")))
    _crash("SIGSEGV")


def _exit(job: Job, argument: str) -> str:
    os._exit(int(argument or 1))


def _raise(job: Job, argument: str) -> str:
    raise RuntimeError(argument or "raised, as asked")


# ---- hanging


def _hang(job: Job, argument: str) -> str:
    """No progress, deaf to cancel, but the GIL is free: pongs still come."""
    time.sleep(float(argument or LONGEST_S))
    return "woke"


def _hang_gil(job: Job, argument: str) -> str:
    """Sleep in C with the GIL held: no pong, no Python signal handler, nothing. PyDLL keeps the GIL."""
    ctypes.PyDLL(None).sleep(int(argument or LONGEST_S))
    return "woke"


def _spin(job: Job, argument: str) -> str:
    """Burn a CPU for so many seconds without progress."""
    until = time.monotonic() + float(argument or LONGEST_S)
    while time.monotonic() < until:
        pass
    return "spun"


def _stop(job: Job, argument: str) -> str:
    """Stop the whole process, as a debugger or a full cgroup freezer would."""
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.2)  # the kernel stops another thread first: this one would get its answer out before its turn comes
    return "continued"


def _progress(job: Job, argument: str) -> str:
    """Progress without end; obeys cancel."""
    for n in range(1, int(LONGEST_S / TICK_S)):
        job.progress(n, None, "decode")
        if job.cancelled.wait(TICK_S):
            job.check_cancelled()
    return "done"


def _deaf(job: Job, argument: str) -> str:
    """Progress and chunks for so many seconds, deaf to cancel."""
    until = time.monotonic() + float(argument or LONGEST_S)
    n = 0
    while time.monotonic() < until:
        n += 1
        job.progress(n, None, "decode")
        job.emit(work.LlmChunk(delta=work.Delta(content="still here ")))
        time.sleep(TICK_S)
    return "done"


def _ignore_term(job: Job, argument: str) -> str:
    """From now on SIGTERM does nothing; the run itself hangs."""
    ctypes.CDLL(None).signal(int(signal.SIGTERM), ctypes.c_void_p(1))  # SIG_IGN
    return _hang(job, argument)


# ---- noise


def _stderr(job: Job, argument: str) -> str:
    """Flood stderr with so many MiB, in lines and then in one line without an end."""
    mib = int(argument or 4)
    line = b"x" * 1023 + b"\n"
    for _ in range(mib * 1024):
        os.write(2, line)
    os.write(2, b"y" * 2**17)
    return f"wrote {mib} MiB"


def _stdout(job: Job, argument: str) -> str:
    """Print by every road that has broken such wires: Python, C stdio, the descriptor, a grandchild."""
    print("from print")  # noqa: T201  the point of it
    libc = ctypes.CDLL(None)
    libc.puts(b"from puts")
    libc.fflush(None)
    os.write(1, b"\x00\x00\x00\x05noise")
    os.system("echo from a shell")
    return "quiet"


# ---- breaking the wire


def _wire() -> Wire:
    """The wire is not given to engines; a broken native library would hit it by its descriptor."""
    return next(found for found in gc.get_objects() if isinstance(found, Wire))


def _raw(data: bytes) -> None:
    wire = _wire()
    with wire._lock:
        os.write(wire._out, data)


def _frame(job: Job, argument: str) -> str:
    """Write a wrong frame: garbage, huge, tag, body, run, seq, half, result."""
    run = job_number(job)
    frames: dict[str, Callable[[], bytes]] = {
        "garbage": lambda: b"\xff\xfe\xfd not a frame",
        "huge": lambda: struct.pack(">I", 2**24) + b"x" * 64,
        "blobs": lambda: _framed(b"\x82\xa1t\xa6result\xa5blobs\x91\xce\x7f\xff\xff\xff"),
        "tag": lambda: _framed(b"\x81\xa1t\xa4nope"),
        "body": lambda: _framed(b"\x82\xa1t\xa5chunk\xa3run\xa1x"),
        "run": lambda: _message(engine_wire.Started(run=run + 1000)),
        "seq": lambda: _message(engine_wire.Chunk(run=run, seq=77, data=engine_wire.pack(None))),
        "hello": lambda: _message(engine_wire.Hello(engine="again", kinds=(), low=1, high=1, pid=1)),
        "half": lambda: b"\x00\x00\x10\x00\x81",
    }
    _raw(frames[argument]())
    return _hang(job, "")


def job_number(job: Job) -> int:
    """The run number of a job, which engines are not told: found the way a debugger would."""
    for found in gc.get_objects():
        if type(found).__name__ == "_Server" and isinstance(jobs := getattr(found, "_jobs", None), dict):
            return next((number for number, other in jobs.items() if other is job), 0)
    return 0


def _framed(header: bytes) -> bytes:
    return struct.pack(">I", len(header)) + header


def _message(message: engine_wire.Up) -> bytes:
    return b"".join(bytes(part) for part in engine_wire.encode(message))


# ---- resources


def _grow(mib: int) -> list[bytearray]:
    """Touch so many MiB, page by page, so that they are resident."""
    held = []
    for _ in range(mib):
        block = bytearray(2**20)
        block[::4096] = b"x" * 256
        held.append(block)
    return held


def _memory(job: Job, argument: str) -> str:
    """Grow by so many MiB, with progress, and keep them for ever."""
    for n in range(int(argument or 64)):
        _kept.extend(_grow(1))
        job.progress(n + 1, None, "grow")
        job.check_cancelled()
    return f"holds {len(_kept)} MiB"


_kept: list[bytearray] = []


def _fork(job: Job, argument: str) -> str:
    """Leave a grandchild in a session of its own that holds the wire open; answer with its pid.

    With the argument "exit" the engine then ends at once, and the pipe stays open without it.
    """
    pid = os.fork()
    if pid == 0:
        os.setsid()
        signal.alarm(LONGEST_S)
        while True:
            signal.pause()
    sys.stderr.write(f"grandchild {pid}\n")
    if argument == "exit":
        os._exit(9)
    return str(pid)


def _result(job: Job, argument: str) -> str:
    """Answer with so many MiB."""
    return "x" * (int(argument or 65) * 2**20)


def _descriptors(job: Job, argument: str) -> str:
    """Open so many descriptors and keep them."""
    _open.extend(os.open(os.devnull, os.O_RDONLY) for _ in range(int(argument or 100)))
    return f"holds {len(_open)} descriptors"


_open: list[int] = []

MISDEEDS: dict[str, Callable[[Job, str], str]] = {
    "crash": _crash_run,
    "crash-after": _crash_after_chunks,
    "exit": _exit,
    "raise": _raise,
    "hang": _hang,
    "hang-gil": _hang_gil,
    "spin": _spin,
    "stop": _stop,
    "progress": _progress,
    "cancel-raises": _progress,
    "deaf": _deaf,
    "ignore-term": _ignore_term,
    "stderr": _stderr,
    "stdout": _stdout,
    "frame": _frame,
    "memory": _memory,
    "fork": _fork,
    "result": _result,
    "descriptors": _descriptors,
}

_start()

ENGINE = Misbehave
