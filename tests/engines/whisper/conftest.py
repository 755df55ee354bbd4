"""WAV files good and bad, and a Whisper model that knows languages."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

FIXTURE = Path(__file__).parents[3] / "engines" / "whisper" / "fixture"
MODEL = FIXTURE / "whisper-tiny-test"

_LANGUAGES = ("en", "de", "fr")


def wav(data: bytes = bytes(32_000), *, rate: int = 16_000, channels: int = 1, bits: int = 16, code: int = 1) -> bytes:
    """A WAV file with a header that may lie; `code` 3 means float samples."""
    frame = channels * bits // 8
    form = struct.pack("<HHIIHH", code, channels, rate, rate * frame & 0xFFFFFFFF, frame & 0xFFFF, bits)
    head = b"RIFF" + struct.pack("<I", 36 + len(data)) + b"WAVEfmt " + struct.pack("<I", 16) + form
    return head + b"data" + struct.pack("<I", len(data)) + data


def write_multilingual(folder: Path) -> Path:
    """A Whisper model with random weights, language tokens and a tokenizer; 1 layer, 16 wide."""
    from ctranslate2.specs import whisper_spec

    spec = whisper_spec.WhisperSpec(1, 2, 1, 2)
    bare = json.loads((MODEL / "vocabulary.json").read_text())
    first = bare.index("<|endoftext|>")
    # An empty token before the end of text is what CTranslate2 knows multilingual models by.
    words = [*bare[:first], "", *bare[first : first + 2], *(f"<|{name}|>" for name in _LANGUAGES), *bare[first + 2 :]]
    first += 3
    _fill(spec, len(words))
    spec.register_vocabulary(words)
    spec.config.suppress_ids, spec.config.suppress_ids_begin = [], [first - 2]
    spec.config.lang_ids, spec.config.alignment_heads = list(range(first, first + len(_LANGUAGES))), [(0, 0)]
    spec.validate()
    spec.optimize(quantization="int8")
    folder.mkdir()
    spec.save(str(folder))
    shutil.copy(MODEL / "preprocessor_config.json", folder)
    tokenizer = json.loads((MODEL / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"][""] = words.index("")
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    known = [(number, word) for number, word in enumerate(words) if word.startswith("<|") and word[2].isalpha()]
    tokenizer["added_tokens"] = [{"id": number, "content": word, **special} for number, word in known]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    return folder


def _fill(spec: Any, words: int, wide: int = 16, inner: int = 32) -> None:
    import numpy as np

    random = np.random.default_rng(0)

    def some(*shape: int) -> Any:
        return (random.standard_normal(shape) * 0.1).astype(np.float32)

    def linear(layer: Any, rows: int, columns: int) -> None:
        layer.weight, layer.bias = some(rows, columns), np.zeros(rows, np.float32)

    def norm(layer: Any) -> None:
        layer.gamma, layer.beta = np.ones(wide, np.float32), np.zeros(wide, np.float32)

    def attention(layer: Any, cross: bool = False) -> None:
        norm(layer.layer_norm)
        for part, rows in zip(layer.linear, (wide, 2 * wide, wide) if cross else (3 * wide, wide), strict=True):
            linear(part, rows, wide)

    def feed(layer: Any) -> None:
        norm(layer.layer_norm)
        linear(layer.linear_0, inner, wide)
        linear(layer.linear_1, wide, inner)

    encoder, decoder = spec.encoder, spec.decoder
    encoder.conv1.weight, encoder.conv1.bias = some(wide, 80, 3), np.zeros(wide, np.float32)
    encoder.conv2.weight, encoder.conv2.bias = some(wide, wide, 3), np.zeros(wide, np.float32)
    encoder.position_encodings.encodings = some(1500, wide)
    decoder.embeddings.weight = some(words, wide)
    decoder.projection.weight = some(words, wide)
    decoder.position_encodings.encodings = some(448, wide)
    for part in (encoder, decoder):
        norm(part.layer_norm)
        for layer in part.layer:
            attention(layer.self_attention)
            feed(layer.ffn)
    for layer in decoder.layer:
        attention(layer.attention, cross=True)


@pytest.fixture(scope="session")
def multilingual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_multilingual(tmp_path_factory.mktemp("whisper") / "multilingual")
