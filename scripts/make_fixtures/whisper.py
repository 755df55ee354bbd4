"""A random-weight Whisper for CTranslate2, and the trained fixture's tokenizer, without torch.

Byte vocabulary: 256 bytes, eight special tokens, 1501 timestamps. The three merges exist because faster-whisper by
default suppresses the first token of " -", " '" and " ♪": in a plain byte vocabulary that would be the space itself.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from ctranslate2.specs import whisper_spec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

SPECIAL = [
    "<|endoftext|>",
    "<|startoftranscript|>",
    "<|translate|>",
    "<|transcribe|>",
    "<|startoflm|>",
    "<|startofprev|>",
    "<|nospeech|>",
    "<|notimestamps|>",
]
END = 256
MELS, POSITIONS, TOKENS = 80, 1500, 448  # faster-whisper always pads to 3000 frames, which need 1500 positions
WIDTH, HIDDEN, HEADS = 32, 64, 2
FEATURES = {"feature_size": MELS, "sampling_rate": 16_000, "hop_length": 160, "chunk_length": 30, "n_fft": 400}


def vocabulary() -> tuple[list[str], list[tuple[str, str]]]:
    """(byte tokens in order of their ids, merges)."""
    letters = _byte_letters()
    tokens = [letters[byte] for byte in range(256)]
    space = letters[ord(" ")]
    merges = [(space, "-"), (space, "'"), (space, letters[0xE2])]
    for number, (first, second) in zip((255, 254, 253), merges, strict=True):  # ids that no UTF-8 text uses
        tokens[number] = first + second
    return tokens, merges


def tokenizer() -> Tokenizer:
    """What tokenizer.json holds."""
    tokens, merges = vocabulary()
    found = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=merges))
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found.decoder = decoders.ByteLevel()
    found.add_special_tokens(SPECIAL)
    return found


def write_random_whisper(folder: Path, seed: int = 0) -> None:
    """Write a model that loads, runs and says nothing of meaning; int8."""
    tokens, _ = vocabulary()
    spec = whisper_spec.WhisperSpec(1, HEADS, 1, HEADS)
    _fill(spec, np.random.default_rng(seed), len(tokens) + len(SPECIAL) + POSITIONS + 1)
    stamps = [f"<|{number * 0.02:.2f}|>" for number in range(POSITIONS + 1)]
    spec.register_vocabulary([*tokens, *SPECIAL, *stamps])
    spec.config.suppress_ids = []
    spec.config.suppress_ids_begin = [END]
    spec.config.lang_ids = []
    spec.config.alignment_heads = [(0, 0)]
    spec.validate()
    spec.optimize(quantization="int8")
    folder.mkdir(parents=True, exist_ok=True)
    spec.save(str(folder))
    tokenizer().save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "preprocessor_config.json").write_text(json.dumps(FEATURES))


def _fill(spec: Any, random: np.random.Generator, tokens: int) -> None:
    def some(*shape: int) -> Any:
        return (random.standard_normal(shape) * 0.1).astype(np.float32)

    def linear(layer: Any, outputs: int, inputs: int) -> None:
        layer.weight, layer.bias = some(outputs, inputs), np.zeros(outputs, np.float32)

    def norm(layer: Any) -> None:
        layer.gamma, layer.beta = np.ones(WIDTH, np.float32), np.zeros(WIDTH, np.float32)

    def attention(layer: Any, *, cross: bool = False) -> None:
        norm(layer.layer_norm)
        for part, outputs in zip(layer.linear, (WIDTH, 2 * WIDTH, WIDTH) if cross else (3 * WIDTH, WIDTH), strict=True):
            linear(part, outputs, WIDTH)

    def feed_forward(layer: Any) -> None:
        norm(layer.layer_norm)
        linear(layer.linear_0, HIDDEN, WIDTH)
        linear(layer.linear_1, WIDTH, HIDDEN)

    encoder, decoder = spec.encoder, spec.decoder
    encoder.conv1.weight, encoder.conv1.bias = some(WIDTH, MELS, 3), np.zeros(WIDTH, np.float32)
    encoder.conv2.weight, encoder.conv2.bias = some(WIDTH, WIDTH, 3), np.zeros(WIDTH, np.float32)
    encoder.position_encodings.encodings = some(POSITIONS, WIDTH)
    decoder.embeddings.weight = some(tokens, WIDTH)
    decoder.position_encodings.encodings = some(TOKENS, WIDTH)
    decoder.projection.weight = some(tokens, WIDTH)
    for side in (encoder, decoder):
        norm(side.layer_norm)
        for layer in side.layer:
            attention(layer.self_attention)
            if side is decoder:
                attention(layer.attention, cross=True)
            feed_forward(layer.ffn)


def _byte_letters() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letters = {byte: chr(byte) for byte in plain}
    for byte in range(256):
        if byte not in letters:
            letters[byte] = chr(256 + len(letters) - len(plain))
    return letters
