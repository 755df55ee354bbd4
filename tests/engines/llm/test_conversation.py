from __future__ import annotations

import json
from typing import Any

import pytest

from engines.llm import conversation
from protocol.faults import FaultError
from protocol.work import LlmParams, Message

TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
OTHER = {"type": "function", "function": {"name": "g"}}


def params(**more: Any) -> LlmParams:
    return LlmParams(messages=[Message(role="user", content="hi")], **more)


def refusal(given: LlmParams) -> tuple[str, str | None]:
    with pytest.raises(FaultError) as caught:
        conversation.check(given)
    return caught.value.fault.code, caught.value.fault.field


@pytest.mark.parametrize(
    "given",
    [
        params(),
        params(tools=[TOOL]),
        params(tools=[TOOL], tool_choice="required"),
        params(tools=[TOOL, OTHER], tool_choice={"type": "function", "function": {"name": "g"}}),
        params(tools=[TOOL], tool_choice="none", json_schema={"type": "object"}),
        params(json_object=True),
        LlmParams(prompt="x", grammar='root ::= "a"'),
        LlmParams(messages=[Message(role="assistant", tool_calls=[{"id": "1"}])]),
    ],
)
def test_good_requests_pass(given: LlmParams) -> None:
    conversation.check(given)


def test_parts_that_are_not_text_are_unsupported() -> None:
    given = LlmParams(messages=[Message(role="user", content=[{"type": "input_audio"}])])
    assert refusal(given) == ("unsupported", "messages.0.content")


def test_tools_and_a_schema_cannot_both_bind() -> None:
    assert refusal(params(tools=[TOOL], json_object=True)) == ("invalid_parameter", "json_object")


def test_schema_needs_messages() -> None:
    assert refusal(LlmParams(prompt="x", json_object=True)) == ("unsupported", "json_object")


def test_plain_messages_keep_what_templates_know() -> None:
    given = LlmParams(
        messages=[
            Message(role="user", content=[{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], name="me"),
            Message(role="tool", content="3", tool_call_id="1"),
        ]
    )
    assert conversation.plain_messages(given) == [
        {"role": "user", "content": "ab", "name": "me"},
        {"role": "tool", "content": "3", "tool_call_id": "1"},
    ]


def test_forced_schema_of_one_and_of_several() -> None:
    one = conversation.forced_schema(params(tools=[TOOL], tool_choice="required"))
    assert one["properties"]["arguments"] == TOOL["function"]["parameters"]
    several = conversation.forced_schema(params(tools=[TOOL, OTHER], tool_choice="required"))
    assert [call["properties"]["arguments"]["type"] for call in several["anyOf"]] == ["object", "object"]
    named = {"type": "function", "function": {"name": "g"}}
    assert conversation.forced_schema(params(tools=[TOOL, OTHER], tool_choice=named))["properties"]["name"] == {
        "const": "g"
    }


def test_forced_call_is_read_back() -> None:
    call = conversation.forced_call('{"name": "f", "arguments": {"a": "\u00e9"}}', "id1")
    assert call is not None
    assert call["function"]["name"] == "f"
    assert json.loads(call["function"]["arguments"]) == {"a": "\u00e9"}


@pytest.mark.parametrize("text", ["", '{"name": "f", "argu', "[]", '{"name": "f"}'])
def test_a_forced_call_cut_off_is_none(text: str) -> None:
    assert conversation.forced_call(text, "id1") is None


@pytest.mark.parametrize(
    ("schema", "word"),
    [
        ({"maxItems": 10_001}, "repetition"),
        ({"pattern": "^a{5,20000}$"}, "repetition"),
        ({"pattern": "(" * 60}, "pattern"),
        ({"enum": ["x" * 200_001]}, "characters"),
    ],
)
def test_schemas_that_would_keep_a_converter_busy(schema: dict[str, Any], word: str) -> None:
    with pytest.raises(FaultError, match=word):
        conversation.check_schema({"properties": {"a": schema}}, "json_schema")


def test_ordinary_schemas_pass() -> None:
    nested: Any = {"type": "string", "pattern": "^[0-9]{1,3}$", "maxLength": 500}
    for _ in range(20):
        nested = {"type": "object", "properties": {"a": nested, "b": {"type": "array", "items": nested}}}
        if len(json.dumps(nested)) > 50_000:
            break
    conversation.check_schema(nested, "json_schema")
