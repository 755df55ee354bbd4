"""Why the worker or a GPU is idle, as a table of situations and sentences."""

from __future__ import annotations

import time

import pytest

from supervisor.control.snapshot import GpuView, Link, ModelView, Snapshot
from supervisor.control.why import explained, state_of
from supervisor.intake.holds import Hold, Source

GPU = GpuView(uuid="GPU-1")
SECOND = GpuView(uuid="GPU-2")
ON = Link(url="ws://c", connected=True)
NO_LINK = "The coordinator is not connected."
OFF = Link(url="ws://c", reason="connection refused")
UNTIL = time.mktime((2026, 11, 21, 21, 30, 0, 0, 0, -1))


def model(name: str = "m", state: str = "ready", **more: object) -> ModelView:
    return ModelView(name=name, engine="llm", state=state, **more)


def seen(*models: ModelView, link: Link = ON, **more: object) -> Snapshot:
    return explained(Snapshot(version="1", models=models, gpus=(GPU,), link=link, **more))


def hold(**more: object) -> tuple[Hold, ...]:
    return (Hold(source=Source.OPERATOR, since=0, **more),)


@pytest.mark.parametrize(
    ("snapshot", "state", "worker", "gpu"),
    [
        (seen(model()), "idle", "There are no jobs.", "There are no jobs."),
        (seen(model(running=1)), "busy", "", ""),
        (seen(), "idle", "No model is configured.", "No model is configured for it."),
        (
            seen(model(running=1), holds=hold(until=UNTIL, reason="a game")),
            "paused",
            "",
            "",
        ),
        (
            seen(model(), holds=hold(until=UNTIL, reason="a game")),
            "paused",
            "Paused by the operator (a game) until 2026-11-21 21:30.",
            "Paused by the operator (a game) until 2026-11-21 21:30.",
        ),
        (
            seen(model(), holds=hold()),
            "paused",
            "Paused by the operator until `supervisor resume`.",
            "Paused by the operator until `supervisor resume`.",
        ),
        (
            seen(model(), holds=hold(), draining="SIGTERM was received"),
            "draining",
            "The worker is draining: SIGTERM was received.",
            "The worker is draining: SIGTERM was received.",
        ),
        (
            seen(model(), link=OFF),
            "offline",
            "The coordinator at ws://c is not connected: connection refused.",
            "The coordinator at ws://c is not connected: connection refused.",
        ),
        (
            seen(model(), link=Link()),
            "offline",
            "The coordinator is not connected.",
            "The coordinator is not connected.",
        ),
        (
            seen(model(state="quarantined", reason="It crashed five times.")),
            "idle",
            "m is quarantined because it crashed five times.",
            "m is quarantined because it crashed five times.",
        ),
        (
            seen(model("a", "quarantined", reason="It crashed."), model("b", "quarantined")),
            "idle",
            "a is quarantined because it crashed (1 more like it).",
            "a is quarantined because it crashed (1 more like it).",
        ),
        (
            seen(model("a", "backoff", reason="Engine died."), model("b")),
            "idle",
            "There are no jobs. a is waiting to be started again because engine died.",
            "There are no jobs. a is waiting to be started again because engine died.",
        ),
        (
            seen(model(state="starting", waits="waits for 3.1 GiB on GPU-1: x is working")),
            "idle",
            "m waits for 3.1 GiB on GPU-1: x is working.",
            "m waits for 3.1 GiB on GPU-1: x is working.",
        ),
        (seen(model(state="loading", queued=1)), "idle", "m is loading.", "m is loading."),
        (seen(model(device="cpu", running=1)), "busy", "", "No model is configured for it."),
        (seen(model(device="cpu")), "idle", "There are no jobs.", "No model is configured for it."),
        (seen(model(gpus=("GPU-2",), running=1)), "busy", "", "No model is configured for it."),
        (seen(model(gpus=("GPU-2",), held={"GPU-1": 5}, running=1)), "busy", "", ""),
    ],
)
def test_one_sentence(snapshot, state, worker, gpu):
    assert snapshot.state == state
    assert snapshot.why == worker
    assert snapshot.gpus[0].why == gpu


def test_a_gpu_that_is_out_of_use_says_so_first():
    broken = Snapshot(
        version="1",
        models=(model(),),
        gpus=(GpuView(uuid="GPU-1", fault="Xid 79: it fell off the bus."),),
        holds=hold(),
    )
    assert explained(broken).gpus[0].why == "Xid 79: it fell off the bus."


def test_a_model_without_a_device_set_is_on_the_first_gpu():
    both = explained(Snapshot(version="1", models=(model(running=1),), gpus=(GPU, SECOND), link=ON))
    assert [gpu.why for gpu in both.gpus] == ["", "No model is configured for it."]


def test_a_worker_that_finishes_its_jobs_is_busy_only_without_a_hold():
    assert state_of(Snapshot(version="1", models=(model(running=1),), link=OFF)) == "busy"
