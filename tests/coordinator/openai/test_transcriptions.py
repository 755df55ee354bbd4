"""Transcriptions and translations over real multipart uploads."""

from __future__ import annotations

import io
import threading
from http.client import HTTPConnection
from typing import Any

import httpx
import openai
import pytest

from coordinator.testing import Running
from protocol.faults import Fault, FaultError
from protocol.work import MAX_AUDIO_BYTES, Segment, SttChunk, SttResult, Word

KEY = "blob_" + 26 * "0"
WAV = b"RIFF\x24\x00\x00\x00WAVEfmt " + bytes(60)
SEGMENTS = [
    Segment(id=0, start=0.0, end=1.5, text=" one two", words=[Word(word=" one", start=0.0, end=0.5, probability=0.9)]),
    Segment(id=1, start=1.5, end=2.25, text=" three"),
]


def script(job: Any) -> None:
    assert job.read("audio") == WAV
    job.started()
    for segment in SEGMENTS if job.offer.stream else ():
        job.chunk(SttChunk(segment=segment))
    result = SttResult(text="one two three", language="en", duration=2.25, task=job.params.task, segments=SEGMENTS)
    job.complete(result, {"audio_seconds": 2.25})


@pytest.fixture
def worker(serve: Any) -> Any:
    return serve(script, "hear", "audio_stt")


def ask(ai: openai.OpenAI, **more: Any) -> Any:
    return ai.audio.transcriptions.create(model="hear", file=("a.wav", io.BytesIO(WAV)), **more)


def test_json_and_text(ai: openai.OpenAI, worker: Any) -> None:
    answer = ask(ai)
    assert answer.text == "one two three"
    assert answer.usage.seconds == 3
    assert ask(ai, response_format="text") == "one two three\n"
    (file,) = worker.jobs[0].offer.inputs
    assert (file.name, file.mime, file.size) == ("audio", "audio/wav", len(WAV))


def test_srt_and_vtt(ai: openai.OpenAI, worker: Any) -> None:
    assert ask(ai, response_format="srt").startswith("1\n00:00:00,000 --> 00:00:01,500\none two\n")
    assert ask(ai, response_format="vtt").startswith("WEBVTT\n\n00:00:00.000 --> 00:00:01.500\none two\n")


def test_verbose_json_with_words(ai: openai.OpenAI, worker: Any) -> None:
    answer = ask(ai, response_format="verbose_json", timestamp_granularities=["word", "segment"])
    assert answer.language == "en"
    assert answer.segments[1].text == " three"
    assert answer.words[0].word == " one"
    assert worker.jobs[0].params.word_timestamps


def test_options_reach_the_engine(ai: openai.OpenAI, worker: Any) -> None:
    ask(ai, language="de", prompt="names", temperature=0.5, extra_body={"vad": True, "beam_size": 3})
    made = worker.jobs[0].params
    assert (made.language, made.prompt, made.temperature, made.vad, made.beam_size) == ("de", "names", 0.5, True, 3)
    assert made.task == "transcribe"


def test_translations(http: httpx.Client, worker: Any) -> None:
    answer = http.post("/v1/audio/translations", data={"model": "hear"}, files={"file": ("a.wav", WAV)})
    assert answer.json()["text"] == "one two three"
    assert worker.jobs[0].params.task == "translate"


def test_a_streamed_transcript(ai: openai.OpenAI, worker: Any) -> None:
    events = list(ask(ai, stream=True))
    assert [event.type for event in events] == ["transcript.text.delta"] * 2 + ["transcript.text.done"]
    assert "".join(event.delta for event in events[:-1]) == events[-1].text == "one two three"


@pytest.mark.parametrize(
    ("data", "field"),
    [
        ({"response_format": "xml"}, "response_format"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": "nan"}, "temperature"),
        ({"beam_size": "100000"}, "beam_size"),
        ({"chunk_length_s": "0"}, "chunk_length_s"),
        ({"language": "English"}, "language"),
        ({"timestamp_granularities[]": "word"}, "timestamp_granularities"),
        ({"timestamp_granularities[]": "letter", "response_format": "verbose_json"}, "timestamp_granularities"),
        ({"stream": "true", "response_format": "srt"}, "response_format"),
        ({"include[]": "logprobs"}, "include"),
        ({"initial_prompt": "x"}, "initial_prompt"),
        ({"vad": "maybe"}, "vad"),
        ({"model": ""}, "model"),
    ],
)
def test_refusals_name_the_field(http: Any, data: dict[str, str], field: str) -> None:
    answer = http.post("/v1/audio/transcriptions", data={"model": "hear", **data}, files={"file": ("a", WAV)})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


def test_bad_uploads(http: Any) -> None:
    def post(**more: Any) -> Any:
        answer = http.post("/v1/audio/transcriptions", **more)
        return answer.status_code, answer.json()["error"]["param"]

    data = {"model": "hear"}
    assert post(data=data, files={"file": ("a.wav", b"")}) == (400, "file")
    assert post(data=data, files={"audio": ("a.wav", WAV)}) == (400, "audio")
    assert post(data=data, files=[("file", ("a", WAV)), ("file", ("b", WAV))]) == (400, "file")
    assert post(data=data, files={"other": (None, "x")}) == (400, "other")
    assert post(files={"model": (None, "hear")}) == (400, "file")
    assert post(json=data) == (415, None)


def test_an_upload_beyond_the_limit_is_413(http: Any) -> None:
    head = b'--b\r\ncontent-disposition: form-data; name="file"; filename="a"\r\n\r\n'
    headers = {"content-type": "multipart/form-data; boundary=b"}

    def pieces() -> Any:
        yield head
        for _ in range(MAX_AUDIO_BYTES // 2**20 + 1):
            yield bytes(2**20)
        yield b"\r\n--b--\r\n"

    answer = http.post("/v1/audio/transcriptions", content=pieces(), headers=headers)
    assert (answer.status_code, answer.json()["error"]["param"]) == (413, "file")


def test_an_announced_length_beyond_the_limit_is_refused_before_the_body(served: Running) -> None:
    url = httpx.URL(served.url)
    connection = HTTPConnection(url.host, url.port, timeout=60)
    connection.putrequest("POST", "/v1/audio/transcriptions")
    headers = {**served.headers, "content-type": "multipart/form-data; boundary=b", "content-length": str(10**12)}
    for name, value in headers.items():
        connection.putheader(name, value)
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


def test_a_file_that_is_no_audio_is_left_to_the_engine(http: Any, serve: Any) -> None:
    asked = threading.Event()

    def refusing(_job: Any) -> None:
        asked.set()
        raise FaultError(Fault("invalid_input_file", "file: not audio.", field="file"))

    serve(refusing, "hear-not", "audio_stt")
    answer = http.post("/v1/audio/transcriptions", data={"model": "hear-not"}, files={"file": ("a.txt", b"hello")})
    assert asked.is_set()
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_input_file")


def test_a_refused_upload_leaves_no_file(http: httpx.Client, served: Running) -> None:
    folder = served.coordinator.parts.blobs.path(KEY).parent
    before = set(folder.iterdir())
    for fields in ({"model": "nobody-serves-this"}, {"model": "whisper", "response_format": "xml"}, {}):
        answer = http.post("/v1/audio/transcriptions", data=fields, files={"file": ("a.wav", WAV)})
        assert answer.status_code >= 400, answer.text
        assert set(folder.iterdir()) <= before
