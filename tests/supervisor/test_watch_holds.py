"""Automatic holds end to end: fake readers, the real rules, a clock that the test moves."""

from __future__ import annotations

import logging
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

from supervisor.intake.holds import Hold, Holds, Mode, Source
from supervisor.intake.observed import Disk, Network, Power, Presence, Unknown
from supervisor.machine.load import Ours
from supervisor.machine.readings import GpuProcess, GpuReading
from supervisor.settings import (
    ApplicationsTable,
    BatteryTable,
    EngineFailuresTable,
    ForeignVramTable,
    HoldsTable,
    NetworkTable,
    PresenceTable,
    ScheduleTable,
    ThermalTable,
)
from supervisor.watch_holds import PATIENCE_S, Readers, WatchHolds, system_readers, threaded

GIB = 2**30
NOON = 1_795_262_400.0  # 2026-11-21 12:00 UTC, a Saturday


class Clock:
    def __init__(self) -> None:
        self.ahead = NOON - trio.current_time()

    def __call__(self) -> float:
        return trio.current_time() + self.ahead


class Kept:
    """A list of holds in memory; `story` is what was put and lifted, and when."""

    def __init__(self, clock: Clock, *items: Hold) -> None:
        self._clock, self._holds, self._start = clock, Holds(items), trio.current_time()
        self.story: list[tuple[float, str, Source]] = []
        self.puts: list[Hold] = []

    def holds(self) -> Holds:
        return self._holds.at(self._clock())

    def put(
        self,
        source: Source,
        reason: str = "",
        *,
        for_s: float | None = None,
        mode: Mode = Mode.STOP,
        gpu: str = "",
    ) -> Hold:
        now = self._clock()
        until = None if for_s is None else now + for_s
        hold = Hold(source=source, reason=reason, since=now, until=until, mode=mode, gpu=gpu)
        self._holds = self.holds().put(hold)
        self.puts.append(hold)
        self._note("put", source)
        return hold

    def lift(self, source: Source, *, gpu: str = "") -> bool:
        before = self.holds()
        self._holds = before.lift(source, gpu=gpu)
        self._note("lift", source)
        return self._holds != before

    def _note(self, what: str, source: Source) -> None:
        self.story.append((round(trio.current_time() - self._start), what, source))


class Gpus:
    def __init__(self) -> None:
        self.found: dict[str, GpuReading] = {}
        self.no_gpu = False

    @property
    def available(self) -> bool:
        return bool(self.found)

    def readings(self) -> dict[str, GpuReading]:
        return self.found

    def show(self, used: float, *, ours: float = 0, uuid: str = "GPU-1", **more: Any) -> None:
        listed = (GpuProcess(pid=7, bytes=int(ours * GIB)),)
        reading = GpuReading(uuid=uuid, memory_used_bytes=int(used * GIB), processes=listed, **more)
        self.found = {**self.found, uuid: reading}


class World:
    """What the readers see; the test changes it."""

    def __init__(self, table: HoldsTable, *kept: Hold) -> None:
        self.presence: Any = Presence()
        self.power: Any = Power()
        self.network: Any = Network()
        self.disk: Any = Disk(folder="/state", free_bytes=100 * GIB)
        self.applications: Any = ()
        self.asked: set[str] = set()
        self.hangs: set[str] = set()
        self.closed = False
        self.gpus = Gpus()
        self.ours = Ours(pids=frozenset({7}))
        self.clock = Clock()
        self.keeper = Kept(self.clock, *kept)
        readers = Readers(
            presence=self._reader("presence"),
            power=self._reader("power"),
            network=self._reader("network"),
            disk=self._reader("disk"),
            applications=self._reader("applications"),
            close=self._close,
        )
        self.watch = WatchHolds(table, self.keeper, readers, self.gpus, lambda: self.ours, self.clock)

    def _close(self) -> None:
        self.closed = True

    def _reader(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def read(*_arguments: object) -> Any:
            self.asked.add(name)
            if name in self.hangs:
                await trio.sleep_forever()
            await trio.lowlevel.checkpoint()
            return getattr(self, name)

        return read

    def reason(self, gpu: str = "") -> str:
        return self.keeper.holds().reason(gpu=gpu)


@pytest.fixture
def make(nursery):
    """Makes a world whose watch runs."""

    def build(table: HoldsTable, *kept: Hold) -> World:
        world = World(table, *kept)
        nursery.start_soon(world.watch.run)
        return world

    return build


HERE = HoldsTable(presence=PresenceTable(mode="unload", idle_s=60))


async def test_the_owner_comes_and_goes(autojump_clock, make):
    world = make(HERE)
    await trio.sleep(10)
    assert world.keeper.story == []
    world.presence = Presence(idle_s=1, told_by="test")
    await trio.sleep(5)
    assert world.reason() == "held because the machine is in use (last input 1 s ago; free after 60 s without)"
    assert world.keeper.holds().mode() is Mode.UNLOAD
    world.presence = Presence(idle_s=59)
    await trio.sleep(30)
    assert len(world.keeper.story) == 1  # not once for every number
    assert world.watch.findings()[Source.PRESENCE, ""] == "last input 59 s ago; free after 60 s without"
    world.presence = Presence(idle_s=60)
    await trio.sleep(3)
    assert world.reason() == ""


async def test_one_twitch_of_the_mouse_is_no_person(autojump_clock, make):
    world = make(HoldsTable(presence=PresenceTable(mode="stop", enter_s=5)))
    world.presence = Presence(idle_s=0)
    await trio.sleep(3)
    world.presence = Presence()
    await trio.sleep(20)
    assert world.keeper.story == []


GAME = HoldsTable(foreign_vram=ForeignVramTable(mode="abort", enter_gb=3, leave_gb=2, enter_s=5, leave_s=20))


async def test_a_game_takes_its_gpu_and_ours_is_never_foreign(autojump_clock, make):
    world = make(GAME)
    world.gpus.show(20, ours=20)
    world.gpus.show(0, uuid="GPU-2")
    await trio.sleep(60)
    assert world.keeper.story == []  # our own 20 GiB
    world.gpus.show(26, ours=20)
    await trio.sleep(8)
    assert world.reason() == ""  # the rest of the worker goes on
    assert world.reason("GPU-2") == ""
    assert "GPU GPU-1: others hold 6.0 GiB, held from 3 GiB until 2 GiB" in world.reason("GPU-1")
    assert world.keeper.holds().mode(gpu="GPU-1") is Mode.ABORT
    world.gpus.show(6)  # ours went, the game stays
    await trio.sleep(60)
    assert world.reason("GPU-1")
    world.gpus.show(2.5)
    await trio.sleep(60)
    assert world.reason("GPU-1")  # between the two levels
    world.gpus.show(0.5)
    await trio.sleep(15)
    assert world.reason("GPU-1")  # not yet for long enough
    await trio.sleep(10)
    assert world.reason("GPU-1") == ""
    assert [what for _, what, _ in world.keeper.story] == ["put", "lift"]


async def test_a_shader_compiler_that_holds_memory_for_a_moment_stops_nobody(autojump_clock, make):
    world = make(GAME)
    for _ in range(10):
        world.gpus.show(8)
        await trio.sleep(3)
        world.gpus.show(0)
        await trio.sleep(3)
    assert world.keeper.story == []


async def test_what_a_loading_model_was_promised_is_ours(autojump_clock, make):
    world = make(GAME)
    world.ours = Ours(held={"GPU-1": 12 * GIB})  # a driver that lists no processes
    world.gpus.show(11)
    await trio.sleep(60)
    assert world.keeper.story == []


async def test_a_gpu_that_vanishes_takes_its_hold_along(autojump_clock, make):
    world = make(HoldsTable(thermal=ThermalTable(enter_s=1)))
    world.gpus.show(0, clock_reasons=("hw-thermal-slowdown",), temperature_c=97.0)
    await trio.sleep(5)
    assert "97 °C" in world.reason("GPU-1")
    world.gpus.found = {}  # unknown: it may be hot still
    await trio.sleep(600)
    assert world.reason("GPU-1")
    world.gpus.no_gpu = True
    await trio.sleep(2)
    assert world.reason("GPU-1") == ""


async def test_quiet_hours_begin_and_end_by_the_clock(autojump_clock, make):
    world = make(HoldsTable(schedule=ScheduleTable(quiet=["12:30-13:00"], time_zone="UTC", mode="unload")))
    await trio.sleep(29 * 60)
    assert world.reason() == ""
    await trio.sleep(2 * 60)
    assert world.reason() == "held by the schedule (quiet hours 12:30-13:00)"
    assert world.keeper.holds().until == pytest.approx(NOON + 3600, abs=0.01)
    await trio.sleep(30 * 60)
    assert world.reason() == ""
    assert len(world.keeper.puts) == 1


async def test_a_schedule_that_cannot_be_understood_is_shown(autojump_clock, make, caplog):
    with caplog.at_level(logging.ERROR):
        world = make(HoldsTable(schedule=ScheduleTable(quiet=["22:00-07:00"], time_zone="Mars")))
    await trio.sleep(5)
    assert "Mars" in world.watch.unknown()[Source.SCHEDULE]
    assert "Mars" in caplog.text
    assert world.keeper.story == []


async def test_a_plug_that_is_pulled_and_put_back(autojump_clock, make):
    world = make(HoldsTable(battery=BatteryTable(enter_s=5, leave_s=30)))
    await trio.sleep(5)
    world.power = Power(on_battery=True, percent=80)
    await trio.sleep(3)
    world.power = Power(percent=80)
    await trio.sleep(60)
    assert world.keeper.story == []
    world.power = Power(on_battery=True, percent=80)
    await trio.sleep(12)
    assert world.reason() == "held to spare the battery (on battery at 80 %)"
    world.power = Power(percent=80)
    await trio.sleep(20)
    assert world.reason()
    await trio.sleep(15)
    assert world.reason() == ""


async def test_programs_disk_and_network(autojump_clock, make):
    table = HoldsTable(
        applications=ApplicationsTable(names=["blender"], mode="abort"), network=NetworkTable(mode="stop")
    )
    world = make(table)
    world.applications = ("Blender",)
    world.disk = Disk(folder="/state", free_bytes=GIB // 10)
    world.network = Network(metered=True)
    await trio.sleep(60)
    assert [hold.source for hold in world.keeper.holds().items] == [Source.APPLICATION, Source.DISK, Source.NETWORK]
    assert world.keeper.holds().mode() is Mode.ABORT
    world.applications = ()
    world.disk = Disk(folder="/state", free_bytes=9 * GIB)
    world.network = Network()
    await trio.sleep(120)
    assert world.reason() == ""


async def test_nobody_is_asked_what_nobody_wants_to_know(autojump_clock, make):
    world = make(HoldsTable(battery=BatteryTable(mode="off")))
    await trio.sleep(60)
    assert world.asked == {"disk"}


async def test_a_reader_that_hangs_costs_only_itself(autojump_clock, make):
    world = make(HoldsTable(presence=PresenceTable(mode="stop")))
    world.hangs = {"presence"}
    world.power = Power(on_battery=True)
    await trio.sleep(PATIENCE_S + 2)
    assert world.watch.unknown() == {Source.PRESENCE: "no answer within 10 s"}
    assert [hold.source for hold in world.keeper.holds().items] == [Source.BATTERY]
    assert "unknown" in world.watch.findings()[Source.PRESENCE, ""]


async def test_unknown_presence_holds_where_the_owner_wants_it_so(autojump_clock, make):
    world = make(HoldsTable(presence=PresenceTable(mode="stop", when_unknown="hold")))
    world.presence = Unknown("there is no bus")
    await trio.sleep(5)
    assert "unknown: there is no bus" in world.reason()


async def test_holds_of_an_earlier_life_are_taken_over(autojump_clock, make):
    old = [
        Hold(source=Source.OPERATOR, since=1.0),
        Hold(source=Source.BATTERY, since=1.0),
        Hold(source=Source.PRESENCE, since=1.0),
        Hold(source=Source.THERMAL, since=1.0, gpu="GPU-9"),
        Hold(source=Source.ENGINE_FAILURES, since=1.0, until=NOON + 999),
    ]
    world = make(HoldsTable(), *old)
    await trio.sleep(1.5)
    # Presence is switched off. The others' rules want to see for themselves first.
    sources = [hold.source for hold in world.keeper.holds().items]
    assert sources == [Source.OPERATOR, Source.BATTERY, Source.THERMAL, Source.ENGINE_FAILURES]
    await trio.sleep(60)
    sources = [hold.source for hold in world.keeper.holds().items]
    assert sources == [Source.OPERATOR, Source.THERMAL, Source.ENGINE_FAILURES]
    world.gpus.no_gpu = True
    await trio.sleep(2)
    assert [hold.source for hold in world.keeper.holds().items] == [Source.OPERATOR, Source.ENGINE_FAILURES]
    assert world.keeper.puts == []


async def test_another_configuration_counts_at_once(autojump_clock, make):
    world = make(HERE)
    world.presence = Presence(idle_s=0)
    await trio.sleep(5)
    assert world.keeper.holds().mode() is Mode.UNLOAD
    world.watch.apply(HoldsTable(presence=PresenceTable(mode="abort")))
    await trio.sleep(2)
    assert world.keeper.holds().mode() is Mode.ABORT
    world.watch.apply(HoldsTable())
    await trio.sleep(2)
    assert world.reason() == ""


async def test_engines_that_fail_in_a_row(autojump_clock, make):
    world = make(HoldsTable(engine_failures=EngineFailuresTable(mode="stop", after=2, pause_s=100)))
    world.watch.note_bad("llama crashed")
    world.watch.note_good()
    world.watch.note_bad("llama crashed")
    assert world.reason() == ""
    world.watch.note_bad("whisper hung")
    assert "2 bad ends in a row, the last: whisper hung; tried again after 100 s" in world.reason()
    await trio.sleep(50)
    assert world.reason()  # the watch leaves it alone
    await trio.sleep(51)
    assert world.reason() == ""


async def test_what_was_opened_is_closed(autojump_clock):
    world = World(HoldsTable())
    with trio.move_on_after(5):
        await world.watch.run()
    assert world.closed


# ---- the real readers, on the real clock


async def test_a_thread_that_is_stuck_is_left_alone():
    stuck, starts = threading.Event(), []

    def read() -> int:
        starts.append(1)
        stuck.wait(30)
        return 7

    ask = threaded(read)
    for _ in range(5):
        with trio.move_on_after(0.02):
            await ask()
    assert len(starts) == 1
    stuck.set()
    assert await ask() == 7


async def test_this_system_answers_every_question(tmp_path):
    readers = system_readers(tmp_path)
    try:
        with trio.fail_after(20):
            assert isinstance(await readers.presence(), Presence | Unknown)
            assert isinstance(await readers.power(), Power | Unknown)
            assert isinstance(await readers.network(), Network | Unknown)
            assert isinstance(await readers.disk(), Disk)
            assert await readers.applications(["no such program"], frozenset()) == ()
    finally:
        readers.close()


async def test_a_simulated_person_is_noticed(tmp_path, monkeypatch):
    """The whole way but for the GPU: the file of the demonstration, the real readers, the real clock."""
    scene = tmp_path / "scene.json"
    scene.write_text('{"idle_s": 1, "fullscreen": "a game fills the screen"}')
    monkeypatch.setenv("BULKHEAD_SIMULATED_PRESENCE", str(scene))
    clock = Clock()
    keeper = Kept(clock)
    put = trio.Event()
    keeper._note = lambda what, _source: put.set()  # type: ignore[method-assign]
    table = HoldsTable(presence=PresenceTable(mode="unload", enter_s=0))
    watch = WatchHolds(table, keeper, system_readers(tmp_path), Gpus(), Ours, clock)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        with trio.fail_after(20):
            await put.wait()
            assert keeper.holds().reason() == "held because the machine is in use (a game fills the screen)"
            put = trio.Event()
            scene.write_text('{"idle_s": 900}')
            await put.wait()
        assert keeper.holds().reason() == ""
        nursery.cancel_scope.cancel()
