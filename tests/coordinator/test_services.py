"""What a request adds to its submission."""

from __future__ import annotations

from typing import Any

import pytest

from coordinator.services import idempotency_key
from protocol.faults import FaultError
from protocol.work import FreeResult


def test_idempotency_keys() -> None:
    assert idempotency_key("") == ""
    assert idempotency_key("a-1 ü") == "a-1 ü"
    for bad in (5, None, "x" * 201, "a\nb", "\x7f"):
        with pytest.raises(FaultError) as caught:
            idempotency_key(bad)
        assert caught.value.fault.field == "idempotency_key"


def test_tenant_trace_and_deadline_reach_the_worker(http: Any, served: Any, serve: Any) -> None:
    def script(job: Any) -> None:
        job.started()
        job.complete(FreeResult())

    worker = serve(script, "traced", "x-traced")
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    body = {"kind": "x-traced", "model": "traced", "wait": 30}
    assert http.post("/v1/jobs", json=body, headers={"traceparent": trace}).status_code == 200
    offer = worker.jobs[0].offer
    assert (offer.traceparent, offer.tenant) == (trace, "default")
    assert 3_590_000 < offer.deadline_ms <= 3_600_000
