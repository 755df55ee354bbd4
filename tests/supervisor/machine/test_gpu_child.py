"""The GPU child's own logic, against a scripted NVML; the real one runs in test_gpu.py."""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from supervisor.machine import gpu_child


class NVMLError(Exception):
    pass


def scripted(**overrides: Any) -> types.ModuleType:
    module: Any = types.ModuleType("pynvml")
    module.NVMLError = NVMLError
    module.nvmlInit = lambda: None
    module.nvmlShutdown = lambda: None
    module.nvmlSystemGetDriverVersion = lambda: b"550.54.14"
    module.nvmlSystemGetCudaDriverVersion_v2 = lambda: 12040
    module.nvmlDeviceGetCount = lambda: 1
    module.nvmlDeviceGetHandleByIndex = lambda index: index
    module.nvmlDeviceGetUUID = lambda handle: "GPU-1"
    module.nvmlDeviceGetName = lambda handle: "RTX"
    module.nvmlDeviceGetMemoryInfo = lambda handle: types.SimpleNamespace(total=24 * 2**30, free=20 * 2**30)
    module.nvmlDeviceGetCudaComputeCapability = lambda handle: (8, 9)
    for name, value in overrides.items():
        setattr(module, name, value)
    return module


def raising(sentence: str) -> Any:
    def fail(*_args: Any) -> None:
        raise NVMLError(sentence)

    return fail


def test_versions_and_fields_are_translated(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", scripted())
    found = gpu_child.read()
    assert found["driver"] == "550.54.14"
    assert found["cuda_max"] == "12.4"
    assert found["gpus"] == [
        {
            "index": 0,
            "uuid": "GPU-1",
            "name": "RTX",
            "memory_bytes": 24 * 2**30,
            "memory_free_bytes": 20 * 2**30,
            "compute_capability": "8.9",
        }
    ]


def test_a_field_that_the_driver_hides_costs_only_that_field(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", scripted(nvmlDeviceGetMemoryInfo=raising("Not Supported")))
    (gpu,) = gpu_child.read()["gpus"]
    assert gpu["name"] == "RTX"
    assert gpu["missing"]["memory_bytes"] == "NVMLError: Not Supported"


def test_no_driver_is_an_error_text(monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", scripted(nvmlInit=raising("NVML Shared Library Not Found")))
    found = gpu_child.read()
    assert found["gpus"] == []
    assert "NVML Shared Library Not Found" in found["error"]
    assert found["cuda_error"]


def test_nvml_is_shut_down_also_when_reading_fails(monkeypatch):
    ended: list[bool] = []
    module = scripted(nvmlDeviceGetCount=raising("Unknown Error"), nvmlShutdown=lambda: ended.append(True))
    monkeypatch.setitem(sys.modules, "pynvml", module)
    assert "Unknown Error" in gpu_child.read()["error"]
    assert ended == [True]


class Cuda:
    """libcuda with given return codes."""

    def __init__(self, init: int = 0, count: int = 1) -> None:
        self._init, self._count = init, count

    def cuInit(self, _flags: int) -> int:
        return self._init

    def cuDeviceGetCount(self, out: Any) -> int:
        out._obj.value = self._count
        return 0

    def cuGetErrorName(self, code: int, out: Any) -> int:
        out._obj.value = b"CUDA_ERROR_UNKNOWN" if code == 999 else None
        return 0 if code == 999 else 1


@pytest.mark.parametrize(
    ("library", "said"),
    [
        (Cuda(), ""),
        (Cuda(init=999), "cuInit failed: CUDA_ERROR_UNKNOWN (999)"),
        (Cuda(init=12345), "cuInit failed: error 12345"),
        (Cuda(count=0), "CUDA counts no device (is CUDA_VISIBLE_DEVICES empty?)"),
    ],
)
def test_cuda_is_tried_and_not_believed(monkeypatch, library: Cuda, said: str):
    monkeypatch.setattr(gpu_child.ctypes, "CDLL", lambda _name: library)
    assert gpu_child.cuda_error() == said


def test_a_missing_libcuda_is_named(monkeypatch):
    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(gpu_child.ctypes, "CDLL", absent)
    assert gpu_child.cuda_error() == "libcuda.so.1 is not installed"


@pytest.mark.parametrize(("release", "wsl2"), [("5.15.153.1-microsoft-standard-WSL2", True), ("6.1.0-18-amd64", False)])
def test_wsl2_is_told_by_its_kernel(monkeypatch, tmp_path, release: str, wsl2: bool):
    file = tmp_path / "osrelease"
    file.write_text(release)
    monkeypatch.setattr("builtins.open", lambda *_args, real=open: real(file))
    assert gpu_child.is_wsl2() is wsl2
