from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engines.runtime import gguf
from protocol.faults import FaultError

MODEL = Path(__file__).parents[3] / "engines" / "llm" / "fixture" / "chat-q8_0.gguf"


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(keys: list[bytes], tensors: list[bytes] | None = None, version: int = 3) -> bytes:
    tensors = tensors or []
    return b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(keys)) + b"".join(keys) + b"".join(tensors)


def key(name: str, kind: int, payload: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + payload


def reason(tmp_path: Path, data: bytes) -> str:
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(FaultError) as caught:
        gguf.read_header(path)
    assert (caught.value.fault.code, caught.value.fault.field) == ("load_failed", "files.model")
    return caught.value.fault.message


def test_the_fixture() -> None:
    found = gguf.read_header(MODEL)
    assert (found.architecture, found.n_ctx_train, found.tensors) == ("llama", 512, 30)
    assert found.compute_type == "q8_0"
    assert found.lengths["tokenizer.ggml.tokens"] == 264
    assert "add_generation_prompt" in found.chat_template
    # 3 layers x 3 heads x (32 + 32) elements of two bytes
    assert found.kv_bytes_per_token() == 3 * 3 * 64 * 2
    assert found.kv_bytes_per_token(1.0) == 3 * 3 * 64


def test_every_kind_of_value(tmp_path: Path) -> None:
    keys = [
        key("a", 0, b"\x07"),
        key("b", 5, struct.pack("<i", -3)),
        key("c", 7, b"\x01"),
        key("d", 8, text("words")),
        key("e", 9, struct.pack("<IQ", 4, 3) + bytes(12)),
        key("f", 9, struct.pack("<IQ", 8, 2) + text("x") + text("yy")),
        key("g", 12, struct.pack("<d", 0.5)),
    ]
    path = tmp_path / "m.gguf"
    path.write_bytes(header(keys).ljust(1024, b"\0"))
    found = gguf.read_header(path)
    assert found.metadata == {"a": 7, "b": -3, "c": True, "d": "words", "g": 0.5}
    assert found.lengths == {"e": 3, "f": 2}
    assert (found.architecture, found.n_ctx_train, found.compute_type, found.chat_template) == ("", 0, "", "")


@pytest.mark.parametrize(
    ("data", "word"),
    [
        (b"", "0 bytes"),
        (b"x" * 100, "letters GGUF"),
        (header([], version=1).ljust(64), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**60, 0), "out of range"),
        (header([key("a", 77, b"")]).ljust(64), "unknown type 77"),
        (header([key("a", 9, struct.pack("<IQ", 9, 1))]).ljust(64), "unknown type 9"),
        (header([key("a", 8, struct.pack("<Q", 2**50))]), "truncated"),
        (header([key("a", 9, struct.pack("<IQ", 8, 2**20))]), "truncated"),
        (header([text("a")]), "truncated"),
        (header([], [text("t") + struct.pack("<I", 9)]), "9 dimensions"),
        (header([], [text("t") + struct.pack("<IQIQ", 1, 1000, 0, 0)]), "its tensors need"),
        (header([key("general.alignment", 4, struct.pack("<I", 0))]).ljust(64), "alignment"),
    ],
)
def test_broken_headers(tmp_path: Path, data: bytes, word: str) -> None:
    assert word in reason(tmp_path, data)


def test_a_byte_short(tmp_path: Path) -> None:
    assert "its tensors need 418048" in reason(tmp_path, MODEL.read_bytes()[:-1])


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FaultError, match="No such file"):
        gguf.read_header(tmp_path / "none.gguf")


@settings(max_examples=200)
@given(st.binary(max_size=200), st.integers(0, 3000))
def test_any_bytes_are_read_or_refused(noise: bytes, at: int) -> None:
    """Nothing but a FaultError comes out, whatever lies in the header."""
    import tempfile

    data = bytearray(MODEL.read_bytes()[:20_000])
    data[at : at + len(noise)] = noise
    with tempfile.NamedTemporaryFile() as file:
        file.write(data)
        file.flush()
        with pytest.raises(FaultError):
            gguf.read_header(Path(file.name))


def test_sizes_agree_with_the_reference_package() -> None:
    reference = pytest.importorskip("gguf", reason="the gguf package is not installed").GGML_QUANT_SIZES
    known = {int(kind): tuple(sizes) for kind, sizes in reference.items()}
    for kind, sizes in gguf.TYPE_SIZES.items():
        assert known[kind] == sizes
