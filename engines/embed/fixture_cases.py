"""Questions to the shipped embedding models whose answers are known: nearer texts rank first."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

from engines.runtime.contract import Case, Fixture, Model
from protocol.work import EmbeddingResult

ONNX_MODEL = Path(__file__).with_name("fixture") / "tiny-embed-onnx"
# The chat fixture serves as the GGUF model: llama.cpp pools the states of any model. A data file, not an import.
GGUF_MODEL = Path(__file__).parents[1] / "llm" / "fixture" / "chat-q8_0.gguf"

_TEXTS = {
    "onnx": ["the cat sat on the mat", "the cat sat", "gpu worker crash and restart"],
    "gguf": ["count to 12", "count to 13", "hello"],
}


def fixture(backend: str) -> Fixture:
    """The model of a backend and its questions."""
    path = ONNX_MODEL if backend == "onnx" else GGUF_MODEL
    texts = _TEXTS[backend]
    return Fixture(
        model=Model(
            name="fixture-embed",
            kinds=("embedding",),
            files={"model": str(path)},
            backend=backend,
            options={"threads": 1},
        ),
        cases=(
            Case(kind="embedding", params={"input": texts}, check=_ranks(3)),
            Case(kind="embedding", params={"input": texts * 30}, check=_ranks(90)),
            Case(kind="embedding", params={"input": [[3, 5, 8]]}, check=_ranks(1)),
        ),
        # Half a million tokens through a model that takes some ten thousand a second.
        endless=Case(kind="embedding", params={"input": ["count to 12 " * 40] * 2000}, check=_ranks(2000))
        if backend == "gguf"
        else None,
        refused=(
            ("embedding", {"input": ["hello", "word " * 2000]}),
            ("embedding", {"input": [[2**31 - 1]]}),
            ("embedding", {"input": ["hello"], "dimensions": 8}),
            ("embedding", {"input": ["hello"], "dimensions": 60_000}),
        ),
    )


def rows(result: EmbeddingResult) -> list[tuple[float, ...]]:
    """The vectors of a result."""
    values = struct.unpack(f"<{result.count * result.dimensions}f", result.vectors)
    return [values[at : at + result.dimensions] for at in range(0, len(values), result.dimensions)]


def _ranks(count: int) -> Callable[[EmbeddingResult, Sequence[Path]], str]:
    """Every vector has length 1, and the second text of each three is nearer to the first than the third is."""

    def check(result: EmbeddingResult, _files: Sequence[Path]) -> str:
        found = rows(result)
        if len(found) != count:
            return f"expected {count} vectors, got {len(found)}"
        if any(abs(math.hypot(*row) - 1) > 1e-5 for row in found):
            return "a vector is not normalised"
        for first, near, far in zip(found[::3], found[1::3], found[2::3], strict=False):
            if _dot(first, near) < _dot(first, far) + 0.1:
                return f"similarity {_dot(first, near):.3f} of near texts, {_dot(first, far):.3f} of far ones"
        return ""

    return check


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return math.fsum(x * y for x, y in zip(a, b, strict=True))
