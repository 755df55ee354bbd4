"""The Prometheus page and the counting behind it."""

from __future__ import annotations

import re
from typing import Any

from coordinator.metrics import HttpCounters, sample
from coordinator.testing import FakeWorker, Running
from protocol.link_wire import ModelOffer
from protocol.work import FreeResult

LINE = re.compile(r'bulkhead_coordinator_[a-z_]+(\{[a-z]+="[^"\n]*"(,[a-z]+="[^"\n]*")*\})? [0-9.e+-]+\Z')


def test_the_page_has_what_happened(http: Any, serve: Any) -> None:
    def script(job: Any) -> None:
        job.started()
        job.complete(FreeResult(), {"compute_ms": 7})

    serve(script, "measured", "x-measured")
    assert http.post("/v1/jobs", json={"kind": "x-measured", "model": "measured", "wait": 5}).status_code == 200
    answer = http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.text.splitlines()
    assert all(LINE.match(line) for line in lines if not line.startswith("#"))
    assert 'bulkhead_coordinator_jobs_total{kind="x-measured",model="measured",outcome="succeeded"} 1' in lines
    assert 'bulkhead_coordinator_usage_total{model="measured",what="compute_ms"} 7.0' in lines
    assert 'bulkhead_coordinator_model_slots{model="measured"} 4' in lines
    assert any(
        line.startswith('bulkhead_coordinator_http_requests_total{route="/v1/jobs",method="POST"') for line in lines
    )


def test_the_page_has_the_verdicts_on_every_sandbox(http: Any, served: Running) -> None:
    verdicts = {"landlock": "verified", "net": "unavailable(EPERM)"}
    offer = ModelOffer(name="confined", kinds=("llm",), engine="fake", sandbox=verdicts)
    with FakeWorker(served, (offer,), lambda job: job.complete(FreeResult()), "w-confined"):
        lines = http.get("/metrics").text.splitlines()
    for layer, verdict in verdicts.items():
        labels = f'worker="w-confined",model="confined",layer="{layer}",verdict="{verdict}"'
        assert f"bulkhead_coordinator_model_sandbox{{{labels}}} 1" in lines


def test_families_are_declared_once(http: Any) -> None:
    declared = [line.split()[2] for line in http.get("/metrics").text.splitlines() if line.startswith("# TYPE")]
    assert len(declared) == len(set(declared))


def test_label_values_are_escaped() -> None:
    assert sample("x", 1, {"m": 'a"b\\c\nd'}) == 'bulkhead_coordinator_x{m="a\\"b\\\\c\\nd"} 1'


async def test_idle_is_when_nothing_is_in_flight() -> None:
    counters = HttpCounters()
    await counters.wait_idle()
    counters.begin()
    counters.begin()
    counters.end("/x", "GET", 200, 0.1)
    assert counters.in_flight == 1
    counters.end("/x", "GET", 499, 0.1)
    await counters.wait_idle()
    assert counters.answered == {("/x", "GET", 200): 1, ("/x", "GET", 499): 1}
