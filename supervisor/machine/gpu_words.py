"""What an engine's own words say about its end: texts of CUDA and of the libraries on top of it. Pure.

The texts are those of `cudaGetErrorString` and the names of `CUresult` (CUDA driver API, "Data types used by CUDA
driver"), which llama.cpp, ctranslate2, onnxruntime and PyTorch all print as they are.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from typing import NamedTuple


class GpuFault(enum.StrEnum):
    """Classes of what goes wrong on a GPU.

    OUT_OF_MEMORY: too little memory was free; the GPU is well.
    APPLICATION: the program did something illegal; its context is lost, the GPU is well.
    DEVICE: the hardware failed; nothing more runs there without a reset.
    DRIVER: the driver or its set-up does not serve CUDA now.
    """

    OUT_OF_MEMORY = "out-of-memory"
    APPLICATION = "application-fault"
    DEVICE = "device-fault"
    DRIVER = "driver-fault"


class Verdict(NamedTuple):
    """A class, and the line that told it."""

    fault: GpuFault
    line: str


_OOM, _APP, _DEVICE, _DRIVER = GpuFault.OUT_OF_MEMORY, GpuFault.APPLICATION, GpuFault.DEVICE, GpuFault.DRIVER

# First match wins within a line, and the gravest class over all lines.
WORDS: tuple[tuple[GpuFault, str], ...] = (
    # CUDA_ERROR_ECC_UNCORRECTABLE 214, _HARDWARE_STACK_ERROR 714, _DEVICE_UNAVAILABLE 46, _NVLINK_UNCORRECTABLE 220
    (_DEVICE, r"uncorrectable (ECC|NVLink) error|ECC_UNCORRECTABLE|NVLINK_UNCORRECTABLE|cudaErrorECCUncorrectable"),
    (_DEVICE, r"fallen off the bus|GPU is lost|GPU requires (a )?re(set|start)|device (was |is )?lost|DEVICE_LOST"),
    (_DEVICE, r"hardware stack error|HARDWARE_STACK_ERROR|cudaErrorHardwareStackError"),
    (_DEVICE, r"CONTAINED\b.*exception|\bCUDA_ERROR_CONTAINED\b|cudaErrorContained"),
    (_DRIVER, r"device\(s\) is/are busy or unavailable|cudaErrorDevicesUnavailable|CUDA_ERROR_DEVICE_UNAVAILABLE"),
    (_DRIVER, r"driver version is insufficient|cudaErrorInsufficientDriver|SYSTEM_DRIVER_MISMATCH"),
    (
        _DRIVER,
        r"driver shutting down|driver/library version mismatch|cudaErrorInitializationError|initialization error",
    ),
    (_DRIVER, r"system not yet initialized|SYSTEM_NOT_READY|OS call failed or operation not supported on this OS"),
    (_DRIVER, r"CUDA_ERROR_(NOT_INITIALIZED|OPERATING_SYSTEM|NO_DEVICE|UNKNOWN)\b|no CUDA-capable device is detected"),
    (_DRIVER, r"MPS (server|client) .*(failed|error|terminated)|CUDA_ERROR_MPS_\w+"),
    (_OOM, r"CUDA(_ERROR_| error: ?)out[ _]of[ _]memory|cudaErrorMemoryAllocation|CUDA out of memory"),
    (_OOM, r"CUDA\b.*\bout of memory|CUDA failed with error out of memory|cudaMalloc failed: out of memory"),
    (_OOM, r"failed to allocate (CUDA\d*|GPU|device) buffer|unable to allocate CUDA\d* buffer"),
    (_OOM, r"CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED|Available memory of .* is smaller than requested"),
    (_APP, r"an illegal memory access|ILLEGAL_ADDRESS|cudaErrorIllegalAddress|misaligned address|MISALIGNED_ADDRESS"),
    (_APP, r"an illegal instruction was encountered|ILLEGAL_INSTRUCTION|invalid program counter|INVALID_PC"),
    (_APP, r"unspecified launch failure|LAUNCH_FAILED|cudaErrorLaunchFailure|device-side assert|CUDA_ERROR_ASSERT"),
    (_APP, r"launch timed out and was terminated|LAUNCH_TIMEOUT|too many resources requested for launch"),
    (_APP, r"operation not supported on global/shared address space|INVALID_ADDRESS_SPACE"),
    (_APP, r"no kernel image is available|NO_BINARY_FOR_GPU|PTX was compiled with an unsupported toolchain"),
)
_PATTERNS = tuple((fault, re.compile(words, re.IGNORECASE)) for fault, words in WORDS)
_GRAVEST_FIRST = (_DEVICE, _DRIVER, _OOM, _APP)


def classify(lines: Iterable[str]) -> Verdict | None:
    """The gravest class that the last words of an engine (or the text of its fault) tell; None when they tell none."""
    found: dict[GpuFault, str] = {}
    for line in lines:
        fault = next((fault for fault, pattern in _PATTERNS if pattern.search(line)), None)
        if fault is not None:
            found.setdefault(fault, line.strip()[:300])
    return next((Verdict(fault, found[fault]) for fault in _GRAVEST_FIRST if fault in found), None)
