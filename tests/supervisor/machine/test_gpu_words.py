"""Last words of engines, as the libraries print them."""

from __future__ import annotations

import pytest

from supervisor.machine.gpu_words import GpuFault, classify

OOM, APP, DEVICE, DRIVER = GpuFault.OUT_OF_MEMORY, GpuFault.APPLICATION, GpuFault.DEVICE, GpuFault.DRIVER

WORDS = [
    (
        OOM,
        "ggml_backend_cuda_buffer_type_alloc_buffer: 24000.00 MiB on device 0: cudaMalloc failed: out of memory",
    ),
    (OOM, "llama_model_load: error loading model: unable to allocate CUDA0 buffer"),
    (OOM, "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 GiB."),
    (OOM, "RuntimeError: CUDA failed with error out of memory"),
    (OOM, "CUDA error: out of memory"),
    (OOM, "cuMemAlloc_v2 failed: CUDA_ERROR_OUT_OF_MEMORY (2)"),
    (OOM, "CUBLAS_STATUS_ALLOC_FAILED"),
    (OOM, "bfc_arena.cc: Available memory of 100 is smaller than requested bytes of 200"),
    (APP, "CUDA error: an illegal memory access was encountered"),
    (APP, "CUDA error: unspecified launch failure"),
    (APP, "CUDA failure 700: an illegal memory access was encountered ; GPU=0 ; hostname=x"),
    (APP, "CUDA error: device-side assert triggered"),
    (APP, "CUDA error: misaligned address"),
    (APP, "CUDA error: the launch timed out and was terminated"),
    (APP, "CUDA error: no kernel image is available for execution on the device"),
    (DEVICE, "CUDA error: uncorrectable ECC error encountered"),
    (DEVICE, "cuCtxSynchronize failed: CUDA_ERROR_ECC_UNCORRECTABLE (214)"),
    (DEVICE, "NVRM: GPU 0000:01:00.0: GPU has fallen off the bus."),
    (DEVICE, "Unable to determine the device handle for GPU 0000:01:00.0: GPU is lost.  Reboot the system"),
    (DEVICE, "CUDA error: hardware stack error"),
    (DEVICE, "vk::DeviceLostError: VK_ERROR_DEVICE_LOST"),
    (DRIVER, "CUDA error: all CUDA-capable devices are busy or unavailable: cudaErrorDevicesUnavailable"),
    (DRIVER, "CUDA-capable device(s) is/are busy or unavailable"),
    (DRIVER, "CUDA driver version is insufficient for CUDA runtime version"),
    (DRIVER, "cuInit failed: CUDA_ERROR_UNKNOWN (999)"),
    (DRIVER, "cuInit failed: CUDA_ERROR_NO_DEVICE (100)"),
    (DRIVER, "Failed to initialize NVML: Driver/library version mismatch"),
    (DRIVER, "CUDA error 304, OS call failed or operation not supported on this OS"),
]


@pytest.mark.parametrize(("fault", "line"), WORDS)
def test_words_have_a_class(fault, line):
    verdict = classify(["loading", line, "  File x, line 3"])
    assert verdict is not None
    assert verdict.fault is fault
    assert verdict.line == line


@pytest.mark.parametrize(
    "line",
    [
        "",
        "killed",
        "MemoryError",
        "Out of memory: Killed process 41",
        "CUDA Graph captured",
        "out of memory",
        "the device was busy",
    ],
)
def test_words_about_something_else_have_none(line):
    assert classify([line]) is None


def test_the_gravest_of_many_lines_counts():
    verdict = classify([line for _fault, line in WORDS if _fault is not DRIVER] + [WORDS[-2][1]])
    assert verdict is not None
    assert verdict.fault is DEVICE


def test_a_very_long_line_is_shortened():
    verdict = classify(["CUDA error: out of memory " + "x" * 10_000])
    assert verdict is not None
    assert len(verdict.line) <= 300
