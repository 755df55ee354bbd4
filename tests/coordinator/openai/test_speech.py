"""Speech: bytes back with the right type."""

from __future__ import annotations

import base64
import json
import threading
from typing import Any

import httpx
import openai
import pytest

from protocol.faults import Fault, FaultError
from protocol.work import AUDIO_MIME, AudioResult, TtsChunk

WAIT_S = 60.0


def script(job: Any) -> None:
    job.started()
    data = f"{job.params.text}|{job.params.voice}|{job.params.speed}".encode()
    # A worker's own idea of the type is not believed.
    job.upload(f"speech.{job.params.format}", data, "text/html")
    job.complete(AudioResult(sample_rate=22050, duration=1.0, format=job.params.format), {"characters": 2})


@pytest.fixture
def worker(serve: Any) -> Any:
    return serve(script, "say", "audio_tts")


def test_mp3_is_the_default(ai: openai.OpenAI, worker: Any) -> None:
    answer = ai.audio.speech.create(model="say", voice="amy", input="hi", speed=1.5)
    assert answer.content == b"hi|amy|1.5"
    assert answer.response.headers["content-type"] == "audio/mpeg"
    assert answer.response.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize("name", sorted(AUDIO_MIME))
def test_every_format(http: Any, worker: Any, name: str) -> None:
    body = {"model": "say", "input": "hi", "voice": {"id": "amy"}, "response_format": name}
    answer = http.post("/v1/audio/speech", json=body)
    assert answer.status_code == 200
    assert answer.headers["content-type"] == AUDIO_MIME[name]
    assert answer.headers["x-audio-sample-rate"] == "22050"


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"response_format": "aac"}, "response_format"),
        ({"input": "  "}, "input"),
        ({"input": None}, "input"),
        ({"speed": 9}, "speed"),
        ({"voice": {}}, "voice.id"),
        ({"instructions": "whisper"}, "instructions"),
        ({"stream_format": "video"}, "stream_format"),
    ],
)
def test_refusals_name_the_field(http: Any, body: dict[str, Any], field: str) -> None:
    answer = http.post("/v1/audio/speech", json={"model": "say", "input": "hi", "voice": "amy", **body})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    if body.get("response_format") == "aac":
        assert "flac, mp3, ogg, opus, pcm, wav" in answer.json()["error"]["message"]


# ---- streamed


class Speaking:
    """A worker that says one piece, and the rest when the test has heard it."""

    def __init__(self) -> None:
        self.heard = threading.Event()
        self.fault: Fault | None = None

    def __call__(self, job: Any) -> None:
        job.started()
        assert job.offer.stream
        job.chunk(TtsChunk(audio=b"abc"))
        assert self.heard.wait(WAIT_S), "the first piece did not come before the second was made"
        if self.fault is not None:
            raise FaultError(self.fault)
        job.chunk(TtsChunk(audio=b"def"))
        job.upload(f"speech.{job.params.format}", b"abcdefgh", "audio/x")
        job.complete(AudioResult(sample_rate=22050, duration=1.0, format=job.params.format), {"characters": 2})


def test_bytes_come_as_they_are_made(ai: openai.OpenAI, serve: Any) -> None:
    speaking = Speaking()
    serve(speaking, "say-stream", "audio_tts")
    got = b""
    with ai.audio.speech.with_streaming_response.create(
        model="say-stream", voice="amy", input="hi", response_format="mp3", stream_format="audio"
    ) as answer:
        assert answer.headers["content-type"] == "audio/mpeg"
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert "content-length" not in answer.headers
        for piece in answer.iter_bytes():
            got += piece
            if got == b"abc":
                speaking.heard.set()
    assert got == b"abcdefgh", "what the encoder kept back comes from the file"


def test_events_of_speech(http: httpx.Client, serve: Any) -> None:
    speaking = Speaking()
    speaking.heard.set()
    serve(speaking, "say-sse", "audio_tts")
    body = {"model": "say-sse", "input": "hi", "voice": "amy", "stream_format": "sse"}
    text = http.post("/v1/audio/speech", json=body).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    audio = [base64.b64decode(event["audio"]) for event in events[:-1]]
    assert audio == [b"abc", b"def", b"gh"]
    assert {event["type"] for event in events[:-1]} == {"speech.audio.delta"}
    assert (events[-1]["type"], events[-1]["usage"]["characters"]) == ("speech.audio.done", 2)


def test_an_engine_that_streams_nothing_is_streamed_from_its_file(ai: openai.OpenAI, serve: Any) -> None:
    serve(script, "say-whole", "audio_tts")
    for form in ("audio", "sse"):
        answer = ai.audio.speech.create(model="say-whole", voice="amy", input="hi", stream_format=form)  # type: ignore[arg-type]
        assert b"hi|amy|1.0" in (answer.content if form == "audio" else base64.b64decode(answer.text.split('"')[7]))


def test_a_fault_in_the_middle_cuts_the_bytes_off(http: httpx.Client, serve: Any) -> None:
    """A body that ended well would be taken for the whole speech."""
    speaking = Speaking()
    speaking.fault = Fault("engine_failed", "It broke.")
    speaking.heard.set()
    serve(speaking, "say-torn", "audio_tts")
    body = {"model": "say-torn", "input": "hi", "voice": "amy"}
    with pytest.raises(httpx.RemoteProtocolError):
        http.post("/v1/audio/speech", json={**body, "stream_format": "audio"})
    text = http.post("/v1/audio/speech", json={**body, "stream_format": "sse"}).text
    assert "It broke." in text
    assert "DONE" not in text


def test_a_refusal_is_a_real_one_streamed_or_not(ai: openai.OpenAI, serve: Any) -> None:
    def picky(_job: Any) -> None:
        raise FaultError(Fault("invalid_parameter", "voice: Nobody.", "voice"))

    serve(picky, "say-picky", "audio_tts")
    for more in ({}, {"stream_format": "audio"}, {"stream_format": "sse"}):
        with pytest.raises(openai.BadRequestError) as refused:
            ai.audio.speech.create(model="say-picky", voice="x", input="hi", **more)  # type: ignore[arg-type]
        assert refused.value.param == "voice"
