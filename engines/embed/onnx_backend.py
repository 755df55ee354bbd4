"""Sentence-transformers models in their ONNX layout, on onnxruntime.

config.json  tokenizer.json  onnx/model.onnx (or model.onnx)  1_Pooling/config.json (optional)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.embed.backend import Options, check_vocabulary, read_options
from engines.embed.vectors import batches, pool, result
from engines.runtime import ort
from engines.runtime.contract import Job, Model, Outcome, Ready
from protocol.faults import refuse

if TYPE_CHECKING:
    from numpy.typing import NDArray

_GRAPHS = ("onnx/model.onnx", "model.onnx")
_BATCH_TOKENS = 16_384  # bounds the activations of one call
_UNLIMITED = 10**9  # tokenizer_config.json writes 1e30 where there is no limit


class OnnxBackend:
    """One graph and its tokenizer."""

    def __init__(self, model: Model, folder: Path, scratch: Path) -> None:
        """Load. Raises FaultError, ImportError."""
        import tokenizers

        self.options: Options = read_options(model)
        if not folder.is_dir():
            sentence = f"{folder} is not a folder with tokenizer.json and onnx/model.onnx."
            hint = 'A GGUF file needs backend = "gguf".'
            raise refuse("load_failed", sentence, "files.model", hint=hint)
        self._tokenizer = self._load_tokenizer(folder / "tokenizer.json")
        config = _json(folder / "config.json")
        self._session = ort.open_session(_graph(folder), model.device, threads=self.options.threads)
        self._output, self._pooled = _choose_output(self._session)
        self._pad = int(config.get("pad_token_id") or 0)
        self._n_vocab = int(config.get("vocab_size") or self._tokenizer.get_vocab_size())
        self._pooling = self.options.pooling or _pooling(folder)
        self.max_tokens = self.options.max_tokens or _max_tokens(folder, config)
        self._terminators: dict[Job, ort.Terminator] = {}
        self.dimensions = int(self._embed([[self._pad]], None).shape[1])
        self.ready = Ready(
            device=self._session.device,
            compute_type=self._session.outputs[self._output].dtype,
            versions={"onnxruntime": ort.version(), "tokenizers": tokenizers.__version__},
            limits={"dimensions": self.dimensions, "n_ctx": self.max_tokens},
        )

    def _load_tokenizer(self, path: Path) -> Any:
        import tokenizers

        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            text = " ".join(str(error).split())[:200]
            raise refuse("load_failed", f"{path} is not a usable tokenizer: {text}.", "files.model") from None
        # Files are saved with truncation on: a long text would be cut without a word.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        return tokenizer

    def lengths(self, items: Sequence[Any]) -> list[int]:
        """Tokens of each text or token list. Raises FaultError for a token that the model does not have."""
        return [len(tokens) for tokens in self._tokens(items)]

    def _tokens(self, items: Sequence[Any]) -> list[list[int]]:
        check_vocabulary(items, self._n_vocab)
        if isinstance(items[0], list):
            return list(items)
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(items))]

    def run(self, job: Job) -> Outcome:
        """Embed in batches; a cancel is seen between two nodes of the graph."""
        import numpy as np

        tokens = self._tokens(job.params.input)
        lengths = [len(row) for row in tokens]
        rows = np.empty((len(tokens), self.dimensions), np.float32)
        terminator = self._terminators[job] = ort.Terminator()
        done = 0
        try:
            for batch in batches(lengths, rows=self.options.batch_size, tokens=_BATCH_TOKENS):
                job.check_cancelled()
                rows[batch] = self._embed([tokens[index] for index in batch], terminator)
                done += len(batch)
                job.progress(done, len(tokens), "embed")
        finally:
            del self._terminators[job]
        usage = {"prompt_tokens": float(sum(lengths))}
        return Outcome(body=result(rows, job.params.dimensions), usage=usage)

    def cancel(self, job: Job) -> None:
        """Stop the graph that runs for this job."""
        if terminator := self._terminators.get(job):
            terminator.terminate()

    def _embed(self, tokens: list[list[int]], terminator: ort.Terminator | None) -> NDArray[Any]:
        """Vectors of one batch, not normalised: (texts, dimensions)."""
        import numpy as np

        width = max(map(len, tokens))
        ids = np.full((len(tokens), width), self._pad, np.int64)
        mask = np.zeros_like(ids)
        for row, line in enumerate(tokens):
            ids[row, : len(line)] = line
            mask[row, : len(line)] = 1
        inputs = {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}
        inputs["position_ids"] = np.tile(np.arange(width, dtype=np.int64), (len(tokens), 1))
        feeds = {name: inputs[name].astype(port.dtype) for name, port in self._session.inputs.items() if name in inputs}
        (states,) = self._session.run([self._output], feeds, terminator)
        return states if self._pooled else pool(states, mask, self._pooling)


def _graph(folder: Path) -> Path:
    for name in _GRAPHS:
        if (folder / name).is_file():
            return folder / name
    raise refuse("load_failed", f"{folder} holds neither {' nor '.join(_GRAPHS)}.", "files.model")


def _json(path: Path) -> dict[str, Any]:
    """A JSON object of the layout; {} when the file is not there. Raises FaultError when it is broken."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise refuse("load_failed", f"{path} cannot be read: {error}.", "files.model") from None
    return found if isinstance(found, dict) else {}


def _choose_output(session: ort.Session) -> tuple[str, bool]:
    """Name of the output to use, and whether it is pooled already. Raises FaultError for a graph of another kind."""
    missing = {"input_ids"} - session.inputs.keys()
    unknown = session.inputs.keys() - {"input_ids", "attention_mask", "token_type_ids", "position_ids"}
    if missing or unknown:
        names = ", ".join(session.inputs)
        sentence = f"{session.path} takes the inputs {names}: it is no text embedding model."
        raise refuse("load_failed", sentence, "files.model")
    if "sentence_embedding" in session.outputs:
        return "sentence_embedding", True
    for port in session.outputs.values():
        if len(port.shape) == 3:
            return port.name, False
    raise refuse("load_failed", f"{session.path} has no output with one vector per token.", "files.model")


def _pooling(folder: Path) -> str:
    config = _json(folder / "1_Pooling" / "config.json")
    for key, name in (
        ("pooling_mode_mean_tokens", "mean"),
        ("pooling_mode_cls_token", "cls"),
        ("pooling_mode_lasttoken", "last"),
    ):
        if config.get(key):
            return name
    if any(value is True for key, value in config.items() if key.startswith("pooling_mode_")):
        raise refuse("load_failed", "1_Pooling/config.json asks for a pooling that is not supported.", "files.model")
    return "mean"


def _max_tokens(folder: Path, config: dict[str, Any]) -> int:
    """The smallest limit that the files state."""
    stated = (
        config.get("max_position_embeddings"),
        _json(folder / "tokenizer_config.json").get("model_max_length"),
        _json(folder / "sentence_bert_config.json").get("max_seq_length"),
    )
    limits = [int(value) for value in stated if isinstance(value, int | float) and 0 < value < _UNLIMITED]
    return min(limits, default=512)
