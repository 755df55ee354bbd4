"""tiny-embed-onnx: a BERT-style sentence embedder without training.

Each word piece has a random vector; a sentence is the mean of its pieces, so that shared words make sentences near.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from make_fixtures.graphs import FLOAT, INT64, Graph, port

DIMENSIONS = 64
TOKENS = 128  # longest input; the tokenizer cuts, the engine refuses before that
WORDS = (
    "the of to and in is you that it he was for on are as with his they at be this have from or one had by word but "
    "not what all were we when your can said there use cat dog sat mat ran fast slow sun moon red blue green car train "
    "gpu model worker job queue engine crash restart audio image video speech text token memory disk network"
)


def write_embedder(folder: Path) -> None:
    """Write the model folder in the layout of sentence-transformers' ONNX exports."""
    vocabulary = _vocabulary()
    folder.mkdir(parents=True, exist_ok=True)
    _tokenizer(vocabulary).save(str(folder / "tokenizer.json"), pretty=False)
    table = np.random.default_rng(0).standard_normal((len(vocabulary), DIMENSIONS)).astype(np.float32)
    table[:4] *= 0.01  # [PAD] [UNK] [CLS] [SEP] say nothing
    graph = Graph()
    graph.constant("E16", table, np.float16)
    graph.op("Cast", ["E16"], "E", to=FLOAT)
    graph.op("Gather", ["E", "input_ids"], "a")
    graph.op("Tanh", ["a"], "last_hidden_state")
    names = ("input_ids", "attention_mask", "token_type_ids")
    graph.save(
        folder / "onnx" / "model.onnx",
        [port(name, INT64, ["batch", "seq"]) for name in names],
        [port("last_hidden_state", FLOAT, ["batch", "seq", DIMENSIONS])],
    )
    names_of = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    files = {
        "config.json": {
            "model_type": "bert",
            "hidden_size": DIMENSIONS,
            "max_position_embeddings": TOKENS,
            "pad_token_id": 0,
        },
        "special_tokens_map.json": names_of,
        "tokenizer_config.json": {"model_max_length": TOKENS, "pad_token": "[PAD]"},
    }
    for name, value in files.items():
        (folder / name).write_text(json.dumps(value))


def _vocabulary() -> dict[str, int]:
    printable = [chr(code) for code in range(33, 127) if not chr(code).isupper()]
    continued = ["##" + letter for letter in "abcdefghijklmnopqrstuvwxyz0123456789"]
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *printable, *continued, *WORDS.split()]
    return {token: number for number, token in enumerate(tokens)}


def _tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])]
    )
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding()
    return tokenizer
