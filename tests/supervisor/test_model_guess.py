"""Which engine fits, told from real fixtures and from headers made here."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import pytest

from supervisor.machine.weights import folder_files
from supervisor.model_guess import Guess, guess, read_gguf, shards

ENGINES = Path(__file__).parents[2] / "engines"


def gguf(**keys: Any) -> bytes:
    """A GGUF header without tensors."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    body = b"GGUF" + struct.pack("<IQQ", 3, 0, len(keys))
    for key, value in keys.items():
        body += text(key.replace("__", "."))
        if isinstance(value, str):
            body += struct.pack("<I", 8) + text(value)
        elif isinstance(value, list):
            body += struct.pack("<IIQ", 9, 8, len(value)) + b"".join(text(item) for item in value)
        else:
            body += struct.pack("<II", 4, value)
    return body


def judged(folder: Path) -> Guess:
    return guess(folder, sorted(folder_files(folder)))


@pytest.mark.parametrize(
    ("fixture", "engine", "backend"),
    [
        ("whisper/fixture/whisper-tiny-test", "whisper", ""),
        ("image/fixture/tiny-sd-onnx", "image", ""),
        ("embed/fixture/tiny-embed-onnx", "embed", "onnx"),
    ],
)
def test_the_shipped_folders_are_recognised(fixture: str, engine: str, backend: str):
    found = judged(ENGINES / fixture)
    assert (found.engine, found.backend, found.main) == (engine, backend, "")


def test_the_shipped_files_are_recognised():
    chat = guess(ENGINES / "llm/fixture", ["chat-q8_0.gguf"])
    assert (chat.engine, chat.main) == ("llm", "chat-q8_0.gguf")
    voice = guess(ENGINES / "piper/fixture", ["tone-text.onnx", "tone-text.onnx.json"])
    assert (voice.engine, voice.main, voice.files) == ("piper", "tone-text.onnx", {"config": "tone-text.onnx.json"})


@pytest.mark.parametrize(
    ("keys", "engine", "backend"),
    [
        ({"general__architecture": "llama"}, "llm", ""),
        ({"general__architecture": "bert"}, "embed", "gguf"),
        ({"general__architecture": "qwen3", "qwen3__pooling_type": 3}, "embed", "gguf"),
        ({"general__architecture": "qwen3", "qwen3__pooling_type": 0}, "llm", ""),
        ({"general__architecture": "bert", "bert__pooling_type": 4}, "", ""),
        ({"tokenizer__list": ["a", "b"] * 100, "general__architecture": "bert"}, "embed", "gguf"),
        ({"general__architecture": "clip"}, "", ""),
        ({}, "llm", ""),
    ],
)
def test_a_gguf_tells_by_its_header(tmp_path: Path, keys: dict[str, Any], engine: str, backend: str):
    (tmp_path / "m.bin").write_bytes(gguf(**keys))
    found = judged(tmp_path)
    assert (found.engine, found.backend) == (engine, backend)
    assert found.why


def test_a_split_gguf_is_one_model_with_parts(tmp_path: Path):
    names = shards("m-00001-of-00003.gguf")
    for name in names:
        (tmp_path / name).write_bytes(gguf(general__architecture="llama"))
    found = judged(tmp_path)
    assert found.main == names[0]
    assert found.files == {"part2": names[1], "part3": names[2]}


def test_a_projector_goes_with_its_model(tmp_path: Path):
    (tmp_path / "a-mmproj.gguf").write_bytes(gguf(general__architecture="clip"))
    (tmp_path / "model.gguf").write_bytes(gguf(general__architecture="llama"))
    found = judged(tmp_path)
    assert (found.engine, found.main, found.files) == ("llm", "model.gguf", {"mmproj": "a-mmproj.gguf"})


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["model.safetensors", "config.json"], "PyTorch"),
        (["net.onnx"], "without a tokenizer.json"),
        (["data.csv"], "no known layout"),
    ],
)
def test_what_nothing_fits_says_why(tmp_path: Path, names: list[str], said: str):
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    found = judged(tmp_path)
    assert found.engine == ""
    assert said in found.why


@pytest.mark.parametrize(
    "data",
    [
        b"GGUF",
        b"GGUF" + struct.pack("<IQQ", 3, 0, 2**60),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**62),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<I", 99),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 8, 2**61),
        b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 1) + b"k" + struct.pack("<IIQ", 9, 9, 1),
        b"GGUF" + struct.pack("<IQQ", 1, 0, 1),
        b"\xff" * 64,
        b"",
    ],
)
def test_hostile_headers_tell_nothing_and_cost_nothing(tmp_path: Path, data: bytes):
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    assert read_gguf(path) == {}


def test_a_truncated_header_tells_what_it_still_holds(tmp_path: Path):
    whole = gguf(general__architecture="bert", general__name="x" * 100)
    path = tmp_path / "m.gguf"
    path.write_bytes(whole[:-50])
    assert read_gguf(path) == {"general.architecture": "bert"}


def test_shards_of_an_unsplit_file_are_the_file():
    assert shards("a/b.gguf") == ["a/b.gguf"]
    assert shards("q/b-00002-of-00002.gguf") == ["q/b-00001-of-00002.gguf", "q/b-00002-of-00002.gguf"]
