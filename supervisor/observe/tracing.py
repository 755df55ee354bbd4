"""Traces of jobs: one trace from the coordinator through this worker, told apart by phase.

Theory of operation. An offer may carry a W3C `traceparent`. The attempt becomes one span below it, and each of its
phases (accept, fetch, queue, load, run, upload) a span below that. A `Tracer` is handed finished spans only: nothing is
held open in a library whose context would have to follow trio's tasks. Without `[otel]` the tracer does nothing and
nothing is imported. Spans carry names and counts, never what callers wrote, and no host name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Protocol

import msgspec

PHASES = ("accept", "fetch", "queue", "load", "run", "upload")
Attributes = Mapping[str, str | int | float | bool]

# OpenTelemetry's names for generative AI are "in development" and have changed before: only this table knows them.
# https://github.com/open-telemetry/semantic-conventions-genai
GEN_AI = {
    "operation": "gen_ai.operation.name",
    "provider": "gen_ai.provider.name",
    "model": "gen_ai.request.model",
    "prompt_tokens": "gen_ai.usage.input_tokens",
    "completion_tokens": "gen_ai.usage.output_tokens",
    "fault": "error.type",
    "job": "bulkhead.job.id",
    "attempt": "bulkhead.job.attempt",
    "kind": "bulkhead.job.kind",
    "outcome": "bulkhead.job.outcome",
}
OPERATIONS = {"llm": "chat", "embedding": "embeddings", "image": "generate_content", "video": "generate_content"}
PROVIDER = "bulkhead"

_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)


class Parent(msgspec.Struct, frozen=True):
    """The span that a job came from: 128 and 64 bits, and whether its trace is recorded."""

    trace: int
    span: int
    sampled: bool


def parse_traceparent(text: str) -> Parent | None:
    """The parent that a W3C `traceparent` names; None when it names none (then the trace starts here)."""
    found = _TRACEPARENT.fullmatch(text.strip())
    if found is None:
        return None
    version, trace, span, flags, more = found.groups()
    if version == "ff" or (version == "00" and more) or not int(trace, 16) or not int(span, 16):
        return None
    return Parent(int(trace, 16), int(span, 16), bool(int(flags, 16) & 1))


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """One finished span; times in ns since the epoch.

    Attributes:
        failed: why, in one word; "" when it did not fail.
    """

    name: str
    start_ns: int
    end_ns: int
    attributes: Attributes = {}
    failed: str = ""


class Tracer(Protocol):
    """Takes finished jobs."""

    def record(self, parent: Parent | None, job: Span, phases: tuple[Span, ...]) -> None:
        """One attempt and its phases, in order. Must not block."""

    def close(self) -> None:
        """Send what is left, in bounded time."""


class NoTracer:
    """The default: nothing leaves."""

    def record(self, parent: Parent | None, job: Span, phases: tuple[Span, ...]) -> None:
        """See `Tracer`."""

    def close(self) -> None:
        """See `Tracer`."""


def attributes_of(
    *,
    job: str,
    attempt: int,
    kind: str,
    model: str,
    outcome: str = "",
    fault: str = "",
    usage: Mapping[str, float] | None = None,
) -> dict[str, str | int | float | bool]:
    """What a span says of its job, under OpenTelemetry's names; only names and counts."""
    known: dict[str, str | int] = {
        "operation": OPERATIONS.get(kind, kind),
        "provider": PROVIDER,
        "model": model,
        "job": job,
        "attempt": attempt,
        "kind": kind,
        "outcome": outcome,
        "fault": fault,
    }
    known |= {
        name: int(amount) for name, amount in (usage or {}).items() if name in GEN_AI and name.endswith("_tokens")
    }
    return {GEN_AI[name]: value for name, value in known.items() if value != ""}
