"""A voice with two speakers, made from the fixture voice."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

FIXTURE = Path(__file__).parents[3] / "engines" / "piper" / "fixture"
TEXT, ESPEAK = FIXTURE / "tone-text.onnx", FIXTURE / "tone-espeak.onnx"


@pytest.fixture(scope="session")
def duo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Speaker "low" says what it is told; speaker "high" says the next letter of the alphabet for each."""
    onnx = pytest.importorskip("onnx", reason="onnx is a development tool")
    from onnx import TensorProto, helper

    model = onnx.load(TEXT)
    graph = model.graph
    graph.input.append(helper.make_tensor_value_info("sid", TensorProto.INT64, [1]))
    graph.initializer.append(helper.make_tensor("step", TensorProto.FLOAT, [], [20.0]))
    for node in graph.node:
        if "freq_s" in node.input:
            node.input[list(node.input).index("freq_s")] = "freq_of_speaker"
    made = [
        helper.make_node("Cast", ["sid"], ["sid_f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["sid_f", "step"], ["shift"]),
        helper.make_node("Add", ["freq_s", "shift"], ["freq_of_speaker"]),
    ]
    at = next(place for place, node in enumerate(graph.node) if "freq_of_speaker" in node.input)
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes[:at], *made, *nodes[at:]])
    path = tmp_path_factory.mktemp("piper") / "duo.onnx"
    onnx.save(model, path)
    config = json.loads(Path(f"{TEXT}.json").read_text())
    config |= {"num_speakers": 2, "speaker_id_map": {"low": 0, "high": 1}}
    Path(f"{path}.json").write_text(json.dumps(config))
    return path
