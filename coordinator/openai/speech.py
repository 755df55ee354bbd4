"""POST /v1/audio/speech: text in, audio bytes out."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator.answers import finished, job_headers, result_of
from coordinator.bodies import FieldTable, model_name, read_json, work_params
from coordinator.files import file_response, only_file
from coordinator.services import submission
from protocol.faults import refuse
from protocol.work import AUDIO_MIME, AudioResult, Kind

DEFAULT_FORMAT = "mp3"
NAMES = {"text": "input", "format": "response_format"}
SAMPLE_RATE = "x-audio-sample-rate"  # the only way to learn it from raw PCM

FIELDS = FieldTable(
    passed=frozenset({"speed", "language"}),
    handled=frozenset({"model", "input", "voice", "response_format"}),
    ignored=frozenset({"user"}),
    fixed={"instructions": ("",), "stream_format": ("audio",)},
)


async def create(request: Request) -> Response:
    """Speak."""
    passed, handled = FIELDS.pick(await read_json(request))
    model = model_name(handled)
    params = to_params(passed, handled)
    record = await finished(request, submission(request, Kind.AUDIO_TTS, model, params), NAMES)
    result: AudioResult = result_of(record)
    headers = {**job_headers(record), SAMPLE_RATE: str(result.sample_rate)}
    file = only_file(record)
    return file_response(request, file, AUDIO_MIME[params.format], f"speech.{params.format}", headers)


ROUTES = [Route("/v1/audio/speech", create, methods=["POST"])]


def to_params(passed: dict[str, Any], handled: dict[str, Any]) -> Any:
    """Work parameters of a speech. Raises FaultError naming the field in OpenAI's words."""
    if "input" not in handled:
        raise refuse("invalid_parameter", "input: The field is required.", "input")
    audio_format = handled.get("response_format", DEFAULT_FORMAT)
    if not isinstance(audio_format, str) or audio_format not in AUDIO_MIME:
        message = f"response_format: Expected one of {', '.join(sorted(AUDIO_MIME))}."
        raise refuse("invalid_parameter", message, "response_format")
    value = {**passed, "text": handled["input"], "format": audio_format}
    voice = handled.get("voice")
    if isinstance(voice, dict):
        voice = voice.get("id")
        if voice is None:
            raise refuse("invalid_parameter", "voice.id: The field is required.", "voice.id")
    if voice is not None:
        value["voice"] = voice
    return work_params(Kind.AUDIO_TTS, value, NAMES)
