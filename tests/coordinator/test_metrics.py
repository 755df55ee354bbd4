"""The Prometheus page and the counting behind it."""

from __future__ import annotations

import re
import threading
from typing import Any

import pytest

from coordinator import vitals
from coordinator.counting import LAG_S
from coordinator.metrics import HttpCounters, _worker_lines, sample
from coordinator.testing import FakeWorker, Running
from coordinator.vitals import Vitals
from protocol.link_wire import ModelOffer
from protocol.work import FreeResult

LINE = re.compile(r'bulkhead_coordinator_[a-z_]+(\{[a-z]+="[^"\n]*"(,[a-z]+="[^"\n]*")*\})? [0-9.e+-]+\Z')


def test_the_page_has_what_happened(http: Any, serve: Any) -> None:
    def script(job: Any) -> None:
        job.started()
        job.complete(FreeResult(), {"compute_ms": 7})

    serve(script, "measured", "x-measured")
    assert http.post("/v1/jobs", json={"kind": "x-measured", "model": "measured", "wait": 30}).status_code == 200
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


def lag(http: Any) -> dict[str, float]:
    """The samples of the streams' lag: bound of a bucket, `sum` or `count` -> value."""
    name = "bulkhead_coordinator_stream_lag_seconds_"
    lines = [line for line in http.get("/metrics").text.splitlines() if line.startswith(name)]
    found = (re.fullmatch(r'([a-z]+)(?:\{le="(.*)"\})? (.*)', line.removeprefix(name)) for line in lines)
    return {one[2] or one[1]: float(one[3]) for one in found if one is not None}


@pytest.mark.parametrize("way", ["chat", "job"])
def test_how_long_a_token_takes_from_the_worker_to_its_client_is_counted(http: Any, serve: Any, way: str) -> None:
    def script(job: Any) -> None:
        job.started()
        go.wait(120)
        for n in range(3):
            job.chunk({"delta": {"content": f"w{n} "}})
        job.complete({"content": "w0 w1 w2 "})

    go = threading.Event()
    serve(script, f"lags-{way}", "llm")
    before = lag(http)
    body = {"model": f"lags-{way}", "stream": True}
    if way == "chat":
        go.set()
        answer = http.post("/v1/chat/completions", json={**body, "messages": [{"role": "user", "content": "hi"}]})
        assert answer.text.endswith("data: [DONE]\n\n")
    else:
        job = http.post("/v1/jobs", json={**body, "kind": "llm", "params": {"prompt": "hi"}}).json()["id"]
        with http.stream("GET", f"/v1/jobs/{job}/events") as events:
            for line in events.iter_lines():
                if line == "event: job":
                    go.set()
    after = lag(http)
    assert after["count"] == after["+Inf"] >= before["count"] + 3  # more, where a stream of another test just ends
    assert after["sum"] > before["sum"]
    assert [float(bound) for bound in after if bound[0].isdigit()] == list(LAG_S)


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


def test_names_and_numbers_are_as_prometheus_has_them(http: Any) -> None:
    """Counters end with _total, histograms rise to their count, every sample belongs to a family with its kind."""
    http.get("/v1/models")
    kinds, seen = {}, set()
    buckets: dict[str, list[float]] = {}
    for line in http.get("/metrics").text.splitlines():
        if line.startswith("# TYPE"):
            _, _, name, kind = line.split()
            kinds[name] = kind
            assert (kind == "counter") == name.endswith("_total"), name
            assert not name.endswith(("_ms", "_mib", "_bucket", "_sum", "_count")), name
            continue
        if line.startswith("#"):
            continue
        name, _, _ = line.partition("{") if "{" in line else line.partition(" ")
        family = next(found for found in (name, re.sub("_(bucket|sum|count)$", "", name)) if found in kinds)
        assert (family == name) == (kinds[family] != "histogram"), line
        series = line.rsplit(" ", 1)[0]
        assert series not in seen, series
        seen.add(series)
        if name.endswith("_bucket"):
            buckets.setdefault(re.sub(r',?le="[^"]*"', "", series), []).append(float(line.rsplit(" ", 1)[1]))
    assert buckets
    assert all(counts == sorted(counts) for counts in buckets.values())


def test_the_queue_the_store_and_the_disk_are_told(http: Any, served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vitals, "PATIENCE_S", 60.0)  # a busy machine is no store that hangs
    asked = {"kind": "x-late", "model": "nobody-has", "wait_for_worker": True}
    job = http.post("/v1/jobs", json=asked).json()
    fresh = Vitals(served.coordinator._store, served.coordinator.state, fresh_s=0.0)
    monkeypatch.setattr(served.coordinator.parts, "vitals", fresh)
    lines = http.get("/metrics").text.splitlines()
    assert 'bulkhead_coordinator_queue_jobs{kind="x-late",model="nobody-has"} 1' in lines
    assert any(line.startswith('bulkhead_coordinator_queue_oldest_seconds{kind="x-late"') for line in lines)
    assert "bulkhead_coordinator_store_up 1" in lines
    assert any(line.startswith("bulkhead_coordinator_store_bytes ") for line in lines)
    assert any(line.startswith("bulkhead_coordinator_state_disk_free_bytes ") for line in lines)
    assert any('store_call_duration_seconds_bucket{call="write",le="+Inf"}' in line for line in lines)
    assert http.post(f"/v1/jobs/{job['id']}/cancel").status_code == 200


def test_workers_are_counted_by_state() -> None:
    rows = [("a", True, 0, 2, "native"), ("b", True, 1, 2, "native"), ("c", True, 2, 2, "studio")]
    rows.append(("d", False, 0, 2, "native"))
    lines = list(_worker_lines(rows))
    for state in ("idle", "busy", "full", "held"):
        assert f'bulkhead_coordinator_worker_states{{state="{state}"}} 1' in lines


def test_a_client_cannot_make_series() -> None:
    counters = HttpCounters()
    for n in range(5):
        counters.begin()
        counters.end("/x", f"VERB{n}", 400, 0.1)
    assert counters.answered == {("/x", "other", 400): 5}
