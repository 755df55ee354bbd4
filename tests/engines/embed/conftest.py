"""The two backends as children, and a maker of models."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines.embed.fixture_cases import GGUF_MODEL, ONNX_MODEL
from protocol.engine_wire import Model, Ready

LIBRARIES = {"onnx": ("onnxruntime", "tokenizers"), "gguf": ("xllamacpp",)}
PATHS = {"onnx": ONNX_MODEL, "gguf": GGUF_MODEL}


def model(backend: str, path: Path | None = None, **options: Any) -> Model:
    files = {"model": str(path or PATHS[backend])}
    return Model(name="embed", files=files, backend=backend, device="cpu", options=options)


@pytest.fixture
def make_model() -> Callable[..., Model]:
    """Build a `Model` for a backend: (backend, path, **options)."""
    return model


@pytest.fixture(scope="module", params=list(LIBRARIES))
def backend(request: pytest.FixtureRequest) -> str:
    """Name of a backend whose libraries are installed."""
    for library in LIBRARIES[request.param]:
        if importlib.util.find_spec(library) is None:
            pytest.skip(f"{library} is not installed")
    name: str = request.param
    return name


@pytest.fixture(scope="module")
def embedder(backend: str, spawn_shared: Callable[[str], Any]) -> Any:
    """A child with the fixture model of the backend loaded, shared by the tests of a module."""
    child = spawn_shared("embed")
    ready = child.load(model(backend))
    assert isinstance(ready, Ready), ready
    return child
