"""What a request means before any library sees it: messages as text, tools, the schema that forces a tool call.

Pure. Both backends get the same view of a request, so they refuse the same things with the same words.
"""

from __future__ import annotations

import json
import re
from typing import Any

from engines.llm.grammar import bracket_depth
from protocol.faults import refuse
from protocol.work import LlmParams, Message

# Converters of schemas recurse, and write a repetition out: `maxLength` of 10^9 keeps one busy for ever.
MAX_SCHEMA_DEPTH = 64
MAX_SCHEMA_CHARS = 200_000
MAX_REPEAT = 10_000
MAX_PATTERN_DEPTH = 50
_COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")


def check(params: LlmParams) -> None:
    """Refuse what no backend can serve. Raises FaultError naming the field."""
    if params.messages is not None:
        for index, message in enumerate(params.messages):
            content_text(message, index)
    elif params.tools or params.tool_choice not in (None, "none"):
        raise refuse("invalid_parameter", "tools: they need `messages`; a plain `prompt` has no turns.", "tools")
    names = [tool_name(tool, index) for index, tool in enumerate(params.tools)]
    if wanted := chosen_tool(params):
        if wanted not in names:
            raise refuse("invalid_parameter", f"tool_choice: no tool is named {wanted!r}.", "tool_choice")
    elif params.tool_choice not in (None, "none", "auto", "required"):
        raise refuse(
            "invalid_parameter", 'tool_choice: expected "none", "auto", "required" or a function.', "tool_choice"
        )
    if params.tool_choice == "required" and not params.tools:
        raise refuse("invalid_parameter", "tool_choice: a tool is required but `tools` is empty.", "tool_choice")
    _check_constraints(params)


def _check_constraints(params: LlmParams) -> None:
    given = [name for name in ("grammar", "json_schema", "json_object") if getattr(params, name) not in (None, False)]
    if len(given) > 1:
        raise refuse("invalid_parameter", f"{given[0]}: give at most one of {', '.join(given)}.", given[0])
    if given and active_tools(params):
        raise refuse("invalid_parameter", f"{given[0]}: it cannot be combined with `tools`.", given[0])
    if params.prompt is not None and given and given[0] != "grammar":
        sentence = f"{given[0]}: a plain prompt takes a grammar only; send the text as `messages`."
        raise refuse("unsupported", sentence, given[0])
    if params.top_logprobs and not params.logprobs:
        raise refuse("invalid_parameter", "top_logprobs: it needs `logprobs` to be true.", "top_logprobs")
    if params.json_schema is not None:
        check_schema(params.json_schema, "json_schema")
    for index, tool in enumerate(params.tools):
        check_schema(tool, f"tools.{index}")


def check_schema(schema: Any, field: str) -> None:
    """Refuse a schema that could keep a converter busy or overflow its stack. Raises FaultError."""
    if len(json.dumps(schema)) > MAX_SCHEMA_CHARS:
        raise refuse("invalid_parameter", f"{field}: it exceeds {MAX_SCHEMA_CHARS} characters.", field)
    level = [schema]
    for _ in range(MAX_SCHEMA_DEPTH):
        for item in level:
            if isinstance(item, dict):
                _check_node(item, field)
        level = [
            child
            for item in level
            if isinstance(item, dict | list)
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return
    raise refuse("invalid_parameter", f"{field}: it is nested deeper than {MAX_SCHEMA_DEPTH} levels.", field)


def _check_node(node: dict[str, Any], field: str) -> None:
    pattern = node.get("pattern", "")
    counts = [node[name] for name in _COUNTS if isinstance(node.get(name), int | float)]
    if isinstance(pattern, str):
        counts += [int(digits[:9]) for digits in re.findall(r"\d+", " ".join(re.findall(r"\{[\d, ]*\}", pattern)))]
        if bracket_depth(pattern) > MAX_PATTERN_DEPTH:
            raise refuse("invalid_parameter", f"{field}: a pattern is nested deeper than {MAX_PATTERN_DEPTH}.", field)
    if counts and max(counts) > MAX_REPEAT:
        raise refuse("invalid_parameter", f"{field}: a repetition of {max(counts)} exceeds {MAX_REPEAT}.", field)


def content_text(message: Message, index: int) -> str:
    """Content of a message as one string; text parts are joined.

    Raises:
        FaultError: `unsupported` for a part that is not text, or no content where there must be some.
    """
    field = f"messages.{index}.content"
    if message.content is None:
        if message.role == "assistant" and message.tool_calls:
            return ""
        raise refuse("invalid_parameter", f"{field}: a message of the {message.role} needs content.", field)
    if isinstance(message.content, str):
        return message.content
    texts = []
    for part in message.content:
        if part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise refuse("unsupported", f"{field}: this model takes text parts only, not {part.get('type')!r}.", field)
        texts.append(part["text"])
    return "".join(texts)


def plain_messages(params: LlmParams) -> list[dict[str, Any]]:
    """Messages as the dicts that chat templates expect, contents as strings, empty fields left out."""
    plain = []
    for index, message in enumerate(params.messages or ()):
        fields: dict[str, Any] = {"role": message.role, "content": content_text(message, index)}
        for name in ("name", "tool_calls", "tool_call_id", "reasoning_content"):
            if (value := getattr(message, name)) is not None:
                fields[name] = value
        plain.append(fields)
    return plain


def tool_name(tool: dict[str, Any], index: int) -> str:
    """Name of a tool. Raises FaultError when the tool has not OpenAI's shape."""
    function = tool.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if tool.get("type") != "function" or not isinstance(name, str) or not name:
        raise refuse(
            "invalid_parameter",
            f'tools.{index}: expected {{"type": "function", "function": {{"name": …}}}}.',
            f"tools.{index}",
        )
    if not isinstance(tool["function"].get("parameters", {}), dict):
        field = f"tools.{index}.function.parameters"
        raise refuse("invalid_parameter", f"{field}: expected a JSON schema.", field)
    return name


def chosen_tool(params: LlmParams) -> str:
    """The function that `tool_choice` names, or ""."""
    choice = params.tool_choice
    if isinstance(choice, dict) and isinstance(function := choice.get("function"), dict):
        return str(function.get("name", ""))
    return ""


def active_tools(params: LlmParams) -> list[dict[str, Any]]:
    """The tools that the answer may call."""
    return [] if params.tool_choice == "none" else params.tools


def must_call(params: LlmParams) -> bool:
    """Whether the answer has to be a tool call."""
    return params.tool_choice == "required" or bool(chosen_tool(params))


def forced_schema(params: LlmParams) -> dict[str, Any]:
    """Schema of an answer that is one tool call: {"name": …, "arguments": …}. For `must_call` requests only."""
    wanted = chosen_tool(params)
    functions = [tool["function"] for tool in params.tools]
    calls = [
        {
            "type": "object",
            "properties": {
                "name": {"const": function["name"]},
                "arguments": function.get("parameters") or {"type": "object"},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for function in functions
        if wanted in ("", function["name"])
    ]
    return calls[0] if len(calls) == 1 else {"anyOf": calls}


def forced_call(text: str, call_id: str) -> dict[str, Any] | None:
    """Read an answer made under `forced_schema`; None when it was cut off before its end."""
    try:
        found = json.loads(text)
        function = {"name": found["name"], "arguments": json.dumps(found["arguments"], ensure_ascii=False)}
    except (ValueError, KeyError, TypeError):
        return None
    return {"index": 0, "id": call_id, "type": "function", "function": function}


def schema_of(params: LlmParams) -> dict[str, Any] | None:
    """The JSON schema that the answer's text must meet, when the request asks for one."""
    if params.json_object:
        return {"type": "object"}
    return params.json_schema
