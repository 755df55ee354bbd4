"""Which engine fits a model, read off its files. Opens headers, runs nothing.

GGUF magic                                       llm; embed (backend gguf) when it is made for embeddings
folder with model.bin and a vocabulary           whisper (CTranslate2)
X.onnx with X.onnx.json                          piper
folder with model_index.json                     image (diffusers layout)
folder with tokenizer.json and an .onnx          embed (backend onnx)
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

# Architectures of llama.cpp that only embed; others embed when their header has a pooling type.
EMBEDDING_ARCHITECTURES = frozenset(
    "bert nomic-bert nomic-bert-moe jina-bert-v2 jina-bert-v3 modern-bert neo-bert eurobert gemma-embedding"
    " t5encoder".split()
)
_POOLING_RANK = 4  # a reranker
_SHARD = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")
MAX_GGUF_ITEMS = 1_000_000  # more keys or array items than any real header has
MAX_GGUF_STRING = 16 * 2**20
_PRUNED = "an ONNX file without a tokenizer.json and without a .onnx.json"


class Guess(msgspec.Struct, frozen=True, kw_only=True):
    """What a pulled model is.

    Attributes:
        engine: "" when the files do not tell.
        main: relative name of the file to load; "" means the folder as a whole.
        files: further roles -> relative names.
        why: what told it, or why nothing did, for people.
    """

    engine: str = ""
    backend: str = ""
    main: str = ""
    files: dict[str, str] = {}
    why: str = ""


class NotGguf(ValueError):
    """The file is no GGUF, or its header is broken."""


def guess(folder: Path, names: Sequence[str]) -> Guess:
    """Judge a folder by the relative names in it. Never raises for strange content: the guess is empty then."""
    ggufs = sorted(name for name in names if _is_gguf(folder / name))
    if ggufs:
        return _gguf(folder, ggufs)
    base = {Path(name).name for name in names}
    if "model_index.json" in names:
        return Guess(engine="image", why="it has a model_index.json (diffusers layout)")
    if "model.bin" in names and base & {"vocabulary.json", "vocabulary.txt"}:
        return Guess(engine="whisper", why="it has a model.bin with a vocabulary (CTranslate2)")
    onnx = sorted(name for name in names if name.endswith(".onnx"))
    voices = [name for name in onnx if f"{name}.json" in names]
    if len(voices) == 1:
        files = {"config": f"{voices[0]}.json"}
        return Guess(engine="piper", main=voices[0], files=files, why="it is an ONNX voice with its .onnx.json")
    if onnx and "tokenizer.json" in names:
        return Guess(engine="embed", backend="onnx", why="it has a tokenizer.json and an ONNX graph")
    if onnx:
        return Guess(main=onnx[0] if len(onnx) == 1 else "", why=f"it is {_PRUNED}")
    if any(name.endswith((".safetensors", ".pt", ".pth", ".bin")) for name in names):
        return Guess(why="it is a PyTorch model; the engines here take GGUF, CTranslate2 or ONNX conversions")
    return Guess(main=names[0] if len(names) == 1 else "", why="its files are of no known layout")


def _gguf(folder: Path, names: Sequence[str]) -> Guess:
    projectors = [name for name in names if _architecture(folder / name) == "clip"]
    mains = [name for name in names if name not in projectors]
    if not mains:
        return Guess(why="it is a projector (mmproj) of a vision model, which is no model by itself")
    main = mains[0]
    files = {f"part{number}": name for number, name in enumerate(mains[1:], start=2)} if _SHARD.match(main) else {}
    if projectors:
        files["mmproj"] = projectors[0]
    header = read_gguf(folder / main)
    architecture = str(header.get("general.architecture", ""))
    pooling = header.get(f"{architecture}.pooling_type", 0)
    if pooling == _POOLING_RANK:
        return Guess(main=main, files=files, why=f"it is a GGUF reranker ({architecture})")
    if architecture in EMBEDDING_ARCHITECTURES or pooling:
        return Guess(engine="embed", backend="gguf", main=main, files=files, why=f"it is a GGUF of {architecture}")
    return Guess(engine="llm", main=main, files=files, why=f"it is a GGUF of {architecture or 'an unnamed kind'}")


def _is_gguf(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def _architecture(path: Path) -> str:
    return str(read_gguf(path).get("general.architecture", ""))


def shards(name: str) -> list[str]:
    """All names of a split GGUF, of which `name` is one; just `name` when it is not split."""
    found = _SHARD.match(Path(name).name)
    if found is None:
        return [name]
    parent = name[: len(name) - len(Path(name).name)]
    count = int(found["count"])
    return [f"{parent}{found['stem']}-{number:05d}-of-{count:05d}.gguf" for number in range(1, count + 1)]


# ---- the GGUF header ---------------------------------------------------------------------------------------

# https://github.com/ggml-org/ggml/blob/master/docs/gguf.md: value types by number
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


def read_gguf(path: Path) -> dict[str, Any]:
    """Return the scalar keys of a GGUF header; {} when the file is none or its header is broken.

    Arrays (the vocabulary) are skipped. A hostile header costs at most `MAX_GGUF_ITEMS` steps.
    """
    try:
        with path.open("rb") as file:
            return dict(_header(file))
    except (OSError, NotGguf, struct.error, UnicodeDecodeError, OverflowError):
        return {}


def _header(file: BinaryIO) -> list[tuple[str, Any]]:
    if file.read(4) != b"GGUF":
        raise NotGguf("wrong magic")
    version, _tensors, count = struct.unpack("<IQQ", file.read(20))
    if version < 2 or count > MAX_GGUF_ITEMS:
        raise NotGguf(f"version {version} with {count} keys")
    found = []
    for _ in range(count):
        try:
            key = _string(file).decode()
            (kind,) = struct.unpack("<I", file.read(4))
            value = _value(file, kind)
        except (NotGguf, struct.error):
            break  # what was read stands: the architecture comes first
        if value is not None:
            found.append((key, value))
    return found


def _string(file: BinaryIO) -> bytes:
    (length,) = struct.unpack("<Q", file.read(8))
    if length > MAX_GGUF_STRING:
        raise NotGguf(f"a string of {length} bytes")
    data = file.read(length)
    if len(data) != length:
        raise NotGguf("truncated")
    return data


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file).decode(errors="replace")
    if kind != _ARRAY:
        return _scalar(file, kind)
    item, count = struct.unpack("<IQ", file.read(12))
    if count > MAX_GGUF_ITEMS:
        raise NotGguf(f"an array of {count} items")
    if item == _STRING:
        for _ in range(count):
            (length,) = struct.unpack("<Q", file.read(8))
            file.seek(min(length, MAX_GGUF_STRING), 1)
    elif item == _ARRAY:
        raise NotGguf("nested arrays")
    else:
        file.seek(struct.calcsize("<" + _format(item)) * count, 1)
    return None


def _scalar(file: BinaryIO, kind: int) -> Any:
    form = "<" + _format(kind)
    return struct.unpack(form, file.read(struct.calcsize(form)))[0]


def _format(kind: int) -> str:
    if kind not in _SCALARS:
        raise NotGguf(f"value type {kind}")
    return _SCALARS[kind]
