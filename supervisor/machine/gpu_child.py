"""The child that reads GPU and driver, once, and prints one JSON object. NVML and libcuda live only here.

    python -I gpu_child.py

A hung driver hangs whoever asks it, NVML included, so the supervisor never asks by itself: it runs this file in a
child with a deadline (`supervisor.machine.gpu`). `cuInit` is tried as well, because NVML answers seconds before CUDA
does when nvidia-uvm is loaded late, and every engine started in between falls to the CPU. Standard library and
nvidia-ml-py only; imports nothing of ours.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import platform
import sys
from collections.abc import Callable
from typing import Any

_CUDA_LIBRARIES = ("libcuda.so.1", "/usr/lib/wsl/lib/libcuda.so.1")


def main() -> None:
    """Entry point; always exits 0 with one line of JSON, whatever is missing."""
    out = os.dup(1)  # a driver library that prints must not reach the line
    os.dup2(2, 1)
    os.write(out, (json.dumps(read()) + "\n").encode())
    os._exit(0)  # no library destructors


def read() -> dict[str, Any]:
    """Everything as plain data; see `supervisor.machine.gpu.Machine` for the fields."""
    found: dict[str, Any] = {"os": sys.platform, "arch": platform.machine(), "wsl2": is_wsl2(), "gpus": []}
    try:
        _read_nvml(found)
    except Exception as error:
        found["error"] = _sentence(error)
    found["cuda_error"] = cuda_error() if found["gpus"] else "no GPU is listed"
    return found


def is_wsl2() -> bool:
    """Whether this Linux is WSL2: its driver belongs to Windows and must not be installed inside."""
    try:
        with open("/proc/sys/kernel/osrelease") as file:
            return "microsoft" in file.read().lower()
    except OSError:
        return False


def _read_nvml(found: dict[str, Any]) -> None:
    nvml: Any = importlib.import_module("pynvml")  # has no type hints
    nvml.nvmlInit()
    try:
        found["driver"] = _text(nvml.nvmlSystemGetDriverVersion())
        version = int(nvml.nvmlSystemGetCudaDriverVersion_v2())
        found["cuda_max"] = f"{version // 1000}.{version % 1000 // 10}"
        count = nvml.nvmlDeviceGetCount()
        found["gpus"] = [_gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(index), index) for index in range(count)]
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, handle: Any, index: int) -> dict[str, Any]:
    """One GPU; a field that this card or container does not tell stays away."""
    gpu: dict[str, Any] = {"index": index}

    def put(name: str, ask: Callable[[], Any]) -> None:
        try:
            gpu[name] = ask()
        except nvml.NVMLError as error:
            gpu.setdefault("missing", {})[name] = _sentence(error)

    put("uuid", lambda: _text(nvml.nvmlDeviceGetUUID(handle)))
    put("name", lambda: _text(nvml.nvmlDeviceGetName(handle)))
    put("memory_bytes", lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).total))
    put("memory_free_bytes", lambda: int(nvml.nvmlDeviceGetMemoryInfo(handle).free))
    put("compute_capability", lambda: ".".join(str(part) for part in nvml.nvmlDeviceGetCudaComputeCapability(handle)))
    return gpu


def cuda_error() -> str:
    """Why CUDA does not work here although NVML lists a GPU; "" when `cuInit` succeeds and counts one."""
    library = None
    for name in _CUDA_LIBRARIES:
        try:
            library = ctypes.CDLL(name)
            break
        except OSError:
            continue
    if library is None:
        return "libcuda.so.1 is not installed"
    if code := library.cuInit(0):
        return f"cuInit failed: {_cuda_name(library, code)}"
    count = ctypes.c_int(0)
    if code := library.cuDeviceGetCount(ctypes.byref(count)):
        return f"cuDeviceGetCount failed: {_cuda_name(library, code)}"
    return "" if count.value else "CUDA counts no device (is CUDA_VISIBLE_DEVICES empty?)"


def _cuda_name(library: ctypes.CDLL, code: int) -> str:
    name = ctypes.c_char_p()
    if library.cuGetErrorName(code, ctypes.byref(name)) == 0 and name.value:
        return f"{name.value.decode()} ({code})"
    return f"error {code}"


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _sentence(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


if __name__ == "__main__":
    main()
