"""Forms, however the network cuts them."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import AsyncIterator
from typing import Any, NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from coordinator.uploads import FIELDS_BYTES, MAX_PARTS, Form, is_multipart, read_form, store_data_url
from protocol.faults import FaultError, refuse

WAV = b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(range(256))


class Stored(NamedTuple):
    key: str
    size: int
    sha256: str


class Blobs:
    """Keeps what was put."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}

    async def put(self, data: AsyncIterator[bytes], limit: int) -> Stored:
        content = b""
        async for piece in data:
            content += piece
            if len(content) > limit:
                raise refuse("payload_too_large", "Too large.")
        key = f"blob_{len(self.kept)}"
        self.kept[key] = content
        return Stored(key, len(content), hashlib.sha256(content).hexdigest())


def request(pieces: list[bytes], content_type: str = "multipart/form-data; boundary=b") -> Request:
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": piece, "more_body": True} for piece in pieces]
    messages.append({"type": "http.request", "body": b"", "more_body": False})

    async def receive() -> dict[str, Any]:
        return messages.pop(0)

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-type", content_type.encode())]}
    return Request(scope, receive)


def part(disposition: str, data: bytes) -> bytes:
    return b"--b\r\nContent-Disposition: form-data; " + disposition.encode() + b"\r\n\r\n" + data + b"\r\n"


FORM = (
    part('name="model"', b"m\xc3\xa9")
    + part('name="file"; filename="a.wav"', WAV)
    + part('name="n"', b"1")
    + b"--b--\r\n"
)


async def read(pieces: list[bytes], files: dict[str, str] | None, blobs: Blobs | None = None) -> Form:
    return await read_form(request(pieces), blobs or Blobs(), files)


@given(cuts=st.lists(st.integers(0, len(FORM)), max_size=12))
@settings(max_examples=60, deadline=None)
async def test_any_split_of_the_body_gives_the_same_form(cuts: list[int]) -> None:
    edges = [0, *sorted(cuts), len(FORM)]
    pieces = [FORM[start:end] for start, end in itertools.pairwise(edges)]
    blobs = Blobs()
    form = await read(pieces, {"file": "audio"}, blobs)
    assert form.fields == {"model": ["mé"], "n": ["1"]}
    stored = form.files["file"]
    assert (stored.name, stored.mime, stored.size) == ("audio", "audio/wav", len(WAV))
    assert stored.sha256 == hashlib.sha256(WAV).hexdigest()
    assert blobs.kept == {stored.blob: WAV}


async def test_files_of_any_name() -> None:
    form = await read([FORM], None)
    assert form.files["file"].name == "file"


@pytest.mark.parametrize(
    ("body", "code", "field"),
    [
        (FORM[:-8], "invalid_request", None),
        (b"", "invalid_request", None),
        (b"hello", "invalid_request", None),
        (part('filename="x"', b"x") + b"--b--\r\n", "invalid_request", None),
        (b"--b\r\nX: y\r\n\r\nx\r\n--b--\r\n", "invalid_request", None),
        (part('name="n"', b"x") * (MAX_PARTS + 1) + b"--b--\r\n", "invalid_request", None),
        (part('name="n"', b"\xff") + b"--b--\r\n", "invalid_parameter", "n"),
        (part('name="n"', bytes(FIELDS_BYTES + 1)) + b"--b--\r\n", "payload_too_large", "n"),
        (part('name="other"; filename="x"', b"x") + b"--b--\r\n", "invalid_parameter", "other"),
        (part('name="file"; filename="x"', b"") + b"--b--\r\n", "invalid_parameter", "file"),
        (part('name="file"', b"x") * 2 + b"--b--\r\n", "invalid_parameter", "file"),
    ],
)
async def test_bad_forms(body: bytes, code: str, field: str | None) -> None:
    with pytest.raises(FaultError) as caught:
        await read([body], {"file": "audio"})
    assert (caught.value.fault.code, caught.value.fault.field) == (code, field)


async def test_a_form_without_a_boundary() -> None:
    assert is_multipart(request([], "multipart/form-data"))
    with pytest.raises(FaultError, match="boundary"):
        await read_form(request([], "multipart/form-data"), Blobs(), {})


async def test_an_unsafe_name_of_a_free_file() -> None:
    with pytest.raises(FaultError, match="Unexpected file"):
        await read([part('name="../x"; filename="x"', b"x") + b"--b--\r\n"], None)


async def test_a_data_url_goes_the_same_way() -> None:
    blobs = Blobs()
    stored = await store_data_url("data:;base64,aGVsbG8=", "thing", "inputs.thing", blobs)
    assert blobs.kept[stored.blob] == b"hello"
    with pytest.raises(FaultError) as caught:
        await store_data_url("data:;base64,aGVsbG8=", "image", "inputs.image", blobs)
    assert caught.value.fault.http_status == 415
