"""The engine wire: every message comes back as it was, in both encodings; hostile frames raise WireError only."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import engine_wire as wire
from protocol.faults import Fault
from protocol.framing import INLINE_BYTES, Frame, FrameDecoder, FramingError

_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | _TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3),
    max_leaves=8,
)
_RUN = st.integers(1, wire.LAST_RUN)
_FILE = st.builds(wire.OutputFile, name=_TEXT, mime=_TEXT, size=st.integers(0, 2**40), sha256=_TEXT)
_FAULT = st.builds(Fault, code=_TEXT, message=_TEXT, field=st.none() | _TEXT, retryable=st.none() | st.booleans())
_MODEL = st.builds(
    wire.Model,
    name=_TEXT,
    kinds=st.lists(_TEXT, max_size=2).map(tuple),
    options=st.dictionaries(_TEXT, _JSON, max_size=3),
)


def _messages(json):
    body = _JSON.map(lambda value: wire.pack(value, json))
    down = st.one_of(
        st.builds(wire.Load, model=_MODEL, scratch=_TEXT),
        st.builds(wire.Validate, run=_RUN, kind=_TEXT, params=body),
        st.builds(wire.Run, run=_RUN, kind=_TEXT, params=body, stream=st.booleans(), folder=_TEXT),
        st.builds(wire.Cancel, run=_RUN),
        st.just(wire.Shutdown()),
        st.builds(wire.Ping, n=st.integers(0, 2**31)),
    )
    up = st.one_of(
        st.builds(wire.Hello, engine=_TEXT, kinds=st.just(("llm",)), low=_RUN, high=_RUN, pid=_RUN),
        st.builds(wire.Ready, device=_TEXT, limits=st.dictionaries(_TEXT, _JSON, max_size=3)),
        st.builds(wire.Valid, run=_RUN),
        st.builds(wire.Started, run=_RUN),
        st.builds(wire.Progress, run=_RUN, n=_RUN, total=st.none() | _RUN, text=_TEXT),
        st.builds(wire.Chunk, run=_RUN, seq=st.integers(0, 2**31), data=body),
        st.builds(wire.Result, run=_RUN, body=body, files=st.lists(_FILE, max_size=2).map(tuple)),
        st.builds(wire.RunFault, run=_RUN, fault=_FAULT),
        st.builds(wire.Pong, n=_RUN),
        st.builds(wire.Log, level=_TEXT, message=_TEXT),
        st.builds(wire.Stats, rss_bytes=_RUN),
    )
    return down, up


def _over_the_wire(message, json):
    decoder = FrameDecoder()
    decoder.feed(b"".join(bytes(part) for part in wire.encode(message, json)))
    (frame,) = decoder
    assert frame.json is json
    return frame


@pytest.mark.parametrize("json", [False, True])
@given(data=st.data())
def test_every_message_comes_back_as_it_was(json, data):
    down, up = _messages(json)
    for messages, decode in ((down, wire.decode_down), (up, wire.decode_up)):
        message = data.draw(messages)
        assert decode(_over_the_wire(message, json)) == message


def test_every_message_of_the_wire_is_in_the_table_above():
    down, up = _messages(False)
    assert "Shutdown" in repr(down)
    for union, strategy in ((wire.DownMessage, down), (wire.UpMessage, up)):
        for type_ in union.__args__:
            assert type_.__name__ in repr(strategy)


@pytest.mark.parametrize(
    ("make", "field", "decode"),
    [
        (lambda raw: wire.Run(run=1, kind="llm", params=raw), "params", wire.decode_down),
        (lambda raw: wire.Validate(run=1, kind="llm", params=raw), "params", wire.decode_down),
        (lambda raw: wire.Chunk(run=1, seq=0, data=raw), "data", wire.decode_up),
        (lambda raw: wire.Result(run=1, body=raw), "body", wire.decode_up),
    ],
)
@pytest.mark.parametrize("extra", [-10, 0, 1, 10])
def test_bulk_travels_behind_the_header_and_comes_back(make, field, decode, extra):
    raw = wire.pack("x" * (INLINE_BYTES + extra))
    parts = wire.encode(make(raw))
    assert (len(parts) == 2) == (len(raw) > INLINE_BYTES)
    assert bytes(getattr(decode(_over_the_wire(make(raw), False)), field)) == bytes(raw)


def test_what_no_frame_can_hold_is_refused():
    with pytest.raises(FramingError):
        wire.encode(wire.Result(run=1, body=wire.pack("x" * (65 * 2**20))))


@given(st.binary(max_size=200), st.booleans(), st.lists(st.binary(max_size=5), max_size=2))
def test_hostile_frames_raise_wire_errors_only(header, json, blobs):
    for decode in (wire.decode_down, wire.decode_up):
        try:
            decode(Frame(header, tuple(blobs), json))
        except wire.WireError:
            pass


_PART = st.sampled_from(["t", "run", "kind", "params", "n", "load", "chunk", "result", "fault", "data", "body", "seq"])


@given(
    st.dictionaries(_PART, _PART | _JSON | st.binary(max_size=5), max_size=6),
    st.lists(st.binary(max_size=3), max_size=2),
)
def test_almost_messages_raise_wire_errors_only(fields, blobs):
    frame = Frame(msgspec.msgpack.encode(fields), tuple(blobs))
    for decode in (wire.decode_down, wire.decode_up):
        try:
            decode(frame)
        except wire.WireError:
            pass


@pytest.mark.parametrize(
    "frame",
    [
        Frame(msgspec.msgpack.encode({"t": "ping", "x": 1})[:-1]),
        Frame(b"\x82\xa1t\xa4ping\xa1x" + b"\x91" * 100_000),
        Frame(b'{"t":"ping","x":' + b"[" * 100_000, json=True),
        Frame(b"\x82\xa1t\xa4ping\xa1n\xa1\xff"),
        Frame(msgspec.msgpack.encode({"t": "ping"}), (b"blob",)),
        Frame(msgspec.msgpack.encode({"t": "cancel", "run": "1"})),
        Frame(msgspec.msgpack.encode({"t": "nope"})),
        Frame(msgspec.msgpack.encode({})),
        Frame(msgspec.msgpack.encode([1])),
    ],
)
def test_broken_frames(frame):
    with pytest.raises(wire.WireError):
        wire.decode_down(frame)


def test_unknown_fields_of_a_newer_peer_are_ignored():
    header = msgspec.msgpack.encode({"t": "ping", "n": 3, "colour": {"deep": [1]}})
    assert wire.decode_down(Frame(header)) == wire.Ping(n=3)


@given(st.binary(max_size=100), st.booleans())
def test_hostile_bodies_raise_wire_errors_only(data, json):
    try:
        wire.unpack(msgspec.Raw(data), dict, json)
    except wire.WireError:
        pass


@pytest.mark.parametrize("data", [b"\x91" * 100_000, b"\xa1\xff", b"\xdd\xff\xff\xff\xff", b""])
def test_bodies_that_broke_decoders(data):
    with pytest.raises(wire.WireError):
        wire.unpack(msgspec.Raw(data))


@given(_JSON, st.booleans())
def test_pack_and_unpack_agree(value, json):
    assert wire.unpack(wire.pack(value, json), json=json) == value
