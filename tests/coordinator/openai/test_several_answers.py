"""`n`: several answers to one prompt are jobs side by side."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import openai
import pytest

from protocol.faults import Fault, FaultError
from protocol.work import Delta, LlmChunk, LlmResult

USER: Any = {"role": "user", "content": "hi"}
WAIT_S = 60.0


def script(job: Any) -> None:
    job.started()
    text = f"seed {job.params.seed}"
    if job.offer.stream:
        for word in text.split():
            job.chunk(LlmChunk(delta=Delta(content=word)))
    job.complete(LlmResult(content=text), {"prompt_tokens": 3, "completion_tokens": 2})


@pytest.fixture
def worker(serve: Any) -> Any:
    return serve(script, "several", "llm")


def test_plain(ai: openai.OpenAI, worker: Any) -> None:
    answer = ai.chat.completions.create(model="several", messages=[USER], n=3, seed=2**63 - 2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert [choice.message.content for choice in answer.choices] == [f"seed {2**63 - 2}", f"seed {2**63 - 1}", "seed 0"]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (3, 6), "the prompt counts once"
    free = ai.completions.create(model="several", prompt="hi", n=2)
    assert [choice.text for choice in free.choices] == ["seed None"] * 2


@pytest.mark.parametrize("chat", [True, False])
def test_streamed(ai: openai.OpenAI, worker: Any, chat: bool) -> None:
    more: Any = {"model": "several", "n": 3, "seed": 5, "stream": True, "stream_options": {"include_usage": True}}
    if chat:
        stream = ai.chat.completions.create(messages=[USER], **more)
    else:
        stream = ai.completions.create(prompt="hi", **more)
    *chunks, last = list(stream)
    texts = {0: "", 1: "", 2: ""}
    ends = {0: 0, 1: 0, 2: 0}
    for chunk in chunks:
        [choice] = chunk.choices
        texts[choice.index] += (choice.delta.content if chat else choice.text) or ""
        ends[choice.index] += choice.finish_reason is not None
    assert texts == {0: "seed5", 1: "seed6", 2: "seed7"}
    assert ends == {0: 1, 1: 1, 2: 1}
    assert len({chunk.id for chunk in [*chunks, last]}) == 1
    assert last.usage.completion_tokens == 6


@pytest.mark.parametrize("stream", [False, True])
def test_one_that_fails_ends_all(http: httpx.Client, serve: Any, stream: bool) -> None:
    cancelled = threading.Event()
    other = threading.Event()

    def one_fails(job: Any) -> None:
        job.started()
        if job.params.seed == 0:
            other.set()
            if job.cancelled.wait(WAIT_S):
                cancelled.set()
            return
        assert other.wait(WAIT_S)
        raise FaultError(Fault("engine_failed", "It broke."))

    serve(one_fails, f"several-fail-{stream}", "llm")
    body = {"model": f"several-fail-{stream}", "messages": [USER], "n": 2, "seed": 0, "stream": stream}
    answer = http.post("/v1/chat/completions", json=body)
    assert "It broke." in answer.text
    assert "[DONE]" not in answer.text
    assert answer.status_code == (200 if stream else 500)
    assert cancelled.wait(WAIT_S), "nobody reads the other answer"


def test_an_idempotency_key_covers_all_of_them(http: httpx.Client, worker: Any) -> None:
    body = {"model": "several", "messages": [USER], "n": 3, "seed": 1}
    headers = {"idempotency-key": "several-1"}
    first, second = (http.post("/v1/chat/completions", json=body, headers=headers) for _ in range(2))
    assert first.json() == second.json()
    assert len(worker.jobs) == 3


@pytest.mark.parametrize("n", [0, 17, True, "2", 1.5])
@pytest.mark.parametrize("route", ["chat/completions", "completions"])
def test_what_is_no_number_of_answers(http: httpx.Client, n: Any, route: str) -> None:
    answer = http.post(
        f"/v1/{route}",
        json={"model": "m", "messages": [USER], "n": n} if "chat" in route else {"model": "m", "prompt": "x", "n": n},
    )
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "n")
