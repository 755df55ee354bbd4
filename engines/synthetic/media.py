"""Files from the standard library alone: WAV tones, PNG pictures, MP4 films whose frames are PNG pictures.

MP4 may carry PNG frames (object type 0x6D of the MP4 registration authority), so a film needs no codec; FFmpeg
reads it, browsers do not. WebM has no such codec, so the synthetic engine refuses it.
"""

from __future__ import annotations

import io
import math
import struct
import wave
import zlib
from array import array
from collections.abc import Sequence

SAMPLE_RATE = 16_000
_TIMESCALE = 600  # divides by every usual frame rate; others are exact through the frame duration below


def tone_wav(notes_hz: Sequence[float], note_s: float) -> bytes:
    """Mono 16-bit WAV of one tone after the other, each `note_s` long."""
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes(tone_pcm(notes_hz, note_s))
    return out.getvalue()


def tone_pcm(notes_hz: Sequence[float], note_s: float) -> bytes:
    """The samples of `tone_wav`, s16le."""
    samples = array("h")
    count = max(1, round(note_s * SAMPLE_RATE))
    for hertz in notes_hz:
        step = 2 * math.pi * hertz / SAMPLE_RATE
        samples.extend(int(12_000 * math.sin(step * index)) for index in range(count))
    return samples.tobytes()


def wav_seconds(data: bytes) -> float:
    """Length of a WAV file. Raises wave.Error or EOFError when it is none."""
    with wave.open(io.BytesIO(data)) as file:
        return float(file.getnframes() / file.getframerate())


def png(width: int, height: int, colour: bytes, other: bytes) -> bytes:
    """A picture in 8-bit RGB: a centred rectangle of `colour` (3 bytes) on a ground of `other`."""
    left, right = width // 4, width - width // 4
    top, bottom = height // 4, height - height // 4
    ground = b"\0" + other * width
    crossed = b"\0" + other * left + colour * (right - left) + other * (width - right)
    rows = b"".join(crossed if top <= row < bottom else ground for row in range(height))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = _png_chunk(b"IHDR", header) + _png_chunk(b"IDAT", zlib.compress(rows, 6)) + _png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def _png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def mp4(frames: Sequence[bytes], width: int, height: int, fps: int) -> bytes:
    """An MP4 film (ISO/IEC 14496-12, -14) whose samples are the given PNG files."""
    media = b"".join(frames)
    ftyp = _box(b"ftyp", b"isom" + _u32(512) + b"isomiso2mp41")
    # moov comes first, and its own size decides where the samples begin: build it twice.
    offset = len(ftyp) + len(_moov(frames, width, height, fps, 0)) + 8
    return ftyp + _moov(frames, width, height, fps, offset) + _box(b"mdat", media)


def _u32(*values: int) -> bytes:
    return struct.pack(f">{len(values)}I", *values)


def _u16(*values: int) -> bytes:
    return struct.pack(f">{len(values)}H", *values)


def _box(name: bytes, *parts: bytes) -> bytes:
    body = b"".join(parts)
    return _u32(8 + len(body)) + name + body


def _full(name: bytes, flags: int, *parts: bytes) -> bytes:
    """A box with version 0 and flags."""
    return _box(name, _u32(flags), *parts)


_MATRIX = _u32(0x10000, 0, 0, 0, 0x10000, 0, 0, 0, 0x40000000)


def _moov(frames: Sequence[bytes], width: int, height: int, fps: int, offset: int) -> bytes:
    scale = fps * _TIMESCALE
    length = len(frames) * _TIMESCALE
    mvhd = _full(b"mvhd", 0, _u32(0, 0, scale, length, 0x10000), _u16(0x100, 0), bytes(8), _MATRIX, bytes(24), _u32(2))
    tkhd = _full(
        b"tkhd", 3, _u32(0, 0, 1, 0, length), bytes(8), _u16(0, 0, 0, 0), _MATRIX, _u32(width << 16, height << 16)
    )
    mdhd = _full(b"mdhd", 0, _u32(0, 0, scale, length), _u16(0x55C4, 0))
    hdlr = _full(b"hdlr", 0, _u32(0), b"vide", bytes(12), b"video\0")
    dinf = _box(b"dinf", _full(b"dref", 0, _u32(1), _full(b"url ", 1)))
    minf = _box(b"minf", _full(b"vmhd", 1, bytes(8)), dinf, _stbl(frames, width, height, offset))
    return _box(b"moov", mvhd, _box(b"trak", tkhd, _box(b"mdia", mdhd, hdlr, minf)))


def _stbl(frames: Sequence[bytes], width: int, height: int, offset: int) -> bytes:
    entry = _box(
        b"mp4v",
        bytes(6),
        _u16(1),
        bytes(16),
        _u16(width, height),
        _u32(0x480000, 0x480000, 0),
        _u16(1),
        bytes(32),
        _u16(24, 0xFFFF),
        _esds(),
    )
    return _box(
        b"stbl",
        _full(b"stsd", 0, _u32(1), entry),
        _full(b"stts", 0, _u32(1, len(frames), _TIMESCALE)),
        _full(b"stsc", 0, _u32(1, 1, len(frames), 1)),
        _full(b"stsz", 0, _u32(0, len(frames)), _u32(*map(len, frames))),
        _full(b"stco", 0, _u32(1, offset)),
    )


def _esds() -> bytes:
    """Elementary stream descriptor with object type 0x6D, PNG, in a visual stream."""
    config = bytes([0x04, 13, 0x6D, 0x11]) + bytes(11)
    stream = bytes([0x03, 3 + len(config) + 3]) + _u16(1) + b"\0" + config + bytes([0x06, 1, 2])
    return _full(b"esds", 0, stream)
