"""Misdeeds of an engine on its wire: noise, broken frames, closed pipes. For engines/synthetic/misbehave.py."""

from __future__ import annotations

import ctypes
import gc
import os
import struct
from collections.abc import Callable

from engines.runtime.contract import Job
from engines.runtime.stdio import Wire
from engines.synthetic.misdeeds_life import hang
from protocol import engine_wire, work

# ---- noise


def _flood(fd: int, mib: int) -> str:
    """So many MiB, in lines and then in one line without an end."""
    line = b"x" * 1023 + b"\n"
    for _ in range(mib * 1024):
        os.write(fd, line)
    os.write(fd, b"y" * 2**17)
    return f"wrote {mib} MiB"


def _stderr(job: Job, argument: str) -> str:
    return _flood(2, int(argument or 4))


def _flood_stdout(job: Job, argument: str) -> str:
    """Descriptor 1, which a library believes to be its terminal."""
    return _flood(1, int(argument or 4))


def _flood_chunks(job: Job, argument: str) -> str:
    """So many valid chunks, as fast as they can be written."""
    count = int(argument or 10_000)
    for number in range(count):
        job.emit(work.LlmChunk(delta=work.Delta(content=f"{number} ")))
    return f"sent {count} chunks"


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
    """Write a wrong frame (a key of the table below), then hang."""
    run = job_number(job)
    frames: dict[str, Callable[[], bytes]] = {
        "garbage": lambda: b"\xff\xfe\xfd not a frame",
        "huge": lambda: struct.pack(">I", 2**24) + b"x" * 64,
        "4gib": lambda: b"\xff\xff\xff\xff" + b"x" * 64,
        "blobs": lambda: _framed(b"\x82\xa1t\xa6result\xa5blobs\x91\xce\x7f\xff\xff\xff"),
        "64blobs": lambda: _framed(b"\x82\xa1t\xa6result\xa5blobs\xdc\x00\x40" + b"\x01" * 64) + b"x" * 64,
        "nested": lambda: _framed(b"\x81\xa1t" + b"\x91" * 100_000 + b"\xc0"),
        "tag": lambda: _framed(b"\x81\xa1t\xa4nope"),
        "body": lambda: _framed(b"\x82\xa1t\xa5chunk\xa3run\xa1x"),
        "run": lambda: _message(engine_wire.Started(run=run + 1000)),
        "seq": lambda: _message(engine_wire.Chunk(run=run, seq=77, data=engine_wire.pack(None))),
        "hello": lambda: _message(engine_wire.Hello(engine="again", kinds=(), low=1, high=1, pid=1)),
        "half": lambda: b"\x00\x00\x10\x00\x81",
        "late": lambda: _after_the_end(run),
    }
    _raw(frames[argument]())
    return hang(job, "")


def _after_the_end(run: int) -> bytes:
    """A right answer, and a chunk behind it."""
    body = engine_wire.pack(work.LlmResult(content="late"))
    chunk = engine_wire.Chunk(run=run, seq=0, data=engine_wire.pack(None))
    return _message(engine_wire.Result(run=run, body=body)) + _message(chunk)


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


def _close_stdin(job: Job, argument: str) -> str:
    """Hear nothing any more: the host's pipe has no reader, ours reads from a pipe that nobody writes to.

    The reader may be inside read(2) with the old one, which then ends with the next message.
    """
    silence, _kept = os.pipe()
    os.dup2(silence, _wire()._in)
    return hang(job, "")


def _close_stdout(job: Job, argument: str) -> str:
    """Say nothing any more, and stay."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, _wire()._out)
    return hang(job, "")


def _result(job: Job, argument: str) -> str:
    """Answer with so many MiB."""
    return "x" * (int(argument or 65) * 2**20)


MISDEEDS: dict[str, Callable[[Job, str], str]] = {
    "stderr": _stderr,
    "flood-stdout": _flood_stdout,
    "flood-chunks": _flood_chunks,
    "stdout": _stdout,
    "frame": _frame,
    "close-stdin": _close_stdin,
    "close-stdout": _close_stdout,
    "result": _result,
}
