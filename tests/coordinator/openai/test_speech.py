"""Speech: bytes back with the right type."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from protocol.work import AUDIO_MIME, AudioResult


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
        ({"stream_format": "sse"}, "stream_format"),
    ],
)
def test_refusals_name_the_field(http: Any, body: dict[str, Any], field: str) -> None:
    answer = http.post("/v1/audio/speech", json={"model": "say", "input": "hi", "voice": "amy", **body})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field
    if body.get("response_format") == "aac":
        assert "flac, mp3, ogg, opus, pcm, wav" in answer.json()["error"]["message"]
