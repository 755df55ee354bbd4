"""Batches over a real server with the official client."""

from __future__ import annotations

import base64
import json
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from coordinator.testing import FakeWorker, running
from protocol.faults import Fault, FaultError
from protocol.link_wire import ModelOffer
from protocol.work import EmbeddingResult, LlmResult, RerankResult

WAIT_S = 60.0
CHAT = "/v1/chat/completions"


def line(n: int, model: str, url: str = CHAT, **body: Any) -> dict[str, Any]:
    messages = {"messages": [{"role": "user", "content": f"say {n}"}]} if url == CHAT else {}
    return {"custom_id": f"line-{n}", "method": "POST", "url": url, "body": {"model": model, **messages, **body}}


def upload(ai: openai.OpenAI, lines: list[Any]) -> str:
    text = "\n".join(json.dumps(item) if isinstance(item, dict) else item for item in lines)
    return ai.files.create(file=("in.jsonl", text.encode()), purpose="batch").id


def start(ai: openai.OpenAI, lines: list[Any], endpoint: Any = CHAT, **more: Any) -> Any:
    return ai.batches.create(input_file_id=upload(ai, lines), endpoint=endpoint, completion_window="24h", **more)


def until(ai: openai.OpenAI, batch: Any, *states: str) -> Any:
    end = time.monotonic() + WAIT_S
    while (now := ai.batches.retrieve(batch.id)).status not in states:
        assert time.monotonic() < end, now
        time.sleep(0.02)
    return now


def lines_of(ai: openai.OpenAI, file: str | None) -> dict[str, Any]:
    """custom id -> line; every id once."""
    if file is None:
        return {}
    found = [json.loads(text) for text in ai.files.content(file).text.splitlines()]
    assert len({item["custom_id"] for item in found}) == len(found)
    return {item["custom_id"]: item for item in found}


def echo(job: Any) -> None:
    job.started()
    text = job.params.messages[0].content
    if text == "say 1":
        raise FaultError(Fault("context_length_exceeded", "messages: Too long.", "messages"))
    job.complete(LlmResult(content=text), {"prompt_tokens": 2, "completion_tokens": 3})


def test_a_batch_from_its_file_to_its_output(ai: openai.OpenAI, serve: Any) -> None:
    worker = serve(echo, "batch-echo", "llm")
    wrong = line(2, "batch-echo", temperature=9)
    made = start(ai, [line(0, "batch-echo"), "", line(1, "batch-echo"), wrong], metadata={"for": "test"})
    assert (made.object, made.endpoint, made.completion_window) == ("batch", CHAT, "24h")
    assert made.metadata == {"for": "test"}
    assert made.expires_at == made.created_at + 86_400
    done = until(ai, made, "completed")
    assert (done.request_counts.total, done.request_counts.completed, done.request_counts.failed) == (3, 1, 2)
    assert done.model == "batch-echo"
    assert (done.usage.input_tokens, done.usage.output_tokens, done.usage.total_tokens) == (2, 3, 5)
    assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at
    assert done.failed_at is done.cancelled_at is done.errors is None
    [answer] = lines_of(ai, done.output_file_id).values()
    assert (answer["custom_id"], answer["error"], answer["response"]["status_code"]) == ("line-0", None, 200)
    assert answer["response"]["body"]["choices"][0]["message"]["content"] == "say 0"
    errors = lines_of(ai, done.error_file_id)
    told = {name: (e["response"]["status_code"], e["response"]["body"]["error"]["param"]) for name, e in errors.items()}
    assert told == {"line-1": (400, "messages"), "line-2": (400, "temperature")}
    output = ai.files.retrieve(done.output_file_id)
    assert (output.purpose, output.filename) == ("batch_output", f"{made.id}_output.jsonl")
    assert {job.offer.priority for job in worker.jobs} == {-10}
    assert made.id in {batch.id for batch in ai.batches.list(limit=5).data}
    ai.files.delete(done.output_file_id)
    ai.files.delete(made.input_file_id)


def vectors(job: Any) -> None:
    job.started()
    if job.offer.kind == "rerank":
        job.complete(RerankResult(results=[{"index": 1, "relevance_score": 0.5}]))
    elif job.offer.kind == "llm":
        job.complete(LlmResult(content="more"))
    else:
        job.complete(EmbeddingResult(count=1, dimensions=2, vectors=struct.pack("<2f", 0.5, 1.0)))


@pytest.mark.parametrize(
    ("endpoint", "body", "check"),
    [
        ("/v1/embeddings", {"input": "a"}, lambda body: body["data"][0]["embedding"] == [0.5, 1.0]),
        (
            "/v1/embeddings",
            {"input": "a", "encoding_format": "base64"},
            lambda body: base64.b64decode(body["data"][0]["embedding"]) == struct.pack("<2f", 0.5, 1.0),
        ),
        ("/v1/completions", {"prompt": "a"}, lambda body: body["choices"][0]["text"] == "more"),
        ("/v1/rerank", {"query": "q", "documents": ["a", "b"]}, lambda body: body["results"][0]["index"] == 1),
    ],
)
def test_every_endpoint(
    ai: openai.OpenAI, serve: Any, endpoint: str, body: dict[str, Any], check: Callable[[Any], bool]
) -> None:
    serve(vectors, "batch-vectors", "embedding", "rerank", "llm")
    done = until(ai, start(ai, [line(0, "batch-vectors", endpoint, **body)], endpoint), "completed")
    [answer] = lines_of(ai, done.output_file_id).values()
    assert check(answer["response"]["body"])


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([], [(None, "The input file has no lines.")]),
        (["{", line(1, "m")], [(1, "JSON")]),
        ([line(1, "m"), line(1, "m")], [(2, "custom_id: Another")]),
        ([{**line(1, "m"), "method": "GET"}, {**line(2, "m"), "url": "/v1/embeddings"}], [(1, "method"), (2, "url")]),
        ([{**line(1, "m"), "colour": 1}], [(1, "colour: Unknown")]),
        ([{**line(1, "m"), "custom_id": ""}], [(1, "custom_id: Expected")]),
        ([{**line(1, "m"), "body": []}], [(1, "body: Expected")]),
    ],
)
def test_a_file_with_wrong_lines_fails_as_a_whole(ai: openai.OpenAI, lines: list[Any], told: list[Any]) -> None:
    done = until(ai, start(ai, lines or [" "]), "failed")
    assert done.errors is not None
    assert len(done.errors.data) == len(told)
    for error, (number, words) in zip(done.errors.data, told, strict=True):
        assert error.line == number
        assert words in error.message
    assert done.failed_at


@pytest.mark.parametrize(
    ("change", "field", "status"),
    [
        ({"endpoint": "/v1/responses"}, "endpoint", 400),
        ({"endpoint": None}, "endpoint", 400),
        ({"completion_window": "1h"}, "completion_window", 400),
        ({"input_file_id": "file-nothing"}, "input_file_id", 404),
        ({"input_file_id": 5}, "input_file_id", 400),
        ({"metadata": {"a": 1}}, "metadata", 400),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after.seconds", 400),
        ({"colour": 1}, "colour", 400),
    ],
)
def test_refusals_name_the_field(
    ai: openai.OpenAI, http: httpx.Client, change: dict[str, Any], field: str, status: int
) -> None:
    body = {"input_file_id": upload(ai, [line(0, "m")]), "endpoint": CHAT, "completion_window": "24h", **change}
    answer = http.post("/v1/batches", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, field)


def test_only_files_for_batches_are_read(ai: openai.OpenAI) -> None:
    file = ai.files.create(file=b"{}", purpose="user_data").id
    with pytest.raises(openai.BadRequestError, match="user_data"):
        ai.batches.create(input_file_id=file, endpoint=CHAT, completion_window="24h")


def test_cancel_keeps_what_was_answered(ai: openai.OpenAI, serve: Any) -> None:
    second = threading.Event()

    def script(job: Any) -> None:
        job.started()
        if job.params.messages[0].content != "say 0":
            second.set()
            assert job.cancelled.wait(WAIT_S)
            raise FaultError(Fault("cancelled", "Cancelled."))
        job.complete(LlmResult(content="first"))

    serve(script, "batch-cancel", "llm", slots=1)
    made = start(ai, [line(n, "batch-cancel") for n in range(3)])
    assert second.wait(WAIT_S)
    # The second line may run before the batch has noted which jobs are its lines'.
    deadline = time.monotonic() + WAIT_S
    while (seen := ai.batches.retrieve(made.id)).request_counts.completed != 1:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert seen.status == "in_progress"
    with pytest.raises(openai.ConflictError, match=made.id):
        ai.files.delete(made.input_file_id)
    assert ai.batches.cancel(made.id).status == "cancelling"
    done = until(ai, made, "cancelled")
    assert done.cancelled_at
    assert list(lines_of(ai, done.output_file_id)) == ["line-0"]
    errors = lines_of(ai, done.error_file_id)
    assert [(name, item["response"], item["error"]["code"]) for name, item in errors.items()] == [
        ("line-1", None, "batch_cancelled"),
        ("line-2", None, "batch_cancelled"),
    ]
    assert ai.batches.cancel(made.id).status == "cancelled"


def test_a_batch_that_ended_cannot_be_cancelled(ai: openai.OpenAI) -> None:
    failed = until(ai, start(ai, ["{"]), "failed")
    with pytest.raises(openai.ConflictError, match="failed"):
        ai.batches.cancel(failed.id)
    for look in (ai.batches.retrieve, ai.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            look("batch_unknown")


def test_batches_are_their_tenants_alone(served: Any, ai: openai.OpenAI) -> None:
    made = start(ai, ["{"])
    key = served.coordinator.keys.create("client", tenant="other-batches")
    with openai.OpenAI(base_url=served.url + "/v1", api_key=key, max_retries=0) as other:
        assert other.batches.list().data == []
        with pytest.raises(openai.NotFoundError):
            other.batches.create(input_file_id=made.input_file_id, endpoint=CHAT, completion_window="24h")
        for look in (other.batches.retrieve, other.batches.cancel):
            with pytest.raises(openai.NotFoundError):
                look(made.id)


def test_a_batch_goes_on_after_a_restart(tmp_path: Path) -> None:
    """The first coordinator ends in the middle; the second brings every line to its end, once."""
    offer = (ModelOffer(name="m", kinds=("llm",), engine="fake", slots=1),)
    half = threading.Event()
    ran: list[str] = []

    def script(job: Any) -> None:
        job.started()
        if len(ran) == 5 and not half.is_set():
            half.set()
            job.cancelled.wait(WAIT_S)  # set when the connection ends
            return
        ran.append(job.params.messages[0].content)
        job.complete(LlmResult(content=job.params.messages[0].content))

    with running(tmp_path) as served, openai.OpenAI(base_url=served.url + "/v1", api_key=served.key) as ai:
        with FakeWorker(served, offer, script):
            made = start(ai, [line(n, "m") for n in range(12)])
            assert half.wait(WAIT_S)
    with running(tmp_path) as served, openai.OpenAI(base_url=served.url + "/v1", api_key=served.key) as ai:
        with FakeWorker(served, offer, script):
            done = until(ai, made, "completed")
        found = lines_of(ai, done.output_file_id)
    assert {name: item["response"]["body"]["choices"][0]["message"]["content"] for name, item in found.items()} == {
        f"line-{n}": f"say {n}" for n in range(12)
    }
    assert done.error_file_id is None
    assert sorted(ran) == sorted({*ran}), "a line that was answered is not run again"
