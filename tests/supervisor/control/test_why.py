"""Why the worker or a GPU is idle, as a table of situations and sentences."""

from __future__ import annotations

import time

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from supervisor.control.snapshot import GpuView, Link, ModelView, Snapshot
from supervisor.control.why import explained, state_of
from supervisor.intake.holds import Hold, Holds, Mode, Source

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
            "Paused by the operator (a game) until 2026-11-21 21:30. 1 job is still running.",
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
        (
            seen(model(state="cold", queued=1)),
            "idle",
            "m is about to be loaded.",
            "m is about to be loaded.",
        ),
        (
            seen(model(state="ready", queued=1)),
            "idle",
            "m is about to take the next job.",
            "m is about to take the next job.",
        ),
        (
            seen(model("a"), model("b", "stopping", queued=2)),
            "idle",
            "b is ending, and is then loaded again for the jobs that wait.",
            "b is ending, and is then loaded again for the jobs that wait.",
        ),
        (
            seen(model("a", queued=1), model("b", "cold", queued=1, waits="waits for its turn behind a")),
            "idle",
            "b waits for its turn behind a.",
            "b waits for its turn behind a.",
        ),
        (  # what is on the way before what waits for it
            seen(model("a", "starting", queued=1, waits="waits for 3.2 GiB: b is working"), model("b", "loading")),
            "idle",
            "a waits for 3.2 GiB: b is working.",
            "a waits for 3.2 GiB: b is working.",
        ),
        (
            seen(model("a", "starting", queued=1, waits="waits for 3.2 GiB"), model("b", "loading", queued=1)),
            "idle",
            "b is loading.",
            "b is loading.",
        ),
        (  # what was taken before the pause is done all the same
            seen(model(state="loading", queued=1), holds=hold()),
            "paused",
            "Paused by the operator until `supervisor resume`. m is loading.",
            "Paused by the operator until `supervisor resume`. m is loading.",
        ),
        (
            seen(model(), jobs=1),
            "idle",
            "1 job fetches its inputs or hands over its results.",
            "1 job fetches its inputs or hands over its results.",
        ),
        (
            seen(model(state="cold", unserved="it is still being checked")),
            "idle",
            "There are no jobs. m is not served: it is still being checked.",
            "There are no jobs. m is not served: it is still being checked.",
        ),
        (  # nothing that the operator could do ends it, and the sentence does not say so
            seen(model(), holds=(Hold(source=Source.DISK, since=0, reason="0.1 GiB free, held until 1 GiB"),)),
            "paused",
            "Paused because the disk is nearly full (0.1 GiB free, held until 1 GiB).",
            "Paused because the disk is nearly full (0.1 GiB free, held until 1 GiB).",
        ),
        (
            seen(model(), holds=(Hold(source=Source.COORDINATOR, since=0, reason="upgrade"),)),
            "paused",
            "Paused by the coordinator (upgrade) until the coordinator resumes it.",
            "Paused by the coordinator (upgrade) until the coordinator resumes it.",
        ),
        (
            seen(model(), holds=(*hold(), Hold(source=Source.BATTERY, since=0, reason="on battery at 9 %"))),
            "paused",
            "Paused by the operator until `supervisor resume` and to spare the battery (on battery at 9 %).",
            "Paused by the operator until `supervisor resume` and to spare the battery (on battery at 9 %).",
        ),
        (  # a cordon pauses its GPU and not the worker
            seen(model(), holds=hold(gpu="GPU-1", reason="a new fan")),
            "idle",
            "There are no jobs.",
            "Paused by the operator (GPU GPU-1: a new fan) until the cordon is lifted.",
        ),
        (seen(model(), holds=hold(gpu="GPU-9")), "idle", "There are no jobs.", "There are no jobs."),
        (
            seen(
                model(kinds=("video",), held_kinds={"video": "held by the operator (video)"}),
                holds=hold(kind="video"),
            ),
            "idle",
            "There are no jobs. No video jobs are taken: held by the operator (video).",
            "There are no jobs. No video jobs are taken: held by the operator (video).",
        ),
        (
            seen(model(running=1), model("n", running=1), draining="moving house", drain_until=UNTIL),
            "draining",
            "The worker is draining: moving house. 2 jobs are still running, and ended at 21:30:00 at the latest.",
            "",
        ),
        (
            seen(model(running=1), holds=hold(mode=Mode.ABORT)),
            "paused",
            "Paused by the operator until `supervisor resume`. 1 job is still running, and is being ended.",
            "",
        ),
        (seen(model(device="cpu", running=1)), "busy", "", "No model is configured for it."),
        (seen(model(device="cpu")), "idle", "There are no jobs.", "No model is configured for it."),
        (seen(model(gpus=("GPU-2",), running=1)), "busy", "", "No model is configured for it."),
        (seen(model(gpus=("GPU-2",), held={"GPU-1": 5}, running=1)), "busy", "", ""),
        (
            seen(model(state="starting", queued=1, waits="its files are being looked at")),
            "idle",
            "m waits: its files are being looked at.",
            "m waits: its files are being looked at.",
        ),
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


@pytest.mark.parametrize(
    ("models", "first", "second"),
    [
        ([model(running=1)], "", "There are no jobs."),  # engines that are told no GPU take the first
        ([model(running=1, on=("GPU-2",))], "There are no jobs.", ""),
        ([model(running=1, held={"GPU-2": 5})], "There are no jobs.", ""),
        ([model(gpus=("GPU-1", "GPU-2"), running=1, on=("GPU-2",))], "There are no jobs.", ""),
        ([model(gpus=("GPU-1",), running=1)], "", "No model is configured for it."),
        # work for this GPU waits although it is idle: the other one has the model
        ([model(running=1, queued=2, on=("GPU-1",))], "", "m works, and 2 jobs more wait for it."),
        (
            [model(running=1, queued=1, waits="its only slot is busy", on=("GPU-1",))],
            "",
            "m waits: its only slot is busy.",
        ),
        # two copies of one model: where each was started counts, for what they hold is told by model
        ([model(running=1, on=("GPU-1",)), model(on=("GPU-2",))], "", "There are no jobs."),
        (
            [model(running=1, on=("GPU-1",), held={"GPU-2": 5}), model(on=("GPU-2",), held={"GPU-2": 5})],
            "",
            "There are no jobs.",
        ),
    ],
)
def test_each_gpu_has_its_own_reason(models, first, second):
    both = explained(Snapshot(version="1", models=tuple(models), gpus=(GPU, SECOND), link=ON))
    assert [gpu.why for gpu in both.gpus] == [first, second]
    assert both.why == ""


def test_a_worker_that_finishes_its_jobs_is_busy_only_without_a_hold():
    assert state_of(Snapshot(version="1", models=(model(running=1),), link=OFF)) == "busy"


# ---- any situation

STATES = ("cold", "starting", "loading", "ready", "busy", "draining", "stopping", "backoff", "quarantined")
UUIDS = ("GPU-1", "GPU-2")
KINDS = ("llm", "video")

models = st.builds(
    ModelView,
    name=st.sampled_from(["m-a", "m-b", "m-c"]),
    engine=st.just("e"),
    state=st.sampled_from(STATES),
    kinds=st.just(KINDS),
    reason=st.sampled_from(["", "It crashed."]),
    unserved=st.sampled_from(["", "it is still being checked"]),
    waits=st.sampled_from(["", "waits for 3.1 GiB on GPU-1: other programs hold 6.0 GiB"]),
    device=st.sampled_from(["", "cpu", "cuda"]),
    gpus=st.sampled_from([(), ("GPU-1",), ("GPU-2",), UUIDS]),
    running=st.integers(0, 2),
    queued=st.integers(0, 2),
    held=st.sampled_from([{}, {"GPU-1": 5}]),
    on=st.sampled_from([(), ("GPU-1",), ("GPU-2",)]),
)
held = st.builds(
    Hold,
    source=st.sampled_from(list(Source)),
    reason=st.sampled_from(["", "a game"]),
    since=st.just(0.0),
    until=st.sampled_from([None, UNTIL]),
    mode=st.sampled_from(list(Mode)),
    gpu=st.sampled_from(["", *UUIDS]),
    kind=st.sampled_from(["", *KINDS]),
)


@st.composite
def situations(draw):
    """A snapshot as gather.py makes it: `held_kinds` follows from the holds."""
    holds = Holds()
    for each in draw(st.lists(held, max_size=4)):
        holds = holds.put(each)
    served = [
        msgspec.structs.replace(each, held_kinds=holds.kinds_held(each.kinds, each.gpus))
        for each in draw(st.lists(models, max_size=3, unique_by=lambda each: each.name))
    ]
    return Snapshot(
        version="1",
        models=tuple(served),
        gpus=tuple(GpuView(uuid=uuid, fault=draw(st.sampled_from(["", "Xid 79."]))) for uuid in UUIDS),
        holds=holds.items,
        draining=draw(st.sampled_from(["", "SIGTERM was received"])),
        drain_until=draw(st.sampled_from([None, UNTIL])),
        link=draw(st.sampled_from([ON, OFF, Link()])),
        jobs=sum(each.running + each.queued for each in served) + draw(st.integers(0, 1)),
    )


@given(situations())
def test_why_is_never_empty_and_never_says_what_is_not_so(given_):
    found = explained(given_)
    running = any(each.running for each in found.models)
    queued = any(each.queued for each in found.models)
    pauses = Holds(found.holds).about()
    sentences = [found.why, *(gpu.why for gpu in found.gpus)]
    assert found.why or running
    for gpu in found.gpus:
        there = [each for each in found.models if gpu.uuid in (each.on or each.held or each.gpus or UUIDS[:1])]
        matching = [each for each in found.models if gpu.uuid in each.gpus or not (each.gpus or each.device == "cpu")]
        assert gpu.why or any(each.running for each in there), gpu.uuid
        if gpu.why and gpu.fault:
            assert gpu.why == gpu.fault
        elif gpu.why and any(each.queued for each in matching):
            assert "There are no jobs." not in gpu.why
    if queued:
        assert "There are no jobs." not in found.why
    for each in sentences:
        assert each == each.strip()
        assert "  " not in each
        assert ".." not in each
        assert not each or each.endswith(".")
        if not found.draining:
            assert "draining:" not in each
        if found.draining:
            assert "Paused" not in each  # a drain ends it all; lifting a hold would change nothing
        if "resume`" in each:  # only what it would lift
            assert any(h.source is Source.OPERATOR and h.until is None and not h.gpu and not h.kind for h in pauses)
        if "is not connected" in each:
            assert not found.link.connected
        for source in set(Source) - {h.source for h in found.holds}:
            # nothing of a hold that is not there
            assert Hold(source=source, since=0).phrase.removeprefix("held ") not in each
    if found.draining or pauses:
        assert found.why.startswith(("The worker is draining", "Paused"))
    for pause in pauses:
        assert found.draining or pause.phrase.removeprefix("held ") in found.why
