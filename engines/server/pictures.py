"""What a picture or a sound file is, told by its own bytes; servers name formats wrongly."""

from __future__ import annotations

import io
import struct
import wave
from typing import NamedTuple


class Picture(NamedTuple):
    """Format ("png", "jpeg", "webp") and size in pixels."""

    format: str
    width: int
    height: int


def picture(data: bytes) -> Picture | None:
    """Look at a picture's header; None when it is none of the three formats."""
    try:
        if data.startswith(b"\x89PNG\r\n\x1a\n") and data[12:16] == b"IHDR":
            return Picture("png", *struct.unpack_from(">II", data, 16))
        if data.startswith(b"\xff\xd8\xff"):
            return _jpeg(data)
        if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
            return _webp(data)
    except (struct.error, IndexError):
        return None
    return None


# Start-of-frame markers: C0 to CF without DHT (C4), JPG (C8) and DAC (CC).
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}


def _jpeg(data: bytes) -> Picture | None:
    at = 2
    while at + 9 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, at + 5)
            return Picture("jpeg", width, height)
        at += 2 + struct.unpack_from(">H", data, at + 2)[0]
    return None


def _webp(data: bytes) -> Picture | None:
    kind = data[12:16]
    if kind == b"VP8X":
        return Picture("webp", 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little"))
    if kind == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return Picture("webp", 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF))
    if kind == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return Picture("webp", width & 0x3FFF, height & 0x3FFF)
    return None


_SOUNDS = {
    "wav": (b"RIFF",),
    "flac": (b"fLaC",),
    "ogg": (b"OggS",),
    "opus": (b"OggS",),
    "mp3": (b"ID3", b"\xff\xfb", b"\xff\xf3", b"\xff\xf2"),
}


def is_sound(data: bytes, format: str) -> bool:
    """Whether the bytes are of this format; raw samples ("pcm") can be anything."""
    return format == "pcm" or data.startswith(_SOUNDS[format])


def sound_length(data: bytes, format: str, pcm_rate: int) -> tuple[int, float]:
    """Sample rate in Hz and length in s; 0 and 0.0 where only a decoder could tell (ogg, opus, mp3)."""
    if format == "pcm":
        return pcm_rate, len(data) / 2 / pcm_rate
    if format == "wav":
        try:
            with wave.open(io.BytesIO(data)) as file:
                # A server that streams does not know the length and writes the largest: count what came.
                frames = min(file.getnframes(), len(data) // (file.getnchannels() * file.getsampwidth()))
                return file.getframerate(), frames / file.getframerate()
        except (wave.Error, EOFError, ZeroDivisionError):
            return 0, 0.0
    if format == "flac" and len(data) >= 26:
        packed = int.from_bytes(data[18:26], "big")
        rate, samples = packed >> 44, packed & (1 << 36) - 1
        return rate, samples / rate if rate else 0.0
    return 0, 0.0
