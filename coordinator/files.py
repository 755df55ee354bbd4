"""Output files of jobs as HTTP answers. Workers made them, so no browser may take them for pages of ours."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import FileResponse

from coordinator.blob_routes import SAFE_HEADERS
from coordinator.records import JobRecord, StoredFile
from coordinator.services import services
from protocol.faults import refuse


def only_file(record: JobRecord) -> StoredFile:
    """The one output file of a succeeded job. Raises FaultError(engine_protocol) when there is not exactly one."""
    if len(record.files) != 1:
        raise refuse("engine_protocol", f"The worker left {len(record.files)} files where one is due.")
    return record.files[0]


def file_response(
    request: Request, file: StoredFile, mime: str, filename: str, headers: dict[str, str] | None = None
) -> FileResponse:
    """Send an output file, with byte ranges. Raises FaultError(not_found) when it was deleted."""
    path = services(request).blobs.path(file.blob)
    if not path.is_file():
        raise refuse("not_found", "The file is gone; files are deleted with their job.")
    return FileResponse(path, media_type=mime, filename=filename, headers={**SAFE_HEADERS, **(headers or {})})
