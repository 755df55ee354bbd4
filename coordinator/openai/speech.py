"""POST /v1/audio/speech: text in, audio bytes out.

Without `stream_format` the answer is the finished file, with its length, byte ranges, and every fault as a status.
With "audio" its bytes come as they are made, with "sse" as events; formats whose beginning is only known at the end
(WAV, FLAC) come at the end all the same.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator.answers import finished, job_headers, result_of
from coordinator.blobs.answers import SAFE_HEADERS
from coordinator.bodies import FieldTable, choice, model_name, read_json, work_params
from coordinator.files import file_response, only_file
from coordinator.records import JobRecord
from coordinator.services import Services, services, submission
from coordinator.streams import EVENTS, JobStream, Shape, sse
from protocol.faults import refuse
from protocol.framing import UNDECODABLE
from protocol.work import AUDIO_MIME, AudioResult, Kind, TtsChunk, TtsParams

DEFAULT_FORMAT = "mp3"
NAMES = {"text": "input", "format": "response_format"}
PIECE_BYTES = 64 * 2**10
SAMPLE_RATE = "x-audio-sample-rate"  # the only way to learn it from raw PCM

FIELDS = FieldTable(
    passed=frozenset({"speed", "language"}),
    handled=frozenset({"model", "input", "voice", "response_format", "stream_format"}),
    ignored=frozenset({"user"}),
    fixed={"instructions": ("",)},
)


async def create(request: Request) -> Response:
    """Speak."""
    passed, handled = FIELDS.pick(await read_json(request))
    model = model_name(handled)
    params = to_params(passed, handled)
    stream_format = choice(handled, "stream_format", ("file", "audio", "sse"), "file")
    if stream_format != "file":
        return _stream(request, model, params, events=stream_format == "sse")
    record = await finished(request, submission(request, Kind.AUDIO_TTS, model, params), NAMES)
    result: AudioResult = result_of(record)
    headers = {**job_headers(record), SAMPLE_RATE: str(result.sample_rate)}
    file = only_file(record)
    return await file_response(request, file, AUDIO_MIME[params.format], f"speech.{params.format}", headers)


def _stream(request: Request, model: str, params: TtsParams, *, events: bool) -> JobStream:
    parts = services(request)
    job = submission(request, Kind.AUDIO_TTS, model, params, stream=True)
    speech = SpeechStream(parts, events)
    headers = {} if events else dict(SAFE_HEADERS)
    # Of a model of several workers, that of the first that said it: a voice has one rate.
    rates = [served.limits.get("sample_rate") for served in parts.dispatcher.models() if served.name == model]
    if not events and params.format == "pcm" and rates and isinstance(rates[0], int):
        headers[SAMPLE_RATE] = str(rates[0])
    shape = EVENTS if events else Shape(AUDIO_MIME[params.format])
    return JobStream(parts, [(job, speech)], NAMES, speech.rest, shape, headers)


class SpeechStream:
    """The bytes of the file that is being made, as they are or as speech.audio events."""

    def __init__(self, parts: Services, events: bool) -> None:
        self._parts, self._events = parts, events
        self._sent = 0

    def start(self, _record: JobRecord) -> list[bytes]:
        """Only the headers."""
        return []

    def chunk(self, data: bytes) -> list[bytes]:
        """The next bytes."""
        try:
            audio = msgspec.msgpack.decode(data, type=TtsChunk).audio
        except UNDECODABLE as error:
            raise refuse("engine_protocol", f"The worker's chunk is not one of kind audio_tts: {error}.") from None
        self._sent += len(audio)
        return [self._written(audio)]

    def end(self, _record: JobRecord, _complete: bool) -> list[bytes]:
        """What is left follows by `rest`."""
        return []

    async def rest(self, records: Sequence[JobRecord]) -> AsyncGenerator[bytes, None]:
        """What was not streamed, from the file; then the last event."""
        [record] = records
        result_of(record)
        async with await self._parts.blobs.open(only_file(record).blob) as file:
            await file.seek(self._sent)
            while piece := await file.read(PIECE_BYTES):
                yield self._written(piece)
        if self._events:
            usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0, **record.usage}
            yield sse({"type": "speech.audio.done", "usage": usage}, "speech.audio.done")

    def _written(self, audio: bytes) -> bytes:
        if not self._events:
            return audio
        return sse({"type": "speech.audio.delta", "audio": base64.b64encode(audio).decode()}, "speech.audio.delta")


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
