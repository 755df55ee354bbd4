"""Collects an answer while it is generated, and streams it. Pure but for the job's `emit` and `progress`."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Any

from engines.llm.conversation import forced_call
from engines.runtime.contract import Job
from protocol.work import Delta, LlmChunk, LlmResult

_PROGRESS_EVERY_S = 0.2


class Answer:
    """One answer in the making.

    Args:
        forced: the text is one tool call written as JSON (`conversation.forced_schema`): it is kept back until it is
            whole and goes out as a tool call.
    """

    def __init__(self, job: Job, *, forced: bool = False) -> None:
        self._job = job
        self._forced = forced
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._logprobs: list[dict[str, Any]] = []
        self.finish_reason = ""

    def add(
        self,
        *,
        content: str = "",
        reasoning: str = "",
        tool_calls: Sequence[dict[str, Any]] = (),
        logprobs: Sequence[dict[str, Any]] = (),
    ) -> None:
        """Append a piece and send it on. `tool_calls` are OpenAI's streaming deltas, with `index`."""
        self._content.append(content)
        self._reasoning.append(reasoning)
        self._logprobs.extend(logprobs)
        for delta in tool_calls:
            _merge(self._calls, delta)
        if self._forced and not tool_calls:
            content = ""
        if content or reasoning or tool_calls:
            delta_ = Delta(content=content or None, reasoning_content=reasoning or None, tool_calls=list(tool_calls))
            self._job.emit(LlmChunk(delta=delta_, logprobs={"content": list(logprobs)} if logprobs else None))

    def finish(self, reason: str) -> None:
        """The generation ended by "stop", "length" or "tool_calls"."""
        if self._forced:
            text = "".join(self._content)
            call = forced_call(text, f"call_{uuid.uuid4().hex[:24]}")
            self._forced = False
            self._content = []
            if call is not None:
                self.add(tool_calls=[call])
                reason = "tool_calls"
            else:  # cut off: what there is goes out as text, the reason says why
                self.add(content=text)
        self.finish_reason = reason
        self._job.emit(LlmChunk(finish_reason=reason))

    def result(self) -> LlmResult:
        """The whole answer."""
        content = "".join(self._content)
        return LlmResult(
            content=content if content or not self._calls else None,
            reasoning_content="".join(self._reasoning) or None,
            tool_calls=self._calls,
            finish_reason=self.finish_reason or "stop",
            logprobs={"content": self._logprobs} if self._logprobs else None,
        )


def _merge(calls: list[dict[str, Any]], delta: dict[str, Any]) -> None:
    """Add a streaming delta to the tool calls of the whole answer."""
    index = int(delta.get("index", 0))
    while len(calls) <= index:
        calls.append({"id": "", "type": "function", "function": {"name": "", "arguments": ""}})
    call = calls[index]
    call["id"] = delta.get("id") or call["id"]
    function = delta.get("function") or {}
    call["function"]["name"] += function.get("name") or ""
    call["function"]["arguments"] += function.get("arguments") or ""


class Pace:
    """Reports progress at most five times a second, so that the wire carries answers and not counters."""

    def __init__(self, job: Job, clock: Callable[[], float] = time.monotonic) -> None:
        self._job, self._clock = job, clock
        self._next = 0.0

    def tick(self, n: int, total: int | None, phase: str) -> None:
        """Say that `n` units are done; called once per unit from the work loop."""
        now = self._clock()
        if now >= self._next:
            self._next = now + _PROGRESS_EVERY_S
            self._job.progress(n, total, phase)
