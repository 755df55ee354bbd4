"""llama.cpp in embedding mode, against the traps that gave wrong vectors."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import psutil
import pytest

from protocol.engine_wire import Ready

pytestmark = pytest.mark.engine
pytest.importorskip("xllamacpp", reason="xllamacpp is not installed")


def embed(child: Any, texts: list[str]) -> Any:
    body = child.run("embedding", {"input": texts}).body
    return np.frombuffer(body.vectors, "<f4").reshape(body.count, body.dimensions)


def test_slots_change_no_vector_beyond_the_models_own_noise(spawn: Any, make_model: Any) -> None:
    """With a split context memory, mean pooling over texts of different length was off by 0.18."""
    choose = random.Random(1)
    texts = ["".join(choose.choices("abcdefgh ", k=choose.randint(2, 200))) for _ in range(30)]
    one, four = spawn("embed"), spawn("embed")
    assert isinstance(one.load(make_model("gguf")), Ready)
    assert isinstance(four.load(make_model("gguf", slots=4)), Ready)
    assert np.abs(embed(one, texts) - embed(four, texts)).max() < 5e-3  # q8_0 activations


def test_no_text_remembers_the_one_before(spawn: Any, make_model: Any) -> None:
    """A cached prefix would be left out of the mean."""
    child = spawn("embed")
    child.load(make_model("gguf"))
    first = embed(child, ["count to 12"])
    embed(child, ["count to 13", "count to 1", "count"])
    assert np.array_equal(embed(child, ["count to 12"]), first)


def test_no_tcp_port_is_open(spawn: Any, make_model: Any) -> None:
    child = spawn("embed")
    child.load(make_model("gguf"))
    assert psutil.Process(child.process.pid).net_connections("inet") == []


def test_pooling_can_be_chosen(spawn: Any, make_model: Any) -> None:
    child = spawn("embed")
    child.load(make_model("gguf", pooling="last"))
    last = embed(child, ["count to 12"])
    other = spawn("embed")
    other.load(make_model("gguf"))
    assert np.abs(last - embed(other, ["count to 12"])).max() > 0.01


def test_more_tokens_than_the_model_was_trained_for_is_refused(spawn: Any, make_model: Any) -> None:
    fault = spawn("embed").load(make_model("gguf", max_tokens=513))
    assert (fault.code, fault.field) == ("load_failed", "options.max_tokens")
