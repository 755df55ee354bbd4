"""Traces to an OTLP/HTTP receiver, only when `[otel] endpoint` names one.

The SDK is imported only then. Its exporter sends from a thread of its own, keeps a bounded queue and drops what it
cannot deliver. Nothing is detected about the host or the process, and no environment variable adds to what is sent.
"""

from __future__ import annotations

import importlib
import threading
from pathlib import Path
from typing import Any

from supervisor.errors import ConfigError
from supervisor.observe.tracing import NoTracer, Parent, Span, Tracer
from supervisor.settings import OtelTable
from supervisor.version import version

SEND_S = 5.0  # for one batch
CLOSE_S = 2.0  # for what is left; a receiver that needs longer does not hold up the end


def open_tracer(table: OtelTable) -> Tracer:
    """The tracer that `[otel]` asks for.

    Raises:
        ConfigError: the SDK is not installed, or the headers cannot be read.
    """
    if not table.endpoint:
        return NoTracer()
    headers = _headers(Path(table.headers_file)) if table.headers_file else {}
    try:
        return OtlpTracer(table.endpoint, headers)
    except ImportError as error:
        cure = "pip install 'bulkhead-worker[otel]'"
        raise ConfigError([f"[otel] endpoint: the package of {error.name} is not installed: {cure}"]) from None


def _headers(path: Path) -> dict[str, str]:
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError([f"[otel] headers_file: {path} cannot be read: {error}"]) from None
    headers = {}
    for number, line in enumerate(lines, 1):
        if line and not line.startswith("#"):
            name, colon, value = line.partition(":")
            if not colon or not name.strip():
                raise ConfigError([f"[otel] headers_file: {path}:{number}: must read `name: value`"])
            headers[name.strip()] = value.strip()
    return headers


class OtlpTracer:
    """Implements `Tracer` with the OpenTelemetry SDK.

    Raises:
        ImportError: a package is missing.
    """

    def __init__(self, endpoint: str, headers: dict[str, str]) -> None:
        load: Any = importlib.import_module
        self._trace = load("opentelemetry.trace")
        sdk, export = load("opentelemetry.sdk.trace"), load("opentelemetry.sdk.trace.export")
        resources, sampling = load("opentelemetry.sdk.resources"), load("opentelemetry.sdk.trace.sampling")
        otlp = load("opentelemetry.exporter.otlp.proto.http.trace_exporter")
        exporter = otlp.OTLPSpanExporter(endpoint=endpoint.rstrip("/") + "/v1/traces", headers=headers, timeout=SEND_S)
        # Not Resource.create: that would ask the environment and detectors, which tell of the host.
        resource = resources.Resource({"service.name": "bulkhead-worker", "service.version": version()})
        # A parent that is not recorded keeps its trace unrecorded; without a parent everything is.
        sampler = sampling.ParentBased(sampling.ALWAYS_ON)
        self._provider = sdk.TracerProvider(sampler=sampler, resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(export.BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("bulkhead", version())

    def record(self, parent: Parent | None, job: Span, phases: tuple[Span, ...]) -> None:
        """See `Tracer`."""
        whole = self._begin(job, self._context(parent))
        below = self._trace.set_span_in_context(whole)
        for phase in phases:
            self._finish(self._begin(phase, below), phase)
        self._finish(whole, job)

    def _context(self, parent: Parent | None) -> Any:
        empty = importlib.import_module("opentelemetry.context").Context()
        if parent is None:
            return empty
        flags = self._trace.TraceFlags(self._trace.TraceFlags.SAMPLED if parent.sampled else 0)
        remote = self._trace.SpanContext(parent.trace, parent.span, is_remote=True, trace_flags=flags)
        return self._trace.set_span_in_context(self._trace.NonRecordingSpan(remote), empty)

    def _begin(self, span: Span, context: Any) -> Any:
        kind = self._trace.SpanKind.CONSUMER if span.name.startswith("job") else self._trace.SpanKind.INTERNAL
        return self._tracer.start_span(
            span.name, context, kind=kind, attributes=dict(span.attributes), start_time=span.start_ns
        )

    def _finish(self, open_span: Any, span: Span) -> None:
        if span.failed:
            open_span.set_status(self._trace.Status(self._trace.StatusCode.ERROR, span.failed))
        open_span.end(span.end_ns)

    def close(self) -> None:
        """See `Tracer`; takes at most `CLOSE_S`."""
        # The SDK waits for its exporter's retries; a thread of ours bounds that.
        last = threading.Thread(target=self._provider.shutdown, name="bulkhead-otlp-close", daemon=True)
        last.start()
        last.join(CLOSE_S)
