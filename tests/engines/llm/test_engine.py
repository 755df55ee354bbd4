"""One suite, both backends: the real library in the real child over the real wire."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import msgspec
import psutil
import pytest

from engines.llm.fixture_cases import fixture
from protocol import engine_wire as wire
from protocol.engine_wire import Ready

pytestmark = pytest.mark.engine

ONE_OF_TWO = {
    "type": "object",
    "properties": {"n": {"enum": [1, 2]}},
    "required": ["n"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "pick", "description": "Pick a number.", "parameters": ONE_OF_TWO}}


def ask(text: str, **more: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "temperature": 0, **more}


def count(n: int) -> str:
    return " ".join(str(number) for number in range(1, n + 1))


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(chunk.get("delta", {}).get("content") or "" for chunk in chunks)


def test_fixture_cases_are_answered_right(chat: Any, backend: str) -> None:
    for case in fixture(backend).cases:
        answer = chat.run(case.kind, case.params, stream=case.stream)
        assert case.check(answer.body, answer.files) == ""


def test_usage_counts_prompt_and_completion(chat: Any) -> None:
    answer = chat.run("llm", ask("count to 12"))
    # bos, user, 11 letters, end, assistant; 26 letters and the end token
    assert answer.result.usage["prompt_tokens"] == 15
    assert answer.result.usage["completion_tokens"] == 27
    assert answer.body.finish_reason == "stop"


def test_chunks_add_up_to_the_answer(chat: Any) -> None:
    answer = chat.run("llm", ask("count to 20"), stream=True)
    assert text_of(answer.chunks) == answer.body.content == count(20)
    assert len(answer.chunks) > 20
    assert answer.chunks[-1] == {"finish_reason": "stop"}


def test_no_chunks_when_no_stream_was_asked_for(chat: Any) -> None:
    assert chat.run("llm", ask("count to 20")).chunks == []


def test_text_parts_of_a_message_are_joined(chat: Any) -> None:
    parts = [{"type": "text", "text": "count "}, {"type": "text", "text": "to 3"}]
    answer = chat.run("llm", {"messages": [{"role": "user", "content": parts}], "temperature": 0})
    assert answer.body.content == "1 2 3"


def test_plain_prompt_is_not_put_into_the_template(chat: Any) -> None:
    answer = chat.run("llm", {"prompt": "<|user|>say hello world<|end|><|assistant|>", "temperature": 0})
    assert answer.body.content == "hello world"


def test_max_tokens_ends_with_length(chat: Any) -> None:
    answer = chat.run("llm", ask("count to 12", max_tokens=5))
    assert (answer.body.content, answer.body.finish_reason) == ("1 2 3", "length")
    assert answer.result.usage["completion_tokens"] == 5


@pytest.mark.parametrize(("stop", "expected"), [(["5"], "1 2 3 4 "), (["9 10"], count(8) + " "), (["zz"], count(12))])
def test_stop_strings_are_not_part_of_the_answer(chat: Any, stop: list[str], expected: str) -> None:
    answer = chat.run("llm", ask("count to 12", stop=stop), stream=True)
    assert text_of(answer.chunks) == answer.body.content == expected
    assert answer.body.finish_reason == "stop"


def test_a_seed_repeats_and_another_differs(chat: Any) -> None:
    # High temperature over all tokens: noise, but the same noise for the same seed.
    def noise(seed: int) -> str:
        loose = {"temperature": 2.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "max_tokens": 60, "seed": seed}
        return chat.run("llm", {"prompt": "qzx", **loose, "grammar": "root ::= [a-z]{60}"}).body.content

    assert noise(7) == noise(7) != noise(8)
    assert noise(2**63 - 1)  # seeds of 63 bits are folded


def test_top_k_1_is_greedy_at_any_temperature(chat: Any) -> None:
    assert chat.run("llm", {**ask("count to 12"), "temperature": 2.0, "top_k": 1}).body.content == count(12)


def test_presence_penalty_changes_the_answer(chat: Any) -> None:
    answer = chat.run("llm", ask("say aaaaaaaa", presence_penalty=2.0, frequency_penalty=2.0))
    assert answer.body.content != chat.run("llm", ask("say aaaaaaaa")).body.content


def test_json_schema_binds_the_answer(chat: Any) -> None:
    assert json.loads(chat.run("llm", ask("hello", json_schema=ONE_OF_TWO)).body.content) in ({"n": 1}, {"n": 2})


def test_json_object_is_an_object(chat: Any) -> None:
    body = chat.run("llm", ask("hello", json_object=True, max_tokens=200)).body
    if body.finish_reason == "stop":
        assert isinstance(json.loads(body.content), dict)
    else:
        assert body.content.lstrip().startswith("{")


def test_grammar_binds_the_answer(chat: Any) -> None:
    body = chat.run("llm", ask("count to 3", grammar='root ::= "yes" | "no"')).body
    assert body.content in ("yes", "no")
    assert body.finish_reason == "stop"


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "pick"}}])
def test_a_forced_tool_call(chat: Any, choice: Any) -> None:
    answer = chat.run("llm", ask("hello", tools=[TOOL], tool_choice=choice), stream=True)
    body = answer.body
    assert body.finish_reason == "tool_calls"
    (call,) = body.tool_calls
    assert call["function"]["name"] == "pick"
    assert json.loads(call["function"]["arguments"]) in ({"n": 1}, {"n": 2})
    streamed = [call for chunk in answer.chunks for call in chunk.get("delta", {}).get("tool_calls", [])]
    assert "".join(call["function"]["arguments"] for call in streamed) == call["function"]["arguments"]
    assert streamed[0]["index"] == 0
    assert body.content is None


def test_a_tool_is_chosen_among_several(chat: Any) -> None:
    other = {"type": "function", "function": {"name": "other", "parameters": ONE_OF_TWO}}
    named = {"type": "function", "function": {"name": "other"}}
    (call,) = chat.run("llm", ask("hello", tools=[TOOL, other], tool_choice=named)).body.tool_calls
    assert call["function"]["name"] == "other"


def test_tools_that_must_not_be_called_are_left_out(chat: Any) -> None:
    assert chat.run("llm", ask("count to 3", tools=[TOOL], tool_choice="none")).body.content == "1 2 3"


def test_free_tool_choice_is_refused_where_the_template_has_no_tools(chat: Any) -> None:
    fault = chat.run("llm", ask("hello", tools=[TOOL])).fault
    assert (fault.code, fault.field) == ("unsupported", "tools")


def test_logprobs_are_those_of_the_model(chat: Any) -> None:
    body = chat.run("llm", ask("count to 3", logprobs=True, top_logprobs=2)).body
    entries = body.logprobs["content"]
    assert [entry["token"] for entry in entries][:5] == ["1", " ", "2", " ", "3"]
    first = entries[0]
    assert first["bytes"] == [49]
    assert len(first["top_logprobs"]) == 2
    assert math.isclose(first["logprob"], first["top_logprobs"][0]["logprob"])
    assert -0.01 < first["logprob"] <= 0
    assert first["top_logprobs"][1]["logprob"] < -5


def test_no_alternatives_come_unasked(chat: Any) -> None:
    entries = chat.run("llm", {"prompt": "x", "max_tokens": 2, "logprobs": True}).body.logprobs["content"]
    assert entries
    assert all(entry["top_logprobs"] == [] and set(entry) >= {"token", "bytes", "logprob"} for entry in entries)


def test_a_prompt_may_fill_the_context_to_the_last_token(chat: Any) -> None:
    # bos + 510 letters leave room for one token
    usage = chat.run("llm", {"prompt": "x" * 510, "max_tokens": 1, "temperature": 0}).result.usage
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (511, 1)


def test_an_answer_without_max_tokens_ends_with_the_context(chat: Any) -> None:
    body = chat.run("llm", {"prompt": "x" * 480, "temperature": 0, "grammar": "root ::= [a-z] root"}).body
    assert body.finish_reason == "length"
    assert 28 <= len(body.content) <= 32


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"prompt": "x" * 511}, "prompt"),
        ({"prompt": "x" * 100_000}, "prompt"),
        (ask("x" * 600), "messages"),
        (ask("ping", max_tokens=510), "max_tokens"),
        ({"prompt": "x" * 100, "max_tokens": 10_000_000}, "max_tokens"),
    ],
)
def test_what_does_not_fit_is_refused_with_the_counts(chat: Any, params: dict[str, Any], field: str) -> None:
    answer = chat.run("llm", params)
    assert (answer.fault.code, answer.fault.field) == ("context_length_exceeded", field)
    assert answer.fault.http_status == 400
    assert "512" in answer.fault.message
    assert not answer.started
    assert chat.run("llm", ask("ping")).body.content == "pong"


def test_cancel_is_quick_and_the_next_run_works(chat: Any, backend: str) -> None:
    endless = fixture(backend).endless
    assert endless is not None
    chat.send(wire.Ping(n=1))
    answer = chat.begin(endless.kind, endless.params, stream=True)
    seen: list[Any] = []
    while len(seen) < 3:
        message = chat.receive()
        if isinstance(message, wire.Chunk):
            seen.append(message)
    chat.send(wire.Cancel(run=chat._runs))
    began = time.monotonic()
    assert chat.finish(answer).fault.code == "cancelled"
    assert time.monotonic() - began < 15.0
    assert chat.run("llm", ask("count to 5")).body.content == count(5)


def test_pings_are_answered_while_it_generates(chat: Any, backend: str) -> None:
    endless = fixture(backend).endless
    assert endless is not None
    answer = chat.begin(endless.kind, endless.params)
    for n in range(1, 6):
        chat.send(wire.Ping(n=n))
        began = time.monotonic()
        while not isinstance(message := chat.receive(), wire.Pong):
            pass
        assert message.n == n
        assert time.monotonic() - began < 15.0
    chat.send(wire.Cancel(run=chat._runs))
    assert chat.finish(answer).fault.code == "cancelled"


def test_progress_counts_tokens_without_a_stream(chat: Any, backend: str) -> None:
    endless = fixture(backend).endless
    assert endless is not None
    answer = chat.begin(endless.kind, endless.params)
    counts: list[int] = []
    while len(counts) < 3:
        message = chat.receive()
        if isinstance(message, wire.Progress) and message.phase == "decode":
            counts.append(message.n)
    chat.send(wire.Cancel(run=chat._runs))
    chat.finish(answer)
    assert counts == sorted(set(counts))


def test_no_tcp_port_is_open(chat: Any) -> None:
    process = psutil.Process(chat.process.pid)
    assert [entry for entry in process.net_connections("inet") if entry.status == psutil.CONN_LISTEN] == []


def test_ready_tells_what_the_model_allows(backend: str, spawn_shared: Any, make_model: Any) -> None:
    child = spawn_shared("llm")
    ready = child.load(make_model(backend, n_ctx=256))
    assert isinstance(ready, Ready), ready
    assert ready.device == "cpu"
    assert ready.compute_type == "q8_0"
    assert ready.slots == (4 if backend == "xllamacpp" else 1)
    assert ready.limits["n_ctx"] == 256
    assert ready.limits["n_ctx_train"] == 512
    assert ready.peak_rss_bytes > 2**20
    assert child.run("llm", ask("x" * 300)).fault.code == "context_length_exceeded"


def test_asking_for_cuda_of_a_cpu_build_is_a_failed_load(backend: str, spawn_shared: Any, make_model: Any) -> None:
    fault = spawn_shared("llm").load(msgspec.structs.replace(make_model(backend), device="cuda"))
    if isinstance(fault, Ready):
        pytest.skip("this is a GPU build on a machine with a GPU")
    assert (fault.code, fault.field) == ("cpu_fallback", "device")


@pytest.mark.gpu
def test_layers_really_go_to_the_gpu(backend: str, spawn_shared: Any, make_model: Any) -> None:
    child = spawn_shared("llm")
    ready = child.load(msgspec.structs.replace(make_model(backend), device="cuda"))
    if not isinstance(ready, Ready) and ready.code == "cpu_fallback":
        pytest.skip(f"no GPU build of {backend} here: {ready.message}")
    assert isinstance(ready, Ready), ready
    assert ready.device.startswith("cuda")
    assert ready.limits["gpu_layers"] > 0
    assert child.run("llm", ask("count to 12")).body.content == count(12)
