"""Formats and sizes told by bytes, checked against files of real encoders."""

from __future__ import annotations

import io
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engines.server.pictures import is_sound, picture, sound_length
from engines.synthetic.media import tone_pcm, tone_wav


@pytest.mark.engine
@pytest.mark.parametrize(
    ("format", "options"),
    [("png", {}), ("jpeg", {}), ("jpeg", {"progressive": True}), ("webp", {}), ("webp", {"lossless": True})],
)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_real_files(format, options, mode):
    image = pytest.importorskip("PIL.Image")
    out = io.BytesIO()
    image.new(mode, (37, 21)).save(out, format, **options)
    assert picture(out.getvalue()) == (format, 37, 21)


@pytest.mark.engine
def test_a_webp_with_alpha_has_an_extended_header():
    image = pytest.importorskip("PIL.Image")
    out = io.BytesIO()
    image.new("RGBA", (300, 5), (1, 2, 3, 4)).save(out, "webp", exif=b"Exif\0\0x")
    assert b"VP8X" in out.getvalue()[:16]
    assert picture(out.getvalue()) == ("webp", 300, 5)


@given(st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBPVP8 ", b"GIF89a"]), st.binary())
def test_hostile_bytes_are_just_no_picture(head, tail):
    found = picture(head + tail)
    assert found is None or found.format in ("png", "jpeg", "webp")


def test_lengths_of_sounds():
    assert sound_length(tone_wav([1.0], 0.25), "wav", 0) == (16_000, 0.25)
    assert sound_length(tone_pcm([1.0], 0.5), "pcm", 16_000) == (16_000, 0.5)
    flac = b"fLaC" + bytes(14) + ((44_100 << 44) | 88_200).to_bytes(8, "big")
    assert sound_length(flac, "flac", 0) == (44_100, 2.0)
    assert sound_length(b"ID3", "mp3", 0) == (0, 0.0)
    assert sound_length(b"RIFFxxxx", "wav", 0) == (0, 0.0)


def test_a_streamed_wav_of_unknown_length_is_measured_by_what_came():
    data = bytearray(tone_wav([1.0], 0.25))
    struct.pack_into("<I", data, 40, 0x7FFFFFFE)
    rate, seconds = sound_length(bytes(data), "wav", 0)
    assert rate == 16_000
    assert seconds == pytest.approx(0.25, abs=0.01)


@pytest.mark.parametrize(("data", "format"), [(b"fLaC", "flac"), (b"OggS", "opus"), (b"\xff\xfb", "mp3"), (b"", "pcm")])
def test_what_is_a_sound(data, format):
    assert is_sound(data, format)
    assert not is_sound(b"<html>", "wav")
