"""A model that loads: nobody waits in silence, and the load is not given up because somebody was told so."""

from __future__ import annotations

import threading
import time
from typing import Any

import httpx
import openai
import pytest

from protocol.faults import Fault, FaultError
from protocol.work import AudioResult, Delta, EmbeddingResult, LlmChunk, LlmResult, TtsChunk

USER = {"role": "user", "content": "hi"}
AT_ONCE = {"x-bulkhead-begin-s": "0"}
WAIT_S = 60.0


class Loading:
    """A worker whose model takes as long to load as the test says, and whose work takes `work_s` unless cancelled."""

    def __init__(self, serve: Any, model: str, work_s: float = 0.0) -> None:
        self.work_s = work_s
        self.loaded = threading.Event()
        self.offered = threading.Event()
        self.worker = serve(self.script, model, "llm", "embedding")

    def script(self, job: Any) -> None:
        job.progress(1, 4, phase="load")
        self.offered.set()
        assert self.loaded.wait(WAIT_S)
        job.started()
        if self.work_s and job.cancelled.wait(self.work_s):
            raise FaultError(Fault("cancelled", "Cancelled."))
        if job.offer.kind == "embedding":
            job.complete(EmbeddingResult(count=1, dimensions=1, vectors=b"\0\0\x80\x3f"))
            return
        if job.offer.stream:
            job.chunk(LlmChunk(delta=Delta(content="ready")))
        job.complete(LlmResult(content="ready"))


def state(http: httpx.Client, job: str) -> str:
    return str(http.get(f"/v1/jobs/{job}").json()["state"])


@pytest.mark.parametrize(
    ("route", "body"), [("chat/completions", {"messages": [USER]}), ("embeddings", {"input": "a"})]
)
def test_a_plain_request_is_told_to_come_again(
    http: httpx.Client, serve: Any, route: str, body: dict[str, Any]
) -> None:
    model = Loading(serve, f"slow-{route}")
    answer = http.post(f"/v1/{route}", json={"model": f"slow-{route}", **body}, headers=AT_ONCE)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    error = answer.json()["error"]
    assert (error["code"], error["retryable"]) == ("model_loading", True)
    assert "load 1 of 4" in error["message"]
    held = answer.headers["x-bulkhead-job"]
    assert state(http, held) == "running", "somebody waits for the load"
    model.loaded.set()
    assert http.post(f"/v1/{route}", json={"model": f"slow-{route}", **body}).status_code == 200
    until = time.monotonic() + WAIT_S
    while (end := state(http, held)) not in ("cancelled", "succeeded"):
        assert time.monotonic() < until, end
        time.sleep(0.02)


def test_who_was_told_to_come_again_does_not_run(http: httpx.Client, serve: Any) -> None:
    """The job that waited for the load is cancelled when its work begins."""
    cancelled = threading.Event()
    loaded = threading.Event()

    def script(job: Any) -> None:
        job.progress(0, 2, phase="load")
        assert loaded.wait(WAIT_S)
        job.started()
        if job.cancelled.wait(WAIT_S):
            cancelled.set()
        job.complete(LlmResult(content="for nobody"))

    serve(script, "slow-held", "llm")
    body = {"model": "slow-held", "messages": [USER]}
    answer = http.post("/v1/chat/completions", json=body, headers=AT_ONCE)
    assert answer.status_code == 503
    loaded.set()
    assert cancelled.wait(WAIT_S)
    assert state(http, answer.headers["x-bulkhead-job"]) == "cancelled"


def test_with_an_idempotency_key_the_answer_waits(http: httpx.Client, serve: Any) -> None:
    model = Loading(serve, "slow-key", work_s=0.3)
    body = {"model": "slow-key", "messages": [USER]}
    headers = {"idempotency-key": "load-1"}
    first = http.post("/v1/chat/completions", json=body, headers={**headers, **AT_ONCE})
    assert first.status_code == 503
    model.loaded.set()
    second = http.post("/v1/chat/completions", json=body, headers=headers)
    assert second.json()["choices"][0]["message"]["content"] == "ready"
    assert second.headers["x-bulkhead-job"] == first.headers["x-bulkhead-job"]
    assert len(model.worker.jobs) == 1


def test_the_official_client_comes_again_by_itself(ai: openai.OpenAI, serve: Any) -> None:
    tries = []

    def script(job: Any) -> None:
        tries.append(job.id)
        if len(tries) == 1:
            job.progress(1, 4, phase="load")
            job.cancelled.wait(WAIT_S)  # by the end of the test: it waits for a load that never ends
            return
        job.started()
        job.complete(LlmResult(content="ready"))

    serve(script, "slow-client", "llm")
    patient = ai.with_options(max_retries=1, default_headers=AT_ONCE)
    patient._calculate_retry_timeout = lambda *_args: 0.01  # type: ignore[method-assign]
    answer = patient.chat.completions.create(model="slow-client", messages=[USER])  # type: ignore[list-item]
    assert answer.choices[0].message.content == "ready"
    assert len(tries) == 2


def test_a_stream_tells_what_it_waits_for(http: httpx.Client, serve: Any) -> None:
    model = Loading(serve, "slow-stream")
    body = {"model": "slow-stream", "messages": [USER], "stream": True}
    lines = []
    with http.stream("POST", "/v1/chat/completions", json=body, headers=AT_ONCE) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            lines.append(line)
            if "load 1 of 4" in line:
                model.loaded.set()
    assert ": waiting: load 1 of 4" in lines
    assert "ready" in "".join(lines)
    assert lines[-2] == "data: [DONE]"


def test_a_stream_of_bytes_is_told_to_come_again(http: httpx.Client, serve: Any) -> None:
    """No comment may stand in it: what came later as its bytes would be cut off, or silence."""
    loaded = threading.Event()
    jobs: list[str] = []

    def script(job: Any) -> None:
        jobs.append(job.id)
        job.progress(1, 4, phase="load")
        assert loaded.wait(WAIT_S)
        job.started()
        if job.id == jobs[0]:  # nobody waits for it any more: the coordinator says so
            assert job.cancelled.wait(WAIT_S)
            raise FaultError(Fault("cancelled", "Cancelled."))
        job.chunk(TtsChunk(audio=b"sound"))
        job.upload("speech.mp3", b"sound", "audio/mpeg")
        job.complete(AudioResult(sample_rate=8000, duration=1.0, format="mp3"))

    serve(script, "slow-voice", "audio_tts")
    body = {"model": "slow-voice", "input": "hi", "stream_format": "audio"}
    answer = http.post("/v1/audio/speech", json=body, headers=AT_ONCE)
    assert (answer.status_code, answer.headers["retry-after"]) == (503, "5")
    error = answer.json()["error"]
    assert (error["code"], error["retryable"]) == ("model_loading", True)
    assert "load 1 of 4" in error["message"]
    held = answer.headers["x-bulkhead-job"]
    assert state(http, held) == "running", "somebody waits for the load"
    loaded.set()
    again = http.post("/v1/audio/speech", json=body)
    assert (again.status_code, again.content) == (200, b"sound")
    until = time.monotonic() + WAIT_S
    while (end := state(http, held)) != "cancelled":
        assert time.monotonic() < until, end
        time.sleep(0.02)
    assert jobs == [held, again.headers["x-bulkhead-job"]]


def test_a_stream_of_bytes_that_has_begun_is_not_refused(http: httpx.Client, serve: Any) -> None:
    """What a worker says of a load after its first bytes is no reason to be told to come again."""
    heard = threading.Event()

    def script(job: Any) -> None:
        job.started()
        job.chunk(TtsChunk(audio=b"one "))
        assert heard.wait(WAIT_S)
        job.progress(1, 4, phase="load")
        job.chunk(TtsChunk(audio=b"two"))
        job.upload("speech.mp3", b"one two", "audio/mpeg")
        job.complete(AudioResult(sample_rate=8000, duration=1.0, format="mp3"))

    serve(script, "begun-voice", "audio_tts")
    body = {"model": "begun-voice", "input": "hi", "stream_format": "audio"}
    with http.stream("POST", "/v1/audio/speech", json=body, headers=AT_ONCE) as answer:
        assert answer.status_code == 200
        came = b""
        for piece in answer.iter_raw():
            came += piece
            heard.set()
    assert came == b"one two"


def test_the_official_client_reads_such_a_stream(ai: openai.OpenAI, serve: Any) -> None:
    model = Loading(serve, "slow-sdk")
    stream = ai.chat.completions.create(
        model="slow-sdk",
        messages=[USER],  # type: ignore[list-item]
        stream=True,
        extra_headers=AT_ONCE,
    )
    assert model.offered.wait(WAIT_S)
    model.loaded.set()
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "ready"


def test_without_a_load_a_request_waits_for_its_turn(http: httpx.Client, serve: Any) -> None:
    """To come again would only cost it its place in the queue."""
    go_on = threading.Event()

    def script(job: Any) -> None:
        assert go_on.wait(WAIT_S)
        job.started()
        job.progress(1, 2, phase="run")
        job.complete(LlmResult(content="done"))

    serve(script, "busy", "llm")
    threading.Timer(0.3, go_on.set).start()
    answer = http.post("/v1/chat/completions", json={"model": "busy", "messages": [USER]}, headers=AT_ONCE)
    assert answer.status_code == 200


@pytest.mark.parametrize("value", ["-1", "soon", "nan", "3601"])
@pytest.mark.parametrize("stream", [False, True])
def test_the_header_is_checked(http: httpx.Client, serve: Any, value: str, stream: bool) -> None:
    body = {"model": "m", "messages": [USER], "stream": stream}
    answer = http.post("/v1/chat/completions", json=body, headers={"x-bulkhead-begin-s": value})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "x-bulkhead-begin-s")
