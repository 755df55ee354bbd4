"""Refusals that only the engine can make: answered in the route's own words, with the job that has the evidence."""

from __future__ import annotations

import time
from typing import Any

import pytest

from protocol.faults import Fault

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nonsense"}}}

# route, body, field of the engine -> param of the answer
ROWS = [
    ("chat/completions", CHAT, "grammar", "grammar"),
    ("chat/completions", CHAT, "messages.0.content", "messages.0.content"),
    ("chat/completions", {**CHAT, "max_tokens": 9}, "max_tokens", "max_tokens"),
    ("chat/completions", {**CHAT, "max_completion_tokens": 9}, "max_tokens", "max_completion_tokens"),
    ("chat/completions", {**CHAT, "response_format": SCHEMA}, "json_schema", "response_format"),
    ("chat/completions", {**CHAT, "response_format": SCHEMA, "stream": True}, "json_schema", "response_format"),
    ("completions", {"prompt": "hi"}, "prompt", "prompt"),
    ("embeddings", {"input": [[1]]}, "input.0", "input.0"),
    ("audio/speech", {"input": "hi"}, "text", "input"),
    ("images/generations", {"prompt": "hi"}, "width", "size"),
    ("images/generations", {"prompt": "hi", "output_compression": 5}, "quality", "output_compression"),
    ("images/generations", {"prompt": "hi", "quality": 5}, "quality", "quality"),
]
KINDS = ("llm", "embedding", "audio_tts", "audio_stt", "image", "video")


@pytest.fixture
def refuse(serve: Any) -> Any:
    """Start a worker whose engine refuses a field."""

    def start(field: str, code: str = "invalid_parameter") -> None:
        serve(lambda job: job.fail(Fault(code, f"{field}: Not for this model.", field)), "picky", *KINDS)

    return start


@pytest.mark.parametrize(("route", "body", "field", "param"), ROWS)
def test_the_field_is_named_as_the_caller_named_it(
    http: Any, refuse: Any, route: str, body: dict[str, Any], field: str, param: str
) -> None:
    refuse(field)
    answer = http.post(f"/v1/{route}", json={"model": "picky", **body})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"], error["code"]) == (400, param, "invalid_parameter")
    assert error["message"] == f"{param}: Not for this model."
    job = http.get(f"/v1/jobs/{answer.headers['x-bulkhead-job']}").json()
    assert job["fault"]["field"] == field


@pytest.mark.parametrize(
    ("route", "field", "param"),
    [
        ("transcriptions", "audio", "file"),
        ("transcriptions", "language", "language"),
        ("translations", "task", "model"),
    ],
)
def test_audio_forms(http: Any, refuse: Any, route: str, field: str, param: str) -> None:
    refuse(field)
    answer = http.post(f"/v1/audio/{route}", data={"model": "picky"}, files={"file": ("a.wav", b"RIFF0000WAVE")})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_video(http: Any, refuse: Any) -> None:
    refuse("width")
    made = http.post("/v1/videos", json={"model": "picky", "prompt": "hi"}).json()
    until = time.monotonic() + 60
    while (shown := http.get(f"/v1/videos/{made['id']}").json())["status"] != "failed":
        assert time.monotonic() < until
        time.sleep(0.01)
    assert shown["error"] == {"code": "invalid_parameter", "message": "size: Not for this model."}
    assert http.get(f"/v1/videos/{made['id']}/content").json()["error"]["param"] == "size"


def test_a_fault_of_the_engine_keeps_its_field(http: Any, refuse: Any) -> None:
    """`options.…` and `files.…` are the operator's words: no route has other ones for them."""
    refuse("text", "load_failed")
    answer = http.post("/v1/audio/speech", json={"model": "picky", "input": "hi"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (503, "text")
