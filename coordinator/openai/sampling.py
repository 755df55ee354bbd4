"""What chat and plain completions share: field names, stop sequences, `n`, stream options."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from coordinator.bodies import flag
from coordinator.records import Submission
from protocol.faults import refuse

MAX_N = 16
SEEDS = 2**63

# Ours beyond OpenAI: top_k, min_p, grammar.
SAMPLING = frozenset(
    {
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "seed",
        "grammar",
    }
)
HANDLED = frozenset({"model", "stream", "stream_options", "stop", "max_tokens", "n"})
# Bookkeeping of OpenAI's platform: none of it changes the answer of a local model.
IGNORED = frozenset(
    {
        "user",
        "metadata",
        "store",
        "service_tier",
        "safety_identifier",
        "prompt_cache_key",
        "prompt_cache_retention",
        "prompt_cache_options",
        "prediction",
    }
)


def shared(handled: Mapping[str, Any]) -> dict[str, Any]:
    """Work parameters from the handled fields that both routes have.

    Raises:
        FaultError: invalid_parameter.
    """
    params: dict[str, Any] = {}
    stop = handled.get("stop")
    if stop is not None:
        params["stop"] = [stop] if isinstance(stop, str) else stop
    if "max_tokens" in handled:
        params["max_tokens"] = handled["max_tokens"]
    return params


def answers_wanted(handled: Mapping[str, Any]) -> int:
    """The field `n`. Raises FaultError(invalid_parameter)."""
    n = handled.get("n", 1)
    if type(n) is not int or not 1 <= n <= MAX_N:
        raise refuse("invalid_parameter", f"n: Expected a number from 1 to {MAX_N}.", "n")
    return n


def each_answer(job: Submission, params: Any, n: int) -> list[Submission]:
    """One job per answer. A given seed counts up from answer to answer, so that they differ and can be repeated."""
    jobs = [job]
    for index in range(1, n):
        more = params
        if params.seed is not None:
            more = msgspec.structs.replace(params, seed=(params.seed + index) % SEEDS)
        key = f"{job.idempotency_key}/{index}" if job.idempotency_key else ""
        jobs.append(msgspec.structs.replace(job, params=msgspec.msgpack.encode(more), idempotency_key=key))
    return jobs


def stream_wish(handled: Mapping[str, Any]) -> tuple[bool, bool]:
    """Return (stream, include_usage). Raises FaultError(invalid_parameter)."""
    stream = flag(handled, "stream")
    options = handled.get("stream_options")
    if options is None:
        return stream, False
    if not stream:
        raise refuse("invalid_parameter", "stream_options: Only allowed with `stream`: true.", "stream_options")
    if not isinstance(options, dict):
        raise refuse("invalid_parameter", "stream_options: Expected an object.", "stream_options")
    unknown = set(options) - {"include_usage", "include_obfuscation"}
    if unknown:
        name = f"stream_options.{min(unknown)[:100]}"
        raise refuse("invalid_parameter", f"{name}: Unknown field.", name)
    value = options.get("include_usage")
    if value is not None and not isinstance(value, bool):
        name = "stream_options.include_usage"
        raise refuse("invalid_parameter", f"{name}: Expected true or false.", name)
    return stream, bool(value)
