"""The embed engine: sentence embeddings, always of length 1, a batch equal to its singles.

    onnx   sentence-transformers layout (a folder) on onnxruntime
    gguf   a GGUF file on llama.cpp

Without `backend` it is onnx, as the catalogue says: what was probed is what serves. A text that is too long is
refused with its index and never cut.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from engines.embed.backend import Backend, check_request
from engines.runtime.contract import (
    Claims,
    Engine,
    Fixture,
    Job,
    LoadProgress,
    Model,
    Outcome,
    Ready,
    main_file,
    refuse,
)
from protocol.work import EmbeddingParams

ONNX, GGUF = "onnx", "gguf"


class EmbedEngine(Engine):
    """Sentence embeddings."""

    name: ClassVar[str] = "embed"
    kinds: ClassVar[tuple[str, ...]] = ("embedding",)
    backends: ClassVar[tuple[str, ...]] = (ONNX, GGUF)

    def __init__(self) -> None:
        self._backend: Backend | None = None
        self._matryoshka = False

    @classmethod
    def probe(cls, backend: str) -> Claims:
        """What the library claims. Raises ImportError."""
        if backend == GGUF:
            from engines.runtime import xllama

            return Claims(versions={"xllamacpp": xllama.version()}, devices=xllama.claimed_devices())
        import tokenizers

        from engines.runtime import ort

        versions = {"onnxruntime": ort.version(), "tokenizers": tokenizers.__version__}
        return Claims(versions=versions, devices=ort.claimed_devices())

    @classmethod
    def fixture(cls, backend: str) -> Fixture:
        """The shipped tiny models."""
        from engines.embed.fixture_cases import fixture

        return fixture(backend or ONNX)

    def load(self, model: Model, scratch: Path, progress: LoadProgress) -> Ready:
        """Load. Raises FaultError, ImportError."""
        path = main_file(model)
        backend = model.backend or ONNX
        if backend not in self.backends:
            sentence = f"backend: {backend!r} is not one of {', '.join(self.backends)}."
            raise refuse("load_failed", sentence, "backend")
        progress(0, 1, "load")
        if backend == ONNX:
            from engines.embed.onnx_backend import OnnxBackend

            loaded: Backend = OnnxBackend(model, path, scratch)
        else:
            from engines.embed.gguf_backend import GgufBackend

            loaded = GgufBackend(model, path, scratch)
        self._matryoshka = bool(model.options.get("matryoshka", False))
        self._backend = loaded
        progress(1, 1, "load")
        return loaded.ready

    def validate(self, kind: str, params: EmbeddingParams) -> None:
        """Refuse texts that are too long, unknown tokens, dimensions that the model has not. Raises FaultError."""
        check_request(params, self._loaded(), matryoshka=self._matryoshka)

    def run(self, job: Job) -> Outcome:
        """Embed. Raises CancelledRun, FaultError."""
        return self._loaded().run(job)

    def cancel(self, job: Job) -> None:
        """Wake the library."""
        if self._backend is not None:
            self._backend.cancel(job)

    def _loaded(self) -> Backend:
        if self._backend is None:
            raise refuse("engine_failed", "No model is loaded.")
        return self._backend


ENGINE = EmbedEngine
