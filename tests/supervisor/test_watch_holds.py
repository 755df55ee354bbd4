"""Automatic holds end to end: fake readers, the real rules, a clock that the test moves."""

from __future__ import annotations

import logging

import pytest
import trio
import trio.testing

from supervisor.intake.holds import Coming, Hold, Mode, Sight, Source
from supervisor.intake.observed import Disk, Network, Person, Power, Presence, Unknown
from supervisor.machine.load import Ours
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
from supervisor.watch_holds import PATIENCE_S
from tests.supervisor.holds_world import GIB, NOON, World


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


async def test_what_a_coordinator_is_told_of_who_sits_here(autojump_clock, make):
    world = make(HERE)
    assert world.watch.person() == Person(first=True), "not looked yet"
    world.presence = Presence(idle_s=1)
    await trio.sleep(10)
    assert world.watch.person() == Person(first=True, here=True)
    world.presence = Presence(idle_s=60)
    await trio.sleep(10)
    assert world.watch.person() == Person(first=True, here=False)
    world.presence = Unknown("there is no bus")
    await trio.sleep(10)
    assert world.watch.person() == Person(), "it works, whoever sits here"
    world.watch.apply(HoldsTable(presence=PresenceTable(mode="stop", when_unknown="hold")))
    await trio.sleep(10)
    assert world.watch.person() == Person(first=True)
    world.watch.apply(HoldsTable(presence=PresenceTable(mode="off")))
    assert world.watch.person() == Person(), "not the coordinator's business"


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
    # Presence and engine failures are switched off. The others' rules want to see for themselves first.
    sources = [hold.source for hold in world.keeper.holds().items]
    assert sources == [Source.OPERATOR, Source.BATTERY, Source.THERMAL]
    await trio.sleep(60)
    sources = [hold.source for hold in world.keeper.holds().items]
    assert sources == [Source.OPERATOR, Source.THERMAL]
    world.gpus.no_gpu = True
    await trio.sleep(2)
    assert [hold.source for hold in world.keeper.holds().items] == [Source.OPERATOR]
    assert world.keeper.puts == []


async def test_a_pause_after_failures_of_an_earlier_life_goes_on(autojump_clock, make):
    old = Hold(source=Source.ENGINE_FAILURES, since=1.0, until=NOON + 100)
    world = make(HoldsTable(engine_failures=EngineFailuresTable(mode="stop")), old)
    await trio.sleep(90)
    assert world.keeper.holds().items == (old,)
    await trio.sleep(20)
    assert world.keeper.holds().items == ()


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


async def test_another_configuration_waits_for_no_interval(autojump_clock, make):
    """Both rules and readers: a person who saves the file looks at the status right after it."""
    world = make(HERE)
    world.presence = Presence(idle_s=0)
    await trio.sleep(5.5)
    world.watch.apply(HoldsTable())
    await trio.testing.wait_all_tasks_blocked()
    assert world.reason() == ""
    world.network = Network(metered=True)
    world.watch.apply(HoldsTable(network=NetworkTable(mode="stop", enter_s=0)))
    await trio.testing.wait_all_tasks_blocked()  # the reader has answered
    await trio.sleep(1.1)
    assert "metered" in world.reason()


async def test_only_what_lost_its_rule_is_lifted(autojump_clock, make):
    both = HoldsTable(presence=PresenceTable(mode="unload"), network=NetworkTable(mode="stop"))
    world = make(both, Hold(source=Source.OPERATOR, since=1.0), Hold(source=Source.COORDINATOR, since=1.0))
    world.presence, world.network = Presence(idle_s=0), Network(metered=True)
    await trio.sleep(30)
    assert len(world.keeper.holds().items) == 4
    world.watch.apply(HoldsTable(network=NetworkTable(mode="stop")))
    await trio.sleep(2)
    left = [hold.source for hold in world.keeper.holds().items]
    assert left == [Source.OPERATOR, Source.COORDINATOR, Source.NETWORK]


async def test_other_names_are_another_question(autojump_clock, make):
    world = make(HoldsTable(applications=ApplicationsTable(names=["blender"], leave_s=0)))
    world.applications = ("Blender",)
    await trio.sleep(5)
    assert world.reason()
    world.hangs = {"applications"}
    await trio.sleep(5)
    world.watch.apply(HoldsTable(applications=ApplicationsTable(names=["doom"], leave_s=0)))
    await trio.sleep(5)
    assert world.reason()  # nobody has looked for it yet: whatever was, stays
    assert world.watch.findings()[Source.APPLICATION, ""] == "programs have not been looked at yet"


async def test_failures_that_nobody_minds_any_more(autojump_clock, make):
    world = make(HoldsTable(engine_failures=EngineFailuresTable(mode="stop", after=2, pause_s=100)))
    for _ in range(2):
        world.watch.note_bad("llama crashed")
    assert world.reason()
    world.watch.apply(HoldsTable())
    await trio.sleep(2)
    assert world.reason() == ""


async def test_the_owner_sees_what_the_rules_see(autojump_clock, make):
    quiet = ScheduleTable(quiet=["12:10-13:00"], time_zone="UTC")
    world = make(HoldsTable(schedule=quiet, presence=PresenceTable(mode="stop"), battery=BatteryTable(mode="off")))
    world.presence = Unknown("there is no bus")
    world.gpus.show(0, temperature_c=44.0)
    await trio.sleep(10)
    assert world.watch.sights() == (
        Sight(source=Source.PRESENCE, text="there is no bus", unknown=True),
        Sight(source=Source.SCHEDULE, text="no quiet hours now"),
        Sight(source=Source.DISK, text="100.0 GiB free at /state, held below 0.5 GiB until 1 GiB"),
        Sight(source=Source.THERMAL, gpu="GPU-1", text="44 °C"),
    )
    (night,) = world.watch.coming()
    assert night == Coming(source=Source.SCHEDULE, text="quiet hours 12:10-13:00", at=NOON + 600)
    await trio.sleep(600)
    assert world.watch.coming() == ()  # they are now
    world.watch.apply(HoldsTable(schedule=ScheduleTable(quiet=["22:00-07:00"], mode="off")))
    assert world.watch.coming() == ()


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
