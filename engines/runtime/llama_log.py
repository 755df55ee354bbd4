"""What llama.cpp's log says about a load: why it failed, and where the layers went. Pure.

Both bindings pass the same lines on; neither offers these facts in any other way.
"""

from __future__ import annotations

import re

import msgspec


class Offload(msgspec.Struct, frozen=True):
    """Where the layers went: `device` is "cpu", "cuda:0", "vulkan:0", …; `layers` of `total` are on a GPU."""

    device: str
    layers: int = 0
    total: int = 0


def load_sentence(log: str, fallback: str) -> str:
    """The first reason that the log of a failed load gives, as one sentence."""
    for line in log.splitlines():
        if found := re.search(r"error loading model: (.*)|(failed to (?:open|create|allocate|initialize).*)", line):
            reason = (found[1] or found[2]).removeprefix("error loading model hyperparameters: ")
            return f"llama.cpp cannot load the model: {one_line(reason)}."
    return f"llama.cpp cannot load the model: {one_line(fallback)}."


_OFFLOADED = re.compile(r"offloaded (\d+)/(\d+) layers to GPU")
_BUFFER = re.compile(r"(CUDA|ROCm|Vulkan|MTL|SYCL)(\d*)\S* model buffer size")
_DEVICES = {"CUDA": "cuda", "ROCm": "rocm", "Vulkan": "vulkan", "MTL": "mps", "SYCL": "sycl"}


def offload_of(log: str, *, has_gpu: bool, taken: int) -> Offload:
    """Judge from the log of a load where the layers are; without a log, from the GPU memory that it took.

    Args:
        taken: bytes by which the GPUs' free memory fell.
    """
    if not has_gpu:
        return Offload("cpu")
    if counts := _OFFLOADED.findall(log):  # the last one: fitting parameters loads the metadata before
        layers, total = map(int, counts[-1])
        # CUDA_Host, without a number, is memory of the host.
        library, index = next((found for found in _BUFFER.findall(log) if found[1]), ("CUDA", "0"))
        return Offload(f"{_DEVICES[library]}:{index}", layers, total) if layers else Offload("cpu", 0, total)
    return Offload("cuda:0") if taken > 0 else Offload("cpu")


def one_line(text: str) -> str:
    """Words of a library, fit for the end of a sentence of ours."""
    return " ".join(text.split())[:400].rstrip(". ")
