"""Framing: any split of the stream gives the same frames, and hostile bytes can make us refuse, not grow."""

from __future__ import annotations

import itertools
import struct
import tracemalloc

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol.framing import (
    MAX_BLOB_BYTES_TOTAL,
    MAX_BLOBS,
    MAX_HEADER_BYTES,
    MAX_JSON_LINE_BYTES,
    Frame,
    FrameDecoder,
    FramingError,
    encode_frame,
)

_BLOBS = st.lists(st.binary(max_size=40), max_size=MAX_BLOBS)


def _binary(blobs, extra=None):
    header = msgspec.msgpack.encode({"t": "x", "blobs": [len(blob) for blob in blobs], "extra": extra})
    return b"".join(encode_frame(header, blobs)), Frame(header, tuple(blobs))


@st.composite
def _frame(draw):
    """(bytes on the wire, the frame that they are)."""
    if draw(st.booleans()):
        line = b"{" + draw(st.binary(max_size=40)).replace(b"\n", b" ")
        return line + b"\n", Frame(line, json=True)
    return _binary(draw(_BLOBS), draw(st.text(max_size=20)))


def _fed(stream, cuts):
    """Everything that a decoder makes of a stream cut in these places: frames, then the error if there is one."""
    decoder, seen = FrameDecoder(), []
    edges = [0, *sorted(cuts), len(stream)]
    try:
        for left, right in itertools.pairwise(edges):
            decoder.feed(stream[left:right])
            seen.extend(decoder)
    except FramingError:
        seen.append(FramingError)
    return seen, decoder


@given(st.lists(_frame(), max_size=5), st.data())
def test_any_split_gives_the_same_frames(frames, data):
    stream = b"".join(wire for wire, _ in frames)
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=10))
    seen, decoder = _fed(stream, cuts)
    assert seen == [frame for _, frame in frames]
    assert decoder.pending_bytes == 0


@given(st.lists(_frame(), max_size=3), _frame(), st.data())
def test_a_stream_cut_short_is_told_by_what_is_pending(frames, last, data):
    kept = data.draw(st.integers(1, len(last[0]) - 1))
    stream = b"".join(wire for wire, _ in frames) + last[0][:kept]
    seen, decoder = _fed(stream, data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    assert seen == [frame for _, frame in frames]
    assert decoder.pending_bytes > 0


@given(st.binary(max_size=200), st.data())
def test_hostile_bytes_raise_framing_errors_only_however_they_are_split(stream, data):
    whole, _ = _fed(stream, [])
    cuts = data.draw(st.lists(st.integers(0, len(stream)), max_size=10))
    split, decoder = _fed(stream, cuts)
    assert split == whole
    assert decoder.pending_bytes <= len(stream)


@given(st.binary(max_size=100), st.data())
def test_hostile_headers_raise_framing_errors_only(header, data):
    stream = struct.pack(">I", len(header)) + header
    seen, _ = _fed(stream, data.draw(st.lists(st.integers(0, len(stream)), max_size=5)))
    assert seen in ([], [FramingError]) or isinstance(seen[0], Frame)


@given(_frame(), st.binary(min_size=1, max_size=20))
def test_frames_before_the_break_are_delivered_and_the_break_is_for_good(frame, tail):
    stream = frame[0] + b"\xff" + tail
    decoder = FrameDecoder()
    decoder.feed(stream)
    frames = iter(decoder)
    assert next(frames) == frame[1]
    with pytest.raises(FramingError):
        next(frames)
    with pytest.raises(FramingError):
        decoder.feed(frame[0])
    with pytest.raises(FramingError):
        next(iter(decoder))


def _header(header):
    return struct.pack(">I", len(header)) + header


_NESTED = b"\x82\xa5blobs\x90\xa1x" + b"\x91" * 100_000
_TOO_BIG = [
    pytest.param(struct.pack(">I", MAX_HEADER_BYTES + 1), id="header"),
    pytest.param(b"{" + b"x" * MAX_JSON_LINE_BYTES, id="json line"),
    pytest.param(_header(msgspec.msgpack.encode({"blobs": [1] * (MAX_BLOBS + 1)})), id="count of blobs"),
    pytest.param(_header(msgspec.msgpack.encode({"blobs": [MAX_BLOB_BYTES_TOTAL, 1]})), id="blob bytes"),
    pytest.param(_header(msgspec.msgpack.encode({"blobs": [-1]})), id="negative size"),
    pytest.param(_header(msgspec.msgpack.encode({"blobs": [2**64 - 1]})), id="huge size"),
    pytest.param(_header(b"\x81\xa5blobs\xdd\xff\xff\xff\xff"), id="list of four billion"),
    pytest.param(_header(msgspec.msgpack.encode([1])), id="not a map"),
    pytest.param(_header(_NESTED), id="nested without end"),
    pytest.param(_header(b"\x81\xa1\xff\xa1\xff"), id="not unicode"),
    pytest.param(b"\x00\x00\x00\x00", id="empty header"),
]


@pytest.mark.parametrize("stream", _TOO_BIG)
def test_limits_are_checked_before_anything_is_allocated(stream):
    decoder = FrameDecoder()
    tracemalloc.start()
    try:
        decoder.feed(stream)
        before = tracemalloc.get_traced_memory()[0]
        tracemalloc.reset_peak()
        try:
            frames = list(decoder)
        except FramingError:
            frames = None
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert frames is None or stream is not None
    assert peak - before < 2 * len(stream) + 2**20
    if frames is not None:  # text that is not Unicode is the header's own affair
        assert frames[0].header == stream[4:]


def test_the_largest_things_allowed_pass():
    line = b"{" + b"x" * (MAX_JSON_LINE_BYTES - 1)
    assert _fed(line + b"\n", [])[0] == [Frame(line, json=True)]
    header = msgspec.msgpack.encode({"x": b"y" * (MAX_HEADER_BYTES - 9)})
    header = header[: len(header)]
    assert len(header) <= MAX_HEADER_BYTES
    assert _fed(b"".join(encode_frame(header)), [5])[0] == [Frame(header)]
    wire, frame = _binary([b"z" * MAX_BLOB_BYTES_TOTAL])
    assert _fed(wire, [])[0] == [frame]


@given(_BLOBS)
def test_a_header_must_announce_the_blobs_that_follow(blobs):
    header = msgspec.msgpack.encode({"blobs": [len(blob) for blob in blobs]})
    with pytest.raises(FramingError):
        encode_frame(header, [*blobs, b"more"])


def test_our_own_frames_are_judged_too():
    with pytest.raises(FramingError):
        encode_frame(bytes(MAX_HEADER_BYTES + 1))
    with pytest.raises(FramingError):
        encode_frame(b"\xc1")
