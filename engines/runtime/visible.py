"""Which GPUs this process may see. To be called before the first import of a GPU library."""

from __future__ import annotations

import os

from protocol.engine_wire import Model


def show_only(model: Model) -> None:
    """Hide every GPU that is not in the model's device set; the first of the set is then "cuda:0".

    NVIDIA's libraries read the variable once, when they start, and take UUIDs as well as numbers.
    """
    if model.devices:
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(model.devices)
