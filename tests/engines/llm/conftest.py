"""Both backends as children; every conformance test runs on each."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from protocol.engine_wire import Model, Ready

MODEL = Path(__file__).parents[3] / "engines" / "llm" / "fixture" / "chat-q8_0.gguf"
LIBRARIES = {"xllamacpp": "xllamacpp", "llama-cpp-python": "llama_cpp"}


def model(backend: str, path: Path = MODEL, **options: Any) -> Model:
    return Model(name="chat", files={"model": str(path)}, backend=backend, device="cpu", options=options)


@pytest.fixture
def make_model() -> Callable[..., Model]:
    """Build a `Model` for a backend: (backend, path, **options)."""
    return model


@pytest.fixture(scope="module", params=list(LIBRARIES))
def backend(request: pytest.FixtureRequest) -> str:
    """Name of a backend whose library is installed."""
    name: str = request.param
    if importlib.util.find_spec(LIBRARIES[name]) is None:
        pytest.skip(f"{name} is not installed")
    return name


@pytest.fixture(scope="module")
def chat(backend: str, spawn_shared: Callable[[str], Any]) -> Any:
    """A child with the fixture model loaded, shared by the tests of a module."""
    child = spawn_shared("llm")
    ready = child.load(model(backend))
    assert isinstance(ready, Ready), ready
    return child
