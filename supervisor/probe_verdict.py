"""From what a probe child said and how it ended to a verdict, and from what went wrong to the cure. Pure.

The child climbs a ladder (engines/runtime/modes.py): import, claims, load, infer, answer. Each rung is written
before it is tried, so the last one says where a child died that can say nothing any more. The sixth and last step is
not the child's: does the driver list memory of it on a GPU?
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from engines.catalog import CATALOG
from supervisor.host.child import Exit, signal_name
from supervisor.machine.gpu import Machine

OK = "ok"
CPU_FALLBACK = "cpu-fallback"
FAILED = "failed"
HUNG = "hung"
NOT_INSTALLED = "not-installed"
# The sixth is "crashed(SIGNAL)".

_DOING = {
    "": "starting",
    "import": "importing its library",
    "claims": "reading its fixture",
    "load": "loading its fixture",
    "infer": "answering its first question",
    "answer": "ending",
}


class Probe(msgspec.Struct, frozen=True, kw_only=True):
    """One engine x backend x device, tried.

    Attributes:
        device_requested: "cpu" or "cuda".
        device_executed: where it really ran; "" when it did not.
        verdict: ok, cpu-fallback, failed, crashed(SIGNAL), hung, not-installed.
        message: what happened, one sentence; "" when ok.
        hint: how to mend it; "" when ok.
        load_ms: milliseconds to load the fixture; None when it did not load.
        infer_ms: milliseconds to the checked answer.
        rss_bytes: peak resident memory of the child.
        licence: of the engine's library, in words.
        stderr: last lines, when not ok.
        sandbox: layer -> verdict, as the locked process found by trying.
        platform: "linux", "wsl2", "macos", "windows".
        held_bytes: GPU -> memory that the driver said the loaded engine held there.
    """

    engine: str
    backend: str
    device_requested: str
    verdict: str
    device_executed: str = ""
    message: str = ""
    hint: str = ""
    kinds: tuple[str, ...] = ()
    compute_type: str = ""
    versions: dict[str, str] = {}
    claimed_devices: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    load_ms: float | None = None
    infer_ms: float | None = None
    rss_bytes: int | None = None
    licence: str = ""
    python: str = ""
    stderr: tuple[str, ...] = ()
    sandbox: dict[str, str] = {}
    platform: str = ""
    held_bytes: dict[str, int] = {}

    @property
    def ok(self) -> bool:
        """Whether the asked device gave the right answer."""
        return self.verdict == OK


class Climb(msgspec.Struct, frozen=True, kw_only=True):
    """What a probe child left behind.

    Attributes:
        rungs: the JSON lines it wrote, in order.
        how: its end.
        hung: whether it had to be ended at the deadline.
        stderr: its last lines.
        held: GPU -> bytes that the driver listed for it while it lived; None when the driver was not asked.
        unknown: why an empty `held` says nothing; "" when it means that it was on no GPU.
    """

    rungs: tuple[dict[str, Any], ...]
    how: Exit
    hung: bool = False
    deadline_s: float = 30.0
    stderr: tuple[str, ...] = ()
    held: dict[str, int] | None = None
    unknown: str = ""

    @property
    def last(self) -> str:
        """Name of the last rung; "" when none was reached."""
        return str(self.rungs[-1]["rung"]) if self.rungs else ""

    def get(self, rung: str) -> dict[str, Any]:
        """Fields of a rung, empty when it was not reached."""
        return next((found for found in self.rungs if found.get("rung") == rung), {})


def judge(name: str, backend: str, device: str, python: str, climb: Climb, machine: Machine | None) -> Probe:
    """Turn a climb into a probe. `machine` sharpens the hints; None means that the GPU was not read."""
    verdict, message = _verdict(climb, device)
    claims, ready, answer = climb.get("claims"), climb.get("infer").get("ready", {}), climb.get("answer")
    entry = CATALOG.get(name)
    probe = Probe(
        engine=name,
        backend=backend,
        device_requested=device,
        verdict=verdict,
        message=message,
        device_executed=ready.get("device", ""),
        kinds=tuple(claims.get("kinds", ())),
        compute_type=ready.get("compute_type", ""),
        versions={**claims.get("claims", {}).get("versions", {}), **ready.get("versions", {})},
        claimed_devices=tuple(claims.get("claims", {}).get("devices", ())),
        notes=(*claims.get("claims", {}).get("notes", ()), *_unconfirmed(climb)),
        held_bytes=climb.held or {},
        load_ms=climb.get("infer").get("load_ms"),
        infer_ms=answer.get("infer_ms"),
        rss_bytes=answer.get("rss_bytes"),
        licence=claims.get("licence", "") or (entry.licence if entry else ""),
        python=python,
        sandbox=climb.get("import").get("sandbox", {}),
        stderr=() if verdict == OK else climb.stderr,
    )
    if verdict == OK:
        return probe
    return msgspec.structs.replace(probe, hint=hint(probe, climb, machine))


def _unconfirmed(climb: Climb) -> tuple[str, ...]:
    return (f"That it ran on the GPU is its own word. {climb.unknown}",) if climb.unknown else ()


def _verdict(climb: Climb, device: str) -> tuple[str, str]:
    doing = _DOING.get(climb.last, "starting")
    if climb.hung:
        return HUNG, f"It gave no answer within {climb.deadline_s:g} s while {doing}."
    if climb.last == "fault":
        return _of_fault(climb.get("fault")["fault"])
    if climb.last == "answer":  # a death after the checked answer is still a right answer
        wrong = climb.get("answer").get("wrong", "")
        executed = climb.get("infer").get("ready", {}).get("device", "")
        if wrong:
            return FAILED, f"The answer to a question with a known answer is wrong: {wrong}"
        if device.startswith("cuda") and not executed.startswith("cuda"):
            return CPU_FALLBACK, f"It was asked for {device} and ran on {executed or 'an unnamed device'}."
        if climb.held == {} and not climb.unknown:
            return CPU_FALLBACK, f"It says that it ran on {executed}, but the driver lists no memory of it on any GPU."
        return OK, ""
    if climb.how.signal is not None:
        return f"crashed({signal_name(climb.how.signal)})", f"It was killed while {doing}."
    if not climb.rungs and "No module named 'msgspec'" in "\n".join(climb.stderr):
        return NOT_INSTALLED, "The interpreter has no msgspec, which the engine's side of the wire needs."
    last_words = f": {climb.stderr[-1]}" if climb.stderr else ""
    return FAILED, f"It {climb.how.describe()} while {doing}{last_words}"


def _of_fault(fault: dict[str, Any]) -> tuple[str, str]:
    message = str(fault.get("message", ""))
    match fault.get("code"):
        case "not_installed" if _shared_object(message):  # installed, but the loader cannot complete it
            return FAILED, message
        case "not_installed":
            return NOT_INSTALLED, message
        case "cpu_fallback":
            return CPU_FALLBACK, message
    return FAILED, message


# ---- hints -------------------------------------------------------------------------------------------------

# Shared objects whose absence is the usual end of a GPU engine, and the package that brings each.
SHARED_OBJECTS: dict[str, str] = {
    "libcublas.so.12": "nvidia-cublas-cu12",
    "libcublasLt.so.12": "nvidia-cublas-cu12",
    "libcudart.so.12": "nvidia-cuda-runtime-cu12",
    "libnvrtc.so.12": "nvidia-cuda-nvrtc-cu12",
    "libcudnn.so.9": "nvidia-cudnn-cu12",
    "libcufft.so.11": "nvidia-cufft-cu12",
    "libcurand.so.10": "nvidia-curand-cu12",
    "libcublas.so.13": "nvidia-cublas",
    "libcublasLt.so.13": "nvidia-cublas",
    "libcudart.so.13": "nvidia-cuda-runtime",
    "libcufft.so.12": "nvidia-cufft",
}
# Those that come from the system instead.
_SYSTEM_OBJECTS: dict[str, str] = {
    "libcuda.so.1": "the NVIDIA driver is not installed, or the container was started without its GPU",
    "libnvidia-ml.so.1": "the NVIDIA driver is not installed, or the container was started without its GPU",
    "libgomp.so.1": "install it with `apt-get install libgomp1`",
    "libstdc++.so.6": "install it with `apt-get install libstdc++6`",
}
_SO = re.compile(
    r"(lib[\w+-]+\.so(?:\.\d+)*)(?: is not found|:? cannot open shared object| or one of its dependencies)"
)
_TOO_OLD = re.compile(
    r"driver version is insufficient|CUDA_ERROR_SYSTEM_DRIVER_MISMATCH|forward compatib", re.IGNORECASE
)
_NO_MEMORY = re.compile(r"out of memory|CUDA_ERROR_OUT_OF_MEMORY|cudaErrorMemoryAllocation|bad_alloc", re.IGNORECASE)


def _shared_object(text: str) -> str:
    found = _SO.search(text)
    return found[1] if found else ""


def hint(probe: Probe, climb: Climb, machine: Machine | None) -> str:
    """How to mend what went wrong; "" when nothing better than the message is known."""
    if probe.verdict == NOT_INSTALLED:
        return install_hint(probe)
    evidence = "\n".join((probe.message, *climb.stderr, str(climb.get("fault"))))
    if library := _shared_object(evidence):
        return _library_hint(library, probe.python)
    if probe.device_requested.startswith("cuda"):
        return _gpu_hint(probe, evidence, machine)
    return _general_hint(probe, evidence)


def install_hint(probe: Probe) -> str:
    """The command that installs what is missing."""
    if "no msgspec" in probe.message:
        return f"`{probe.python} -m pip install msgspec`"
    entry = CATALOG.get(probe.engine)
    extra = (entry.extra.get(probe.backend) or next(iter(entry.extra.values()), "")) if entry else ""
    if not extra:
        return f"Install the engine's library into {probe.python}."
    return f"`pip install 'bulkhead-worker[{extra}]'`, or `supervisor setup --engines {probe.engine}`"


def _library_hint(library: str, python: str) -> str:
    if library in _SYSTEM_OBJECTS:
        return f"{library} is missing: {_SYSTEM_OBJECTS[library]}."
    if package := SHARED_OBJECTS.get(library):
        return (
            f"{library} is missing: `{python} -m pip install {package}`; the engine finds it there at its next start."
        )
    return f"{library} is missing: install the package of your system that provides it."


def _gpu_hint(probe: Probe, evidence: str, machine: Machine | None) -> str:
    if machine is not None and not machine.gpus:
        return f"No NVIDIA GPU was found here ({machine.error or machine.cuda_error}); run `nvidia-smi` to check."
    if machine is not None and machine.cuda_error:
        return f"The GPU is listed, but CUDA does not start: {machine.cuda_error}; is nvidia-uvm loaded?"
    if _TOO_OLD.search(evidence):
        has = f"The driver {machine.driver} serves CUDA {machine.cuda_max}; " if machine else ""
        return f"{has}the library wants a newer driver, or a build for an older CUDA: `supervisor setup` picks one."
    if _NO_MEMORY.search(evidence):
        return "The GPU is full: `nvidia-smi` shows who holds its memory."
    if probe.verdict == CPU_FALLBACK:
        return _fallback_hint(probe)
    return _general_hint(probe, evidence)


def _fallback_hint(probe: Probe) -> str:
    if "onnxruntime" in probe.versions and "onnxruntime-gpu" not in probe.versions:
        return f"This is the CPU build of onnxruntime; `supervisor setup --engines {probe.engine}` makes a GPU venv."
    if {"xllamacpp", "llama-cpp-python", "llama_cpp_python"} & set(probe.versions):
        return "The wheel on PyPI is a CPU build; build it with CUDA: `supervisor setup --dry-run` prints how."
    return f"`supervisor setup --engines {probe.engine}` makes a venv with the library's GPU build."


def _general_hint(probe: Probe, evidence: str) -> str:
    if probe.verdict == HUNG:
        return "Try a longer --deadline; if `nvidia-smi` hangs too, the driver needs a reset or the box a reboot."
    if probe.verdict == "crashed(SIGILL)":
        return "The library was compiled for another CPU: install its wheel again, or build with -DGGML_NATIVE=OFF."
    if probe.verdict == "crashed(SIGKILL)":
        return "Somebody killed it; `dmesg` tells whether the system ran out of memory."
    if probe.verdict.startswith("crashed"):
        return "The library crashed by itself; reinstall it, and read the stack in the stderr lines (--json)."
    if _NO_MEMORY.search(evidence):
        return "The machine ran out of memory: end other programs, or use a smaller model."
    return "The stderr lines (--json) say more."


def summary(probes: Sequence[Probe]) -> str:
    """One line for people: how many of each verdict."""
    counts: dict[str, int] = {}
    for probe in probes:
        counts[probe.verdict] = counts.get(probe.verdict, 0) + 1
    return ", ".join(f"{count} {verdict}" for verdict, count in counts.items()) or "nothing to probe"
