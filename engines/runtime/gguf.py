"""The header of a GGUF file, read without llama.cpp.

It answers before the load what is cheap to know and expensive to find out: is this file whole, how long a context
was the model trained for, how much memory does a token of context take, does it bring a chat template. llama.cpp
needs 18 s to refuse a context of 100 million tokens; this needs milliseconds.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any

import msgspec

from protocol.faults import FaultError, refuse

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_MAX_COUNT = 1_000_000  # of tensors, of metadata keys: real files stay below 100,000
_MAX_DIMS = 4
_MAX_STRING = 64 * 2**20  # bytes; chat templates have tens of KB
_DEFAULT_ALIGNMENT = 32

# Metadata value types 0-12 of the format; None marks string (8) and array (9).
_SCALARS: tuple[struct.Struct | None, ...] = tuple(
    struct.Struct("<" + code) if code else None
    for code in ("B", "b", "H", "h", "I", "i", "f", "?", "", "", "Q", "q", "d")
)
_STRING, _ARRAY = 8, 9

# ggml tensor type -> (elements in a block, bytes of a block). A type that is not here is not measured.
TYPE_SIZES: dict[int, tuple[int, int]] = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 10: (256, 84),
    11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292), 16: (256, 66), 17: (256, 74),
    18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136), 24: (1, 1), 25: (1, 2),
    26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54), 35: (256, 66), 39: (32, 17),
}  # fmt: skip

# `general.file_type` -> the name that people use.
_FILE_TYPES = {
    0: "f32", 1: "f16", 2: "q4_0", 3: "q4_1", 7: "q8_0", 8: "q5_0", 9: "q5_1", 10: "q2_k", 11: "q3_k_s", 12: "q3_k_m",
    13: "q3_k_l", 14: "q4_k_s", 15: "q4_k_m", 16: "q5_k_s", 17: "q5_k_m", 18: "q6_k", 19: "iq2_xxs", 20: "iq2_xs",
    21: "q2_k_s", 22: "iq3_xs", 23: "iq3_xxs", 24: "iq1_s", 25: "iq4_nl", 26: "iq3_s", 27: "iq3_m", 28: "iq2_s",
    29: "iq2_m", 30: "iq4_xs", 31: "iq1_m", 32: "bf16", 36: "tq1_0", 37: "tq2_0", 38: "mxfp4_moe",
}  # fmt: skip


class Header(msgspec.Struct, frozen=True, kw_only=True):
    """What the header says.

    Attributes:
        metadata: scalars and strings by key; of arrays only the length is kept, in `lengths`.
        tensors: how many there are.
        bytes: size of the file.
    """

    metadata: dict[str, Any]
    lengths: dict[str, int]
    tensors: int
    bytes: int

    @property
    def architecture(self) -> str:
        """Such as "llama" or "bert"."""
        return str(self.metadata.get("general.architecture", ""))

    def number(self, key: str) -> int:
        """An integer of this architecture (`context_length`, `block_count`, …); 0 where it is missing."""
        value = self.metadata.get(f"{self.architecture}.{key}", 0)
        return value if isinstance(value, int) else 0

    @property
    def n_ctx_train(self) -> int:
        """Tokens of context that the model was trained for; 0 when the file does not say."""
        return self.number("context_length")

    @property
    def chat_template(self) -> str:
        """The model's own chat template, or ""."""
        return str(self.metadata.get("tokenizer.chat_template", ""))

    @property
    def compute_type(self) -> str:
        """Quantisation of most tensors: "q8_0", "q4_k_m", …; "" when unknown."""
        return _FILE_TYPES.get(self.metadata.get("general.file_type", -1), "")

    def kv_bytes_per_token(self, bytes_per_element: float = 2.0) -> int:
        """Memory that one token of context takes in all layers; an upper bound for sliding-window models.

        Head counts may be per-layer arrays, of which the header keeps no values: then heads of all layers are
        assumed to be as many as the widest can have.
        """
        heads = self.number("attention.head_count") or 1
        width = self.number("embedding_length")
        key = self.number("attention.key_length") or width // heads
        value = self.number("attention.value_length") or width // heads
        kv_heads = self.number("attention.head_count_kv") or heads
        return int(self.number("block_count") * kv_heads * (key + value) * bytes_per_element)


def read_header(path: Path) -> Header:
    """Read and check the header of a GGUF file, and that no tensor lies beyond the file's end.

    Raises:
        FaultError: `load_failed` with the reason; the process is well.
    """
    try:
        with path.open("rb") as file:
            size = file.seek(0, 2)
            if size < 24:
                raise _bad(path, f"it has only {size} bytes")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(path, data, size)
    except OSError as error:
        raise refuse("load_failed", f"{path} cannot be read: {error.strerror or error}.", "files.model") from None


def _bad(path: Path, reason: str) -> FaultError:
    return refuse(
        "load_failed", f"{path.name} is not a usable GGUF file: {reason}.", "files.model", hint="Fetch the file again."
    )


class _Truncated(Exception):
    """The header goes on beyond the end of the file."""


class _Cursor:
    def __init__(self, data: mmap.mmap, size: int) -> None:
        self.data, self.size, self.at = data, size, 0

    def scalar(self, form: struct.Struct) -> Any:
        end = self.at + form.size
        if end > self.size:
            raise _Truncated
        (value,) = form.unpack_from(self.data, self.at)
        self.at = end
        return value

    def skip(self, count: int) -> None:
        self.at += count
        if self.at > self.size:
            raise _Truncated

    def text(self) -> str:
        length = self.scalar(_U64)
        if length > min(_MAX_STRING, self.size - self.at):
            raise _Truncated
        raw = self.data[self.at : self.at + length]
        self.at += length
        return raw.decode(errors="replace")


_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


def _parse(path: Path, data: mmap.mmap, size: int) -> Header:
    if data[:4] != _MAGIC:
        raise _bad(path, "it does not start with the letters GGUF")
    cursor = _Cursor(data, size)
    cursor.skip(4)
    version = cursor.scalar(_U32)
    if version not in _VERSIONS:
        raise _bad(path, f"its format version {version} is not one of {', '.join(map(str, _VERSIONS))}")
    tensors, keys = cursor.scalar(_U64), cursor.scalar(_U64)
    if max(tensors, keys) > _MAX_COUNT:
        raise _bad(path, "its counts of tensors and keys are out of range")
    try:
        metadata, lengths = _metadata(path, cursor, keys)
        end = _end_of_tensors(path, cursor, tensors, metadata)
    except _Truncated:
        raise _bad(path, "it is truncated, or its header is damaged") from None
    if end > size:
        raise _bad(path, f"it is truncated: it has {size} bytes, its tensors need {end}")
    return Header(metadata=metadata, lengths=lengths, tensors=tensors, bytes=size)


def _metadata(path: Path, cursor: _Cursor, keys: int) -> tuple[dict[str, Any], dict[str, int]]:
    metadata: dict[str, Any] = {}
    lengths: dict[str, int] = {}
    for _ in range(keys):
        key, kind = cursor.text(), cursor.scalar(_U32)
        if kind == _STRING:
            metadata[key] = cursor.text()
        elif kind == _ARRAY:
            lengths[key] = _skip_array(path, cursor)
        else:
            metadata[key] = cursor.scalar(_form(path, kind))
    return metadata, lengths


def _form(path: Path, kind: int) -> struct.Struct:
    form = _SCALARS[kind] if kind < len(_SCALARS) else None
    if form is None:
        raise _bad(path, f"its metadata holds a value of the unknown type {kind}")
    return form


def _skip_array(path: Path, cursor: _Cursor) -> int:
    kind, length = cursor.scalar(_U32), cursor.scalar(_U64)
    if length > cursor.size:
        raise _Truncated
    if kind != _STRING:
        cursor.skip(length * _form(path, kind).size)
        return int(length)
    # Vocabularies: some 100,000 strings, so this loop is kept bare.
    data, size, at, unpack = cursor.data, cursor.size, cursor.at, _U64.unpack_from
    for _ in range(length):
        if at + 8 > size:
            raise _Truncated
        at += 8 + unpack(data, at)[0]
    cursor.at = 0
    cursor.skip(at)
    return int(length)


def _end_of_tensors(path: Path, cursor: _Cursor, tensors: int, metadata: dict[str, Any]) -> int:
    """Where the last tensor ends, in bytes from the start of the file."""
    furthest = 0
    for _ in range(tensors):
        cursor.text()
        dims = cursor.scalar(_U32)
        if dims > _MAX_DIMS:
            raise _bad(path, f"a tensor claims {dims} dimensions")
        elements = math.prod(cursor.scalar(_U64) for _ in range(dims))
        kind, offset = cursor.scalar(_U32), cursor.scalar(_U64)
        block, bytes_ = TYPE_SIZES.get(kind, (1, 0))
        furthest = max(furthest, offset + elements // block * bytes_)
    alignment = metadata.get("general.alignment", _DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
        raise _bad(path, "its alignment is out of range")
    return -(-cursor.at // alignment) * alignment + furthest
