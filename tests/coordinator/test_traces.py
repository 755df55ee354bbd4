"""One trace from the request to the offer; without OpenTelemetry what the caller sent goes on untouched."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.records import JobRecord, Submission
from coordinator.testing import Running
from coordinator.traces import NoTraces, OtelConfig, OtelTraces, TraceRefusal, open_traces
from protocol.work import FreeResult

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
ASKED = Submission(kind="llm", model="m", params=b"PROMPT", traceparent=PARENT)


def row(traceparent: str) -> JobRecord:
    return JobRecord(
        id="j", kind="llm", model="m", state="queued", tenant="t", attempt=1, created_ms=1000, params=b"PROMPT",
        traceparent=traceparent,
    )  # fmt: skip


def test_without_a_receiver_nothing_is_changed() -> None:
    traces = open_traces(OtelConfig())
    assert isinstance(traces, NoTraces)
    with traces.submit(ASKED) as stored:
        assert stored is ASKED
    assert traces.offered(row(PARENT)) == PARENT
    traces.ended(("j", 1), "failed")
    traces.close()


def test_the_callers_trace_reaches_the_worker_untouched(served: Running, http: httpx.Client, serve: Any) -> None:
    offers: list[str] = []

    def script(job: Any) -> None:
        offers.append(job.offer.traceparent)
        job.started()
        job.complete(FreeResult(), {})

    serve(script, "traced", "x-traced")
    body = {"kind": "x-traced", "model": "traced", "wait": 30}
    for sent in (PARENT, "not-a-traceparent"):
        assert http.post("/v1/jobs", json=body, headers={"traceparent": sent}).status_code == 200
    assert offers == [PARENT, "not-a-traceparent"]


def test_headers_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "headers"
    file.write_text("# token\nno colon\n")
    with pytest.raises(TraceRefusal, match=r"headers:2: must read `name: value`"):
        open_traces(OtelConfig(endpoint="http://localhost:4318", headers_file=str(file)))
    with pytest.raises(TraceRefusal, match="cannot be read"):
        open_traces(OtelConfig(endpoint="http://localhost:4318", headers_file=str(tmp_path / "none")))


class Exported:
    """OpenTelemetry's in-memory exporter behind our traces."""

    def __init__(self) -> None:
        pytest.importorskip("opentelemetry.sdk", reason="OpenTelemetry is not installed (extra: otel)")
        load: Any = importlib.import_module
        self.memory = load("opentelemetry.sdk.trace.export.in_memory_span_exporter").InMemorySpanExporter()
        self.traces = OtelTraces(load("opentelemetry.sdk.trace.export").SimpleSpanProcessor(self.memory))

    def spans(self) -> dict[str, Any]:
        return {span.name: span for span in self.memory.get_finished_spans()}


@pytest.fixture
def exported() -> Iterator[Exported]:
    found = Exported()
    yield found
    found.traces.close()


def test_spans_hang_below_each_other(exported: Exported) -> None:
    with exported.traces.submit(ASKED) as stored:
        pass
    sent = exported.traces.offered(row(stored.traceparent))
    exported.traces.ended(("j", 1), "engine_crashed")
    exported.traces.ended(("j", 1))
    spans = exported.spans()
    assert set(spans) == {"submit", "queue", "attempt"}
    assert {format(span.context.trace_id, "032x") for span in spans.values()} == {PARENT[3:35]}
    assert format(spans["submit"].parent.span_id, "016x") == PARENT[36:52]
    for name in ("queue", "attempt"):
        assert spans[name].parent.span_id == spans["submit"].context.span_id
    assert sent == f"00-{PARENT[3:35]}-{spans['attempt'].context.span_id:016x}-01"
    assert spans["attempt"].attributes["error.type"] == "engine_crashed"
    assert spans["queue"].start_time == 1000 * 1_000_000
    assert "PROMPT" not in str([span.to_json() for span in spans.values()])


@pytest.mark.parametrize("sent", ["", "nonsense", "00-" + "0" * 32 + "-b7ad6b7169203331-01", "ff-" + PARENT[3:]])
def test_without_a_parent_a_trace_begins(exported: Exported, sent: str) -> None:
    with exported.traces.submit(Submission(kind="llm", model="m", params=b"", traceparent=sent)) as stored:
        assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-01", stored.traceparent)
    assert exported.spans()["submit"].parent is None


def test_what_is_not_recorded_stays_unrecorded(exported: Exported) -> None:
    with exported.traces.submit(
        Submission(kind="llm", model="m", params=b"", traceparent=PARENT[:-2] + "00")
    ) as stored:
        assert stored.traceparent.endswith("-00")
    assert exported.spans() == {}


def test_a_refused_submission_is_told(exported: Exported) -> None:
    with pytest.raises(ValueError, match="full"), exported.traces.submit(ASKED):
        raise ValueError("full")
    assert exported.spans()["submit"].attributes["error.type"] == "ValueError"


def test_a_job_from_the_request_to_the_worker(
    exported: Exported, served: Running, http: httpx.Client, serve: Any
) -> None:
    offers: list[str] = []

    def script(job: Any) -> None:
        offers.append(job.offer.traceparent)
        job.started()
        job.complete(FreeResult(), {})

    attempts = served.coordinator.parts.dispatcher.attempts
    attempts.traces = exported.traces
    try:
        serve(script, "spanned", "x-spanned")
        body = {"kind": "x-spanned", "model": "spanned", "wait": 30}
        assert http.post("/v1/jobs", json=body, headers={"traceparent": PARENT}).status_code == 200
    finally:
        attempts.traces = NoTraces()
    spans = exported.spans()
    assert set(spans) == {"submit", "queue", "attempt"}
    assert offers == [f"00-{PARENT[3:35]}-{spans['attempt'].context.span_id:016x}-01"]
