"""GGUF embedding models on llama.cpp, through xllamacpp.

Facts that shape it (xllamacpp 2026.10, measured): with several slots and a split context memory, texts of different
length in one batch get wrong vectors (mean pooling sees part of the tokens; components off by 0.18): the memory is
unified. With one slot a batch equals its singles bit for bit; with several, quantised models differ in the third
digit, so one is the default. A text must fit one physical batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from msgspec import Meta

from engines.embed.backend import Options, check_vocabulary, read_options
from engines.embed.vectors import batches, result
from engines.runtime import gguf, xllama
from engines.runtime.contract import Job, Model, Outcome, Ready, option, refuse

DEFAULT_TOKENS = 2048  # longest text when the model takes more: the compute buffers grow with it
_CALL_TOKENS = 4096  # of one call, which cannot be cancelled
_POOLINGS = {1: "mean", 2: "cls", 3: "last"}  # values of `ARCHITECTURE.pooling_type`


class GgufBackend:
    """One `xllamacpp.Server` in embedding mode."""

    def __init__(self, model: Model, path: Path, scratch: Path) -> None:
        """Load. Raises FaultError, ImportError."""
        self.options: Options = read_options(model, ("n_gpu_layers", "slots"))
        header = gguf.read_header(path)
        trained = header.n_ctx_train or DEFAULT_TOKENS
        self.max_tokens = self.options.max_tokens or min(trained, DEFAULT_TOKENS)
        if self.max_tokens > trained:
            sentence = f"options.max_tokens: {self.max_tokens} exceed the {trained} that this model was trained for."
            raise refuse("load_failed", sentence, "options.max_tokens")
        slots = option(model, "slots", Annotated[int, Meta(ge=1, le=64)], 1)
        self._n_vocab = header.lengths.get("tokenizer.ggml.tokens", 0)
        self._server = xllama.LlamaServer(self._parameters(model, path, header, slots), scratch, model.device)
        self.dimensions = len(self._vectors([[0]])[0][0])
        self.ready = Ready(
            device=self._server.offload.device,
            slots=slots,
            compute_type=header.compute_type,
            versions={"xllamacpp": xllama.version()},
            vram_bytes=self._server.vram_bytes,
            limits={"dimensions": self.dimensions, "n_ctx": self.max_tokens},
        )

    def _parameters(self, model: Model, path: Path, header: gguf.Header, slots: int) -> Any:
        import xllamacpp  # type: ignore[import-untyped]

        params = xllama.parameters(self.options.threads)
        params.model.path = str(path)
        params.embedding = True
        params.n_ctx = self.max_tokens * slots
        params.n_parallel = slots
        params.kv_unified = True
        params.cache_prompt = False
        params.n_batch = params.n_ubatch = self.max_tokens
        params.n_gpu_layers = option(model, "n_gpu_layers", Annotated[int, Meta(ge=-1, le=10_000)], -1)
        pooling = self.options.pooling or _POOLINGS.get(header.number("pooling_type"), "mean")
        params.pooling_type = getattr(xllamacpp.llama_pooling_type, f"LLAMA_POOLING_TYPE_{pooling.upper()}")
        return params

    def lengths(self, items: Sequence[Any]) -> list[int]:
        """Tokens of each text or token list, exact where it matters.

        A text in ASCII has no more tokens than characters and special tokens: one that is short enough is not asked
        about, because each question is a request over the socket.
        """
        check_vocabulary(items, self._n_vocab)
        return [self._length(item) for item in items]

    def _length(self, item: str | list[int]) -> int:
        if isinstance(item, list):
            return len(item)
        if item.isascii() and len(item) + 4 <= self.max_tokens:
            return len(item)
        return len(self._server.tokenize(item))

    def run(self, job: Job) -> Outcome:
        """Embed in batches; a cancel is seen between them."""
        import numpy as np

        items = job.params.input
        rows = np.empty((len(items), self.dimensions), np.float32)
        sizes = [len(item) for item in items]
        used = done = 0
        for batch in batches(sizes, rows=self.options.batch_size, tokens=_CALL_TOKENS):
            job.check_cancelled()
            vectors, tokens = self._vectors([items[index] for index in batch])
            rows[batch] = vectors
            used, done = used + tokens, done + len(batch)
            job.progress(done, len(items), "embed")
        return Outcome(body=result(rows, job.params.dimensions), usage={"prompt_tokens": float(used)})

    def cancel(self, job: Job) -> None:
        """Nothing to wake: calls are short, `run` looks between them."""

    def _vectors(self, items: list[Any]) -> tuple[list[list[float]], int]:
        answer = self._server.embeddings({"input": items})
        rows: list[list[float]] = [[]] * len(items)
        for entry in answer["data"]:
            rows[entry["index"]] = entry["embedding"]
        return rows, int(answer["usage"]["prompt_tokens"])
