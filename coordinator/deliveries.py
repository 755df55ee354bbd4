"""Notes, made while a request is answered, of what its answer delivers; `Deliveries` passes them on once it was sent.

Whoever writes an answer calls `note_…`; without the layer around it that does nothing. An answer counts as delivered
when its last byte was given to the client's connection.
"""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.records import JobRecord

_LEFT = 499  # what a request ends with whose client is gone


class Notes(msgspec.Struct):
    """What one answer delivers.

    Attributes:
        jobs: id -> tenant of jobs whose result, or fault, is the answer.
        blobs: keys of whole files.
        files: id -> tenant of kept files.
    """

    jobs: dict[str, str] = {}
    blobs: list[str] = []
    files: dict[str, str] = {}


_notes: ContextVar[Notes | None] = ContextVar("deliveries", default=None)


def note_job(record: JobRecord) -> None:
    """The answer has all that came of this job."""
    if (notes := _notes.get()) is not None and record.ended:
        notes.jobs[record.id] = record.tenant


def note_fault(record: JobRecord) -> None:
    """The answer has the fault of this job, when it ended with one; a result is not in it."""
    if record.state != "succeeded":
        note_job(record)


def not_yet(record: JobRecord) -> None:
    """The answer only says where the files of this job are."""
    if (notes := _notes.get()) is not None:
        notes.jobs.pop(record.id, None)


def note_blob(key: str) -> None:
    """A whole file was sent."""
    if (notes := _notes.get()) is not None:
        notes.blobs.append(key)


def note_file(file_id: str, tenant: str) -> None:
    """A whole kept file was sent."""
    if (notes := _notes.get()) is not None:
        notes.files[file_id] = tenant


class Deliveries:
    """ASGI layer: gives every request its notes, and `taken` those of each answer that was sent to its end."""

    def __init__(self, app: ASGIApp, taken: Callable[[Notes], None]) -> None:
        self._app, self._taken = app, taken

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http" or scope["method"] == "HEAD":
            await self._app(scope, receive, send)
            return
        notes, status, over = Notes(), 0, False

        async def watched(message: Message) -> None:
            nonlocal status, over
            await send(message)
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body":
                over = not message.get("more_body", False)

        before = _notes.set(notes)
        try:
            await self._app(scope, receive, watched)
        finally:
            _notes.reset(before)
        if over and status != _LEFT and (notes.jobs or notes.blobs or notes.files):
            self._taken(notes)
