"""The test vectors that other implementations are run against, run against ours."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import msgspec
import pytest

from protocol import engine_session, engine_wire, link_session, link_wire
from protocol.framing import FrameDecoder, FramingError
from scripts import vectors_road

ROOT = Path(__file__).parents[2]
VECTORS = json.loads((ROOT / "protocol" / "vectors.json").read_text())
LINK, ENGINE = VECTORS["link"], VECTORS["engine"]


def named(vectors):
    return pytest.mark.parametrize("vector", vectors, ids=lambda vector: vector["name"])


def test_the_file_and_the_document_are_what_the_code_says():
    assert vectors_road.VECTORS.read_text() == vectors_road.vectors_text(), "run scripts/vectors"
    text = vectors_road.DOCUMENT.read_text()
    assert vectors_road.written(text) == text, "run scripts/vectors"


def test_every_message_has_a_vector():
    assert {vector["message"]["t"] for vector in LINK["messages"]} == {*link_wire.UP, *link_wire.DOWN}
    tags = {
        type_.__struct_config__.tag for base in (engine_wire.Up, engine_wire.Down) for type_ in base.__subclasses__()
    }
    assert {vector["header"]["t"] for vector in ENGINE["frames"]} == tags


def shown(value, found):
    """Collects each (struct, field) that is not at its default somewhere in a value, and all structs."""
    if isinstance(value, tuple | list):
        for each in value:
            shown(each, found)
    if isinstance(value, msgspec.Struct):
        for field in msgspec.structs.fields(value):
            inside = getattr(value, field.name)
            empty = field.default_factory() if field.default is msgspec.NODEFAULT and not field.required else None
            if field.required or inside != (field.default if empty is None else empty):
                found.add((type(value), field.name))
            shown(inside, found)


@pytest.mark.parametrize(
    ("examples", "parts"),
    [
        ([body for _, body, _ in vectors_road.LINK], vectors_road.LINK_PARTS),
        ([message for _, message in vectors_road.ENGINE], vectors_road.ENGINE_PARTS),
    ],
    ids=["link", "engine"],
)
def test_every_field_of_every_message_stands_in_a_vector_and_in_the_document(examples, parts):
    found = set()
    shown(examples, found)
    structs = {type(example) for example in examples} | set(parts)
    wanted = {(type_, field.name) for type_ in structs for field in msgspec.structs.fields(type_)}
    missing = sorted(f"{type_.__name__}.{name}" for type_, name in wanted - found if name != "blobs")
    assert missing == []
    assert {type_ for type_, _ in found} <= structs, "a struct inside messages that the document does not describe"


def test_types_have_words_of_no_language():
    words = [
        (str, "string"),
        (int | None, "integer"),
        (tuple[str, ...], "list of string"),
        (dict[str, object], "map to object"),
        (dict[str, float], "map to number"),
        (tuple[link_wire.Gpu, ...], "list of Gpu"),
        (msgspec.structs.fields(link_wire.Ack)[0].type, '"stored" or "fenced"'),
    ]
    assert [vectors_road.type_word(type_) for type_, _ in words] == [word for _, word in words]


@named(LINK["messages"])
def test_a_message_of_the_link_means_what_the_vector_says_and_is_written_so(vector):
    data = bytes.fromhex(vector["hex"])
    envelope = link_wire.decode_envelope(data)
    body = link_wire.decode_body(envelope, link_wire.UP if vector["direction"] == "up" else link_wire.DOWN)
    assert vectors_road.plain(msgspec.msgpack.decode(data)) == vector["message"]
    assert link_wire.encode(body, envelope.job, envelope.attempt) == data


@named(LINK["refused"])
def test_what_is_refused_on_the_link_costs_what_the_vector_says(vector):
    table = link_wire.UP if vector["direction"] == "up" else link_wire.DOWN
    try:
        envelope = link_wire.decode_envelope(bytes.fromhex(vector["hex"]))
    except link_wire.EnvelopeError:
        assert vector["costs"] == "envelope"
        return
    assert vector["costs"] == "body"
    with pytest.raises(link_wire.BodyError):
        link_wire.decode_body(envelope, table)


@named(LINK["tolerated"])
def test_what_is_tolerated_on_the_link(vector):
    envelope = link_wire.decode_envelope(bytes.fromhex(vector["hex"]))
    assert link_wire.decode_body(envelope, link_wire.UP) == link_wire.Heartbeat(n=1)


@named(ENGINE["frames"])
def test_a_frame_of_the_engine_wire_means_what_the_vector_says(vector):
    message = next(message for name, message in vectors_road.ENGINE if name == vector["name"])
    whole = b"".join(bytes(part) for part in engine_wire.encode(message))
    assert vector["hex"] in ("", whole.hex())
    decoder = FrameDecoder()
    decoder.feed(whole)
    (frame,) = decoder
    decode = engine_wire.decode_up if vector["direction"] == "up" else engine_wire.decode_down
    assert decode(frame) is not None
    assert frame.header == bytes.fromhex(vector["header_hex"])[4:]
    assert vectors_road.plain(msgspec.msgpack.decode(frame.header)) == vector["header"]
    assert [hashlib.sha256(blob).hexdigest() for blob in frame.blobs] == vector["sha256_of_blobs"]


@named(ENGINE["refused"])
def test_what_is_refused_on_the_engine_wire(vector):
    decoder = FrameDecoder()
    decoder.feed(bytes.fromhex(vector["hex"]))
    with pytest.raises((FramingError, engine_wire.WireError)):
        [engine_wire.decode_up(frame) for frame in decoder]


@pytest.mark.parametrize(
    ("rows", "table"),
    [
        (LINK["session_table"], link_session.SESSION_TABLE),
        (LINK["attempt_table"], link_session.ATTEMPT_TABLE),
        (ENGINE["instance_table"], engine_session.INSTANCE_TABLE),
        (ENGINE["run_table"], engine_session.RUN_TABLE),
    ],
)
def test_the_tables_are_ours(rows, table):
    ours = {((state.value if state else None), tag): following.value for (state, tag), following in table.items()}
    assert {(state, tag): following for state, tag, following in rows} == ours
