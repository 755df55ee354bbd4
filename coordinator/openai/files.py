"""/v1/files: upload, list, retrieve, content, delete. A tenant sees its own files only."""

from __future__ import annotations

import functools
import re
from contextlib import aclosing
from typing import Any, NamedTuple

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator import deliveries
from coordinator.blobs.answers import UNKNOWN, blob_response
from coordinator.bodies import check_length, page_size, whole_number
from coordinator.errors import Json
from coordinator.kept_files import MAX_FILE_BYTES, new_file_id
from coordinator.openai.listing import cursor, oldest_first, page
from coordinator.services import caller, services
from coordinator.store.shelf import FileRecord
from coordinator.uploads import (
    ENVELOPE_BYTES,
    FIELDS_BYTES,
    FormPart,
    decoded,
    form_events,
    is_multipart,
    part_pieces,
    read_text,
)
from protocol.faults import refuse

# What something here reads, or what its owner wants back as it is.
OUTPUT = "batch_output"  # what a batch made
PURPOSES = ("batch", "user_data")
SHA256 = "x-content-sha256"  # of the file in the form, for who wants it checked on the way
LIST_LIMIT = 10_000
BATCH_KEEP_S = 30 * 86_400  # OpenAI's own default for this purpose
KEEP_S = (3600, 30 * 86_400)
_EXPIRES = ("expires_after[anchor]", "expires_after[seconds]")


async def upload(request: Request) -> Response:
    """Keep a file."""
    if not is_multipart(request):
        raise refuse("unsupported_media_type", "Expected a body of type multipart/form-data with the file in it.")
    limit = MAX_FILE_BYTES + FIELDS_BYTES + ENVELOPE_BYTES
    check_length(request, limit)
    digest = request.headers.get(SHA256, "").lower()
    if digest and not re.fullmatch("[0-9a-f]{64}", digest):
        raise refuse("invalid_parameter", f"{SHA256}: Expected 64 hexadecimal digits.", SHA256)
    files, tenant = services(request).files, caller(request).tenant
    fields: dict[str, str] = {}
    kept: FileRecord | None = None
    try:
        async with aclosing(form_events(request, limit)) as events:
            async for event in events:
                assert isinstance(event, FormPart)
                if event.name == "file":
                    if kept is not None:
                        raise refuse("invalid_parameter", "file: Expected one file only.", "file")
                    draft = FileRecord(
                        id=new_file_id(),
                        tenant=tenant,
                        name=event.filename or "file",
                        purpose="",
                        blob="",
                        size=0,
                        sha256=digest,
                    )
                    async with aclosing(part_pieces(events)) as pieces:
                        kept = await files.receive(pieces, draft)
                    continue
                fields[event.name] = decoded(await read_text(events, event.name, FIELDS_BYTES), event.name)
        wish = to_wish(fields)
        if kept is None:
            raise refuse("invalid_parameter", "file: The file is required.", "file")
        record = await files.keep(msgspec.structs.replace(kept, purpose=wish.purpose), wish.keep_s)
    except BaseException:
        if kept is not None:
            await files.drop(kept)
        raise
    return Json(to_file(record))


class Wish(NamedTuple):
    """The form's fields beside the file."""

    purpose: str
    keep_s: int


def to_wish(fields: dict[str, str]) -> Wish:
    """Check the fields. Raises FaultError naming the field."""
    if unknown := set(fields) - {"purpose", *_EXPIRES}:
        name = min(unknown)[:100]
        raise refuse("invalid_parameter", f"{name}: Unknown field.", name)
    purpose = fields.get("purpose", "")
    if not purpose:
        raise refuse("invalid_parameter", "purpose: The field is required.", "purpose")
    if purpose not in PURPOSES:
        raise refuse("unsupported", f"purpose: This server takes only {', '.join(PURPOSES)}.", "purpose")
    anchor, seconds = (fields.get(name) for name in _EXPIRES)
    if anchor is None and seconds is None:
        return Wish(purpose, BATCH_KEEP_S if purpose == "batch" else 0)
    return Wish(purpose, keep_seconds({"anchor": anchor, "seconds": seconds}, "expires_after"))


def keep_seconds(value: Any, field: str) -> int:
    """OpenAI's expiry policy as seconds. Raises FaultError(invalid_parameter)."""
    anchor, seconds = (value.get("anchor"), value.get("seconds")) if isinstance(value, dict) else (None, None)
    if anchor != "created_at":
        raise refuse("invalid_parameter", f"{field}.anchor: Expected created_at.", f"{field}.anchor")
    text = str(seconds)
    least, most = KEEP_S
    number = whole_number(text, least, most)
    if number is None:
        message = f"{field}.seconds: Expected a number from {least} to {most}."
        raise refuse("invalid_parameter", message, f"{field}.seconds")
    return number


async def list_files(request: Request) -> Response:
    """The tenant's files, newest first, in pages."""
    query = request.query_params
    limit = page_size(query, LIST_LIMIT, LIST_LIMIT)
    records = await services(request).files.list(
        caller(request).tenant, limit + 1, cursor(query), query.get("purpose", ""), oldest_first(query)
    )
    return Json(page([to_file(record) for record in records], limit))


async def retrieve(request: Request) -> Response:
    """What is known of a file."""
    return Json(to_file(await _find(request)))


async def content(request: Request) -> Response:
    """Its bytes."""
    record = await _find(request)
    response = await blob_response(request, services(request).blobs, record.blob, UNKNOWN, record.name)
    if record.purpose == OUTPUT:
        response.sent_whole = functools.partial(deliveries.note_file, record.id, record.tenant)
    return response


async def delete(request: Request) -> Response:
    """Delete it; a batch that reads it keeps it."""
    name = request.path_params["id"]
    if not await services(request).files.remove(name, caller(request).tenant):
        raise refuse("not_found", f"There is no file {name[:100]!r}.", "file_id")
    return Json({"id": name, "object": "file", "deleted": True})


ROUTES = [
    Route("/v1/files", upload, methods=["POST"]),
    Route("/v1/files", list_files, methods=["GET"]),
    Route("/v1/files/{id}", retrieve, methods=["GET"]),
    Route("/v1/files/{id}", delete, methods=["DELETE"]),
    Route("/v1/files/{id}/content", content, methods=["GET"]),
]


async def _find(request: Request) -> FileRecord:
    return await services(request).files.find(request.path_params["id"], caller(request).tenant)


def to_file(record: FileRecord) -> dict[str, Any]:
    """OpenAI's file object, and the digest of the bytes as they lie here."""
    return {
        "id": record.id,
        "object": "file",
        "bytes": record.size,
        "sha256": record.sha256,
        "created_at": record.created_ms // 1000,
        "expires_at": record.expires_ms // 1000 if record.expires_ms else None,
        "filename": record.name,
        "purpose": record.purpose,
        "status": "processed",
        "status_details": None,
    }
