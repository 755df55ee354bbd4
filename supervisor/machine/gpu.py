"""What GPU and driver this machine has, as data, read by a child; "no GPU" is a value, not an error."""

from __future__ import annotations

import platform
import shutil
import sys
from pathlib import Path

import msgspec
import trio

from supervisor.host.child import ChildSpec, run_child

READER = Path(__file__).resolve().parents[2] / "engines" / "telemetry" / "reader.py"
TRY_DEADLINE_S = 30.0  # a context on a cold driver takes seconds; PTX is compiled on the way
READ_DEADLINE_S = 15.0  # a cold driver needs up to five seconds; a hung one never answers
POLL_S = 1.0


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU; 0 or "" where the driver does not tell (a container, say; `missing` has the reason by field)."""

    index: int
    uuid: str = ""
    name: str = ""
    memory_bytes: int = 0
    memory_free_bytes: int = 0
    compute_capability: str = ""
    missing: dict[str, str] = {}


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """What decides which libraries fit.

    Attributes:
        os: as `sys.platform`.
        arch: as `platform.machine()`.
        driver: version of the NVIDIA driver; "" without one.
        cuda_max: highest CUDA version that the driver serves, as "12.4"; "" without one.
        python: version of the interpreter that makes the venvs.
        nvcc: whether a CUDA compiler is on PATH.
        error: why NVML told nothing.
        cuda_error: why CUDA itself does not work although a GPU is listed; "" when it does.
    """

    os: str = sys.platform
    arch: str = platform.machine()
    wsl2: bool = False
    driver: str = ""
    cuda_max: str = ""
    gpus: tuple[Gpu, ...] = ()
    python: str = platform.python_version()
    nvcc: bool = False
    error: str = ""
    cuda_error: str = ""

    @property
    def usable(self) -> bool:
        """Whether a CUDA program would find a GPU now."""
        return bool(self.gpus) and not self.cuda_error


async def read_machine(*, deadline_s: float = READ_DEADLINE_S, argv: tuple[str, ...] | None = None) -> Machine:
    """Ask the GPU child. Never raises for a missing or broken GPU: `error` says what is wrong.

    Args:
        deadline_s: after it the child is ended and the driver counts as hung.
        argv: of another child that speaks the same line, for tests.

    Cancellation: the child is ended and reaped.
    """
    child = argv or (sys.executable, "-I", str(READER), "--once")
    output, how, seen = await run_child(ChildSpec(name="gpu reader", argv=child), deadline_s=deadline_s)
    nvcc = await trio.to_thread.run_sync(_has_nvcc)
    try:
        return msgspec.structs.replace(msgspec.json.decode(output, type=Machine), nvcc=nvcc)
    except msgspec.MsgspecError:
        if how.signal is not None and not output:
            error = f"the GPU reader gave no answer within {deadline_s:g} s or died ({how.describe()})"
        else:
            error = f"the GPU reader {how.describe()}: {' '.join(seen.stderr_tail(3)) or 'no output'}"
        return Machine(nvcc=nvcc, error=error, cuda_error=error)


class _Tried(msgspec.Struct):
    error: str


async def try_gpu(
    uuid: str, *, deadline_s: float = TRY_DEADLINE_S, argv: tuple[str, ...] | None = None
) -> tuple[str, int]:
    """Run a small kernel on one GPU (or MIG device), in a child: is it fit to work?

    Returns:
        "" when its answer was right, else why not in one sentence; and the pid of a child that could not be killed,
        0 otherwise. Such a pid holds on to the GPU.

    Cancellation: the child is ended and reaped.
    """
    child = argv or (sys.executable, "-I", str(READER), "--try-cuda", uuid)
    output, how, seen = await run_child(ChildSpec(name="gpu trial", argv=child), deadline_s=deadline_s)
    if how.unkillable:
        return f"The trial of the GPU hangs and cannot be killed (pid {seen.pid}).", seen.pid
    try:
        return msgspec.json.decode(output, type=_Tried).error, 0
    except msgspec.MsgspecError:
        said = " ".join(seen.stderr_tail(3)) or f"no answer within {deadline_s:g} s"
        return f"The trial of the GPU {how.describe()}: {said}.", 0


def _has_nvcc() -> bool:
    return shutil.which("nvcc") is not None or Path("/usr/local/cuda/bin/nvcc").exists()


async def wait_for_gpu(patience_s: float, *, argv: tuple[str, ...] | None = None) -> Machine:
    """Ask until CUDA answers or `patience_s` have passed; returns the last reading either way.

    At boot nvidia-uvm may come seconds after the service: an engine that starts before it runs on the CPU.
    """
    machine = Machine(error="not read yet")
    with trio.move_on_after(patience_s):
        while True:
            machine = await read_machine(argv=argv)
            if machine.usable:
                return machine
            await trio.sleep(POLL_S)
    return machine
