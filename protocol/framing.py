"""Frames on the engine pipe: a 4-byte big-endian length, a msgpack header, then raw blobs.

The header may announce `blobs: [n1, n2, …]`; that many raw bytes follow, in order. The header stays under
16 MiB, so byte 0 of a binary frame is always 0x00. A frame that starts with `{` is one JSON line, which lets a
person drive an engine from a shell; it carries no blobs and is answered in kind.

    length (4)   header (msgpack map)                      blobs
    00 00 00 1f  {"t": "chunk", "run": 1, "blobs": [3]}    61 62 63

Every limit is checked before anything is allocated: a hostile peer can make us refuse, not grow.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from typing import Annotated

import msgspec

MAX_HEADER_BYTES = 16 * 2**20 - 1
MAX_JSON_LINE_BYTES = 2**20
MAX_BLOBS = 16
MAX_BLOB_BYTES_TOTAL = 64 * 2**20
# Payloads up to this size travel inside the header; larger ones as blobs, tens of MB as files.
INLINE_BYTES = 64 * 2**10

# What msgspec raises for hostile bytes: besides its own errors, text that is not UTF-8 and nesting without end.
UNDECODABLE = (msgspec.MsgspecError, UnicodeDecodeError, RecursionError)

_LENGTH = struct.Struct(">I")


class FramingError(Exception):
    """The peer broke the framing; the stream cannot be trusted any more."""


class Frame(msgspec.Struct, frozen=True):
    """One complete frame.

    Attributes:
        header: the encoded header, still bytes: msgpack, or JSON when `json` is true.
        blobs: raw payloads in the order announced.
        json: whether the peer wrote a JSON line and should be answered with one.
    """

    header: bytes
    blobs: tuple[bytes, ...] = ()
    json: bool = False


class _Announced(msgspec.Struct):
    """The one header field that the framing itself must know."""

    blobs: Annotated[list[int], msgspec.Meta(max_length=MAX_BLOBS)] = []


_announced = msgspec.msgpack.Decoder(_Announced)


def encode_frame(header: bytes, blobs: Sequence[bytes | memoryview] = ()) -> list[bytes | memoryview]:
    """Return the buffers of one binary frame, ready for writev.

    Args:
        header: msgpack map; when `blobs` is not empty it must announce their sizes in its `blobs` field.
        blobs: raw payloads.

    Raises:
        FramingError: a limit is exceeded, or the header announces other sizes.
    """
    if len(header) > MAX_HEADER_BYTES:
        raise FramingError(f"header of {len(header)} bytes exceeds {MAX_HEADER_BYTES}")
    sizes = [len(blob) for blob in blobs]
    if sizes != _sizes(header):
        raise FramingError(f"header announces other blobs than the {len(sizes)} given")
    return [_LENGTH.pack(len(header)) + header, *blobs]


def _sizes(header: bytes) -> list[int]:
    """Sizes of the blobs that follow this header, checked against the limits."""
    try:
        sizes = _announced.decode(header).blobs
    except UNDECODABLE as error:
        raise FramingError(f"header is not a msgpack map with at most {MAX_BLOBS} blobs: {error}") from None
    if any(size < 0 for size in sizes) or sum(sizes) > MAX_BLOB_BYTES_TOTAL:
        raise FramingError(f"blobs of {sum(sizes)} bytes exceed {MAX_BLOB_BYTES_TOTAL}")
    return sizes


class FrameDecoder:
    """Bytes in, frames out; any split of the stream gives the same frames.

    After a `FramingError` the decoder is broken for good and raises again on every call.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._header: bytes | None = None
        self._sizes: list[int] = []
        self._blobs: list[bytes] = []
        self._broken: FramingError | None = None

    @property
    def pending_bytes(self) -> int:
        """Bytes held for a frame that is not complete; 0 means that the stream may end here."""
        held = sum(len(blob) for blob in self._blobs) + len(self._header or b"")
        return len(self._buffer) + held

    def feed(self, data: bytes | bytearray | memoryview) -> None:
        """Take bytes from the pipe; iterate over the decoder for the frames that they complete.

        Raises:
            FramingError: the stream broke earlier.
        """
        if self._broken is not None:
            raise self._broken
        self._buffer += data

    def __iter__(self) -> Iterator[Frame]:
        """Yield every complete frame.

        Raises:
            FramingError: the peer broke the framing; all frames before the break were yielded.
        """
        while (frame := self._next_or_break()) is not None:
            yield frame

    def _next_or_break(self) -> Frame | None:
        if self._broken is not None:
            raise self._broken
        try:
            return self._next()
        except FramingError as error:
            self._broken = error
            self._buffer.clear()
            raise

    def _next(self) -> Frame | None:
        if self._header is None:
            if not self._buffer:
                return None
            if self._buffer[0] == 0x7B:  # "{"
                return self._json_line()
            self._header = self._binary_header()
            if self._header is None:
                return None
            self._sizes = _sizes(self._header)
        return self._with_blobs(self._header)

    def _json_line(self) -> Frame | None:
        end = self._buffer.find(b"\n", 0, MAX_JSON_LINE_BYTES + 1)
        if end < 0:
            if len(self._buffer) > MAX_JSON_LINE_BYTES:
                raise FramingError(f"JSON line exceeds {MAX_JSON_LINE_BYTES} bytes")
            return None
        return Frame(self._take(end + 1)[:-1], json=True)

    def _binary_header(self) -> bytes | None:
        if len(self._buffer) < 4:
            if self._buffer[0] != 0:
                raise FramingError(f"a frame cannot start with byte 0x{self._buffer[0]:02x}")
            return None
        (length,) = _LENGTH.unpack_from(self._buffer)
        if length > MAX_HEADER_BYTES:
            raise FramingError(f"header of {length} bytes exceeds {MAX_HEADER_BYTES}")
        if len(self._buffer) < 4 + length:
            return None
        return self._take(4 + length)[4:]

    def _with_blobs(self, header: bytes) -> Frame | None:
        while len(self._blobs) < len(self._sizes):
            wanted = self._sizes[len(self._blobs)]
            if len(self._buffer) < wanted:
                return None
            self._blobs.append(self._take(wanted))
        frame = Frame(header, tuple(self._blobs))
        self._header, self._sizes, self._blobs = None, [], []
        return frame

    def _take(self, count: int) -> bytes:
        with memoryview(self._buffer) as view:
            taken = bytes(view[:count])
        del self._buffer[:count]
        return taken
