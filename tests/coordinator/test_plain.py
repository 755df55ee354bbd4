"""What a worker says that cannot be shown, or not all of it: its own job fails, and everybody's lists are whole."""

from __future__ import annotations

import time
from typing import Any

import httpx
import msgspec
import pytest

from coordinator.errors import RETRY_AFTER_S, fault_response
from coordinator.plain import MESSAGE_CHARS, MOST_DETAIL_BYTES, NAME_CHARS, bounded, json_bytes, why_not_plain
from coordinator.testing import OfferedJob
from protocol import link_wire as wire
from protocol.faults import Fault

EXT = msgspec.msgpack.Ext(5, b"x")


@pytest.mark.parametrize("value", [EXT, {"a": [EXT]}, {None: 1}, {"a": {True: 1}}, {1.5: {None: 2}}])
def test_what_json_cannot_say_is_told(value: Any) -> None:
    assert json_bytes(value) is None


@pytest.mark.parametrize("value", [None, {}, {"a": [1, 2.5, "x", None, b"y"]}, {1: 2}, float("nan"), "\0"])
def test_what_json_can_say_has_a_length(value: Any) -> None:
    assert json_bytes(value) is not None


def test_messages_that_cannot_be_shown_are_named_by_their_field() -> None:
    raw = msgspec.Raw(msgspec.msgpack.encode(EXT))
    deep = msgspec.Raw(b"\x91" * 5000 + b"\xc0")
    assert "data" in why_not_plain(wire.Chunk(seq=0, data=raw))
    assert "data" in why_not_plain(wire.Chunk(seq=0, data=deep))
    assert "detail" in why_not_plain(wire.Fail(fault=Fault("x", "y", detail={"a": EXT})))
    assert "detail" in why_not_plain(wire.OrderDone(id="1", ok=True, detail={"a": EXT}))
    good = msgspec.Raw(msgspec.msgpack.encode({"content": "x"}))
    assert not why_not_plain(wire.Chunk(seq=0, data=good))
    assert not why_not_plain(wire.Heartbeat(n=1))


def test_a_fault_is_kept_in_bounds() -> None:
    fault = Fault("c" * 9999, "m" * 99_999, "f" * 9999, detail={"tail": "x" * MOST_DETAIL_BYTES})
    kept = bounded(fault)
    assert (len(kept.code), len(kept.message), len(kept.field or "")) == (NAME_CHARS, MESSAGE_CHARS, NAME_CHARS)
    assert list(kept.detail) == ["left_out"]
    left_out = bounded(Fault("c", "m", detail={"a": EXT})).detail["left_out"]
    assert left_out == "The worker's detail cannot be said in JSON."
    usual = Fault("engine_crashed", "It crashed.", detail={"exit_code": 3, "stderr_tail": ["a"] * 50})
    assert bounded(usual) == usual


@pytest.mark.parametrize("told", ["soon", None, float("nan"), float("inf"), -1, 10**300, [], {"a": 1}])
def test_a_worker_cannot_say_a_retry_after_that_is_none(told: object) -> None:
    answer = fault_response(Fault("overloaded", "Come again.", detail={"retry_after_s": told}))
    assert answer.headers["retry-after"] == str(RETRY_AFTER_S)
    answer = fault_response(Fault("overloaded", "Come again.", detail={"retry_after_s": 17.9}))
    assert answer.headers["retry-after"] == "17"


def test_lists_are_whole_whatever_one_worker_answered(http: httpx.Client, serve: Any) -> None:
    def script(job: OfferedJob) -> None:
        job.started()
        if job.params["how"] == "result":
            job.complete({"output": {"a": EXT}})
        else:
            job.fail(Fault("invalid_parameter", "x", detail={"a": EXT}))

    serve(script, "x-liar", "x-liar")
    for how in ("result", "fault"):
        body = {"kind": "x-liar", "model": "x-liar", "params": {"how": how}}
        job = http.post("/v1/jobs", json=body).json()["id"]
        until = time.monotonic() + 60
        while "engine_protocol" not in http.get(f"/v1/jobs/{job}").text:
            assert time.monotonic() < until
            time.sleep(0.02)
    assert http.get("/v1/jobs").status_code == 200
    assert http.get("/v1/models").status_code == 200
