"""Output files of jobs as HTTP answers. Workers made them, so no browser may take them for pages of ours."""

from __future__ import annotations

from starlette.requests import Request

from coordinator.blobs.answers import BlobResponse, blob_response
from coordinator.records import JobRecord, StoredFile
from coordinator.services import services
from protocol.faults import refuse


def only_file(record: JobRecord) -> StoredFile:
    """The one output file of a succeeded job. Raises FaultError(engine_protocol) when there is not exactly one."""
    if len(record.files) != 1:
        raise refuse("engine_protocol", f"The worker left {len(record.files)} files where one is due.")
    return record.files[0]


async def file_response(
    request: Request, file: StoredFile, mime: str, filename: str, headers: dict[str, str] | None = None
) -> BlobResponse:
    """Send an output file, with byte ranges. Raises FaultError(not_found) when it was deleted."""
    return await blob_response(request, services(request).blobs, file.blob, mime, filename, headers)
