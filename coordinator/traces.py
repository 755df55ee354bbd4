"""Traces of jobs: from the request, over the wait in the queue, to the attempt, below which the worker's spans hang.

Theory of operation. A request may carry a W3C `traceparent`. Its job's row keeps it, and so does the offer; without
`[otel]` it goes from end to end untouched, and nothing is imported. With `[otel]`, a short span `submit` hangs below
the caller's, the row keeps that one, and every attempt adds a span `queue` and a span `attempt` below it; the offer
carries the attempt's. So an attempt may be offered by another coordinator than the one that took the job, and each
holds only spans of attempts that it offered itself. Spans carry names and counts, never what callers wrote.
"""

from __future__ import annotations

import importlib
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import msgspec

from coordinator.records import JobRecord, Submission

OPEN_ATTEMPTS = 20_000  # spans beyond that are ended as lost
SEND_S = 5.0
CLOSE_S = 2.0
_TRACEPARENT = re.compile(r"([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-([0-9a-f]{2})(-.*)?", re.ASCII)
Key = tuple[str, int]


class OtelConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Section `[otel]`.

    Attributes:
        endpoint: OTLP over HTTP, such as http://localhost:4318; "" traces nothing.
        headers_file: lines `name: value` that go with every batch, a token for example.
    """

    endpoint: str = ""
    headers_file: str = ""


class TraceRefusal(Exception):
    """`[otel]` asks for what cannot be; the sentence says what to do."""


class Traces(Protocol):
    """Told of what becomes of jobs; nothing here blocks."""

    def submit(self, s: Submission) -> Any:
        """Context of the making of a row; its value is the submission to store."""

    def offered(self, record: JobRecord) -> str:
        """An attempt is offered; the traceparent that goes with it."""

    def ended(self, key: Key, why: str = "") -> None:
        """An attempt is over; `why` it failed, in one word. Unknown ones are no trouble."""

    def close(self) -> None:
        """Send what is left, in bounded time."""


class NoTraces:
    """The default: what the caller sent goes on as it is."""

    @contextmanager
    def submit(self, s: Submission) -> Iterator[Submission]:
        """See `Traces`."""
        yield s

    def offered(self, record: JobRecord) -> str:
        """See `Traces`."""
        return record.traceparent

    def ended(self, key: Key, why: str = "") -> None:
        """See `Traces`."""

    def close(self) -> None:
        """See `Traces`."""


def open_traces(config: OtelConfig) -> Traces:
    """What `[otel]` asks for. Raises TraceRefusal."""
    if not config.endpoint:
        return NoTraces()
    headers = _headers(Path(config.headers_file)) if config.headers_file else {}
    load: Any = importlib.import_module
    try:
        otlp, export = (
            load("opentelemetry.exporter.otlp.proto.http.trace_exporter"),
            load("opentelemetry.sdk.trace.export"),
        )
        place = config.endpoint.rstrip("/") + "/v1/traces"
        exporter = otlp.OTLPSpanExporter(endpoint=place, headers=headers, timeout=SEND_S)
        return OtelTraces(export.BatchSpanProcessor(exporter))
    except ImportError as error:
        cure = "run pip install 'bulkhead-worker[otel]'"
        raise TraceRefusal(f"[otel] endpoint: the package of {error.name} is not installed; {cure}.") from None


def _headers(path: Path) -> dict[str, str]:
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise TraceRefusal(f"[otel] headers_file: {path} cannot be read: {error}.") from None
    headers = {}
    for number, line in enumerate(lines, 1):
        if line and not line.startswith("#"):
            name, colon, value = line.partition(":")
            if not colon or not name.strip():
                raise TraceRefusal(f"[otel] headers_file: {path}:{number}: must read `name: value`.")
            headers[name.strip()] = value.strip()
    return headers


class OtelTraces:
    """Implements `Traces` with the OpenTelemetry SDK, which sends from a thread of its own and drops what it cannot.

    Raises:
        ImportError: a package is missing.
    """

    def __init__(self, processor: Any) -> None:
        load: Any = importlib.import_module
        self._trace, self._context = load("opentelemetry.trace"), load("opentelemetry.context")
        sdk, sampling = load("opentelemetry.sdk.trace"), load("opentelemetry.sdk.trace.sampling")
        # Not Resource.create: that would ask the environment and detectors, which tell of the host.
        resource = load("opentelemetry.sdk.resources").Resource({"service.name": "bulkhead-coordinator"})
        sampler = sampling.ParentBased(sampling.ALWAYS_ON)
        self._provider = sdk.TracerProvider(sampler=sampler, resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("bulkhead")
        self._open: OrderedDict[Key, Any] = OrderedDict()

    @contextmanager
    def submit(self, s: Submission) -> Iterator[Submission]:
        """See `Traces`. A caller's traceparent that is none begins a new trace."""
        about = {"bulkhead.job.kind": s.kind, "gen_ai.request.model": s.model}
        span = self._begin("submit", s.traceparent, about, self._trace.SpanKind.PRODUCER)
        try:
            yield msgspec.structs.replace(s, traceparent=_text(span.get_span_context()))
        except Exception as error:
            self._end(span, type(error).__name__)
            raise
        self._end(span, "")

    def offered(self, record: JobRecord) -> str:
        """See `Traces`."""
        about = {
            "bulkhead.job.id": record.id,
            "bulkhead.job.attempt": record.attempt,
            "bulkhead.job.kind": record.kind,
            "gen_ai.request.model": record.model,
        }
        now = time.time_ns()
        waited = min(record.created_ms * 1_000_000, now)
        queue = self._begin("queue", record.traceparent, about, self._trace.SpanKind.INTERNAL, waited)
        queue.end(now)
        span = self._begin("attempt", record.traceparent, about, self._trace.SpanKind.CONSUMER)
        self._open[record.id, record.attempt] = span
        while len(self._open) > OPEN_ATTEMPTS:
            self._end(self._open.popitem(last=False)[1], "lost")
        return _text(span.get_span_context())

    def ended(self, key: Key, why: str = "") -> None:
        """See `Traces`."""
        if (span := self._open.pop(key, None)) is not None:
            self._end(span, why)

    def close(self) -> None:
        """See `Traces`; takes at most `CLOSE_S`."""
        # The SDK waits for its exporter's retries; a thread of ours bounds that.
        last = threading.Thread(target=self._provider.shutdown, name="bulkhead-traces-close", daemon=True)
        last.start()
        last.join(CLOSE_S)

    def _begin(self, name: str, parent: str, about: dict[str, Any], kind: Any, start_ns: int | None = None) -> Any:
        return self._tracer.start_span(name, self._below(parent), kind=kind, attributes=about, start_time=start_ns)

    def _below(self, traceparent: str) -> Any:
        empty = self._context.Context()
        found = _TRACEPARENT.fullmatch(traceparent.strip())
        if found is None:
            return empty
        version, trace, span, flags, more = found.groups()
        if version == "ff" or (version == "00" and more) or not int(trace, 16) or not int(span, 16):
            return empty
        sampled = self._trace.TraceFlags(int(flags, 16) & self._trace.TraceFlags.SAMPLED)
        remote = self._trace.SpanContext(int(trace, 16), int(span, 16), is_remote=True, trace_flags=sampled)
        return self._trace.set_span_in_context(self._trace.NonRecordingSpan(remote), empty)

    def _end(self, span: Any, why: str) -> None:
        if why:
            span.set_attribute("error.type", why)
            span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, why))
        span.end()


def _text(context: Any) -> str:
    """W3C's traceparent of a span."""
    return f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags & 1:02x}"
