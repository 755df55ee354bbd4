"""POST /v1/completions, plain and streamed: one prompt, no chat template."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator.answers import all_finished, job_headers, result_of, usage_tokens
from coordinator.bodies import FieldTable, model_name, read_json, work_params
from coordinator.errors import Json
from coordinator.openai.chat import decode_chunk
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
from protocol.work import Kind, LlmResult

DEFAULT_MAX_TOKENS = 16  # OpenAI's own default of this route
MAX_LOGPROBS = 5

FIELDS = FieldTable(
    passed=SAMPLING,
    handled=HANDLED | {"prompt", "logprobs"},
    ignored=IGNORED,
    fixed={"best_of": (1,), "echo": (False,), "suffix": ("",), "logit_bias": ({},)},
)


async def create(request: Request) -> Response:
    """Continue a prompt."""
    passed, handled = FIELDS.pick(await read_json(request))
    model = model_name(handled)
    stream, include_usage = stream_wish(handled)
    params = to_params(passed, handled)
    n = answers_wanted(handled)
    jobs = each_answer(submission(request, Kind.LLM, model, params, stream=stream), params, n)
    if stream:
        streams = [CompletionStream(include_usage, index) for index in range(n)]
        pairs = list(zip(jobs, streams, strict=True))
        return JobStream(services(request), pairs, closing=streams[0].usage if include_usage else None)
    records = await all_finished(request, jobs)
    return Json(to_answer(*records), headers=job_headers(records[0]))


ROUTES = [Route("/v1/completions", create, methods=["POST"])]


def to_params(passed: dict[str, Any], handled: dict[str, Any]) -> Any:
    """Work parameters of a completion. Raises FaultError naming the field."""
    prompt = handled.get("prompt")
    if isinstance(prompt, list) and len(prompt) == 1 and isinstance(prompt[0], str):
        prompt = prompt[0]
    if not isinstance(prompt, str):
        message = "prompt: Expected one text (or a list of one); token lists and batches are not taken here."
        raise refuse("invalid_parameter", message, "prompt")
    value = {"max_tokens": DEFAULT_MAX_TOKENS, **passed, **shared(handled), "prompt": prompt}
    if "logprobs" in handled:
        count = handled["logprobs"]
        if type(count) is not int or not 0 <= count <= MAX_LOGPROBS:
            raise refuse("invalid_parameter", f"logprobs: Expected a number from 0 to {MAX_LOGPROBS}.", "logprobs")
        value.update(logprobs=True, top_logprobs=count)
    return work_params(Kind.LLM, value)


def to_answer(record: JobRecord, *others: JobRecord) -> dict[str, Any]:
    """OpenAI's text_completion object; one choice per job."""
    choices = []
    for index, one in enumerate((record, *others)):
        result: LlmResult = result_of(one)
        choices.append(_choice(index, result.content or "", result.finish_reason, result.logprobs))
    return {**_base(record), "choices": choices, "usage": usage_tokens(record, *others)}


class CompletionStream:
    """Renders chunks of choice `index` as text_completion objects."""

    def __init__(self, include_usage: bool, index: int = 0) -> None:
        self._index = index
        self._include_usage = include_usage
        self._base: dict[str, Any] = {}
        self._sent = ""
        self._finish_reason: str | None = None

    def start(self, record: JobRecord) -> list[bytes]:
        """Only the headers: this object has no role to announce."""
        self._base = _base(record)
        return []

    def chunk(self, data: bytes) -> list[bytes]:
        """One piece of text."""
        chunk = decode_chunk(data)
        text = chunk.delta.content or ""
        self._sent += text
        self._finish_reason = self._finish_reason or chunk.finish_reason
        return [self._event(text, chunk.finish_reason, chunk.logprobs, len(self._sent) - len(text))]

    def end(self, record: JobRecord, complete: bool) -> list[bytes]:
        """What was not streamed yet, and the reason of the end."""
        result: LlmResult = result_of(record)
        whole = result.content or ""
        rest = whole[len(self._sent) :] if not complete and whole.startswith(self._sent) else ""
        events = []
        if rest or self._finish_reason is None:
            reason = result.finish_reason if self._finish_reason is None else None
            events.append(self._event(rest, reason))
        return events

    async def usage(self, records: Sequence[JobRecord]) -> AsyncGenerator[bytes, None]:
        """The last chunk, after the ends of all choices."""
        yield sse({**self._base, "choices": [], "usage": usage_tokens(*records)})

    def _event(
        self, text: str, finish_reason: str | None, logprobs: dict[str, Any] | None = None, offset: int = 0
    ) -> bytes:
        choice = _choice(self._index, text, finish_reason, logprobs, offset)
        usage = {"usage": None} if self._include_usage else {}
        return sse({**self._base, "choices": [choice], **usage})


def _base(record: JobRecord) -> dict[str, Any]:
    return {
        "id": f"cmpl-{record.id}",
        "object": "text_completion",
        "created": record.created_ms // 1000,
        "model": record.model,
    }


def _choice(
    index: int, text: str, finish_reason: str | None, logprobs: dict[str, Any] | None, offset: int = 0
) -> dict[str, Any]:
    return {
        "index": index,
        "text": text,
        "logprobs": legacy_logprobs(logprobs, offset),
        "finish_reason": finish_reason,
    }


def legacy_logprobs(logprobs: dict[str, Any] | None, offset: int = 0) -> dict[str, Any] | None:
    """Chat-style logprobs ({"content": [{token, logprob, top_logprobs}]}) in the older shape of this route.

    Args:
        logprobs: what the engine said, or None.
        offset: characters of the answer before these tokens.
    """
    items = logprobs.get("content") if logprobs else None
    if not isinstance(items, list):
        return None
    tokens = [str(item.get("token", "")) for item in items if isinstance(item, dict)]
    values = [item.get("logprob") for item in items if isinstance(item, dict)]
    tops = [
        {str(top.get("token", "")): top.get("logprob") for top in item.get("top_logprobs") or []}
        for item in items
        if isinstance(item, dict)
    ]
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += len(token)
    return {"tokens": tokens, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}
