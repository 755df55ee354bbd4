"""Where a model may run, and whether it runs there: the same for every engine.

The runtime calls `prepare` before an engine's `load` and `refuse_fallback` after it; engines call neither.
"""

from __future__ import annotations

import os

from protocol.engine_wire import Model, Ready
from protocol.faults import refuse

DEVICES = ("auto", "cpu", "cuda")
_VISIBLE = "CUDA_VISIBLE_DEVICES"


def prepare(model: Model) -> None:
    """Check the device, and hide every GPU that the model must not touch. Before the first use of a GPU library.

    NVIDIA's libraries read the variable once, when they start, and take UUIDs as well as numbers. The first GPU of
    the device set is then "cuda:0". A model of the CPU sees none: a library built with CUDA makes a context on each
    GPU that it sees, hundreds of MB, even when no layer goes there.

    Raises:
        FaultError: `load_failed`, field "device".
    """
    if model.device not in DEVICES:
        known = ", ".join(DEVICES)
        raise refuse("load_failed", f"device: {model.device!r} is none of {known}.", "device")
    if model.device == "cpu":
        os.environ[_VISIBLE] = ""
    elif model.devices:
        os.environ[_VISIBLE] = ",".join(model.devices)


def refuse_fallback(model: Model, ready: Ready) -> None:
    """A silent fall to the CPU is a failed load. Raises FaultError (`cpu_fallback`)."""
    if model.device == "cuda" and not ready.device.startswith("cuda"):
        raise refuse(
            "cpu_fallback",
            f"Model {model.name!r} asks for {model.device} but the library runs it on {ready.device}.",
            "device",
            hint="Run `engine-probe` to see which library cannot use the GPU, and why.",
        )
