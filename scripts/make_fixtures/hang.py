"""hang.onnx: a loop of 2^62 rounds. Only a signal ends it, or RunOptions.terminate, looked at between rounds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import helper, numpy_helper

from make_fixtures.graphs import BOOL, FLOAT, INT64, Graph, node, port

ROUNDS = 2**62


def write_hang(path: Path) -> None:
    """Input and output: 16 floats."""
    body = helper.make_graph(
        [node("Identity", ["ci"], ["co"]), node("Mul", ["v", "k"], ["vo"])],
        "b",
        [port("i", INT64, []), port("ci", BOOL, []), port("v", FLOAT, [16])],
        [port("co", BOOL, []), port("vo", FLOAT, [16])],
        [numpy_helper.from_array(np.float32(0.999), "k")],
    )
    graph = Graph()
    graph.constant("n", ROUNDS, np.int64)
    graph.constant("t", True)
    graph.op("Loop", ["n", "t", "x"], "y", body=body)
    graph.save(path, [port("x", FLOAT, [16])], [port("y", FLOAT, [16])])
