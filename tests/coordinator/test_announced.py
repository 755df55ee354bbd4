"""Announcements that would stop the queue for all end their own session, and nothing else."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from coordinator.announced import MOST_LABELS, MOST_MODELS, MOST_SLOTS, NAME_CHARS, why_refused
from coordinator.testing import FakeWorker, OfferedJob, Running
from coordinator.testing_link import Closed, RawWorker
from protocol import link_wire as wire
from protocol.link_wire import Capabilities, Gpu, ModelOffer
from protocol.revision import LINK_WIRE


def model(**said: Any) -> tuple[ModelOffer, ...]:
    return (ModelOffer(**{"name": "x-odd", "kinds": ("x-odd",), "engine": "fake", **said}),)


ODD: dict[str, tuple[dict[str, Any], str]] = {
    "slots beyond 63 bits": ({"models": model(slots=2**63)}, "slots"),
    "too many slots": ({"models": model(slots=MOST_SLOTS + 1)}, "slots"),
    "slots below none": ({"models": model(slots=-1)}, "slots"),
    "name with nul": ({"models": model(name="a\0b")}, "name"),
    "no name": ({"models": model(name="")}, "name"),
    "long name": ({"models": model(name="n" * (NAME_CHARS + 1))}, "name"),
    "kind with nul": ({"models": model(kinds=("x-a\0",))}, "kinds"),
    "no kind": ({"models": model(kinds=("",))}, "kinds"),
    "many kinds": ({"models": model(kinds=tuple(f"x-{n}" for n in range(100)))}, "kinds"),
    "many models": ({"models": model() * (MOST_MODELS + 1)}, "models: Announce at most"),
    "many labels": ({"labels": {str(n): "" for n in range(MOST_LABELS + 1)}}, "labels"),
    "label with nul": ({"labels": {"a": "\0"}}, "labels"),
    "memory of nan": ({"vram_threshold_gb": math.nan}, "vram_threshold_gb"),
    "endless memory": ({"vram_threshold_gb": math.inf}, "vram_threshold_gb"),
    "negative memory": ({"vram_threshold_gb": -1.0}, "vram_threshold_gb"),
    "limits that JSON cannot say": ({"models": model(limits={"n": msgspec.msgpack.Ext(1, b"x")})}, "models"),
    "limits without end": ({"models": model(limits={"voices": ["v" * 1000] * 1000})}, "models"),
    "an engine without end": ({"models": model(engine="e" * 2**20)}, "models"),
    "a reason without end": ({"reason": "r" * 2**20}, "reason"),
    "a GPU without end": ({"gpus": (Gpu(uuid="u" * 2**20, name="", vram_bytes=0),)}, "gpus"),
}


@pytest.mark.parametrize("name", list(ODD))
def test_an_announcement_beyond_all_bounds_is_refused_with_the_field(name: str) -> None:
    said, field = ODD[name]
    assert field in why_refused(Capabilities(**said))


def test_what_workers_announce_is_taken() -> None:
    models = model() + model(name="org/Model v1.0 (Q4)@home ü", kinds=("llm", "embedding"), slots=64) + model(kinds=())
    gpu = Gpu(uuid="GPU-1", name="A GPU", vram_bytes=2**40)
    said = Capabilities(models=models, gpus=(gpu,), labels={"room": "", "rack": "3"}, vram_threshold_gb=79.5)
    assert why_refused(said) == ""
    assert why_refused(Capabilities(models=model() * MOST_MODELS)) == ""


@pytest.mark.parametrize("again", [False, True], ids=["in hello", "later"])
@pytest.mark.parametrize("name", ["slots beyond 63 bits", "name with nul", "memory of nan"])
def test_it_ends_its_own_session_and_jobs_are_done(served: Running, http: Any, name: str, again: bool) -> None:
    def script(job: OfferedJob) -> None:
        job.started()
        job.complete({})

    said, field = ODD[name]
    odd = Capabilities(**said)
    good = model(name="x-beside", kinds=("x-odd",))
    with FakeWorker(served, good, script, "beside"), RawWorker(_port(served), "odd", served.worker_token) as worker:
        if again:
            worker.hello(*model())
            worker.send(wire.Announce(capabilities=odd))
        else:
            worker.send(wire.Hello(worker="odd", low=LINK_WIRE.low, high=LINK_WIRE.high, capabilities=odd))
        told = worker.expect(wire.Error).body
        assert told.code == "protocol_violation"
        assert field in told.message
        with pytest.raises(Closed):
            worker.receive()
        done = http.post("/v1/jobs", json={"kind": "x-odd", "model": "x-beside", "wait": 30})
        assert done.json()["state"] == "succeeded", done.text


def _port(served: Running) -> int:
    return int(served.url.rpartition(":")[2])
