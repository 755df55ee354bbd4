"""The llm engine: GGUF models through llama.cpp, by one of two Python bindings.

    xllamacpp         llama.cpp's server as a wheel: slots, continuous batching, tool calls of the model's own
    llama-cpp-python  compiled on the spot: one request at a time

Both serve the same requests with the same words of refusal. A prompt that does not fit the context is refused and
never cut; so is `max_tokens` that does not fit beside it. The context is never shifted.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from engines.llm import conversation
from engines.llm.backend import DEFAULT_SLOTS, Backend, check_fit, model_path, read_options
from engines.runtime import gguf
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
from protocol.work import LlmParams

XLLAMACPP, LLAMA_CPP_PYTHON = "xllamacpp", "llama-cpp-python"


class LlmEngine(Engine):
    """Chat and plain completion."""

    name: ClassVar[str] = "llm"
    kinds: ClassVar[tuple[str, ...]] = ("llm",)
    backends: ClassVar[tuple[str, ...]] = (XLLAMACPP, LLAMA_CPP_PYTHON)

    def __init__(self) -> None:
        self._backend: Backend | None = None

    @classmethod
    def probe(cls, backend: str) -> Claims:
        """What the chosen binding claims. Raises ImportError."""
        if (backend or XLLAMACPP) == XLLAMACPP:
            from engines.runtime import xllama

            return Claims(versions={XLLAMACPP: xllama.version()}, devices=xllama.claimed_devices())
        import llama_cpp

        devices = ("cpu", "cuda") if llama_cpp.llama_supports_gpu_offload() else ("cpu",)
        return Claims(versions={LLAMA_CPP_PYTHON: llama_cpp.__version__}, devices=devices)

    @classmethod
    def fixture(cls, backend: str) -> Fixture:
        """The shipped 400 KB chat model."""
        from engines.llm.fixture_cases import fixture

        return fixture(backend)

    def load(self, model: Model, scratch: Path, progress: LoadProgress) -> Ready:
        """Check the file's header, then load it. Raises FaultError, ImportError."""
        backend = model.backend or XLLAMACPP
        if backend not in self.backends:
            sentence = f"backend: {backend!r} is not one of {', '.join(self.backends)}."
            raise refuse("load_failed", sentence, "backend")
        path = model_path(model, main_file(model))
        header = gguf.read_header(path)
        options = read_options(model, header, slots=DEFAULT_SLOTS if backend == XLLAMACPP else 1)
        progress(0, 1, "load")
        if backend == XLLAMACPP:
            from engines.llm.xllamacpp_backend import XllamacppBackend

            self._backend = XllamacppBackend(model, path, header, options, scratch)
        else:
            from engines.llm.llamacpp_backend import LlamaCppPythonBackend

            self._backend = LlamaCppPythonBackend(model, path, header, options, scratch)
        progress(1, 1, "load")
        return self._backend.ready

    def validate(self, kind: str, params: LlmParams) -> None:
        """Refuse what the model cannot serve. Raises FaultError naming the field."""
        conversation.check(params)
        backend = self._loaded()
        backend.check(params)
        check_fit(backend.count(params), params, backend.n_ctx)

    def run(self, job: Job) -> Outcome:
        """Generate one answer; chunks as they come. Raises CancelledRun, FaultError."""
        backend = self._loaded()
        answer = backend.answer(job.params, job)
        usage = backend.run(job.params, job, answer)
        return Outcome(body=answer.result(), usage=usage)

    def _loaded(self) -> Backend:
        if self._backend is None:
            raise refuse("engine_failed", "No model is loaded.")
        return self._backend


ENGINE = LlmEngine
