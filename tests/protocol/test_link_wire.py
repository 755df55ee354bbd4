"""The link wire: two stages, so that a broken body costs one job and only a missing envelope costs the session."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from protocol import link_wire as wire
from protocol.engine_wire import OutputFile, pack
from protocol.faults import Fault

RAW = pack({"a": [1, "b"]})
FILE = wire.FileRef(name="audio", url="/v1/x", size=3, sha256="0" * 64)
# One message of every tag, with everything set.
MESSAGES: list[wire.Body] = [
    wire.Hello(
        worker="w",
        low=1,
        high=2,
        boot="b",
        capabilities=wire.Capabilities(
            models=(wire.ModelOffer(name="m", kinds=("llm",), engine="e", slots=2, limits={"n_ctx": 5}),),
            gpus=(wire.Gpu(uuid="u", name="n", vram_bytes=1),),
            labels={"a": "b"},
        ),
        held=(wire.Held(job="j", attempt=2, started=True),),
    ),
    wire.Announce(capabilities=wire.Capabilities(accepting=False, reason="r")),
    wire.Heartbeat(n=1, running=2, gpus=(wire.GpuState(uuid="u", busy=0.5, free_bytes=3),)),
    wire.Accept(),
    wire.Decline(code="busy", reason="r", retry_after_ms=5),
    wire.Started(),
    wire.Chunk(seq=3, data=RAW),
    wire.Progress(n=1, total=2, phase="p", text="t"),
    wire.Complete(result=RAW, files=(OutputFile("n", "m", 1, "s"),), usage={"images": 1.0}),
    wire.Fail(fault=Fault("engine_crashed", "m", detail={"signal": 11}), streamed=True),
    wire.LogBatch(lines=(wire.LogLine(ts="t", level="info", message="m"),), dropped=1),
    wire.OrderDone(id="7", ok=True, message="m", detail={"a": "b"}),
    wire.Draining(reason="r"),
    wire.Welcome(session="s", revision=1, heartbeat_ms=7),
    wire.Offer(kind="llm", model="m", params=RAW, inputs=(FILE,), deadline_ms=5, labels={"a": "b"}, priority=-1),
    wire.Ack(verdict="fenced"),
    wire.ChunkAck(seq=3),
    wire.HeartbeatAck(n=1),
    wire.Cancel(reason="r"),
    wire.Drain(),
    wire.Pause(reason="r", for_ms=5),
    wire.Resume(),
    wire.ShutdownWorker(reason="r"),
    wire.Order(id="7", verb="probe", arguments={"model": "m"}),
    wire.Error(code="auth_failed", message="m"),
]


@pytest.mark.parametrize("body", MESSAGES, ids=lambda body: type(body).__name__)
def test_every_message_comes_back_as_it_was(body):
    envelope = wire.decode_envelope(wire.encode(body, "job", 3))
    assert (envelope.t, envelope.job, envelope.attempt) == (wire.TAGS[type(body)], "job", 3)
    table = wire.UP if envelope.t in wire.UP else wire.DOWN
    assert wire.decode_body(envelope, table) == body


def test_the_table_above_is_complete_and_no_tag_goes_both_ways():
    assert {type(body) for body in MESSAGES} == set(wire.TAGS)
    assert not set(wire.UP) & set(wire.DOWN)


def test_a_message_of_the_other_direction_is_a_broken_body():
    envelope = wire.decode_envelope(wire.encode(wire.Drain()))
    with pytest.raises(wire.BodyError, match="unknown message 'drain'"):
        wire.decode_body(envelope, wire.UP)


@given(st.binary(max_size=200))
def test_hostile_bytes_raise_the_two_errors_only(data):
    try:
        envelope = wire.decode_envelope(data)
    except wire.EnvelopeError:
        return
    for table in (wire.UP, wire.DOWN):
        try:
            wire.decode_body(envelope, table)
        except wire.BodyError:
            pass


@given(st.sampled_from([*wire.UP, *wire.DOWN]), st.binary(max_size=100))
def test_hostile_bodies_keep_the_envelope(tag, data):
    envelope = wire.Envelope(tag, "job", 1, msgspec.Raw(data))
    try:
        wire.decode_body(envelope, wire.UP if tag in wire.UP else wire.DOWN)
    except wire.BodyError:
        pass


@given(st.sampled_from(MESSAGES), st.data())
def test_damaged_messages_raise_the_two_errors_only(body, data):
    message = bytearray(wire.encode(body, "job", 1))
    for _ in range(data.draw(st.integers(1, 3))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    try:
        envelope = wire.decode_envelope(bytes(message[: data.draw(st.integers(0, len(message)))]))
        wire.decode_body(envelope, wire.UP if envelope.t in wire.UP else wire.DOWN)
    except (wire.EnvelopeError, wire.BodyError):
        pass


@pytest.mark.parametrize(
    "body", [b"\x81\xa1x" + b"\x91" * 100_000, b"\x81\xa1n\xa1\xff", b"\x81\xa1n\xdd\xff\xff\xff\xff"]
)
def test_bodies_that_broke_decoders(body):
    with pytest.raises(wire.BodyError):
        wire.decode_body(wire.Envelope("heartbeat", body=msgspec.Raw(body)), wire.UP)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xc1",
        b"\x90",
        b"\x80",
        b"\x81\xa1t\x01",
        b"\x82\xa1t\xa1x\xa4body" + b"\x91" * 100_000,
        b"\x81\xa1t\xa1\xff",
    ],
)
def test_what_has_no_envelope(data):
    with pytest.raises(wire.EnvelopeError):
        wire.decode_envelope(data)


def test_a_message_too_large_is_not_even_looked_at():
    with pytest.raises(wire.EnvelopeError, match="exceeds"):
        wire.decode_envelope(b"\x81" * (wire.MAX_MESSAGE_BYTES + 1))


def test_unknown_fields_of_a_newer_peer_are_ignored():
    body = msgspec.Raw(msgspec.msgpack.encode({"n": 4, "colour": "red"}))
    assert wire.decode_body(wire.Envelope("heartbeat", body=body), wire.UP) == wire.Heartbeat(n=4)


def test_a_result_comes_inline_or_not():
    assert wire.Complete(result=RAW).inline == bytes(RAW)
    assert wire.Complete().inline is None
    for body in (wire.Complete(result=RAW), wire.Complete()):
        assert wire.decode_body(wire.decode_envelope(wire.encode(body)), wire.UP).inline == body.inline
