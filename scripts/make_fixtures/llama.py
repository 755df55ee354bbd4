"""Random-weight llama models in GGUF, and broken ones, without torch.

The tokenizer is the trained fixture's: bytes, three chat tokens, and one NORMAL token U+2581. Without that token
llama.cpp spells each space as three byte tokens; a trained model then answers 10 of 78 questions instead of 76.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np

VOCABULARY = 264  # <unk> <s> </s>, 256 bytes, user, assistant, end, the space, one unused
BOS, EOS, UNK, END = 1, 2, 0, 261
WIDTH, HEADS, LAYERS, HIDDEN, CONTEXT = 64, 2, 2, 192, 512  # multiples of 32, as q8_0 blocks need
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}<|assistant|>{% else %}<|user|>{% endif %}"
    "{{ m['content'] }}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7}  # llama.cpp's general.file_type

Weights = dict[str, Any]


def random_weights(seed: int = 0) -> Weights:
    """Tensor name -> float32 array."""
    random = np.random.default_rng(seed)

    def some(*shape: int) -> Any:
        return (random.standard_normal(shape) * 0.05).astype(np.float32)

    weights: Weights = {"token_embd.weight": some(VOCABULARY, WIDTH) * 20}
    for layer in range(LAYERS):
        block = f"blk.{layer}."
        weights[block + "attn_norm.weight"] = np.ones(WIDTH, np.float32)
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            weights[f"{block}{name}.weight"] = some(WIDTH, WIDTH)
        weights[block + "ffn_norm.weight"] = np.ones(WIDTH, np.float32)
        weights[block + "ffn_gate.weight"] = some(HIDDEN, WIDTH)
        weights[block + "ffn_up.weight"] = some(HIDDEN, WIDTH)
        weights[block + "ffn_down.weight"] = some(WIDTH, HIDDEN)
    weights["output_norm.weight"] = np.ones(WIDTH, np.float32)
    weights["output.weight"] = some(VOCABULARY, WIDTH)
    return weights


def write_llama(path: Path, weights: Weights | None = None, *, file_type: str = "q8_0", heads: int = HEADS) -> None:
    """Write a model; without `weights`, the random ones."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_name("random-fixture")
    writer.add_license("cc0-1.0")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(HIDDEN)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(WIDTH // heads)
    writer.add_rope_freq_base(10_000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(FILE_TYPES[file_type])
    _tokenizer(writer)
    for name, values in (weights or random_weights()).items():
        _tensor(writer, name, values, file_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tokenizer(writer: gguf.GGUFWriter) -> None:
    kind = gguf.TokenType
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["<|user|>", "<|assistant|>", "<|end|>", "\u2581", "<|pad2|>"]
    kinds = [
        kind.UNKNOWN,
        kind.CONTROL,
        kind.CONTROL,
        *[kind.BYTE] * 256,
        *[kind.CONTROL] * 3,
        kind.NORMAL,
        kind.UNUSED,
    ]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types([int(one) for one in kinds])
    writer.add_bos_token_id(BOS)
    writer.add_eos_token_id(EOS)
    writer.add_eot_token_id(END)
    writer.add_unk_token_id(UNK)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(TEMPLATE)


def _tensor(writer: gguf.GGUFWriter, name: str, values: Any, file_type: str) -> None:
    values = np.ascontiguousarray(values, np.float32)
    if values.ndim == 1 or file_type == "f32":
        writer.add_tensor(name, values)
    elif file_type == "f16":
        writer.add_tensor(name, values.astype(np.float16))
    else:
        kind = gguf.GGMLQuantizationType.Q8_0
        writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)


def write_broken(folder: Path) -> None:
    """Files that a loader must refuse (or, for nan.gguf, must survive): names say what is wrong."""
    folder.mkdir(parents=True, exist_ok=True)
    good = folder / "good.gguf"
    write_llama(good, file_type="f16")
    data = good.read_bytes()
    good.unlink()
    huge = struct.pack("<Q", 2**60)
    files = {
        "empty": b"",
        "zeros": bytes(5000),
        "magic": b"GGML" + data[4:],
        "version99": data[:4] + struct.pack("<I", 99) + data[8:],
        "tensor_count_huge": data[:8] + huge + data[16:],
        "key_count_huge": data[:16] + huge + data[24:],
        "cut_in_header": data[:100],
        "cut_in_keys": data[:4000],
        "cut_in_data": data[:-50_000],
    }
    for name, content in files.items():
        (folder / f"{name}.gguf").write_bytes(content)
    weights = random_weights()
    write_llama(folder / "short_vocabulary.gguf", {**weights, "token_embd.weight": weights["token_embd.weight"][:200]})
    write_llama(folder / "heads_mismatch.gguf", weights, heads=3)
    spoilt = {name: values * np.nan if "attn_q" in name else values for name, values in weights.items()}
    write_llama(folder / "nan.gguf", spoilt, file_type="f16")  # q8_0 has no NaN
    del weights["blk.1.ffn_up.weight"]
    write_llama(folder / "missing_tensor.gguf", weights)
