"""/v1/videos: create, list, status, content, delete. A video is a job of kind video under its job id."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator import deliveries
from coordinator.answers import ending_fault, succeeded
from coordinator.bodies import (
    JSON_WITH_FILES_BYTES,
    FieldTable,
    in_callers_words,
    model_name,
    page_size,
    read_json,
    work_params,
)
from coordinator.errors import Json
from coordinator.files import file_response, only_file
from coordinator.forms import form_values
from coordinator.openai.listing import cursor, oldest_first, page
from coordinator.openai.pictures import SIZE_NAMES, size_params
from coordinator.records import JobRecord, StoredInput
from coordinator.services import caller, services, submission
from coordinator.uploads import is_multipart, read_form, store_data_url, uploads
from protocol.faults import refuse
from protocol.work import VIDEO_MIME, Kind, VideoParams

LIST_LIMIT = 100
NAMES = {**SIZE_NAMES, "image": "input_reference"}

FIELDS = FieldTable(
    passed=frozenset(
        {"prompt", "seconds", "negative_prompt", "fps", "steps", "guidance", "seed", "strength", "format"}
    ),
    handled=frozenset({"model", "size", "input_reference"}),
    ignored=frozenset({"user"}),
)
_TYPES: dict[str, type] = {
    "seconds": float,
    "fps": int,
    "steps": int,
    "guidance": float,
    "seed": int,
    "strength": float,
}
_STATUS = {"queued": "queued", "running": "in_progress", "succeeded": "completed", "failed": "failed"}


async def create(request: Request) -> Response:
    """Queue a video and return at once; the job goes on when the client leaves."""
    parts = services(request)
    inputs: tuple[StoredInput, ...] = ()
    async with uploads(parts) as blobs:
        if is_multipart(request):
            form = await read_form(request, blobs, {"input_reference": "image"})
            passed, handled = FIELDS.pick(form_values(form, _TYPES))
            inputs = tuple(form.files.values())
        else:
            passed, handled = FIELDS.pick(await read_json(request, JSON_WITH_FILES_BYTES))
        model = model_name(handled)
        params = to_params(passed, handled)
        if "input_reference" in handled:
            reference = handled["input_reference"]
            link = reference.get("image_url") if isinstance(reference, dict) else reference
            inputs = (await store_data_url(link, "image", "input_reference", blobs),)
        record = await parts.dispatcher.submit(submission(request, Kind.VIDEO, model, params, inputs=inputs))
    parts.progress.follow(record.id)
    return Json(to_video(record, 0))


async def list_videos(request: Request) -> Response:
    """The tenant's videos, newest first, in pages."""
    parts, query = services(request), request.query_params
    limit = page_size(query, LIST_LIMIT, LIST_LIMIT)
    records = await parts.dispatcher.videos(
        caller(request).tenant, limit + 1, after=cursor(query), oldest_first=oldest_first(query)
    )
    return Json(page([to_video(record, parts.progress.percent(record.id)) for record in records], limit))


async def status(request: Request) -> Response:
    """How far a video is."""
    record = await _find(request)
    return Json(to_video(record, services(request).progress.percent(record.id)))


async def content(request: Request) -> Response:
    """The bytes of a finished video."""
    variant = request.query_params.get("variant", "video")
    if variant != "video":
        raise refuse("unsupported", "variant: This server has only the video itself.", "variant")
    record = await _find(request)
    if not record.ended:
        raise refuse("not_found", f"The video has no content yet: it is {_STATUS[record.state]}.")
    deliveries.note_fault(record)
    params = _params(succeeded(record, NAMES))
    return await file_response(request, only_file(record), VIDEO_MIME[params.format], f"{record.id}.{params.format}")


async def delete(request: Request) -> Response:
    """Cancel the job, or delete the finished video; either way its routes answer 404 from now on."""
    record = await _find(request)
    parts = services(request)
    after = await parts.dispatcher.cancel(record.id, record.tenant, "the video was deleted by its owner")
    if after is not None and after.state != "cancelled":  # a cancelled one stays, because its usage is still to come
        await parts.dispatcher.remove(record.id, record.tenant)
    return Json({"id": record.id, "object": "video.deleted", "deleted": True})


ROUTES = [
    Route("/v1/videos", create, methods=["POST"]),
    Route("/v1/videos", list_videos, methods=["GET"]),
    Route("/v1/videos/{id}", status, methods=["GET"]),
    Route("/v1/videos/{id}", delete, methods=["DELETE"]),
    Route("/v1/videos/{id}/content", content, methods=["GET"]),
]


def to_params(passed: dict[str, Any], handled: dict[str, Any]) -> Any:
    """Work parameters of a video. Raises FaultError naming the field in OpenAI's words."""
    value = {**passed, **size_params(handled.get("size"))}
    seconds = value.get("seconds")
    if isinstance(seconds, str):  # OpenAI's own type of this field
        try:
            value["seconds"] = float(seconds)
        except ValueError:
            raise refuse("invalid_parameter", "seconds: Expected a number.", "seconds") from None
    return work_params(Kind.VIDEO, value, NAMES)


def to_video(record: JobRecord, percent: int) -> dict[str, Any]:
    """OpenAI's video object."""
    params = _params(record)
    video: dict[str, Any] = {
        "id": record.id,
        "object": "video",
        "created_at": record.created_ms // 1000,
        "completed_at": record.finished_ms // 1000 if record.finished_ms is not None else None,
        "expires_at": None,
        "model": record.model,
        "progress": 100 if record.state == "succeeded" else percent,
        "prompt": params.prompt,
        "remixed_from_video_id": None,
        "seconds": f"{params.seconds:g}",
        "size": f"{params.width}x{params.height}",
        "status": _STATUS[record.state],
        "error": None,
    }
    if record.state == "failed":
        fault = in_callers_words(ending_fault(record), NAMES)
        video["error"] = {"code": fault.code, "message": fault.message}
    return video


async def _find(request: Request) -> JobRecord:
    """The video's job. A cancelled one is a deleted one."""
    name = request.path_params["id"]
    record = await services(request).dispatcher.get(name, caller(request).tenant)
    if record is None or record.kind != Kind.VIDEO or record.state == "cancelled":
        raise refuse("not_found", f"There is no video {name!r}.", "video_id")
    return record


def _params(record: JobRecord) -> VideoParams:
    return msgspec.msgpack.decode(record.params, type=VideoParams)
