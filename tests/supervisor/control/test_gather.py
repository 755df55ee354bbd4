"""A snapshot gathered from its sources."""

from __future__ import annotations

import os

import msgspec
import trio

from protocol import engine_wire as wire
from supervisor.control.gather import Gathering, Sources
from supervisor.control.snapshot import IncidentView, Link
from supervisor.host.work import EngineSpec, InstanceStatus, ModelSpec
from supervisor.intake.holds import Coming, Hold, Holds, Sight, Source
from supervisor.machine.readings import GpuProcess, GpuReading, foreign_bytes
from supervisor.room import VramRoom

GIB = 2**30
ENGINE = EngineSpec(name="llm", module="none", python="none")


class Watch:
    """One GPU of 24 GiB: 5 GiB are this process's, 3 GiB somebody else's."""

    reason = ""
    available = True

    def __init__(self) -> None:
        ours = GpuProcess(pid=os.getpid(), bytes=5 * GIB)
        theirs = GpuProcess(pid=1, bytes=3 * GIB)
        self.gpu = GpuReading(
            uuid="GPU-1",
            name="H200",
            memory_total_bytes=24 * GIB,
            memory_free_bytes=16 * GIB,
            memory_used_bytes=8 * GIB,
            processes=(ours, theirs),
            busy=0.25,
        )

    def readings(self):
        return {"GPU-1": self.gpu}

    def device(self, uuid: str):
        return self.readings().get(uuid)

    def used_by(self, pids):
        held = sum(process.bytes or 0 for process in self.gpu.processes if process.pid in set(pids))
        return {"GPU-1": held} if held else {}

    def foreign_bytes(self, uuid: str, own_pids, own_bytes: int = 0):
        return foreign_bytes(self.gpu, own_pids, own_bytes)

    async def wait_known(self, _deadline_s: float) -> bool:
        raise AssertionError

    async def wait_for(self, _predicate, _deadline_s: float) -> bool:
        await trio.lowlevel.checkpoint()
        return True


class Lane:
    """A loaded model whose process is this one."""

    def __init__(self, spec: ModelSpec) -> None:
        self.spec = spec
        self.pid = os.getpid()
        self.wanted, self.idle_since, self.ready_since = False, 0.0, 0.0

    def evict(self, reason: str) -> None:
        raise AssertionError(reason)

    def tell(self, progress) -> None:
        raise AssertionError(progress)


async def test_everything_comes_together(tmp_path, autojump_clock):
    spec = ModelSpec(name="chat", engine=ENGINE, model=wire.Model(name="chat", device="cuda", devices=("GPU-1",)))
    watch = Watch()
    room = VramRoom(watch, 0, tmp_path / "vram.json")
    hold = Hold(source=Source.OPERATOR, since=1.0)
    instance = InstanceStatus(
        model="chat", engine="llm", state="ready", pid=os.getpid(), idle_s=1.0, sandbox={"seccomp": "verified"}
    )
    sources = Sources(
        worker="box",
        specs=[spec],
        instances=lambda: [instance],
        holds=lambda: Holds((hold,)),
        room=room,
        watch=watch,
        link=lambda: Link(url="ws://c", connected=True),
        jobs=lambda: 2,
        gpu_faults=lambda: {"GPU-1": ""},
        incidents=lambda count: [IncidentView(time="t", model="chat")] * count,
        ends=lambda: {"chat": {"crashed": 2}},
    )
    gathering = Gathering(sources)
    await trio.sleep(60)
    async with room.place(Lane(spec)):
        seen = gathering.snapshot()
    assert (seen.worker, seen.pid, seen.uptime_s, seen.jobs) == ("box", os.getpid(), 60, 2)
    assert seen.state == "paused"
    assert seen.why.startswith("Paused by the operator")
    (model,) = seen.models
    assert (model.device, model.vram_bytes, model.held) == ("cuda", 5 * GIB, {"GPU-1": 5 * GIB})
    assert model.ends == {"crashed": 2}
    (gpu,) = seen.gpus
    assert (gpu.ours_bytes, gpu.foreign_bytes, gpu.free_bytes) == (5 * GIB, 3 * GIB, 16 * GIB)
    assert gpu.why == seen.why
    assert len(seen.incidents) == 5


PINNED = wire.Model(name="chat", device="cuda", kinds=("llm", "video"), devices=("GPU-1",))
ANYWHERE = wire.Model(name="chat", device="auto", kinds=("llm", "video"))
ON_CPU = wire.Model(name="chat", device="cpu", kinds=("llm", "video"))


def shown(tmp_path, instance: InstanceStatus, *holds: Hold, model: wire.Model = PINNED, **more: object):
    """One model on a box without news, as the owner is shown it."""
    watch = Watch()
    sources = Sources(
        worker="box",
        specs=[ModelSpec(name="chat", engine=ENGINE, model=model)],
        instances=lambda: [instance],
        holds=lambda: Holds(holds),
        room=VramRoom(watch, 0, tmp_path / "vram.json"),
        watch=watch,
        link=lambda: Link(url="ws://c", connected=True),
        **more,
    )
    return Gathering(sources).snapshot()


EVICTED = InstanceStatus(
    model="chat",
    engine="llm",
    state="cold",
    reason="It was unloaded (held by the operator (a game)).",
    last_end="unloaded (held by the operator (a game))",
)


async def test_a_hold_that_is_over_is_not_told_any_more(tmp_path):
    game = Hold(source=Source.OPERATOR, since=1.0, reason="a game")
    (during,) = shown(tmp_path, EVICTED, game).models
    assert during.last_end == EVICTED.last_end
    (after,) = shown(tmp_path, EVICTED).models
    assert (after.reason, after.last_end) == ("", "unloaded")


async def test_a_model_that_nobody_waits_for_any_more_does_not_wait(tmp_path):
    gave_up = InstanceStatus(model="chat", engine="llm", state="cold", reason="waits for 3.1 GiB on GPU-1")
    (model,) = shown(tmp_path, gave_up).models
    assert model.reason == ""
    failed = InstanceStatus(model="chat", engine="llm", state="cold", blocked=True, reason="waits for no one")
    (model,) = shown(tmp_path, failed).models
    assert model.reason == "waits for no one"


async def test_a_model_whose_load_is_decided_and_not_begun_says_so(tmp_path):
    (model,) = shown(tmp_path, msgspec.structs.replace(EVICTED, queued=2)).models
    assert model.waits == "it is about to be loaded"
    (model,) = shown(tmp_path, msgspec.structs.replace(EVICTED, state="starting", queued=2)).models
    assert model.waits == ""


async def test_what_is_cordoned_and_what_is_not_served_is_told(tmp_path):
    ready = InstanceStatus(model="chat", engine="llm", state="ready")
    no_video = Hold(source=Source.OPERATOR, since=1.0, kind="video", gpu="GPU-1")
    seen = shown(tmp_path, ready, no_video, refused=lambda: {"chat": "not served: it is still being checked"})
    (model,) = seen.models
    assert model.kinds == ("llm", "video")
    assert model.held_kinds == {"video": "held by the operator (video: GPU GPU-1)"}
    assert model.unserved == "it is still being checked"
    assert seen.state == "idle"
    assert seen.why == "There are no jobs. chat is not served: it is still being checked."


async def test_a_cordon_of_one_gpu_is_about_the_models_that_may_use_it(tmp_path):
    ready = InstanceStatus(model="chat", engine="llm", state="ready")
    no_video = Hold(source=Source.OPERATOR, since=1.0, kind="video", gpu="GPU-1")
    for model, held in ((PINNED, ["video"]), (ANYWHERE, ["video"]), (ON_CPU, [])):
        (seen,) = shown(tmp_path, ready, no_video, model=model).models
        assert list(seen.held_kinds) == held


async def test_where_an_instance_was_started_counts_while_it_lives(tmp_path):
    ready = InstanceStatus(model="chat", engine="llm", state="ready", pid=os.getpid(), gpus=("GPU-1",))
    assert shown(tmp_path, ready).models[0].on == ("GPU-1",)
    gone = InstanceStatus(model="chat", engine="llm", state="cold", gpus=("GPU-1",))
    assert shown(tmp_path, gone).models[0].on == ()


async def test_what_the_rules_see_and_what_is_coming_is_shown(tmp_path):
    ready = InstanceStatus(model="chat", engine="llm", state="ready")
    blind = Sight(source=Source.PRESENCE, text="there is no bus", unknown=True)
    night = Coming(source=Source.SCHEDULE, text="quiet hours 22:00-07:00", at=9.0)
    seen = shown(tmp_path, ready, sights=lambda: [blind], coming=lambda: [night], drain_until=lambda: 7.0)
    assert (seen.sights, seen.coming, seen.drain_until) == ((blind,), (night,), 7.0)


async def test_a_drain_is_told_as_such(tmp_path, autojump_clock):
    watch = Watch()
    room = VramRoom(watch, 0, tmp_path / "vram.json")
    sources = Sources("box", [], list, Holds, room, watch, draining=lambda: "moving house")
    seen = Gathering(sources).snapshot()
    assert (seen.state, seen.why) == ("draining", "The worker is draining: moving house.")
