"""Plain completions: mapping, plain and streamed answers, the older logprobs."""

from __future__ import annotations

from typing import Any

import openai
import pytest

from coordinator.openai.completions import FIELDS, legacy_logprobs, to_params
from protocol.faults import FaultError
from protocol.work import Delta, LlmChunk, LlmResult


def params(**body: Any) -> Any:
    passed, handled = FIELDS.pick({"prompt": "one", **body})
    return to_params(passed, handled)


def test_a_prompt_may_stand_in_a_list_and_16_tokens_are_the_default() -> None:
    made = params(prompt=["one"])
    assert (made.prompt, made.max_tokens, made.messages) == ("one", 16, None)
    assert params(max_tokens=3, logprobs=2).top_logprobs == 2


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"prompt": ["a", "b"]}, "prompt"),
        ({"prompt": [1, 2]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"echo": True}, "echo"),
        ({"best_of": 2}, "best_of"),
        ({"suffix": "x"}, "suffix"),
        ({"logprobs": 6}, "logprobs"),
        ({"messages": []}, "messages"),
    ],
)
def test_refusals_name_the_field(body: dict[str, Any], field: str) -> None:
    with pytest.raises(FaultError) as caught:
        params(**body)
    assert caught.value.fault.field == field
    assert caught.value.fault.http_status == 400


def test_logprobs_in_the_older_shape() -> None:
    item = {"token": "ab", "logprob": -0.5, "top_logprobs": [{"token": "ab", "logprob": -0.5}]}
    assert legacy_logprobs({"content": [item, {**item, "token": "c"}]}, 4) == {
        "tokens": ["ab", "c"],
        "token_logprobs": [-0.5, -0.5],
        "top_logprobs": [{"ab": -0.5}, {"ab": -0.5}],
        "text_offset": [4, 6],
    }
    assert legacy_logprobs(None) is None


def script(job: Any) -> None:
    job.started()
    if job.offer.stream:
        job.chunk(LlmChunk(delta=Delta(content=" two")))
        job.chunk(LlmChunk(delta=Delta(content=" three")))
    job.complete(LlmResult(content=" two three", finish_reason="length"), {"prompt_tokens": 1, "completion_tokens": 2})


def test_plain_and_streamed_answers_agree(ai: openai.OpenAI, serve: Any) -> None:
    serve(script, "complete", "llm")
    plain = ai.completions.create(model="complete", prompt="one")
    assert plain.choices[0].text == " two three"
    assert plain.usage is not None
    assert plain.usage.total_tokens == 3
    chunks = list(
        ai.completions.create(model="complete", prompt="one", stream=True, stream_options={"include_usage": True})
    )
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == " two three"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None, None, "length"]
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 3
