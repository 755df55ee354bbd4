"""A client that goes away cancels its job within a second, on every route; one that made a job does not."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from protocol.faults import Fault, FaultError
from protocol.work import AudioResult, Delta, LlmChunk, LlmResult, Segment, SttChunk, TtsChunk, VideoResult
from tests.coordinator.openai.by_hand import sent_by_hand

WAIT_S = 60.0
PROMISE_S = 1.0
LEFT_S = 30.0  # it takes milliseconds; a loaded machine gets its time
TRIES = 20
USER = [{"role": "user", "content": "hi"}]
PNG = b"\x89PNG\r\n\x1a\n" + bytes(64)
KINDS = ("llm", "embedding", "rerank", "audio_stt", "audio_tts", "image", "video")
AUDIO = {"files": {"file": ("a.wav", b"RIFF0000WAVE")}}
PICTURE = {"files": {"image": ("a.png", PNG)}}

# name -> route, what is sent, how many jobs it makes
PLAIN: dict[str, tuple[str, dict[str, Any], int]] = {
    "chat": ("chat/completions", {"json": {"messages": USER}}, 1),
    "chat, several": ("chat/completions", {"json": {"messages": USER, "n": 3}}, 3),
    "completion": ("completions", {"json": {"prompt": "a"}}, 1),
    "embedding": ("embeddings", {"json": {"input": "a"}}, 1),
    "rerank": ("rerank", {"json": {"query": "a", "documents": ["b"]}}, 1),
    "transcription": ("audio/transcriptions", {"data": {}, **AUDIO}, 1),
    "translation": ("audio/translations", {"data": {}, **AUDIO}, 1),
    "speech": ("audio/speech", {"json": {"input": "a"}}, 1),
    "image": ("images/generations", {"json": {"prompt": "a"}}, 1),
    "edit": ("images/edits", {"data": {"prompt": "a"}, **PICTURE}, 1),
}
STREAMS: dict[str, tuple[str, dict[str, Any], int]] = {
    "chat": ("chat/completions", {"json": {"messages": USER, "stream": True}}, 1),
    "chat, several": ("chat/completions", {"json": {"messages": USER, "stream": True, "n": 3}}, 3),
    "completion": ("completions", {"json": {"prompt": "a", "stream": True}}, 1),
    "transcription": ("audio/transcriptions", {"data": {"stream": "true"}, **AUDIO}, 1),
    "translation": ("audio/translations", {"data": {"stream": "true"}, **AUDIO}, 1),
    "speech": ("audio/speech", {"json": {"input": "a", "stream_format": "audio"}}, 1),
    "speech events": ("audio/speech", {"json": {"input": "a", "stream_format": "sse"}}, 1),
    "image": ("images/generations", {"json": {"prompt": "a", "stream": True}}, 1),
    "edit": ("images/edits", {"data": {"prompt": "a", "stream": "true"}, **PICTURE}, 1),
}
PIECES: dict[str, Callable[[], Any]] = {
    "llm": lambda: LlmChunk(delta=Delta(content="one")),
    "audio_stt": lambda: SttChunk(segment=Segment(id=0, start=0, end=1, text="one")),
    "audio_tts": lambda: TtsChunk(audio=b"one"),
}


class Endless:
    """Work that goes on until it is cancelled."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)

    def __call__(self, job: Any) -> None:
        job.started()
        if job.offer.stream and job.offer.kind in PIECES:
            job.chunk(PIECES[job.offer.kind]())
        self.begun.release()
        assert job.cancelled.wait(WAIT_S)
        raise FaultError(Fault("cancelled", "Cancelled."))

    def wait(self, jobs: int) -> None:
        for _ in range(jobs):
            assert self.begun.acquire(timeout=WAIT_S)


def with_model(sent: dict[str, Any]) -> dict[str, Any]:
    where = "json" if "json" in sent else "data"
    return {**sent, where: {**sent[where], "model": "endless"}}


def ended(worker: Any, jobs: int, since: float, http: httpx.Client) -> None:
    """All jobs were cancelled, in the store and on the worker, within the time."""
    for job in worker.jobs:
        assert job.cancelled.wait(max(0.0, since + LEFT_S - time.monotonic())), "the worker was not told in time"
    assert len(worker.jobs) == jobs
    assert {http.get(f"/v1/jobs/{job.id}").json()["state"] for job in worker.jobs} == {"cancelled"}


@pytest.mark.parametrize("name", PLAIN)
def test_who_waits_for_an_answer(served: Any, http: httpx.Client, serve: Any, name: str) -> None:
    route, sent, jobs = PLAIN[name]
    endless = Endless()
    worker = serve(endless, "endless", *KINDS)
    left: list[float] = []
    request = httpx.Request("POST", f"{served.url}/v1/{route}", headers=served.headers, **with_model(sent))
    gone(request, endless, jobs, left)
    assert left
    ended(worker, jobs, left[0], http)


def test_the_worker_hears_of_it_within_a_second(served: Any, http: httpx.Client, serve: Any) -> None:
    """Of a few tries the best one counts: a loaded machine may be late now and then, not always."""
    route, sent, _ = PLAIN["chat"]
    endless, took = Endless(), list[float]()
    worker = serve(endless, "endless", *KINDS)
    while len(took) < TRIES and min(took, default=PROMISE_S) >= PROMISE_S:
        left: list[float] = []
        request = httpx.Request("POST", f"{served.url}/v1/{route}", headers=served.headers, **with_model(sent))
        gone(request, endless, 1, left)
        assert worker.jobs[-1].cancelled.wait(LEFT_S)
        took.append(time.monotonic() - left[0])
    assert min(took) < PROMISE_S, took


def gone(request: httpx.Request, endless: Endless, jobs: int, left: list[float]) -> None:
    """Send a request by hand, and close the connection when its work has begun."""
    with sent_by_hand(request):
        endless.wait(jobs)
        left.append(time.monotonic())


@pytest.mark.parametrize("name", STREAMS)
def test_who_reads_a_stream(http: httpx.Client, serve: Any, name: str) -> None:
    route, sent, jobs = STREAMS[name]
    endless = Endless()
    worker = serve(endless, "endless", *KINDS)
    headers = {"x-bulkhead-begin-s": "0"}  # kinds whose engines send no pieces begin with a comment line
    with http.stream("POST", f"/v1/{route}", headers=headers, **with_model(sent)) as answer:
        pieces = answer.iter_raw()
        assert answer.status_code == 200
        next(pieces)
        endless.wait(jobs)
        left = time.monotonic()
    ended(worker, jobs, left, http)


def test_who_asked_for_a_job_may_leave(http: httpx.Client, serve: Any) -> None:
    """Jobs, videos and requests with an idempotency key go on without their client."""
    go_on, begun = threading.Event(), threading.Semaphore(0)

    def script(job: Any) -> None:
        job.started()
        begun.release()
        assert go_on.wait(WAIT_S)
        if job.offer.kind == "video":
            job.upload("0.webm", b"\x1a\x45\xdf\xa3", "video/webm")
            job.complete(VideoResult(width=64, height=64, frames=1, fps=1, format="webm", codec="vp9", seed=1))
        elif job.offer.kind == "audio_tts":
            job.upload("speech.mp3", b"sound", "audio/mpeg")
            job.complete(AudioResult(sample_rate=8000, duration=1.0, format="mp3"))
        else:
            job.complete(LlmResult(content="done"))

    worker = serve(script, "patient", "llm", "video", "audio_tts")
    chat = {"model": "patient", "messages": USER}
    asked: list[tuple[str, dict[str, Any], dict[str, str]]] = [
        ("jobs", {"kind": "llm", "model": "patient", "params": {"messages": USER}, "wait": 60}, {}),
        ("chat/completions", chat, {"idempotency-key": "leaving-1"}),
        ("audio/speech", {"model": "patient", "input": "a"}, {"idempotency-key": "leaving-2"}),
    ]
    for route, body, headers in asked:
        request = http.build_request("POST", f"/v1/{route}", json=body, headers=headers)
        with sent_by_hand(request):
            assert begun.acquire(timeout=WAIT_S)
    http.post("/v1/videos", json={"model": "patient", "prompt": "a"})
    assert begun.acquire(timeout=WAIT_S)
    assert not any(job.cancelled.is_set() for job in worker.jobs)
    go_on.set()
    until = time.monotonic() + WAIT_S
    while {http.get(f"/v1/jobs/{job.id}").json()["state"] for job in worker.jobs} != {"succeeded"}:
        assert time.monotonic() < until
        time.sleep(0.02)
