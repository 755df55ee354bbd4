from __future__ import annotations

from typing import Any

from engines.llm.answer import Answer, Pace
from engines.runtime.contract import Job
from protocol.work import Delta, LlmChunk


def job(stream: bool = True) -> tuple[Job, list[Any]]:
    sent: list[Any] = []
    return Job("llm", None, stream=stream, emit=sent.append), sent


def test_pieces_are_sent_and_add_up() -> None:
    made, sent = job()
    answer = Answer(made)
    answer.add(content="a", logprobs=[{"token": "a"}])
    answer.add(reasoning="hm")
    answer.add()
    answer.finish("stop")
    assert sent == [
        LlmChunk(delta=Delta(content="a"), logprobs={"content": [{"token": "a"}]}),
        LlmChunk(delta=Delta(reasoning_content="hm")),
        LlmChunk(finish_reason="stop"),
    ]
    found = answer.result()
    assert (found.content, found.reasoning_content, found.finish_reason) == ("a", "hm", "stop")


def test_tool_call_deltas_are_merged_by_index() -> None:
    answer = Answer(job()[0])
    answer.add(tool_calls=[{"index": 0, "id": "x", "function": {"name": "f", "arguments": '{"a'}}])
    answer.add(tool_calls=[{"index": 1, "id": "y", "function": {"name": "g", "arguments": "{}"}}])
    answer.add(tool_calls=[{"index": 0, "function": {"arguments": '":1}'}}])
    first, second = answer.result().tool_calls
    assert first == {"id": "x", "type": "function", "function": {"name": "f", "arguments": '{"a":1}'}}
    assert second["function"]["name"] == "g"
    assert answer.result().content is None


def test_a_forced_call_goes_out_whole() -> None:
    made, sent = job()
    answer = Answer(made, forced=True)
    for piece in ('{"name": "f", ', '"arguments": {"n": 1}}'):
        answer.add(content=piece)
    assert sent == []
    answer.finish("stop")
    assert sent[0].delta.tool_calls[0]["function"] == {"name": "f", "arguments": '{"n": 1}'}
    assert sent[1] == LlmChunk(finish_reason="tool_calls")
    assert answer.result().content is None


def test_a_forced_call_that_was_cut_off_goes_out_as_text() -> None:
    made, sent = job()
    answer = Answer(made, forced=True)
    answer.add(content='{"name": "f')
    answer.finish("length")
    assert sent[0] == LlmChunk(delta=Delta(content='{"name": "f'))
    assert answer.result().finish_reason == "length"
    assert answer.result().tool_calls == []


def test_an_empty_answer_is_an_empty_text() -> None:
    answer = Answer(job()[0])
    answer.finish("stop")
    assert answer.result().content == ""


def test_progress_is_paced() -> None:
    reported: list[tuple[int, int | None, str]] = []
    now = 0.0
    pace = Pace(Job("llm", None, report=lambda n, total, phase, _: reported.append((n, total, phase))), lambda: now)
    for n in range(100):
        now = n * 0.05
        pace.tick(n, None, "decode")
    assert 20 <= len(reported) <= 30
    assert reported[0] == (0, None, "decode")
