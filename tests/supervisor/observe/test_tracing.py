from __future__ import annotations

import pytest

from protocol.work import USAGE_KEYS, Kind
from supervisor.observe.tracing import GEN_AI, OPERATIONS, NoTracer, Parent, Span, attributes_of, parse_traceparent

TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.mark.parametrize(
    ("text", "sampled"),
    [
        (f"00-{TRACE}-{SPAN}-01", True),
        (f" 00-{TRACE}-{SPAN}-00 ", False),
        (f"00-{TRACE}-{SPAN}-03", True),
        (f"01-{TRACE}-{SPAN}-01-more", True),  # later versions may say more at the end
    ],
)
def test_a_parent_is_read(text: str, sampled: bool) -> None:
    assert parse_traceparent(text) == Parent(int(TRACE, 16), int(SPAN, 16), sampled)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "rubbish",
        f"ff-{TRACE}-{SPAN}-01",
        f"00-{'0' * 32}-{SPAN}-01",
        f"00-{TRACE}-{'0' * 16}-01",
        f"00-{TRACE.upper()}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-01-more",
        f"00-{TRACE}-{SPAN}-1",
        f"00-{TRACE[:-1]}-{SPAN}-01",
        f"00-{TRACE}-{SPAN}-0१",
        "x" * 100_000,
    ],
)
def test_what_is_no_parent_starts_a_new_trace(text: str) -> None:
    assert parse_traceparent(text) is None


def test_attributes_have_the_names_of_the_conventions_and_no_words() -> None:
    found = attributes_of(
        job="j", attempt=1, kind="llm", model="m", outcome="succeeded", usage={"prompt_tokens": 3.0, "frames": 9}
    )
    assert found == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "bulkhead",
        "gen_ai.request.model": "m",
        "gen_ai.usage.input_tokens": 3,
        "bulkhead.job.id": "j",
        "bulkhead.job.attempt": 1,
        "bulkhead.job.kind": "llm",
        "bulkhead.job.outcome": "succeeded",
    }
    assert attributes_of(job="j", attempt=1, kind="x-own", model="m")["gen_ai.operation.name"] == "x-own"


def test_the_mapping_names_what_exists() -> None:
    assert set(OPERATIONS) <= {str(kind) for kind in Kind}
    assert {name for name in GEN_AI if name.endswith("_tokens")} <= set(USAGE_KEYS)
    assert len(set(GEN_AI.values())) == len(GEN_AI)


def test_the_default_does_nothing() -> None:
    tracer = NoTracer()
    tracer.record(None, Span(name="job llm", start_ns=1, end_ns=2), ())
    tracer.close()
