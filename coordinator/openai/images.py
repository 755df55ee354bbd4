"""POST /v1/images/generations."""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from coordinator import deliveries
from coordinator.answers import finished, job_headers, result_of
from coordinator.bodies import FieldTable, choice, flag, model_name, read_json, work_params
from coordinator.errors import Json
from coordinator.openai.pictures import SIZE_NAMES, size_params
from coordinator.records import JobRecord, StoredInput
from coordinator.services import Services, services, submission
from coordinator.streams import JobStream, sse
from protocol.faults import refuse
from protocol.work import ImageParams, ImageResult, Kind

# A multiple of three, so that the base64 of the pieces is the base64 of the whole.
PIECE_BYTES = 3 * 2**18
MAX_STREAMED_BYTES = 64 * 2**20  # of one picture in an event: 4096 x 4096 pixels of PNG

FIELDS = FieldTable(
    passed=frozenset({"prompt", "n", "negative_prompt", "steps", "guidance", "seed"}),
    handled=frozenset({"model", "size", "response_format", "output_format", "quality", "output_compression", "stream"}),
    ignored=frozenset({"user", "moderation", "safety_identifier"}),
    fixed={
        "background": ("auto", "opaque"),
        "style": (),
        "partial_images": (0,),
    },
)


async def create(request: Request) -> Response:
    """Make images; the answer carries them as base64 (default) or as signed URLs."""
    passed, handled = FIELDS.pick(await read_json(request))
    return await answer(request, passed, handled)


async def answer(
    request: Request, passed: dict[str, Any], handled: dict[str, Any], inputs: tuple[StoredInput, ...] = ()
) -> Response:
    """Run a checked request, which may begin from an image, and answer it in the asked form."""
    model = model_name(handled)
    stream = flag(handled, "stream")
    form = choice(handled, "response_format", ("b64_json", "url"), "b64_json")
    params = to_params(passed, handled)
    parts = services(request)
    job = submission(request, Kind.IMAGE, model, params, inputs=inputs)
    if stream:
        if form != "b64_json":
            raise refuse("unsupported", "response_format: A stream carries b64_json only.", "response_format")
        kind = "image_edit" if inputs else "image_generation"
        pictures = PictureStream(parts, kind, params)
        return JobStream(parts, [(job, pictures)], field_names(handled), pictures.completed)
    record = await finished(request, job, field_names(handled))
    result = _checked(record, params)
    head = {
        "created": record.created_ms // 1000,
        "output_format": params.format,
        "size": f"{result.width}x{result.height}",
    }
    if form == "b64_json":
        body = _with_bytes(parts, record, result, head)
        return StreamingResponse(body, media_type="application/json", headers=job_headers(record))
    deliveries.not_yet(record)
    base = str(request.base_url).rstrip("/")
    data = [
        {"url": base + parts.blobs.client_url(file.blob, parts.limits.blob_url_s), **_seed(result, index)}
        for index, file in enumerate(record.files)
    ]
    return Json({**head, "data": data}, headers=job_headers(record))


ROUTES = [Route("/v1/images/generations", create, methods=["POST"])]


def to_params(passed: dict[str, Any], handled: dict[str, Any]) -> Any:
    """Work parameters of an image request. Raises FaultError naming the field in OpenAI's words."""
    value = {**passed, **size_params(handled.get("size"))}
    if "output_format" in handled:
        value["format"] = handled["output_format"]
    quality = handled.get("quality", "auto")
    if isinstance(quality, str):
        # Names of quality tiers mean nothing to a diffusion model; only the defaults are harmless.
        if quality not in ("auto", "standard"):
            raise refuse("unsupported", "quality: Expected a number from 1 to 100 (of the encoder).", "quality")
    else:
        value["quality"] = quality
    if "output_compression" in handled:
        value["quality"] = handled["output_compression"]
    return work_params(Kind.IMAGE, value, field_names(handled))


def field_names(handled: dict[str, Any]) -> dict[str, str]:
    """Our field names -> those that the caller used."""
    quality = "output_compression" if "output_compression" in handled else "quality"
    return {**SIZE_NAMES, "format": "output_format", "quality": quality}


def _checked(record: JobRecord, params: ImageParams) -> ImageResult:
    result: ImageResult = result_of(record)
    if len(record.files) != params.n:
        raise refuse("engine_protocol", f"The worker left {len(record.files)} files where {params.n} are due.")
    return result


class PictureStream:
    """Nothing until the end, when each picture is one event; comment lines keep the stream alive until then."""

    def __init__(self, parts: Services, kind: str, params: ImageParams) -> None:
        self._parts, self._kind, self._params = parts, kind, params

    def start(self, _record: JobRecord) -> list[bytes]:
        """Only the headers."""
        return []

    def chunk(self, _data: bytes) -> list[bytes]:
        """Engines of this kind send none."""
        return []

    def end(self, _record: JobRecord, _complete: bool) -> list[bytes]:
        """The pictures follow by `completed`."""
        return []

    async def completed(self, records: Sequence[JobRecord]) -> AsyncGenerator[bytes, None]:
        """One event per picture; one picture at a time is in memory."""
        [record] = records
        result = _checked(record, self._params)
        for index, file in enumerate(record.files):
            data = await self._parts.blobs.read(file.blob, MAX_STREAMED_BYTES)
            name = f"{self._kind}.completed"
            event = {
                "type": name,
                "b64_json": base64.b64encode(data).decode(),
                "created_at": record.created_ms // 1000,
                "output_format": self._params.format,
                "size": f"{result.width}x{result.height}",
                "background": "opaque",
                "quality": "auto",
                "usage": {
                    "input_tokens": 0,
                    "input_tokens_details": {"image_tokens": 0, "text_tokens": 0},
                    "output_tokens": 0,
                    "total_tokens": 0,
                },
                **_seed(result, index),
            }
            yield sse(event, name)


def _seed(result: ImageResult, index: int) -> dict[str, int]:
    return {"seed": result.seeds[index]} if index < len(result.seeds) else {}


async def _with_bytes(
    parts: Services, record: JobRecord, result: ImageResult, head: dict[str, Any]
) -> AsyncIterator[bytes]:
    """The answer's JSON with base64 inside, made piece by piece: the images are never in memory whole."""
    yield msgspec.json.encode(head)[:-1] + b',"data":['
    for index, file in enumerate(record.files):
        seed = msgspec.json.encode(_seed(result, index))[1:-1]
        yield (b"," if index else b"") + b"{" + seed + (b"," if seed else b"") + b'"b64_json":"'
        async with await parts.blobs.open(file.blob) as source:
            while piece := await source.read(PIECE_BYTES):
                yield base64.b64encode(piece)
        yield b'"}'
    yield b"]}"
