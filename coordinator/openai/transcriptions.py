"""POST /v1/audio/transcriptions and /v1/audio/translations."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from coordinator.answers import finished, job_headers, result_of
from coordinator.bodies import FieldTable, choice, flag, model_name, work_params
from coordinator.errors import Json
from coordinator.forms import form_values
from coordinator.records import JobRecord
from coordinator.services import services, submission
from coordinator.streams import JobStream, sse
from coordinator.uploads import is_multipart, read_form, uploads
from protocol.faults import refuse
from protocol.framing import UNDECODABLE
from protocol.transcript import to_srt, to_verbose_json, to_vtt
from protocol.work import Kind, SttChunk, SttResult

FORMATS = ("json", "text", "srt", "verbose_json", "vtt")
GRANULARITIES = ("word", "segment")
# That an English-only model cannot translate is a matter of the model: the route has no field for the task.
NAMES = {"audio": "file", "task": "model", "word_timestamps": "timestamp_granularities"}

FIELDS = FieldTable(
    passed=frozenset({"language", "prompt", "temperature", "beam_size", "vad", "chunk_length_s"}),
    handled=frozenset({"model", "response_format", "timestamp_granularities", "stream"}),
    ignored=frozenset({"user"}),
    fixed={"include": (), "chunking_strategy": (), "keywords": (), "languages": ()},
)
_TYPES: dict[str, type] = {
    "temperature": float,
    "beam_size": int,
    "vad": bool,
    "chunk_length_s": int,
    "stream": bool,
}


async def transcribe(request: Request) -> Response:
    """Text in the language that is spoken."""
    return await _answer(request, "transcribe")


async def translate(request: Request) -> Response:
    """Text in English."""
    return await _answer(request, "translate")


ROUTES = [
    Route("/v1/audio/transcriptions", transcribe, methods=["POST"]),
    Route("/v1/audio/translations", translate, methods=["POST"]),
]


async def _answer(request: Request, task: str) -> Response:
    if not is_multipart(request):
        raise refuse("unsupported_media_type", "Expected a body of type multipart/form-data with the file in it.")
    parts = services(request)
    async with uploads(parts) as blobs:
        form = await read_form(request, blobs, {"file": "audio"})
        values = form_values(form, _TYPES, {"timestamp_granularities": str, "include": str})
        passed, handled = FIELDS.pick(values)
        model = model_name(handled)
        if "file" not in form.files:
            raise refuse("invalid_parameter", "file: The audio file is required.", "file")
        wish = to_wish(handled)
        words = "word" in wish.granularities
        params = work_params(Kind.AUDIO_STT, {**passed, "task": task, "word_timestamps": words}, NAMES)
        inputs = (form.files["file"],)
        job = submission(request, Kind.AUDIO_STT, model, params, inputs=inputs, stream=wish.stream)
        if wish.stream:
            return JobStream(parts, [(job, TranscriptStream())], NAMES)
        record = await finished(request, job, NAMES)
        return to_response(record, result_of(record), wish)


# ---- request ------------------------------------------------------------------------------------------------


class Wish(msgspec.Struct, frozen=True):
    """How the caller wants the transcript."""

    format: str
    granularities: tuple[str, ...]
    stream: bool


def to_wish(handled: dict[str, Any]) -> Wish:
    """Read the fields about the answer's shape. Raises FaultError(invalid_parameter)."""
    shape = choice(handled, "response_format", FORMATS, "json")
    stream = flag(handled, "stream")
    if stream and shape not in ("json", "text"):
        message = "response_format: Only json and text can be streamed."
        raise refuse("invalid_parameter", message, "response_format")
    granularities = tuple(handled.get("timestamp_granularities", ()))
    for item in granularities:
        if item not in GRANULARITIES:
            message = f"timestamp_granularities: Expected {' and '.join(GRANULARITIES)}."
            raise refuse("invalid_parameter", message, "timestamp_granularities")
    if granularities and shape != "verbose_json":
        message = "timestamp_granularities: Only allowed with `response_format`: verbose_json."
        raise refuse("invalid_parameter", message, "timestamp_granularities")
    return Wish(shape, granularities or ("segment",), stream)


# ---- answer -------------------------------------------------------------------------------------------------


def to_response(record: JobRecord, result: SttResult, wish: Wish) -> Response:
    """The transcript in the asked format."""
    headers = job_headers(record)
    if wish.format == "text":
        return PlainTextResponse(result.text.strip() + "\n", headers=headers)
    if wish.format == "srt":
        return PlainTextResponse(to_srt(result), headers=headers)
    if wish.format == "vtt":
        return Response(to_vtt(result), media_type="text/vtt", headers=headers)
    usage = _usage(result)
    if wish.format == "verbose_json":
        return Json({**to_verbose_json(result, wish.granularities), "usage": usage}, headers=headers)
    return Json({"text": result.text.strip(), "usage": usage}, headers=headers)


def _usage(result: SttResult) -> dict[str, Any]:
    # Whole seconds, rounded up, as OpenAI counts them.
    return {"type": "duration", "seconds": -int(-result.duration // 1)}


class TranscriptStream:
    """Renders segments as transcript.text.delta events and the end as transcript.text.done."""

    def __init__(self) -> None:
        self._text = ""

    def start(self, _record: JobRecord) -> list[bytes]:
        """Only the headers."""
        return []

    def chunk(self, data: bytes) -> list[bytes]:
        """One segment."""
        try:
            segment = msgspec.msgpack.decode(data, type=SttChunk).segment
        except UNDECODABLE as error:
            raise refuse("engine_protocol", f"The worker's chunk is not one of kind audio_stt: {error}.") from None
        text = segment.text if self._text else segment.text.lstrip()
        self._text += text
        return [_delta(text)] if text else []

    def end(self, record: JobRecord, complete: bool) -> list[bytes]:
        """What was not streamed yet, then the whole text."""
        result: SttResult = result_of(record)
        whole = result.text.strip()
        events = []
        if not complete and whole.startswith(self._text) and len(whole) > len(self._text):
            events.append(_delta(whole[len(self._text) :]))
        return [*events, sse({"type": "transcript.text.done", "text": whole})]


def _delta(text: str) -> bytes:
    return sse({"type": "transcript.text.delta", "delta": text})
