"""POST /v1/chat/completions, plain and streamed."""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator.answers import all_finished, job_headers, result_of, usage_tokens
from coordinator.bodies import JSON_BYTES, FieldTable, model_name, read_json, work_params
from coordinator.errors import Json
from coordinator.openai.sampling import (
    HANDLED,
    IGNORED,
    SAMPLING,
    answers_wanted,
    each_answer,
    shared,
    stream_wish,
)
from coordinator.records import JobRecord
from coordinator.services import services, submission
from coordinator.streams import JobStream, sse
from protocol.faults import refuse
from protocol.framing import UNDECODABLE
from protocol.work import Kind, LlmChunk, LlmResult

FIELDS = FieldTable(
    passed=SAMPLING | {"messages", "tools", "tool_choice", "logprobs", "top_logprobs", "chat_template_kwargs"},
    handled=HANDLED | {"max_completion_tokens", "response_format", "reasoning_effort"},
    ignored=IGNORED,
    fixed={
        "parallel_tool_calls": (True,),
        "modalities": (["text"],),
        "logit_bias": ({},),
        "verbosity": ("medium",),
        "audio": (),
        "functions": (),
        "function_call": (),
        "web_search_options": (),
        "moderation": (),
    },
)
_TOOL_NAME = re.compile(r"[A-Za-z0-9_.-]{1,128}\Z", re.ASCII)


async def create(request: Request) -> Response:
    """Answer a chat."""
    body = await read_json(request, JSON_BYTES)
    passed, handled = FIELDS.pick(body)
    model = model_name(handled)
    stream, include_usage = stream_wish(handled)
    params = to_params(passed, handled)
    n = answers_wanted(handled)
    jobs = each_answer(submission(request, Kind.LLM, model, params, stream=stream), params, n)
    names = field_names(handled)
    if stream:
        streams = [ChatStream(model, include_usage, index) for index in range(n)]
        pairs = list(zip(jobs, streams, strict=True))
        return JobStream(services(request), pairs, names, streams[0].usage if include_usage else None)
    records = await all_finished(request, jobs, names)
    return Json(to_answer(*records), headers=job_headers(records[0]))


ROUTES = [Route("/v1/chat/completions", create, methods=["POST"])]


# ---- request ------------------------------------------------------------------------------------------------


def to_params(passed: dict[str, Any], handled: dict[str, Any]) -> Any:
    """Work parameters of a chat. Raises FaultError naming the field in OpenAI's words."""
    value = {**passed, **shared(handled)}
    if "messages" not in value:
        raise refuse("invalid_parameter", "messages: The field is required.", "messages")
    if "max_completion_tokens" in handled:
        if handled.get("max_tokens", handled["max_completion_tokens"]) != handled["max_completion_tokens"]:
            message = "max_tokens: It contradicts max_completion_tokens; give one of them."
            raise refuse("invalid_parameter", message, "max_tokens")
        value["max_tokens"] = handled["max_completion_tokens"]
    if "reasoning_effort" in handled:
        # The chat template decides what it means, as with llama.cpp's and vLLM's own servers.
        kwargs = value.get("chat_template_kwargs", {})
        if isinstance(kwargs, dict):
            value["chat_template_kwargs"] = {"reasoning_effort": handled["reasoning_effort"], **kwargs}
    value.update(_response_format(handled.get("response_format")))
    params = work_params(Kind.LLM, value, field_names(handled))
    _check_tools(params.tools, params.tool_choice)
    if params.top_logprobs and not params.logprobs:
        raise refuse("invalid_parameter", "top_logprobs: Only allowed with `logprobs`: true.", "top_logprobs")
    return params


def field_names(handled: dict[str, Any]) -> dict[str, str]:
    """Our field names -> those that the caller used."""
    names = {"json_schema": "response_format", "json_object": "response_format"}
    if "max_completion_tokens" in handled:
        names["max_tokens"] = "max_completion_tokens"
    return names


def _response_format(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_object": True}
    if kind != "json_schema":
        message = "response_format.type: Expected one of text, json_object, json_schema."
        raise refuse("invalid_parameter", message, "response_format.type")
    wrapper = value.get("json_schema")
    schema = wrapper.get("schema") if isinstance(wrapper, dict) else None
    if not isinstance(schema, dict):
        name = "response_format.json_schema.schema"
        raise refuse("invalid_parameter", f"{name}: Expected a JSON schema object.", name)
    return {"json_schema": schema}


def _check_tools(tools: list[dict[str, Any]], wanted: str | dict[str, Any] | None) -> None:
    names = {_tool_name(tool, f"tools.{index}") for index, tool in enumerate(tools)}
    if wanted is None or wanted in ("none", "auto"):
        return
    if wanted == "required":
        ok = bool(tools)
    else:
        function = wanted.get("function") if isinstance(wanted, dict) and wanted.get("type") == "function" else None
        ok = isinstance(function, dict) and function.get("name") in names
    if not ok:
        message = "tool_choice: Expected none, auto, required (with tools) or one of the given functions."
        raise refuse("invalid_parameter", message, "tool_choice")


def _tool_name(tool: dict[str, Any], field: str) -> str:
    """Check one tool and return its function's name. Raises FaultError(invalid_parameter)."""
    function = tool.get("function")
    name = function.get("name") if isinstance(function, dict) else None
    if tool.get("type") != "function" or not isinstance(name, str) or not _TOOL_NAME.match(name):
        message = f'{field}: Expected {{"type": "function", "function": {{"name": …}}}}.'
        raise refuse("invalid_parameter", message, field)
    if isinstance(function, dict) and not isinstance(function.get("parameters", {}), dict):
        field = f"{field}.function.parameters"
        raise refuse("invalid_parameter", f"{field}: Expected a JSON schema object.", field)
    return name


# ---- answer -------------------------------------------------------------------------------------------------


def chat_id(job: str) -> str:
    """OpenAI-like id of an answer; the job's id is inside."""
    return f"chatcmpl-{job}"


def to_answer(record: JobRecord, *others: JobRecord) -> dict[str, Any]:
    """OpenAI's chat.completion object; one choice per job."""
    return {
        "id": chat_id(record.id),
        "object": "chat.completion",
        "created": record.created_ms // 1000,
        "model": record.model,
        "choices": [_choice(index, result_of(one)) for index, one in enumerate((record, *others))],
        "usage": usage_tokens(record, *others),
    }


def _choice(index: int, result: LlmResult) -> dict[str, Any]:
    message: dict[str, Any] = {"role": "assistant", "content": result.content, "refusal": None}
    if result.reasoning_content is not None:
        message["reasoning_content"] = result.reasoning_content
    if result.tool_calls:
        message["tool_calls"] = result.tool_calls
    return {
        "index": index,
        "message": message,
        "logprobs": result.logprobs,
        "finish_reason": result.finish_reason,
    }


class ChatStream:
    """Renders chunks of choice `index` as chat.completion.chunk objects."""

    def __init__(self, model: str, include_usage: bool, index: int = 0) -> None:
        self._index = index
        self._model = model
        self._include_usage = include_usage
        self._base: dict[str, Any] = {}
        self._finish_reason: str | None = None
        self._content = ""
        self._reasoning = ""
        self._tools = False

    def start(self, record: JobRecord) -> list[bytes]:
        """The chunk that names the role, as OpenAI sends it."""
        self._base = {
            "id": chat_id(record.id),
            "object": "chat.completion.chunk",
            "created": record.created_ms // 1000,
            "model": self._model,
        }
        return [self._chunk({"role": "assistant", "content": ""})]

    def chunk(self, data: bytes) -> list[bytes]:
        """One delta."""
        chunk = decode_chunk(data)
        self._content += chunk.delta.content or ""
        self._reasoning += chunk.delta.reasoning_content or ""
        self._tools = self._tools or bool(chunk.delta.tool_calls)
        self._finish_reason = self._finish_reason or chunk.finish_reason
        delta = msgspec.to_builtins(chunk.delta)
        return [self._chunk(delta, chunk.finish_reason, chunk.logprobs)]

    def end(self, record: JobRecord, complete: bool) -> list[bytes]:
        """What was not streamed yet, and the reason of the end."""
        result: LlmResult = result_of(record)
        events = []
        if not complete and (rest := self._rest(result)):
            events.append(self._chunk(rest))
        if self._finish_reason is None:
            events.append(self._chunk({}, result.finish_reason))
        return events

    async def usage(self, records: Sequence[JobRecord]) -> AsyncGenerator[bytes, None]:
        """The last chunk, after the ends of all choices."""
        yield sse({**self._base, "choices": [], "usage": usage_tokens(*records)})

    def _rest(self, result: LlmResult) -> dict[str, Any]:
        rest: dict[str, Any] = {}
        for name, sent in (("content", self._content), ("reasoning_content", self._reasoning)):
            whole = getattr(result, name) or ""
            if whole.startswith(sent) and len(whole) > len(sent):
                rest[name] = whole[len(sent) :]
        if result.tool_calls and not self._tools:
            rest["tool_calls"] = [{"index": index, **call} for index, call in enumerate(result.tool_calls)]
        return rest

    def _chunk(
        self, delta: dict[str, Any], finish_reason: str | None = None, logprobs: dict[str, Any] | None = None
    ) -> bytes:
        choice = {"index": self._index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        usage = {"usage": None} if self._include_usage else {}
        return sse({**self._base, "choices": [choice], **usage})


def decode_chunk(data: bytes) -> LlmChunk:
    try:
        return msgspec.msgpack.decode(data, type=LlmChunk)
    except UNDECODABLE as error:
        raise refuse("engine_protocol", f"The worker's chunk is not one of kind llm: {error}.") from None
