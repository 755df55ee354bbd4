"""Types by content, and files inside JSON."""

from __future__ import annotations

import base64

import pytest

from coordinator.media import UNKNOWN, check_input, decode_data, input_limit, output_type, sniff
from protocol.faults import FaultError
from protocol.work import MAX_AUDIO_BYTES, MAX_IMAGE_BYTES


@pytest.mark.parametrize(
    ("head", "mime"),
    [
        (b"\x89PNG\r\n\x1a\n....", "image/png"),
        (b"\xff\xd8\xff\xe0", "image/jpeg"),
        (b"RIFF....WEBPVP8 ", "image/webp"),
        (b"GIF89a", "image/gif"),
        (b"RIFF....WAVEfmt ", "audio/wav"),
        (b"fLaC", "audio/flac"),
        (b"OggS", "audio/ogg"),
        (b"ID3\x04", "audio/mpeg"),
        (b"\xff\xfb\x90", "audio/mpeg"),
        (b"\x00\x00\x00\x20ftypM4A ", "audio/mp4"),
        (b"\x00\x00\x00\x20ftypisom", "video/mp4"),
        (b"\x1a\x45\xdf\xa3", "video/webm"),
        (b"", UNKNOWN),
        (b"\xff", UNKNOWN),
        (b"hello", UNKNOWN),
    ],
)
def test_types_by_content(head: bytes, mime: str) -> None:
    assert sniff(head) == mime


def test_a_start_image_must_be_an_image_and_audio_is_the_engines_affair() -> None:
    check_input("image", "image/webp", "input_reference")
    check_input("audio", UNKNOWN, "file")
    for mime in ("image/gif", "audio/wav", UNKNOWN):
        with pytest.raises(FaultError) as caught:
            check_input("image", mime, "input_reference")
        assert caught.value.fault.http_status == 415
        assert caught.value.fault.field == "input_reference"


def test_limits() -> None:
    assert (input_limit("audio"), input_limit("image")) == (MAX_AUDIO_BYTES, MAX_IMAGE_BYTES)


@pytest.mark.parametrize(
    "text",
    [
        "data:image/png;base64,aGVsbG8=",
        "data:;base64,aGVsbG8=",
        "data:text/plain;charset=utf-8;base64,aGVsbG8=",
        "aGVsbG8=",
    ],
)
def test_data_urls(text: str) -> None:
    assert decode_data(text, "inputs.x", 5) == b"hello"


@pytest.mark.parametrize(
    ("text", "code"),
    [
        (None, "invalid_parameter"),
        (5, "invalid_parameter"),
        ("http://example.org/x", "invalid_parameter"),
        ("data:text/plain,hello", "invalid_parameter"),
        ("data:image/png;base64,", "invalid_parameter"),
        ("not base64!", "invalid_parameter"),
        ("aGVsbG8", "invalid_parameter"),
        ("é", "invalid_parameter"),
        (base64.b64encode(bytes(100)).decode(), "payload_too_large"),
    ],
)
def test_refusals_name_the_field(text: object, code: str) -> None:
    with pytest.raises(FaultError) as caught:
        decode_data(text, "inputs.x", 50)
    assert (caught.value.fault.code, caught.value.fault.field) == (code, "inputs.x")


@pytest.mark.parametrize(
    ("declared", "head", "told"),
    [
        ("image/png", b"\x89PNG\r\n\x1a\n", "image/png"),
        ("text/html", b"\x89PNG\r\n\x1a\n<script>", "image/png"),
        ("text/html", b"<!doctype html>", UNKNOWN),
        ("image/svg+xml", b"<svg onload=x>", UNKNOWN),
        ("application/xhtml+xml", b"<?xml", UNKNOWN),
        ("application/pdf", b"%PDF-1.7", UNKNOWN),
        ("text/javascript", b"alert(1)", UNKNOWN),
        ("text/plain; charset=utf-8", b"words", "text/plain; charset=utf-8"),
        ("text/plain", b"GIF89a/*", "image/gif"),
        ("application/json", b"{}", "application/json"),
        ("audio/mp4", b"\0\0\0\x18ftypisom", "audio/mp4"),
        ("audio/pcm", b"\0\0", "audio/pcm"),
        ("image/png", b"no magic here", "image/png"),
        ("image/png\r\nx-evil: 1", b"", UNKNOWN),
        ("text/plain; charset=x\r\n", b"", UNKNOWN),
        ("IMAGE/PNG", b"", UNKNOWN),
        ("", b"", UNKNOWN),
        ("x" * 400, b"", UNKNOWN),
    ],
)
def test_a_workers_word_for_a_type_counts_where_nothing_comes_of_it(declared: str, head: bytes, told: str) -> None:
    assert output_type(declared, head) == told
