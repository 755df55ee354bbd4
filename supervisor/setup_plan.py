"""Which libraries fit this machine: a pure table from (driver, GPU, OS, WSL2) to packages.

One environment per engine, because the GPU builds exclude each other: onnxruntime and onnxruntime-gpu write the same
package folder, and not all libraries follow the same CUDA major. The pins live in requirements/NAME.txt, with
hashes (`scripts/compile-requirements`).

CUDA 12 for all: ctranslate2 is built for CUDA 12 only, onnxruntime-gpu up to 1.26 as well (1.27 and later want 13),
and a driver of CUDA 13 runs programs of CUDA 12.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import resources

import msgspec

from supervisor.machine.gpu import Machine

CUDA12_DRIVER = "525.60.13"  # first driver that serves CUDA 12, and cuDNN 9 for it
MIN_CAPABILITY = (5, 0)  # CUDA 12 has no code for older GPUs
_LLAMA_VERSION = "0.3.36"


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """One engine of the table.

    Attributes:
        cpu: requirement set for the CPU.
        cuda: requirement set for CUDA 12; "" when no GPU build is on PyPI.
        cpu_mib, cuda_mib: measured or estimated size of the environment.
    """

    cpu: str
    cuda: str
    cpu_mib: int
    cuda_mib: int = 0


# Sizes on the CPU were measured; those with CUDA are sums of the wheels' unpacked sizes.
TABLE: dict[str, Row] = {
    "llm": Row(cpu="llm-cpu", cuda="", cpu_mib=130),
    "embed": Row(cpu="embed-cpu", cuda="embed-cu12", cpu_mib=260, cuda_mib=3100),
    "whisper": Row(cpu="stt-cpu", cuda="stt-cu12", cpu_mib=410, cuda_mib=1300),
    "piper": Row(cpu="tts-cpu", cuda="tts-cu12", cpu_mib=180, cuda_mib=3000),
    "image": Row(cpu="image-cpu", cuda="image-cu12", cpu_mib=200, cuda_mib=3000),
    "video": Row(cpu="video-cpu", cuda="video-cu12", cpu_mib=290, cuda_mib=3100),
}


class VenvPlan(msgspec.Struct, frozen=True, kw_only=True):
    """One environment to make.

    Attributes:
        requirements: name of the pinned set; "" when nothing can be installed.
        packages: `name==version` of what matters in it.
        device: what the environment is for, and what `[engines.NAME] device` becomes.
        reason: why this device, one sentence.
        notes: what else a person should know.
        mib: disk it needs.
    """

    engine: str
    requirements: str
    packages: tuple[str, ...]
    device: str
    reason: str
    notes: tuple[str, ...] = ()
    mib: int = 0


def plan(machine: Machine, engines: Sequence[str], device: str = "") -> list[VenvPlan]:
    """Choose for each engine.

    Args:
        machine: what `read_machine` told.
        engines: names of `TABLE`.
        device: "cpu" keeps the GPU out; "" takes the best.

    Raises:
        ValueError: an engine that needs no environment.
    """
    found = []
    for engine in engines:
        if engine not in TABLE:
            raise ValueError(f"engine {engine!r} has no library to install; known are {', '.join(TABLE)}")
        found.append(_one(machine, engine, TABLE[engine], device))
    return found


def _one(machine: Machine, engine: str, row: Row, device: str) -> VenvPlan:
    if refusal := unsupported(machine):
        return VenvPlan(engine=engine, requirements="", packages=(), device="", reason=refusal)
    notes = list(_notes(machine))
    obstacle = "you asked for the CPU" if device == "cpu" else gpu_obstacle(machine)
    if not obstacle and not row.cuda:
        obstacle = "its GPU builds are published outside PyPI, so this is the CPU build"
        notes.append(_llama_note(machine))
    name = row.cpu if obstacle else row.cuda
    if engine == "embed" and not obstacle:
        notes.append('GGUF models of `embed` run on the CPU build of llama.cpp: give them device = "cpu"')
    if engine == "piper":
        notes.append("piper-tts is GPL-3.0-or-later")
    return VenvPlan(
        engine=engine,
        requirements=name,
        packages=main_packages(name),
        device="cpu" if obstacle else "cuda",
        reason=f"CPU: {obstacle}" if obstacle else f"CUDA 12 on {machine.gpus[0].name or 'the GPU'}",
        notes=tuple(notes),
        mib=row.cpu_mib if obstacle else row.cuda_mib,
    )


def unsupported(machine: Machine) -> str:
    """Why nothing can be installed here; "" when something can."""
    if _version(machine.python) < (3, 11):
        return f"Python {machine.python} is too old: 3.11 or newer is needed"
    if machine.os not in ("linux", "darwin"):
        return f"there are no engines for {machine.os}; use Linux, or WSL2 on Windows"
    return ""


def gpu_obstacle(machine: Machine) -> str:
    """Why the GPU builds do not fit; "" when they do."""
    if machine.os == "darwin":
        return "macOS has no CUDA"
    if not machine.gpus:
        return f"no NVIDIA GPU was found ({machine.error})" if machine.error else "no NVIDIA GPU was found"
    if machine.arch not in ("x86_64", "AMD64"):
        return f"the GPU wheels are for x86_64, and this is {machine.arch}"
    if _version(machine.cuda_max) < (12, 0):
        where = "in Windows" if machine.wsl2 else "here"
        return (
            f"the driver {machine.driver} serves CUDA {machine.cuda_max or 'of an unknown version'}, and the builds"
            f" need 12.0: install driver {CUDA12_DRIVER} or newer {where} and run this again"
        )
    capabilities = [_version(gpu.compute_capability) for gpu in machine.gpus if gpu.compute_capability]
    if capabilities and max(capabilities) < MIN_CAPABILITY:
        return f"{machine.gpus[0].name} has compute capability {machine.gpus[0].compute_capability}; CUDA 12 needs 5.0"
    if machine.cuda_error:
        return f"a GPU is listed, but CUDA does not start: {machine.cuda_error}"
    return ""


def _notes(machine: Machine) -> Sequence[str]:
    notes = []
    if machine.wsl2:
        notes.append("WSL2 uses the driver of Windows: never install a Linux driver inside")
    if _version(machine.cuda_max) >= (13, 0):
        notes.append(f"the driver serves CUDA {machine.cuda_max}; it runs these CUDA 12 builds as well")
    return notes


def _llama_note(machine: Machine) -> str:
    build = (
        f"CMAKE_ARGS=-DGGML_CUDA=on PYTHON -m pip install --no-binary :all: llama-cpp-python=={_LLAMA_VERSION}, with"
        ' PYTHON of this environment, then backend = "llama-cpp-python" in [[models]]'
    )
    if machine.nvcc:
        return f"nvcc is here, so a GPU build takes 10 to 20 minutes: {build}"
    return f"for the GPU install the CUDA toolkit (nvcc) first, then {build}"


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:2])


# ---- pinned sets -------------------------------------------------------------------------------------------

_PIN = re.compile(r"^(?P<name>[A-Za-z0-9_.-]+)(?:\[[^]]*\])?==(?P<version>\S+)", re.MULTILINE)
_NAMED = re.compile(r"^(?P<name>[A-Za-z0-9_.-]+)", re.MULTILINE)


def pins(requirements: str) -> dict[str, str]:
    """Every pin of a set: name -> version."""
    return {found["name"]: found["version"] for found in _PIN.finditer(requirements_text(requirements, "txt"))}


def main_packages(requirements: str) -> tuple[str, ...]:
    """`name==version` of the packages that the set was asked for; the rest follows from them."""
    asked = {found["name"] for found in _NAMED.finditer(requirements_text(requirements, "in"))}
    return tuple(f"{name}=={version}" for name, version in sorted(pins(requirements).items()) if name in asked)


def requirements_text(requirements: str, ending: str) -> str:
    """Text of a set: "txt" is pinned with hashes, "in" is what was asked for."""
    return resources.files("supervisor").joinpath(f"requirements/{requirements}.{ending}").read_text()
