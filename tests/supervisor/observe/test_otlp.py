"""OTLP over real HTTP to a stand-in receiver, where the SDK is installed."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import importlib.util
import platform
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from supervisor.errors import ConfigError
from supervisor.observe import otlp
from supervisor.observe.jobwatch import Watches
from supervisor.observe.otlp import open_tracer
from supervisor.observe.tally import Tally
from supervisor.observe.tracing import NoTracer
from supervisor.settings import OtelTable


def installed() -> bool:
    try:
        return importlib.util.find_spec("opentelemetry.exporter.otlp.proto.http") is not None
    except ModuleNotFoundError:
        return False


needs_sdk = pytest.mark.skipif(not installed(), reason="the OpenTelemetry SDK is not installed")
PATIENCE_S = 60.0  # for what takes milliseconds where nothing else runs
TRACE, SPAN = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left is sent within `CLOSE_S`, or lost: too little where other tests have the processor."""
    monkeypatch.setattr(otlp, "CLOSE_S", PATIENCE_S)


def test_without_an_endpoint_nothing_is_imported() -> None:
    before = set(sys.modules)
    assert isinstance(open_tracer(OtelTable()), NoTracer)
    assert not [name for name in set(sys.modules) - before if name.startswith("opentelemetry")]


def test_a_missing_package_is_said_with_the_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("opentelemetry", "opentelemetry.trace", "opentelemetry.sdk.trace"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=r"pip install 'bulkhead-worker\[otel\]'"):
        open_tracer(OtelTable(endpoint="http://127.0.0.1:4318"))


def test_broken_headers_are_said_with_their_line(tmp_path: Path) -> None:
    file = tmp_path / "headers"
    table = OtelTable(endpoint="http://127.0.0.1:4318", headers_file=str(file))
    with pytest.raises(ConfigError, match=r"headers_file: .*cannot be read"):
        open_tracer(table)
    file.write_text("# mine\n\nauthorization: Bearer x\nrubbish\n")
    with pytest.raises(ConfigError, match="headers:4: must read `name: value`") as caught:
        open_tracer(table)
    assert "rubbish" not in str(caught.value)


class Receiver(http.server.BaseHTTPRequestHandler):
    got: list[tuple[str, dict[str, str], bytes]]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        body = gzip.decompress(body) if self.headers.get("content-encoding") == "gzip" else body
        self.got.append((self.path, {name.lower(): value for name, value in self.headers.items()}, body))
        self.send_response(200)
        self.send_header("content-type", "application/x-protobuf")
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_args: object) -> None:
        """Nobody reads it."""


@contextlib.contextmanager
def receiver() -> Iterator[tuple[str, list[tuple[str, dict[str, str], bytes]]]]:
    got: list[tuple[str, dict[str, str], bytes]] = []
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), type("Taker", (Receiver,), {"got": got}))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", got
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def spans_of(bodies: list[bytes]) -> tuple[dict[str, Any], dict[str, Any]]:
    """(span name -> span, attributes of the resource)"""
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

    spans, about = {}, {}
    for body in bodies:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            about |= {each.key: each.value.string_value for each in resource.resource.attributes}
            spans |= {span.name: span for scope in resource.scope_spans for span in scope.spans}
    return spans, about


@needs_sdk
def test_a_job_arrives_as_one_trace_below_its_parent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", f"host.name={platform.node()}")
    headers = tmp_path / "headers"
    headers.write_text("x-token: mine\n")
    with receiver() as (url, got):
        tracer = open_tracer(OtelTable(endpoint=url + "/", headers_file=str(headers)))
        watch = Watches(Tally(), tracer).begin(
            job="j1", attempt=2, kind="llm", model="m", traceparent=f"00-{TRACE}-{SPAN}-01"
        )
        for phase in ("fetch", "queue", "load", "run"):
            watch.enter(phase)
        watch.end("failed", "engine_hung")
        tracer.close()
    assert {path for path, _headers, _body in got} == {"/v1/traces"}
    assert {headers["x-token"] for _path, headers, _body in got} == {"mine"}
    spans, about = spans_of([body for _path, _headers, body in got])
    assert set(spans) == {"job llm", "accept", "fetch", "queue", "load", "run"}
    job = spans["job llm"]
    assert {span.trace_id.hex() for span in spans.values()} == {TRACE}
    assert job.parent_span_id.hex() == SPAN
    assert {span.parent_span_id for name, span in spans.items() if name != "job llm"} == {job.span_id}
    assert job.status.message == spans["run"].status.message == "engine_hung"
    assert spans["fetch"].status.code == 0
    assert {each.key for each in job.attributes} >= {"gen_ai.request.model", "bulkhead.job.id"}
    assert set(about) == {"service.name", "service.version"}
    assert socket.gethostname().encode() not in b"".join(body for _path, _headers, body in got)


@needs_sdk
def test_a_trace_that_is_not_recorded_stays_unrecorded() -> None:
    with receiver() as (url, got):
        tracer = open_tracer(OtelTable(endpoint=url))
        watches = Watches(Tally(), tracer)
        watches.begin(job="a", attempt=1, kind="llm", model="m", traceparent=f"00-{TRACE}-{SPAN}-00").end("succeeded")
        watches.begin(job="b", attempt=1, kind="image", model="m").end("succeeded")
        tracer.close()
    spans, _about = spans_of([body for _path, _headers, body in got])
    assert set(spans) == {"job image", "accept"}
    assert spans["job image"].parent_span_id == b""


@needs_sdk
def test_a_receiver_that_does_not_answer_holds_up_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otlp, "CLOSE_S", 0.05)
    with socket.create_server(("127.0.0.1", 0)) as deaf:
        tracer = open_tracer(OtelTable(endpoint=f"http://127.0.0.1:{deaf.getsockname()[1]}"))
        Watches(Tally(), tracer).begin(job="a", attempt=1, kind="llm", model="m").end("succeeded")
        tracer.close()
        left = [thread for thread in threading.enumerate() if thread.name == "bulkhead-otlp-close"]
        assert left, "the exporter waits for its answer still, and nobody for the exporter"
    for thread in left:
        thread.join(PATIENCE_S)
        assert not thread.is_alive()
