"""The watch over one instance, with everything it looks at played by the test."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
import trio.testing

from protocol import engine_wire as wire
from supervisor.host.ends import End, Why
from supervisor.host.fake import FAKE_SENSES, FakeWatchdog
from supervisor.host.senses import Senses
from supervisor.host.watch import RESTLESS_S, Watch, ceiling_bytes
from supervisor.host.watchdog import Diagnosis, Facts
from supervisor.host.work import EngineSpec, ModelSpec
from supervisor.settings import LimitsTable, RecycleTable

GIB = 2**30
LIMITS = LimitsTable(recycle=RecycleTable(rss_growth_gb=1))


def spec(**more: object) -> ModelSpec:
    engine = EngineSpec(name="e", module="", python="")
    return ModelSpec(name="m", engine=engine, model=wire.Model(name="m", device="cpu"), memory_bytes=90 * GIB, **more)


class Instance:
    """What a watch needs of an instance."""

    def __init__(self) -> None:
        self.spec, self.limits = spec(), LIMITS
        self.child = SimpleNamespace(pid=7)
        self.cgroup: Any = None
        self.over = trio.Event()
        self.loading, self.has = False, 0
        self.ready: wire.Ready | None = wire.Ready(device="cpu")
        self.runs = SimpleNamespace(admitted=[], hopeless=False, done=0)
        self.told: list[wire.Down] = []
        self.ended: list[tuple[End, str, str]] = []
        self.changes = 0

    async def tell(self, message: wire.Down) -> None:
        await trio.lowlevel.checkpoint()
        self.told.append(message)

    async def give_up(self, end: End, code: str, message: str) -> None:
        await trio.lowlevel.checkpoint()
        self.ended.append((end, code, message))
        self.over.set()

    def changed(self) -> None:
        self.changes += 1


class Stage:
    def __init__(self, nursery: trio.Nursery, **senses: Any) -> None:
        self.rss = GIB
        self.kills: int | None = 5
        self.dog = FakeWatchdog()
        self.instance = Instance()
        chosen: Senses = FAKE_SENSES._replace(
            watchdog=lambda _pid: self.dog,
            rss_bytes=lambda _pid: self.rss,
            oom_kills=lambda: self.kills,
            **senses,
        )
        self.watch = Watch(self.instance, chosen, Path("/scratch"))  # type: ignore[arg-type]
        nursery.start_soon(self.watch.run)


@pytest.fixture
async def stage(autojump_clock):
    async with trio.open_nursery() as nursery:
        yield Stage(nursery)
        nursery.cancel_scope.cancel()


async def test_it_pings_while_there_is_work_and_one_ping_at_a_time(stage, autojump_clock):
    await trio.sleep(5.5)
    assert stage.instance.told == []
    stage.instance.has = 1
    await trio.sleep(5)
    assert stage.instance.told == [wire.Ping()]
    stage.watch.ponged()
    await trio.sleep(1)
    assert len(stage.instance.told) == 2


async def test_work_after_a_long_rest_begins_with_a_fresh_heartbeat(stage, autojump_clock):
    await trio.sleep(100.5)
    assert "beat" not in stage.dog.calls
    stage.instance.has = 1
    await trio.sleep(1)
    assert stage.dog.calls[-1] == "beat"
    stage.instance.has = 0
    await trio.sleep(1)
    assert stage.dog.calls[-1] == "rest"


async def test_time_in_which_we_stood_still_is_not_held_against_it(mock_clock):
    async with trio.open_nursery() as nursery:
        stage = Stage(nursery)
        stage.instance.has = 1
        await trio.testing.wait_all_tasks_blocked()
        mock_clock.jump(1000)
        await trio.testing.wait_all_tasks_blocked()
        assert stage.dog.calls == ["beat"]  # and nothing was judged before its words could be read
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("diagnosis", "state_s", "after", "why"),
    [
        (Diagnosis.WEDGED, 0.0, 20, Why.WEDGED),
        (Diagnosis.STOPPED, 0.0, 20, Why.WEDGED),
        (Diagnosis.BUSY_IN_C, 0.0, 500, None),
        (Diagnosis.DEADLOCKED, 0.0, 500, None),
        (Diagnosis.UNINTERRUPTIBLE, 10.0, 500, None),
        (Diagnosis.UNINTERRUPTIBLE, 31.0, 5, Why.WEDGED),
        (Diagnosis.UNKNOWN, 0.0, 500, None),
    ],
)
async def test_what_ends_it_and_what_only_classifies(stage, autojump_clock, diagnosis, state_s, after, why):
    stage.instance.has = 1
    stage.dog.diagnosis = diagnosis
    stage.dog.facts = lambda: Facts(state_s=state_s)
    await trio.sleep(after)
    assert [(end.why, code) for end, code, _text in stage.instance.ended] == ([(why, "engine_hung")] if why else [])
    if why:
        assert diagnosis.value in stage.instance.ended[0][2]


async def test_the_ceiling_is_polled_unless_the_kernel_holds_it(stage, autojump_clock):
    stage.instance.cgroup = SimpleNamespace(limited=True)
    stage.rss = 91 * GIB
    await trio.sleep(3)
    assert stage.instance.ended == []
    stage.instance.cgroup = SimpleNamespace(limited=False)
    await trio.sleep(2)
    ((end, code, text),) = stage.instance.ended
    assert (end.why, code) == (Why.MEMORY, "out_of_memory")
    assert "91.00 GiB" in text


def test_the_ceiling_of_a_model_without_one_is_most_of_the_box():
    assert ceiling_bytes(spec()) == 90 * GIB
    plain = ModelSpec(name="m", engine=spec().engine, model=wire.Model(name="m"))
    assert 0.5 * 2**28 < ceiling_bytes(plain) < 2**50


async def test_a_kill_for_want_of_memory_is_seen_though_a_look_came_between_it_and_the_death(stage, autojump_clock):
    await trio.sleep(10.5)
    assert not stage.watch.oom_killed()
    stage.kills = 6
    await trio.sleep(1)  # a large process takes its time to die
    assert stage.watch.oom_killed()
    await trio.sleep(10)
    assert not stage.watch.oom_killed()  # that one was not ours
    stage.kills = None
    assert not stage.watch.oom_killed()


async def test_wear_is_judged_when_it_rests(stage, autojump_clock):
    stage.instance.runs.done = 3
    stage.watch.rested()
    stage.instance.has = 1
    stage.rss = 5 * GIB  # what a run holds
    await trio.sleep(RESTLESS_S - 10)
    assert stage.watch.rss_bytes == 5 * GIB
    assert stage.watch.worn() == ""
    await trio.sleep(20)  # it never rests
    assert "grew by 4.0 GiB" in stage.watch.worn()
    assert stage.instance.changes > 0


async def test_a_rest_is_looked_at_once_a_second(stage, autojump_clock):
    stage.instance.has, stage.instance.runs.done = 1, 3
    stage.watch.rested()
    stage.instance.runs.done = 50
    stage.rss = 5 * GIB
    stage.watch.rested()
    assert stage.watch.worn() == ""
    await trio.sleep(1.5)
    stage.watch.rested()
    assert "grew by 4.0 GiB" in stage.watch.worn()
