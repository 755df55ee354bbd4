"""What only this backend has: slots, the private socket, tools of the model's own."""

from __future__ import annotations

import itertools
import os
import stat
from typing import Any

import psutil
import pytest

from engines.llm.answer import Answer
from engines.llm.xllamacpp_backend import request_body, take_choice, usage_of
from engines.runtime.contract import Job
from protocol import engine_wire as wire
from protocol.engine_wire import Ready
from protocol.work import LlmParams, Message

CHAT = [Message(role="user", content="hi")]
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("a", "b")]


def test_body_names_only_what_was_asked_for() -> None:
    body = request_body(LlmParams(messages=CHAT), native_tools=True)
    assert body == {
        "stream": True,
        "stream_options": {"include_usage": True},
        "return_progress": True,
        "messages": [{"role": "user", "content": "hi"}],
    }


def test_body_of_a_plain_prompt() -> None:
    body = request_body(LlmParams(prompt="x", logprobs=True, seed=2**32 + 5, stop=["y"], top_k=3), native_tools=True)
    assert (body["prompt"], body["logprobs"], body["seed"], body["stop"], body["top_k"]) == ("x", 1, 6, ["y"], 3)
    assert "messages" not in body


def test_free_choice_is_left_to_the_models_own_tool_calls() -> None:
    body = request_body(LlmParams(messages=CHAT, tools=TOOLS), native_tools=True)
    assert (body["tools"], body["tool_choice"]) == (TOOLS, "auto")
    assert "response_format" not in body


@pytest.mark.parametrize(
    ("choice", "names"), [("required", ["a", "b"]), ({"type": "function", "function": {"name": "b"}}, ["b"])]
)
@pytest.mark.parametrize("native", [True, False])
def test_a_call_that_must_come_is_bound_by_a_schema(choice: Any, names: list[str], native: bool) -> None:
    body = request_body(LlmParams(messages=CHAT, tools=TOOLS, tool_choice=choice), native_tools=native)
    schema = body["response_format"]["json_schema"]["schema"]
    assert [call["properties"]["name"] for call in schema.get("anyOf", [schema])] == [{"const": name} for name in names]
    # a template with a place for tools shows them
    assert ("tools" in body, body.get("tool_choice")) == (native, "none" if native else None)


def test_choices_of_both_routes_reach_the_answer() -> None:
    answer = Answer(Job("llm", None))
    take_choice({"delta": {"role": "assistant", "content": None}, "finish_reason": None}, answer)
    take_choice({"delta": {"reasoning_content": "hm"}}, answer)
    take_choice({"delta": {"content": "a"}, "logprobs": {"content": [{"id": 3, "token": "a", "logprob": 0.0}]}}, answer)
    take_choice({"text": "b", "finish_reason": "length"}, answer)
    found = answer.result()
    assert (found.content, found.reasoning_content, found.finish_reason) == ("ab", "hm", "length")
    assert found.logprobs == {"content": [{"token": "a", "logprob": 0.0, "top_logprobs": []}]}


def test_usage() -> None:
    raw = {
        "prompt_tokens": 9,
        "completion_tokens": 2,
        "total_tokens": 11,
        "prompt_tokens_details": {"cached_tokens": 4},
    }
    assert usage_of(raw) == {"prompt_tokens": 9.0, "completion_tokens": 2.0, "cached_tokens": 4.0}
    assert usage_of({}) == {"prompt_tokens": 0.0, "completion_tokens": 0.0}


# ---- the real server

SHOWS_TOOLS = (
    "{% for tool in tools or [] %}<|user|>{{ tool.function | tojson }}<|end|>{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}<|assistant|>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>\n"
    '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}\n</tool_call>'
    "{% endfor %}{% else %}<|user|>{{ m.content }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def server(spawn: Any, make_model: Any) -> Any:
    pytest.importorskip("xllamacpp")
    child = spawn("llm")
    assert isinstance(ready := child.load(make_model("xllamacpp", slots=4)), Ready), ready
    return child


def user(text: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "temperature": 0}


@pytest.mark.engine
def test_four_runs_advance_together(server: Any) -> None:
    """Continuous batching: four endless runs all make tokens before any of them ends."""
    loop = {"prompt": "x", "grammar": "root ::= [a-z] root", "temperature": 0}
    begun = [server.begin("llm", loop, stream=True) for _ in range(4)]
    order = []
    ended = 0
    while ended < len(begun):
        message = server.receive()
        if isinstance(message, wire.Chunk):
            order.append(message.run)
        ended += isinstance(message, wire.Result)
    first_end = min(max(at for at, run in enumerate(order) if run == number) for number in range(1, 5))
    last_begin = max(order.index(number) for number in range(1, 5))
    assert last_begin < first_end, "a run began only when another had ended"
    switches = sum(a != b for a, b in itertools.pairwise(order))
    assert switches > len(order) // 10, "the runs took turns, not steps"


@pytest.mark.engine
def test_concurrent_answers_do_not_mix(server: Any) -> None:
    wanted = {server.begin("llm", user(f"count to {n}")) and server._runs: n for n in (10, 20, 30, 40)}
    results: dict[int, str] = {}
    while len(results) < 4:
        message = server.receive()
        if isinstance(message, wire.Result):
            results[message.run] = wire.unpack(message.body)["content"]
    for run, n in wanted.items():
        assert results[run] == " ".join(map(str, range(1, n + 1)))


@pytest.mark.engine
def test_cancel_of_one_run_leaves_its_neighbours(server: Any) -> None:
    from engines.llm.fixture_cases import fixture

    endless = fixture("xllamacpp").endless
    assert endless is not None
    server.begin("llm", endless.params)
    doomed = server._runs
    other = server.begin("llm", user("count to 50"))
    server.send(wire.Cancel(run=doomed))
    ends: dict[int, Any] = {}
    while len(ends) < 2:
        message = server.receive()
        if isinstance(message, wire.Result | wire.RunFault):
            ends[message.run] = message
    assert ends[doomed].fault.code == "cancelled"
    assert wire.unpack(ends[doomed + 1].body)["content"].endswith("49 50")
    assert other.fault is None


@pytest.mark.engine
def test_the_listener_is_a_socket_in_the_scratch_folder(server: Any) -> None:
    path = server.folder / "x.sock"
    assert stat.S_ISSOCK(os.stat(path).st_mode)
    listening = psutil.Process(server.process.pid).net_connections("unix")
    assert str(path) in {entry.laddr for entry in listening}
    assert psutil.Process(server.process.pid).net_connections("inet") == []


@pytest.mark.engine
def test_shutdown_ends_the_process_at_once(server: Any) -> None:
    server.run("llm", user("ping"))
    server.send(wire.Shutdown())
    assert server.process.wait(60) == 0


@pytest.mark.engine
def test_a_template_that_shows_tools(spawn: Any, make_model: Any) -> None:
    pytest.importorskip("xllamacpp")
    child = spawn("llm")
    assert isinstance(child.load(make_model("xllamacpp", chat_template=SHOWS_TOOLS)), Ready)
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    tools = [{"type": "function", "function": {"name": "pick", "parameters": schema}}]
    free = child.run("llm", {**user("hello"), "tools": tools, "max_tokens": 60})
    assert free.fault is None
    assert free.result.usage["prompt_tokens"] > 100  # the tool is in the prompt
    forced = child.run("llm", {**user("hello"), "tools": tools, "tool_choice": "required"})
    (call,) = forced.body.tool_calls
    assert call["function"]["name"] == "pick"
    assert forced.result.usage["prompt_tokens"] > 100
    unused = child.run("llm", {**user("hello"), "tools": tools, "tool_choice": "none", "max_tokens": 60})
    assert unused.result.usage["prompt_tokens"] < 20
