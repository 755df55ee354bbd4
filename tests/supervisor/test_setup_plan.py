"""The table (driver, GPU, OS, WSL2) -> packages, without any of them."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import msgspec
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from engines.catalog import CATALOG
from supervisor.machine.gpu import Gpu, Machine
from supervisor.setup_plan import TABLE, gpu_obstacle, main_packages, pins, plan, requirements_text, unsupported

ROOT = Path(__file__).parents[2]
BOX = Machine(
    os="linux",
    arch="x86_64",
    python="3.11.7",
    driver="570.86.15",
    cuda_max="12.8",
    gpus=(Gpu(index=0, name="RTX 4090", compute_capability="8.9"),),
)


def box(**changes: Any) -> Machine:
    return msgspec.structs.replace(BOX, **changes)


def card(capability: str) -> tuple[Gpu, ...]:
    return (Gpu(index=0, name="card", compute_capability=capability),)


@pytest.mark.parametrize(
    ("machine", "device", "said"),
    [
        (box(), "cuda", "CUDA 12 on RTX 4090"),
        (box(driver="525.60.13", cuda_max="12.0"), "cuda", "CUDA 12"),
        (box(driver="580.95.05", cuda_max="13.0"), "cuda", "CUDA 12"),
        (box(wsl2=True), "cuda", "CUDA 12"),
        (box(gpus=card("5.0")), "cuda", "CUDA 12"),
        (box(gpus=card("12.0")), "cuda", "CUDA 12"),
        (box(gpus=card("")), "cuda", "CUDA 12"),
        (box(gpus=(*card("3.5"), *card("8.0"))), "cuda", "CUDA 12"),
        (box(gpus=(), driver="", cuda_max="", error="no NVML"), "cpu", "no NVIDIA GPU was found (no NVML)"),
        (box(gpus=(), driver="", cuda_max=""), "cpu", "no NVIDIA GPU was found"),
        (box(driver="470.256.02", cuda_max="11.4"), "cpu", "install driver 525.60.13 or newer here"),
        (box(driver="472.12", cuda_max="11.4", wsl2=True), "cpu", "or newer in Windows"),
        (box(cuda_max=""), "cpu", "of an unknown version"),
        (box(gpus=card("3.7")), "cpu", "compute capability 3.7"),
        (box(cuda_error="cuInit failed: CUDA_ERROR_UNKNOWN (999)"), "cpu", "CUDA does not start: cuInit failed"),
        (box(arch="aarch64"), "cpu", "wheels are for x86_64"),
        (box(os="darwin", arch="arm64", gpus=()), "cpu", "macOS has no CUDA"),
    ],
)
def test_the_device_follows_the_machine(machine: Machine, device: str, said: str):
    for engine in ("image", "video", "whisper", "embed", "piper"):
        (found,) = plan(machine, [engine])
        assert found.device == device
        assert said in found.reason
        assert found.requirements == (TABLE[engine].cuda if device == "cuda" else TABLE[engine].cpu)
        assert found.mib > 0


def test_the_gpu_sets_hold_what_cuda_12_needs():
    by_engine = {each.engine: set(each.packages) for each in plan(BOX, list(TABLE))}
    for engine in ("image", "video", "embed", "piper"):
        assert "onnxruntime-gpu==1.26.0" in by_engine[engine]
    assert any(package.startswith("nvidia-cublas-cu12==12.") for package in by_engine["whisper"])
    assert any(package.startswith("faster-whisper==1.2") for package in by_engine["whisper"])


def test_llm_stays_on_the_cpu_and_says_how_to_build():
    (without,) = plan(BOX, ["llm"])
    assert without.device == "cpu"
    assert "outside PyPI" in without.reason
    assert "install the CUDA toolkit" in without.notes[-1]
    (with_nvcc,) = plan(box(nvcc=True), ["llm"])
    assert "nvcc is here" in with_nvcc.notes[-1]
    assert "CMAKE_ARGS=-DGGML_CUDA=on" in with_nvcc.notes[-1]
    (no_gpu,) = plan(box(gpus=()), ["llm"])
    assert not any("CMAKE_ARGS" in note for note in no_gpu.notes)


def test_a_user_may_leave_the_gpu_alone():
    (found,) = plan(BOX, ["image"], "cpu")
    assert (found.device, found.requirements) == ("cpu", "image-cpu")
    assert "you asked for the CPU" in found.reason


def test_notes_tell_what_matters():
    assert any("never install a Linux driver" in note for note in plan(box(wsl2=True), ["image"])[0].notes)
    assert any("runs these CUDA 12 builds" in note for note in plan(box(cuda_max="13.1"), ["image"])[0].notes)
    assert any("GPL-3" in note for note in plan(BOX, ["piper"])[0].notes)
    assert any('device = "cpu"' in note for note in plan(BOX, ["embed"])[0].notes)


@pytest.mark.parametrize(("changes", "said"), [({"python": "3.10.4"}, "too old"), ({"os": "win32"}, "WSL2")])
def test_machines_that_cannot_be_served(changes: dict[str, Any], said: str):
    machine = box(**changes)
    assert said in unsupported(machine)
    (found,) = plan(machine, ["llm"])
    assert found.requirements == ""
    assert said in found.reason


def test_unknown_engines_are_refused():
    with pytest.raises(ValueError, match="no library to install"):
        plan(BOX, ["command"])


def test_a_good_machine_has_no_obstacle():
    assert gpu_obstacle(BOX) == ""


# ---- the pinned sets -------------------------------------------------------------------------------------------

SETS = sorted({name for row in TABLE.values() for name in (row.cpu, row.cuda) if name})


def test_every_engine_with_a_library_is_in_the_table():
    assert set(TABLE) == {name for name, entry in CATALOG.items() if entry.extra}


@pytest.mark.parametrize("name", SETS)
def test_every_requirement_is_pinned_and_hashed(name: str):
    entries = re.split(r"\n(?=[A-Za-z0-9])", requirements_text(name, "txt").strip())
    assert entries
    for entry in entries:
        assert re.match(r"[A-Za-z0-9_.-]+==\S+", entry), entry
        assert "--hash=sha256:" in entry, entry
    assert "://" not in requirements_text(name, "txt")


@pytest.mark.parametrize("name", SETS)
def test_the_pins_satisfy_what_was_asked_for(name: str):
    found = pins(name)
    for line in requirements_text(name, "in").splitlines():
        if line.split("#")[0].strip():
            asked = Requirement(line.split("#")[0])
            assert Version(found[asked.name]) in asked.specifier, line
    assert "msgspec" in found, "the engine's side of the wire needs it"
    assert main_packages(name)


@pytest.mark.parametrize("name", [row.cpu for row in TABLE.values()])
def test_the_cpu_sets_follow_the_extras_of_the_distribution(name: str):
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    found = pins(name)
    for text in extras[name.removesuffix("-cpu")]:
        asked = Requirement(text)
        if asked.name != "bulkhead-worker":
            assert Version(found[asked.name]) in asked.specifier, f"{text}: run scripts/compile-requirements"


@pytest.mark.parametrize("name", [row.cuda for row in TABLE.values() if row.cuda.startswith(("embed", "image", "tts"))])
def test_a_gpu_set_never_holds_both_onnxruntimes(name: str):
    assert "onnxruntime-gpu" in pins(name)
    assert "onnxruntime" not in pins(name)
