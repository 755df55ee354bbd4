"""What studio workers deliver, as results of ours."""

from __future__ import annotations

import io
import struct
import wave
from typing import Any

import msgspec
import pytest
from PIL import Image

from coordinator.studio.results import from_file, from_json, picture_size, wav_facts
from protocol.faults import FaultError
from protocol.work import AudioResult, ImageResult, LlmResult, SttResult, VideoResult, parse_params


def picture(form: str, **options: Any) -> bytes:
    """A picture of 40 x 24 as a library writes it."""
    target = io.BytesIO()
    Image.new("RGB", (40, 24), "red").save(target, form, **options)
    return target.getvalue()


def read(data: bytes, type_: Any) -> Any:
    return msgspec.msgpack.decode(data, type=type_)


@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True, "exif": b"Exif\0\0" + bytes(5000)}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"exif": b"Exif\0\0" + bytes(50)}),
    ],
)
def test_the_size_of_a_picture_is_read_from_it(form: str, options: dict[str, Any]) -> None:
    data = picture(form, **options)
    assert picture_size(data[: 64 * 1024]) == (40, 24)
    for length in range(min(len(data), 200)):
        assert picture_size(data[:length]) in (None, (40, 24))


def test_sizes_that_cannot_be_are_none() -> None:
    head = bytearray(picture("PNG"))
    head[16:24] = struct.pack(">II", 2**31, 5)
    assert picture_size(bytes(head)) is None


def test_the_facts_of_a_wav_are_bounded_by_its_size() -> None:
    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setnchannels(2)
        file.setsampwidth(2)
        file.setframerate(16000)
        file.writeframes(bytes(64000))
    data = target.getvalue()
    assert wav_facts(data, len(data)) == (16000, 1.0)
    piped = bytearray(data)
    piped[40:44] = b"\xff\xff\xff\xff"
    assert wav_facts(bytes(piped), len(data)) == (16000, 1.0)
    for length in range(60):
        wav_facts(data[:length], length)


@pytest.mark.parametrize(
    ("kind", "wanted", "data", "type_"),
    [
        ("image", "webp", picture("WEBP"), ImageResult),
        ("image", "jpeg", picture("JPEG"), ImageResult),
        ("audio_tts", "mp3", b"ID3" + bytes(50), AudioResult),
        ("audio_tts", "pcm", bytes(50), AudioResult),
        ("video", "webm", b"\x1a\x45\xdf\xa3" + bytes(50), VideoResult),
    ],
)
def test_files_of_the_format_that_was_asked_for(kind: str, wanted: str, data: bytes, type_: Any) -> None:
    params = parse_params(kind, {"text" if kind == "audio_tts" else "prompt": "p", "format": wanted})
    complete = from_file(kind, params, data, len(data), "0" * 64)
    result = read(complete.inline or b"", type_)
    assert result.format == wanted
    assert complete.files[0].name.endswith(f".{wanted}")
    assert complete.files[0].size == len(data)
    with pytest.raises(FaultError, match="image"):
        from_file(kind, params, b"" if wanted == "pcm" else b"<html>", 0 if wanted == "pcm" else 6, "0" * 64)


def test_a_transcript_with_segments_and_without() -> None:
    said = {"text": "a b", "language": "en", "duration": 2, "segments": [{"start": 0, "end": 1, "text": "a"}]}
    result = read(from_json("audio_stt", raw(said), "translate").inline or b"", SttResult)
    assert (result.text, result.task, result.duration, len(result.segments)) == ("a b", "translate", 2.0, 1)
    for segments in ([], None, "odd", [{"start": -1}]):
        result = read(from_json("audio_stt", raw({**said, "segments": segments})).inline or b"", SttResult)
        assert [(one.start, one.end, one.text) for one in result.segments] == [(0.0, 2.0, "a b")]
    assert from_json("audio_stt", raw(said)).usage == {"audio_seconds": 2.0}


def test_a_chat_keeps_what_there_is() -> None:
    message = {"role": "assistant", "content": None, "reasoning_content": "r", "tool_calls": [{"id": "x"}]}
    said = {"choices": [{"message": message, "finish_reason": None}], "elapsed_ms": -1}
    complete = from_json("llm", raw(said))
    result = read(complete.inline or b"", LlmResult)
    assert (result.content, result.reasoning_content, result.finish_reason) == (None, "r", "stop")
    assert (result.tool_calls, complete.usage) == ([{"id": "x"}], {})


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("llm", {}),
        ("llm", {"choices": [{}]}),
        ("llm", {"choices": [{"message": {}}] * 17}),
        ("audio_stt", {"language": "en"}),
        ("audio_stt", {"text": "x", "duration": -1}),
        ("audio_stt", {"text": "x", "duration": 1e300}),
        ("image", {"text": "x"}),
    ],
)
def test_other_shapes_are_refused(kind: str, said: Any) -> None:
    with pytest.raises(FaultError) as refused:
        from_json(kind, raw(said))
    assert refused.value.fault.code == "engine_protocol"


def raw(value: Any) -> msgspec.Raw:
    return msgspec.Raw(msgspec.json.encode(value))
