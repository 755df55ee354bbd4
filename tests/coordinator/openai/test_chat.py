"""Chat over a real server with the official client, and the mapping of every field."""

from __future__ import annotations

import json
import threading
from typing import Any

import httpx
import openai
import pytest

from coordinator.openai.chat import FIELDS, to_params
from protocol.faults import Fault, FaultError
from protocol.work import Delta, LlmChunk, LlmResult
from tests.coordinator.openai.by_hand import sent_by_hand

USER = {"role": "user", "content": "count"}
WAIT_S = 60.0
LEFT_S = 30.0  # it takes milliseconds, and the promise is a second; a loaded machine gets its time


def params(**body: Any) -> Any:
    passed, handled = FIELDS.pick({"messages": [USER], **body})
    return to_params(passed, handled)


# ---- mapping ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "name", "value"),
    [
        ({"stop": "x"}, "stop", ["x"]),
        ({"stop": ["x", "y"]}, "stop", ["x", "y"]),
        ({"stop": None}, "stop", []),
        ({"max_tokens": 7}, "max_tokens", 7),
        ({"max_completion_tokens": 8}, "max_tokens", 8),
        ({"max_tokens": 8, "max_completion_tokens": 8}, "max_tokens", 8),
        ({"response_format": {"type": "text"}}, "json_object", False),
        ({"response_format": {"type": "json_object"}}, "json_object", True),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}},
            "json_schema",
            {"type": "object"},
        ),
        ({"reasoning_effort": "low"}, "chat_template_kwargs", {"reasoning_effort": "low"}),
        ({"logprobs": True, "top_logprobs": 3}, "top_logprobs", 3),
        ({"temperature": 0, "seed": 5, "top_p": 0.5}, "seed", 5),
        ({"n": 1, "user": "u", "metadata": {}, "store": False, "parallel_tool_calls": True}, "seed", None),
        ({"logit_bias": {}, "modalities": ["text"]}, "seed", None),
    ],
)
def test_fields_become_work_parameters(body: dict[str, Any], name: str, value: Any) -> None:
    assert getattr(params(**body), name) == value


def test_the_developer_role_and_text_parts_pass() -> None:
    parts = [{"type": "text", "text": "a"}]
    messages = [{"role": "developer", "content": "be brief"}, {"role": "user", "content": parts}]
    made = params(messages=messages)
    assert [message.role for message in made.messages] == ["developer", "user"]
    assert made.messages[1].content == parts


@pytest.mark.parametrize(
    ("body", "field", "code"),
    [
        ({"tempurature": 1}, "tempurature", "invalid_parameter"),
        ({"temperature": 3}, "temperature", "invalid_parameter"),
        ({"temperature": "hot"}, "temperature", "invalid_parameter"),
        ({"stop": [""]}, "stop[0]", "invalid_parameter"),
        ({"stop": ["x"] * 17}, "stop", "invalid_parameter"),
        ({"max_tokens": 0}, "max_tokens", "invalid_parameter"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "invalid_parameter"),
        ({"max_tokens": 1, "max_completion_tokens": 2}, "max_tokens", "invalid_parameter"),
        ({"messages": []}, "messages", "invalid_parameter"),
        ({"messages": None}, "messages", "invalid_parameter"),
        ({"messages": [{"role": "pirate", "content": ""}]}, "messages[0].role", "invalid_parameter"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "invalid_parameter"),
        ({"response_format": "json"}, "response_format.type", "invalid_parameter"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format.json_schema.schema",
            "invalid_parameter",
        ),
        ({"tools": [{"type": "web"}]}, "tools.0", "invalid_parameter"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0", "invalid_parameter"),
        ({"tool_choice": "required"}, "tool_choice", "invalid_parameter"),
        ({"tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice", "invalid_parameter"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_parameter"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported"),
        ({"parallel_tool_calls": False}, "parallel_tool_calls", "unsupported"),
        ({"functions": []}, "functions", "unsupported"),
    ],
)
def test_refusals_name_the_field(body: dict[str, Any], field: str, code: str) -> None:
    with pytest.raises(FaultError) as caught:
        params(**body)
    assert (caught.value.fault.field, caught.value.fault.code) == (field, code)
    assert caught.value.fault.message.startswith(field)
    assert caught.value.fault.http_status == 400


# ---- over the wire ------------------------------------------------------------------------------------------


def test_a_plain_answer_reaches_the_official_client(ai: openai.OpenAI, serve: Any) -> None:
    def script(job: Any) -> None:
        job.started()
        result = LlmResult(content=f"seed {job.params.seed}", reasoning_content="hm", finish_reason="length")
        job.complete(result, {"prompt_tokens": 3, "completion_tokens": 2, "cached_tokens": 1})

    worker = serve(script, "chat-plain", "llm")
    answer = ai.chat.completions.create(model="chat-plain", messages=[USER], seed=41, max_tokens=9)
    assert answer.choices[0].message.content == "seed 41"
    assert answer.choices[0].message.model_extra == {"reasoning_content": "hm"}
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens) == (3, 2, 5)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 1
    assert answer.id == f"chatcmpl-{worker.jobs[0].id}"
    assert worker.jobs[0].params.max_tokens == 9
    assert not worker.jobs[0].offer.stream


def test_tool_calls_come_back(ai: openai.OpenAI, serve: Any) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a":1}'}}
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}

    def script(job: Any) -> None:
        assert job.params.tools == [tool]
        job.started()
        job.complete(LlmResult(tool_calls=[call], finish_reason="tool_calls"))

    serve(script, "chat-tools", "llm")
    choice = {"type": "function", "function": {"name": "add"}}
    answer = ai.chat.completions.create(model="chat-tools", messages=[USER], tools=[tool], tool_choice=choice)  # type: ignore[call-overload]
    assert answer.choices[0].message.tool_calls[0].function.arguments == '{"a":1}'
    assert answer.choices[0].message.content is None


def counting(job: Any) -> None:
    job.started()
    for word in ("one", " two", " three"):
        job.chunk(LlmChunk(delta=Delta(content=word)))
    job.chunk(LlmChunk(finish_reason="stop"))
    job.complete(LlmResult(content="one two three"), {"prompt_tokens": 1, "completion_tokens": 3})


def test_a_stream_reaches_the_official_client_with_usage(ai: openai.OpenAI, serve: Any) -> None:
    worker = serve(counting, "chat-stream", "llm")
    stream = ai.chat.completions.create(
        model="chat-stream", messages=[USER], stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert worker.jobs[0].offer.stream
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "one two three"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1] if chunk.choices[0].finish_reason] == ["stop"]
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 4
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_the_asynchronous_client_streams_as_well(served: Any, serve: Any) -> None:
    import asyncio

    serve(counting, "chat-async", "llm")

    async def main() -> str:
        async with openai.AsyncOpenAI(base_url=served.url + "/v1", api_key=served.key, max_retries=0) as client:
            stream = await client.chat.completions.create(model="chat-async", messages=[USER], stream=True)  # type: ignore[list-item]
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(main()) == "one two three"


def test_the_first_token_is_flushed_before_the_second_is_made(http: httpx.Client, serve: Any) -> None:
    seen = threading.Event()

    def script(job: Any) -> None:
        job.started()
        job.chunk(LlmChunk(delta=Delta(content="one")))
        assert seen.wait(WAIT_S), "the first token did not arrive"
        job.chunk(LlmChunk(delta=Delta(content="two")))
        job.complete(LlmResult(content="onetwo"))

    serve(script, "chat-flush", "llm")
    body = {"model": "chat-flush", "messages": [USER], "stream": True}
    text = ""
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["x-bulkhead-job"].startswith("job_")
        for piece in answer.iter_text():
            text += piece
            if "one" in text:
                seen.set()
    assert text.endswith("data: [DONE]\n\n")


def test_a_silent_stream_sends_comment_lines(http: httpx.Client, serve: Any) -> None:
    commented = threading.Event()

    def script(job: Any) -> None:
        job.started()
        assert commented.wait(WAIT_S), "no comment line came"
        job.complete(LlmResult(content="late"))

    serve(script, "chat-silent", "llm")
    body = {"model": "chat-silent", "messages": [USER], "stream": True}
    lines = []
    with http.stream("POST", "/v1/chat/completions", json=body) as answer:
        for line in answer.iter_lines():
            lines.append(line)
            if line.startswith(":"):
                commented.set()
    assert lines[-2] == "data: [DONE]"
    # Nothing was streamed, so the end brings the whole answer.
    assert any('"late"' in line for line in lines)


def test_a_refusal_of_the_engine_is_a_real_400_even_for_a_stream(ai: openai.OpenAI, serve: Any) -> None:
    def script(_job: Any) -> None:
        raise FaultError(Fault("context_length_exceeded", "messages: 9 tokens do not fit.", field="messages"))

    serve(script, "chat-refusal", "llm")
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            ai.chat.completions.create(model="chat-refusal", messages=[USER], stream=stream)  # type: ignore[call-overload]
        assert caught.value.code == "context_length_exceeded"
        assert caught.value.param == "messages"
        assert caught.value.request_id
        assert caught.value.request_id.startswith("req_")


def test_a_fault_in_the_middle_ends_the_stream_without_done(http: httpx.Client, ai: openai.OpenAI, serve: Any) -> None:
    def script(job: Any) -> None:
        job.started()
        job.chunk(LlmChunk(delta=Delta(content="one")))
        raise FaultError(Fault("engine_crashed", "The engine died of signal 11."))

    serve(script, "chat-crash", "llm")
    body = {"model": "chat-crash", "messages": [USER], "stream": True}
    text = http.post("/v1/chat/completions", json=body).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    assert events[-1]["error"]["code"] == "engine_crashed"
    assert "[DONE]" not in text
    with pytest.raises(openai.APIError, match="signal 11"):
        list(ai.chat.completions.create(model="chat-crash", messages=[USER], stream=True))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_cancels_its_job_within_a_second(http: httpx.Client, serve: Any, stream: bool) -> None:
    begun = threading.Event()

    def script(job: Any) -> None:
        job.started()
        if stream:
            job.chunk(LlmChunk(delta=Delta(content="one")))
        begun.set()
        assert job.cancelled.wait(WAIT_S)
        raise FaultError(Fault("cancelled", "Cancelled."))

    worker = serve(script, "chat-leave", "llm")
    body = {"model": "chat-leave", "messages": [USER], "stream": stream}
    if stream:
        with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            pieces = answer.iter_text()  # dropping the iterator would close the connection
            next(pieces)
            assert begun.wait(WAIT_S)
    else:
        with sent_by_hand(http.build_request("POST", "/v1/chat/completions", json=body)):
            assert begun.wait(WAIT_S)
    assert worker.jobs[0].cancelled.wait(LEFT_S)
    state = http.get(f"/v1/jobs/{worker.jobs[0].id}").json()
    assert state["state"] == "cancelled"


def test_a_job_with_an_idempotency_key_outlives_its_client(http: httpx.Client, serve: Any) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def script(job: Any) -> None:
        job.started()
        begun.set()
        assert go_on.wait(WAIT_S)
        assert not job.cancelled.is_set()
        job.complete(LlmResult(content="for later"))

    worker = serve(script, "chat-again", "llm")
    body = {"model": "chat-again", "messages": [USER]}
    headers = {"idempotency-key": "chat-again-1"}
    with sent_by_hand(http.build_request("POST", "/v1/chat/completions", json=body, headers=headers)):
        assert begun.wait(WAIT_S)
    assert not worker.jobs[0].cancelled.wait(0.3)
    go_on.set()
    answer = http.post("/v1/chat/completions", json=body, headers=headers)
    assert answer.json()["choices"][0]["message"]["content"] == "for later"
    assert len(worker.jobs) == 1


def test_an_unknown_model_is_404(ai: openai.OpenAI, serve: Any) -> None:
    serve(counting, "chat-other", "llm")
    with pytest.raises(openai.NotFoundError) as caught:
        ai.chat.completions.create(model="nobody-serves-this", messages=[USER])
    assert caught.value.code == "model_not_found"
