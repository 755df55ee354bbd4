"""What a file really is, by its first bytes, and files that come inside JSON as data URLs."""

from __future__ import annotations

import base64
import binascii
import re

from protocol.faults import refuse
from protocol.work import MAX_INPUT_BYTES

HEAD_BYTES = 64
UNKNOWN = "application/octet-stream"
START_IMAGES = frozenset({"image/png", "image/jpeg", "image/webp"})
OTHER_INPUT_BYTES = 100 * 2**20  # inputs of kinds that protocol/work.py does not know

_EXACT = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"fLaC", "audio/flac"),
    (b"OggS", "audio/ogg"),
    (b"ID3", "audio/mpeg"),
    (b"\x1a\x45\xdf\xa3", "video/webm"),
)
_MIME = re.compile(r"[a-z0-9][a-z0-9.+-]{0,60}/[a-z0-9][a-z0-9.+-]{0,60}(; ?[a-z0-9-]{1,40}=[A-Za-z0-9._-]{1,40})?\Z")
_TIMED = frozenset({"audio", "video"})
_MEDIA = frozenset({"audio", "video", "image"})
_INERT = frozenset(
    {"text/plain", "text/csv", "text/markdown", "application/json", "application/jsonl", "application/zip"}
)
_DATA_URL = re.compile(r"data:(?P<mime>[\w.+-]+/[\w.+-]+)?(?:;[\w-]+=[\w.+-]+)*;base64,", re.ASCII)


def sniff(head: bytes) -> str:
    """Return the MIME type that the first `HEAD_BYTES` of a file show, or `UNKNOWN`."""
    for magic, mime in _EXACT:
        if head.startswith(magic):
            return mime
    if head[:4] == b"RIFF" and head[8:12] == b"WAVE":
        return "audio/wav"
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "image/webp"
    if head[4:8] == b"ftyp":
        return "audio/mp4" if head[8:11] == b"M4A" else "video/mp4"
    # MPEG audio frame sync: eleven ones, then a layer that exists.
    if len(head) > 1 and head[0] == 0xFF and head[1] & 0xE0 == 0xE0 and head[1] & 0x06:
        return "audio/mpeg"
    return UNKNOWN


def output_type(declared: str, head: bytes) -> str:
    """What an output may be called: a worker's word is kept only where nothing could come of it.

    Content that shows its type has that type, unless both are audio or film, whose containers are the same. What a
    browser would run or lay out (HTML, SVG, XML, PDF, scripts) has none.

    Args:
        declared: by the worker; any text.
        head: the first `HEAD_BYTES` of the file.
    """
    found, major = sniff(head), declared.partition("/")[0]
    if found != UNKNOWN and major != found.partition("/")[0] and not {major, found.partition("/")[0]} <= _TIMED:
        return found
    plain = declared.partition(";")[0]
    inert = plain in _INERT or (major in _MEDIA and "+" not in plain)
    return declared if inert and _MIME.match(declared) else UNKNOWN


def check_input(name: str, mime: str, field: str) -> None:
    """Refuse a start image that is no image. Audio is left to the engine, whose decoder knows best.

    Raises:
        FaultError: unsupported_media_type.
    """
    if name == "mask" and mime != "image/png":
        raise refuse("unsupported_media_type", f"{field}: Expected a PNG image with transparent places.", field)
    if name == "image" and mime not in START_IMAGES:
        found = "its content is of an unknown type" if mime == UNKNOWN else f"its content is {mime}"
        raise refuse("unsupported_media_type", f"{field}: Expected a PNG, JPEG or WebP image, but {found}.", field)


def input_limit(name: str) -> int:
    """Largest size in bytes of the input called `name`."""
    return MAX_INPUT_BYTES.get(name, OTHER_INPUT_BYTES)


def decode_data(text: object, field: str, limit: int) -> bytes:
    """Decode a base64 data URL, or bare base64.

    Raises:
        FaultError: invalid_parameter, payload_too_large; both name `field`.
    """
    if not isinstance(text, str) or text.startswith(("http:", "https:")):
        raise refuse("invalid_parameter", f"{field}: Expected a base64 data URL; links are not followed.", field)
    match = _DATA_URL.match(text)
    if match is None and text.startswith("data:"):
        raise refuse("invalid_parameter", f"{field}: Expected a data URL of the form data:TYPE;base64,…", field)
    start = match.end() if match else 0
    if (len(text) - start) * 3 // 4 > limit + 2:
        raise refuse("payload_too_large", f"{field}: The file exceeds {limit} bytes.", field)
    try:
        data = base64.b64decode(text[start:], validate=True)
    except (binascii.Error, ValueError):
        raise refuse("invalid_parameter", f"{field}: The data is not base64.", field) from None
    if not data:
        raise refuse("invalid_parameter", f"{field}: The file is empty.", field)
    return data
