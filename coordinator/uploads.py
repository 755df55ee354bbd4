"""Uploads: multipart forms and data URLs, streamed into the blobs.

A form is read part by part as it arrives; files go straight to the blobs, so at most one network chunk and the
text fields (together at most `FIELDS_BYTES`) are in memory.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import TYPE_CHECKING, NamedTuple, Protocol

import anyio
import msgspec
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from coordinator.bodies import check_length
from coordinator.media import HEAD_BYTES, check_input, decode_data, input_limit, sniff
from coordinator.records import StoredInput
from protocol.faults import FaultError, refuse
from protocol.ids import is_safe_id

if TYPE_CHECKING:
    from coordinator.services import Services

FIELDS_BYTES = 2**20
MAX_PARTS = 64
MAX_NAME_BYTES = 200
MAX_FORM_BYTES = 2**30  # of a form with files of any name
ENVELOPE_BYTES = 256 * 2**10  # boundaries and part headers around the payload


class StoredBlob(Protocol):
    """What the blobs answer to a put: `size` in bytes, `sha256` in hex."""

    @property
    def key(self) -> str: ...
    @property
    def size(self) -> int: ...
    @property
    def sha256(self) -> str: ...


class BlobSink(Protocol):
    """The one thing that uploads need of the blobs."""

    async def put(self, data: AsyncIterator[bytes], limit: int) -> StoredBlob:
        """Store; FaultError(payload_too_large) beyond `limit` bytes."""
        ...


class _Noted:
    """Blobs that remember what was put."""

    def __init__(self, blobs: BlobSink) -> None:
        self._blobs = blobs
        self.keys: list[str] = []

    async def put(self, data: AsyncIterator[bytes], limit: int) -> StoredBlob:
        stored = await self._blobs.put(data, limit)
        self.keys.append(stored.key)
        return stored


@asynccontextmanager
async def uploads(parts: Services) -> AsyncIterator[BlobSink]:
    """Where a request's files go: when it is refused, those that belong to no job are deleted again.

    Cancellation: as for a refusal.
    """
    noted = _Noted(parts.blobs)
    try:
        yield noted
    except BaseException:
        if noted.keys:
            with anyio.CancelScope(shield=True):
                await parts.dispatcher.drop_unused(noted.keys)
        raise


class Form(msgspec.Struct, frozen=True):
    """A multipart form: text fields in order of arrival, files by field name."""

    fields: dict[str, list[str]]
    files: dict[str, StoredInput]


class FormPart(NamedTuple):
    """A part begins; `filename` is None where the client gave none."""

    name: str
    filename: str | None


class _End:
    """End of a part."""


_END = _End()
FormEvent = FormPart | bytes | _End


def is_multipart(request: Request) -> bool:
    """Whether the body is a multipart form."""
    return request.headers.get("content-type", "").lower().startswith("multipart/form-data")


async def read_form(request: Request, blobs: BlobSink, files: Mapping[str, str] | None) -> Form:
    """Read a form; its files are in the blobs when this returns.

    Args:
        request: whose body was not read yet.
        blobs: where the files go.
        files: form field -> name of the input; only these may be files. None: every part that has a file name
            is an input named as its field.

    Raises:
        FaultError: invalid_request (broken form), invalid_parameter (unexpected, doubled or empty file),
            payload_too_large, unsupported_media_type.
        ClientDisconnect: the client left while sending.
    """
    limit = MAX_FORM_BYTES
    if files is not None:
        limit = sum(input_limit(name) for name in files.values()) + FIELDS_BYTES + ENVELOPE_BYTES
    check_length(request, limit)
    fields: dict[str, list[str]] = {}
    stored: dict[str, StoredInput] = {}
    budget = FIELDS_BYTES
    async with aclosing(form_events(request, limit)) as events:
        async for event in events:
            assert isinstance(event, FormPart)
            if event.filename is not None or (files and event.name in files):
                if event.name in stored:
                    raise refuse("invalid_parameter", f"{event.name}: Expected one file only.", event.name)
                name = _input_name(event.name, files)
                stored[event.name] = await store_stream(part_pieces(events), name, event.name, blobs)
                continue
            text = await read_text(events, event.name, budget)
            budget -= len(text)
            fields.setdefault(event.name, []).append(decoded(text, event.name))
    return Form(fields, stored)


async def read_text(events: AsyncIterator[FormEvent], field: str, limit: int) -> bytes:
    """The part that just began, as bytes of a text. Raises FaultError(payload_too_large)."""
    text = bytearray()
    async with aclosing(part_pieces(events)) as pieces:
        async for piece in pieces:
            text += piece
            if len(text) > limit:
                raise refuse("payload_too_large", f"{field}: The texts of a form exceed {FIELDS_BYTES} bytes.", field)
    return bytes(text)


def _input_name(field: str, files: Mapping[str, str] | None) -> str:
    name = files.get(field) if files is not None else field
    if name is None or not is_safe_id(name):
        raise refuse("invalid_parameter", f"{field}: Unexpected file.", field)
    return name


async def store_stream(data: AsyncGenerator[bytes, None], name: str, field: str, blobs: BlobSink) -> StoredInput:
    """Put one input into the blobs, with its type taken from its content.

    Raises:
        FaultError: invalid_parameter when it is empty, payload_too_large, unsupported_media_type.
    """
    head = bytearray()

    async def watched() -> AsyncGenerator[bytes, None]:
        async for piece in data:
            if len(head) < HEAD_BYTES:
                head.extend(piece[: HEAD_BYTES - len(head)])
            yield piece

    limit = input_limit(name)
    try:
        async with aclosing(data), aclosing(watched()) as source:
            blob = await blobs.put(source, limit)
    except FaultError as error:
        if error.fault.code != "payload_too_large":
            raise
        raise refuse("payload_too_large", f"{field}: The file exceeds {limit} bytes.", field) from None
    if blob.size == 0:
        raise refuse("invalid_parameter", f"{field}: The file is empty.", field)
    mime = sniff(bytes(head))
    check_input(name, mime, field)
    return StoredInput(name, blob.key, blob.size, blob.sha256, mime)


async def store_data_url(text: object, name: str, field: str, blobs: BlobSink) -> StoredInput:
    """Put an input that came as a data URL (or bare base64) into the blobs. Raises FaultError."""
    data = decode_data(text, field, input_limit(name))

    async def pieces() -> AsyncGenerator[bytes, None]:
        for start in range(0, len(data), 2**16):
            yield data[start : start + 2**16]

    return await store_stream(pieces(), name, field, blobs)


async def part_pieces(events: AsyncIterator[FormEvent]) -> AsyncGenerator[bytes, None]:
    """Bytes of the part that just began."""
    async for event in events:
        if isinstance(event, _End):
            return
        assert isinstance(event, bytes)
        yield event


async def form_events(request: Request, limit: int) -> AsyncGenerator[FormEvent, None]:
    """What a form consists of, as it arrives: per part its `FormPart`, its bytes and its end.

    Raises:
        FaultError: invalid_request (broken form), payload_too_large beyond `limit` bytes.
        ClientDisconnect: the client left while sending.
    """
    _, options = parse_options_header(request.headers.get("content-type"))
    boundary = options.get(b"boundary", b"")
    if not 1 <= len(boundary) <= MAX_NAME_BYTES:
        raise refuse("invalid_request", "The content type of the form names no boundary.")
    collector = _Collector()
    parser = MultipartParser(boundary, collector.callbacks())  # type: ignore[arg-type]
    size = 0
    try:
        async with aclosing(request.stream()) as stream:
            async for piece in stream:
                size += len(piece)
                if size > limit:
                    raise refuse("payload_too_large", f"The form exceeds {limit} bytes.")
                parser.write(piece)
                for event in collector.take():
                    yield event
        parser.finalize()
    except FormParserError as error:
        raise refuse("invalid_request", f"The body is not a multipart form: {error}.") from None
    if not collector.complete:
        raise refuse("invalid_request", "The form ends before its closing boundary.")


class _Collector:
    """Turns the parser's callbacks into events."""

    def __init__(self) -> None:
        self.complete = False
        self._events: list[FormEvent] = []
        self._name = bytearray()
        self._value = bytearray()
        self._disposition = b""
        self._parts = 0

    def callbacks(self) -> dict[str, object]:
        return {
            "on_part_begin": self._begin,
            "on_header_field": lambda data, start, end: self._name.extend(data[start:end]),
            "on_header_value": lambda data, start, end: self._value.extend(data[start:end]),
            "on_header_end": self._header,
            "on_headers_finished": self._headers,
            "on_part_data": lambda data, start, end: self._events.append(bytes(data[start:end])),
            "on_part_end": lambda: self._events.append(_END),
            "on_end": self._finish,
        }

    def take(self) -> list[FormEvent]:
        events, self._events = self._events, []
        return events

    def _begin(self) -> None:
        self._parts += 1
        self._disposition = b""
        if self._parts > MAX_PARTS:
            raise refuse("invalid_request", f"The form has more than {MAX_PARTS} parts.")

    def _header(self) -> None:
        if bytes(self._name).lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._name.clear()
        self._value.clear()

    def _headers(self) -> None:
        kind, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"")
        if kind != b"form-data" or not 1 <= len(name) <= MAX_NAME_BYTES:
            raise refuse("invalid_request", "A part of the form has no name.")
        filename = options.get(b"filename")
        self._events.append(
            FormPart(decoded(name, "name"), None if filename is None else filename.decode("utf-8", "replace"))
        )

    def _finish(self) -> None:
        self.complete = True


def decoded(data: bytes, field: str) -> str:
    """The text of a field. Raises FaultError(invalid_parameter)."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise refuse("invalid_parameter", f"{field}: Expected UTF-8 text.", field) from None
