"""Results of studio workers that are files: a multipart form, streamed into the blobs as it comes.

The form has the file as `image` whatever it is, the texts `prompt` and `ext`, and perhaps `generationMeta`. What the
file really is, its content tells; the texts decide nothing, so they are only bounded. A job that is not the worker's
is refused before its bytes are read; one that nobody waits for any more is read and dropped.

A file that is not what the job asks for ends the attempt, and is answered as a job that is not claimed any more: to
any 5xx a worker would send the same file again, and keep the job meanwhile.
"""

from __future__ import annotations

import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing

import anyio
from starlette.requests import Request
from starlette.responses import Response

from coordinator.blobs.base import Blobs, StoredBlob
from coordinator.blobs.bounds import bounds_of
from coordinator.bodies import check_length
from coordinator.errors import Json, fault_response
from coordinator.studio.jobs import Given, StudioJobs
from coordinator.studio.results import HEAD_BYTES, file_name, from_file, of_a_cancelled_job
from coordinator.studio.wire import JSON_KINDS
from coordinator.uploads import (
    ENVELOPE_BYTES,
    FIELDS_BYTES,
    FormEvent,
    FormPart,
    decoded,
    form_events,
    is_multipart,
    part_pieces,
    read_text,
)
from protocol.faults import Fault, FaultError, refuse
from protocol.link_wire import Complete

log = logging.getLogger(__name__)

FILE_FIELD = "image"
_EXT = re.compile(r"[A-Za-z0-9]{1,8}\Z", re.ASCII)


def form_bytes(kind: str, blobs: Blobs) -> int:
    """Most bytes that a form may have with the result of a job of this kind."""
    most = bounds_of(kind).each or blobs.max_output_bytes  # of a kind without files, whose upload is refused as such
    return min(blobs.max_output_bytes, most) + FIELDS_BYTES + ENVELOPE_BYTES


class _Stalled(Exception):
    """Nothing of the upload has come for too long."""


async def receive(request: Request, jobs: StudioJobs, idle_s: float, job: str, blobs: Blobs) -> Response:
    """Take the file of a job and end the job with it.

    Args:
        request: whose body was not read yet.
        jobs: of the worker that sends it.
        idle_s: an upload of which nothing comes for so long is ended.
        job: its id.
        blobs: where the file goes.

    Raises:
        FaultError: invalid_request, invalid_parameter, payload_too_large, unsupported_media_type, storage_full: the
            worker still has the job. conflict: it does not, or not any more.
        ClientDisconnect: the worker left while sending.
    """
    given = jobs.given(job)
    if given is None:
        raise refuse("conflict", "The job is not claimed by this worker.", "jobId")
    if given.kind in JSON_KINDS:
        raise refuse("invalid_request", f"A result of kind {given.kind} is sent as completeJson.")
    with jobs.uploading(given):
        try:
            end = await _read(request, jobs, idle_s, given, blobs)
        except _Stalled:
            return fault_response(Fault("invalid_request", "The upload stalled."), 408)
        async with jobs.turn:
            kept = await jobs.uploaded(given, end)
    if not kept:
        why = f" {end.message}" if isinstance(end, Fault) else ""
        raise refuse("conflict", f"The job is not claimed by this worker any more.{why}", "jobId")
    return Json({"ok": True})


async def _read(request: Request, jobs: StudioJobs, idle_s: float, given: Given, blobs: Blobs) -> Complete | Fault:
    """What the form ends the job with: its file as a result, or why it is none."""
    if not is_multipart(request):
        raise refuse("unsupported_media_type", "Expected a body of type multipart/form-data with the file in it.")
    limit = form_bytes(given.kind, blobs)
    check_length(request, limit)
    budget, stored, head = FIELDS_BYTES, None, bytearray()
    unwanted = jobs.abandoned(given.key[0])
    async with aclosing(form_events(request, limit)) as form, aclosing(_paced(form, idle_s)) as events:
        async for event in events:
            assert isinstance(event, FormPart)
            if event.name != FILE_FIELD:
                text = await read_text(events, event.name, budget)
                budget -= len(text)
                _check_field(event.name, decoded(text, event.name))
            elif stored is not None:
                raise refuse("invalid_parameter", f"{FILE_FIELD}: Expected one file only.", FILE_FIELD)
            elif unwanted:
                stored = await _dropped(part_pieces(events))
            else:
                stored = await _kept(part_pieces(events), given, blobs, head)
    if stored is None:
        raise refuse("invalid_parameter", f"{FILE_FIELD}: The file is required.", FILE_FIELD)
    if unwanted:
        return of_a_cancelled_job(given.kind, given.params)
    try:
        return from_file(given.kind, given.params, bytes(head), stored.size, stored.sha256)
    except FaultError as error:
        log.warning("%s#%d: %s", *given.key, error.fault.message)
        return error.fault


def _check_field(name: str, text: str) -> None:
    if name == "ext" and not _EXT.match(text):
        raise refuse("invalid_parameter", "ext: Expected up to 8 letters and digits, such as webp.", "ext")


async def _kept(data: AsyncGenerator[bytes, None], given: Given, blobs: Blobs, head: bytearray) -> StoredBlob:
    """Put the file among the outputs of its attempt; its beginning is left in `head`."""

    async def watched() -> AsyncGenerator[bytes, None]:
        async for piece in data:
            if len(head) < HEAD_BYTES:
                head.extend(piece[: HEAD_BYTES - len(head)])
            yield piece

    job, attempt = given.key
    async with aclosing(data), aclosing(watched()) as source:
        return await blobs.put_output(job, attempt, file_name(given.kind, given.params), source)


async def _dropped(data: AsyncGenerator[bytes, None]) -> StoredBlob:
    size = 0
    async with aclosing(data):
        async for piece in data:
            size += len(piece)
    return StoredBlob("", size, "")


async def _paced(form: AsyncIterator[FormEvent], idle_s: float) -> AsyncGenerator[FormEvent, None]:
    """The events of a form, as long as they keep coming. Raises _Stalled."""
    while True:
        event: FormEvent | None = None
        with anyio.move_on_after(idle_s) as patience:
            event = await anext(form, None)
        if patience.cancelled_caught:
            raise _Stalled
        if event is None:
            return
        yield event
