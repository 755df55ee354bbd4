"""A few lines around `onnx.helper`, so that a maker reads like the formula that it builds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 9  # what onnxruntime 1.15 and later read

FLOAT, HALF, INT32, INT64, BOOL = (
    TensorProto.FLOAT,
    TensorProto.FLOAT16,
    TensorProto.INT32,
    TensorProto.INT64,
    TensorProto.BOOL,
)

port = helper.make_tensor_value_info
node = helper.make_node


class Graph:
    """Collects nodes and constants; `save` checks and writes the model."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []

    def constant(self, name: str, value: Any, dtype: Any = None) -> str:
        """Add an initialiser; returns its name."""
        self.constants.append(numpy_helper.from_array(np.asarray(value, dtype), name))
        return name

    def op(self, kind: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        """Add a node with one output; returns the output's name."""
        self.nodes.append(node(kind, list(inputs), [output], **attributes))
        return output

    def save(
        self, path: Path, inputs: Sequence[Any], outputs: Sequence[Any], name: str = "g", producer: str = ""
    ) -> None:
        """Write the model; the same calls give the same bytes."""
        graph = helper.make_graph(self.nodes, name, list(inputs), list(outputs), self.constants)
        named = {"producer_name": producer} if producer else {}
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], **named)
        model.ir_version = IR_VERSION
        onnx.checker.check_model(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(model.SerializeToString(deterministic=True))
