"""The rules of automatic holds: tables of what is seen, and latches over a clock that the test moves."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest

from supervisor.intake import hold_rules
from supervisor.intake.hold_rules import (
    Entry,
    Failures,
    Finding,
    Latch,
    Level,
    Patience,
    judge,
    rules,
    step,
)
from supervisor.intake.holds import Mode, Source
from supervisor.intake.observed import Disk, Gpu, Network, Observed, Power, Presence, Quiet, Unknown
from supervisor.settings import (
    ApplicationsTable,
    BatteryTable,
    DiskTable,
    EngineFailuresTable,
    ForeignVramTable,
    HoldsTable,
    NetworkTable,
    PresenceTable,
    ScheduleTable,
    ThermalTable,
)

ENTER, BETWEEN, LEAVE = Level.ENTER, Level.BETWEEN, Level.LEAVE
DARK = Unknown("the bus does not answer")
GIB = 2**30


def on_battery(percent: float | None) -> Power:
    return Power(on_battery=True, percent=percent)


def plugged(percent: float | None) -> Power:
    return Power(on_battery=False, percent=percent)


def gpu(**values: Any) -> Gpu:
    return Gpu(uuid="GPU-1", **values)


def free(gibibytes: float) -> Disk:
    return Disk(folder="/state", free_bytes=int(gibibytes * GIB))


ALWAYS = BatteryTable()
LOW = BatteryTable(below_percent=20, above_percent=40)
HOT = ThermalTable(celsius=85, cooler_by=10)
OTHERS = ForeignVramTable(enter_gb=3, leave_gb=2)
BUSY = ForeignVramTable(enter_gb=3, leave_gb=2, busy=0.5)
DISK = DiskTable(floor_gb=1, enough_gb=2)
SURE = NetworkTable(guesses=False)

ROWS = [
    # rule, table, what was seen, level, part of the sentence
    ("schedule", ScheduleTable(), None, LEAVE, "no quiet hours"),
    ("schedule", ScheduleTable(), Quiet(text="22:00-07:00", until=9.0), ENTER, "quiet hours 22:00-07:00"),
    ("schedule", ScheduleTable(), Unknown("no time zone Mars"), BETWEEN, "Mars"),
    ("presence", PresenceTable(), None, BETWEEN, "not been read"),
    ("presence", PresenceTable(), Presence(idle_s=3), ENTER, "last input 3 s ago; free after 5 min without"),
    ("presence", PresenceTable(), Presence(idle_s=299.9), ENTER, "last input 5 min ago"),
    ("presence", PresenceTable(), Presence(idle_s=300), LEAVE, "5 min"),
    ("presence", PresenceTable(), Presence(idle_s=math.inf), LEAVE, "nobody is logged in"),
    ("presence", PresenceTable(), Presence(idle_s=3, locked=True), LEAVE, "locked"),
    ("presence", PresenceTable(), Presence(idle_s=9000, occupied=("mpv plays a film",)), ENTER, "mpv plays a film"),
    ("presence", PresenceTable(), DARK, LEAVE, "unknown: the bus does not answer"),
    ("presence", PresenceTable(when_unknown="hold"), DARK, ENTER, "unknown: the bus does not answer"),
    ("battery", ALWAYS, None, BETWEEN, "not been read"),
    ("battery", ALWAYS, on_battery(99), ENTER, "on battery at 99 %"),
    ("battery", ALWAYS, on_battery(None), ENTER, "on battery"),
    ("battery", ALWAYS, plugged(50), LEAVE, "plugged in at 50 %"),
    ("battery", ALWAYS, plugged(None), LEAVE, "plugged in"),
    ("battery", ALWAYS, plugged(19), BETWEEN, "charging at 19 %, goes on from 20 %"),
    ("battery", ALWAYS, DARK, LEAVE, "unknown"),
    ("battery", LOW, on_battery(21), BETWEEN, "on battery at 21 %"),
    ("battery", LOW, on_battery(20), ENTER, "held at 20 % or less"),
    ("battery", LOW, plugged(30), BETWEEN, "goes on from 40 %"),
    ("battery", LOW, plugged(40), LEAVE, "plugged in at 40 %"),
    ("thermal", HOT, gpu(temperature_c=85), ENTER, "85 °C, held from 85 °C until 75 °C"),
    ("thermal", HOT, gpu(temperature_c=84.9), BETWEEN, "85 °C"),
    ("thermal", HOT, gpu(temperature_c=75), LEAVE, "75 °C"),
    ("thermal", HOT, gpu(), BETWEEN, "not told"),
    ("thermal", HOT, gpu(temperature_c=60, slowed=("hw-power-brake",)), ENTER, "want of power"),
    ("thermal", ThermalTable(), gpu(temperature_c=120), LEAVE, "120 °C"),
    ("thermal", ThermalTable(), gpu(slowed=("hw-slowdown", "hw-thermal-slowdown")), ENTER, "for heat"),
    ("thermal", ThermalTable(), gpu(slowed=("sw-power-cap",), power_w=450, power_limit_w=450), LEAVE, "no slowdown"),
    ("thermal", ThermalTable(), gpu(slowed=("sw-thermal-slowdown",), temperature_c=83), LEAVE, "83 °C"),
    ("foreign_vram", OTHERS, gpu(foreign_bytes=3 * GIB), ENTER, "others hold 3.0 GiB, held from 3 GiB until 2 GiB"),
    ("foreign_vram", OTHERS, gpu(foreign_bytes=3 * GIB - 1), BETWEEN, "3.0 GiB"),
    ("foreign_vram", OTHERS, gpu(foreign_bytes=2 * GIB), LEAVE, "2.0 GiB"),
    ("foreign_vram", OTHERS, gpu(), BETWEEN, "not told"),
    ("foreign_vram", OTHERS, gpu(foreign_bytes=0, foreign_busy=1.0), LEAVE, "0.0 GiB"),
    ("foreign_vram", BUSY, gpu(foreign_bytes=0, foreign_busy=0.5), ENTER, "50% busy"),
    ("foreign_vram", BUSY, gpu(foreign_bytes=0, foreign_busy=0.4), LEAVE, "0.0 GiB"),
    ("foreign_vram", BUSY, gpu(foreign_bytes=0, foreign_busy=None), BETWEEN, "0.0 GiB"),
    ("foreign_vram", ForeignVramTable(enter_gb=1, leave_gb=2), gpu(foreign_bytes=int(1.5 * GIB)), ENTER, "1.5 GiB"),
    ("applications", ApplicationsTable(), None, BETWEEN, "not been looked at"),
    ("applications", ApplicationsTable(), ("blender",), ENTER, "blender runs"),
    ("applications", ApplicationsTable(), ("blender", "steam"), ENTER, "blender, steam run"),
    ("applications", ApplicationsTable(), (), LEAVE, "none"),
    ("applications", ApplicationsTable(), DARK, LEAVE, "unknown"),
    ("disk", DISK, free(0.99), ENTER, "1.0 GiB free at /state, held below 1 GiB until 2 GiB"),
    ("disk", DISK, free(1), BETWEEN, "1.0 GiB free"),
    ("disk", DISK, free(2), LEAVE, "2.0 GiB free"),
    ("disk", DISK, DARK, BETWEEN, "not known: the bus"),
    ("disk", DISK, None, BETWEEN, "not known"),
    ("disk", DiskTable(floor_gb=2, enough_gb=1), free(1.5), ENTER, "until 2 GiB"),
    ("network", NetworkTable(), Network(metered=True), ENTER, "is metered"),
    ("network", NetworkTable(), Network(metered=True, guessed=True), ENTER, "guess"),
    ("network", SURE, Network(metered=True, guessed=True), LEAVE, "not metered"),
    ("network", SURE, Network(metered=True), ENTER, "is metered"),
    ("network", NetworkTable(), Network(), LEAVE, "not metered"),
    ("network", NetworkTable(), DARK, LEAVE, "unknown"),
    ("network", NetworkTable(), None, BETWEEN, "not been read"),
]


@pytest.mark.parametrize(("rule", "table", "seen", "level", "part"), ROWS)
def test_a_rule_says_its_level_and_a_sentence(rule, table, seen, level, part):
    found = getattr(hold_rules, rule)(table, seen)
    assert found.level is level
    assert part in found.text


# ---- latches


@pytest.mark.parametrize(
    ("story", "held_at"),
    [
        # (time, level), … with 5 s to enter and 10 s to leave; when it is held
        ([(0, ENTER), (4.9, ENTER)], []),
        ([(0, ENTER), (5, ENTER)], [5]),
        ([(0, ENTER), (4, BETWEEN), (5, ENTER), (9, ENTER)], []),
        ([(0, ENTER), (4, LEAVE), (5, ENTER), (10, ENTER)], [10]),
        ([(0, ENTER), (5, ENTER), (6, LEAVE), (15, LEAVE)], [5, 6, 15]),
        ([(0, ENTER), (5, ENTER), (6, LEAVE), (16, LEAVE)], [5, 6]),
        ([(0, ENTER), (5, ENTER), (6, LEAVE), (15, ENTER), (16, LEAVE), (25, LEAVE)], [5, 6, 15, 16, 25]),
        ([(0, ENTER), (5, ENTER), (6, BETWEEN), (1000, BETWEEN)], [5, 6, 1000]),
        ([(0, BETWEEN), (1000, BETWEEN)], []),
    ],
)
def test_a_level_has_to_last(story, held_at):
    latch, held = Latch(), []
    for now, level in story:
        latch = step(latch, level, now, Patience(5, 10))
        if latch.held:
            held.append(now)
    assert held == held_at


def test_without_patience_it_follows_at_once():
    assert step(Latch(), ENTER, 0, hold_rules.AT_ONCE).held
    assert not step(Latch(held=True), LEAVE, 0, hold_rules.AT_ONCE).held


@pytest.mark.parametrize("seed", range(20))
def test_a_reading_that_jumps_never_makes_the_worker_come_and_go(seed):
    """Whatever is read, two changes are as far apart as the rule's times say."""
    dice = random.Random(seed)
    latch, now, changes = Latch(), 0.0, []
    patience = Patience(dice.uniform(0, 10), dice.uniform(0, 20))
    for _ in range(1000):
        now += dice.uniform(0.1, 3)
        before = latch
        latch = step(latch, dice.choice([ENTER] * 9 + [LEAVE] * 9 + [BETWEEN]), now, patience)
        if latch.held != before.held:
            changes.append((now, latch.held))
    for (earlier, _), (later, held) in itertools.pairwise(changes):
        assert later - earlier >= (patience.enter_s if held else patience.leave_s)


# ---- all of them together


def entry(level: Level, source: Source = Source.DISK, gpu: str = "") -> Entry:
    return Entry((source, gpu), "unload", hold_rules.AT_ONCE, Finding(level, "so it is", 77.0))


def test_a_wish_has_everything_that_a_hold_needs():
    _, (wish,) = judge({}, [entry(ENTER, gpu="GPU-1")], 0)
    assert (wish.source, wish.gpu, wish.mode) == (Source.DISK, "GPU-1", Mode.UNLOAD)
    assert (wish.reason, wish.until) == ("so it is", 77.0)


def test_what_has_no_rule_any_more_is_forgotten():
    latches, _ = judge({}, [entry(ENTER), entry(ENTER, gpu="GPU-1")], 0)
    assert len(latches) == 2
    latches, wishes = judge(latches, [entry(BETWEEN)], 1)
    assert list(latches) == [(Source.DISK, "")]
    assert len(wishes) == 1


ALL = HoldsTable(
    schedule=ScheduleTable(quiet=["22:00-07:00"]),
    presence=PresenceTable(mode="unload"),
    foreign_vram=ForeignVramTable(mode="abort"),
    applications=ApplicationsTable(names=["blender"]),
    network=NetworkTable(mode="stop"),
)


def test_a_fresh_box_watches_only_what_is_nobodys_taste():
    sources = {each.scope[0] for each in rules(HoldsTable(), Observed(gpus=(gpu(),)))}
    assert sources == {Source.BATTERY, Source.THERMAL, Source.DISK}


def test_every_rule_can_be_asked_for_and_gpus_each_have_their_own():
    seen = Observed(gpus=(gpu(), Gpu(uuid="GPU-2")))
    scopes = [each.scope for each in rules(ALL, seen)]
    assert len(scopes) == len(set(scopes)) == 10
    assert (Source.FOREIGN_VRAM, "GPU-2") in scopes
    assert (Source.THERMAL, "GPU-1") in scopes


def test_a_game_holds_its_gpu_and_no_other():
    seen = Observed(gpus=(gpu(foreign_bytes=8 * GIB), Gpu(uuid="GPU-2", foreign_bytes=0)))
    latches, wishes = judge({}, rules(ALL, seen), 0)
    latches, wishes = judge(latches, rules(ALL, seen, latches), 5)
    assert [(wish.source, wish.gpu, wish.mode) for wish in wishes] == [(Source.FOREIGN_VRAM, "GPU-1", Mode.ABORT)]


def test_while_the_gpus_are_unknown_their_holds_stay_and_one_that_is_gone_is_forgotten():
    hot = Observed(gpus=(gpu(slowed=("hw-thermal-slowdown",)),))
    latches, _ = judge({}, rules(ALL, hot), 0)
    latches, wishes = judge(latches, rules(ALL, hot, latches), 20)
    assert [wish.gpu for wish in wishes] == ["GPU-1"]
    latches, wishes = judge(latches, rules(ALL, Observed(), latches), 1000)
    assert [wish.gpu for wish in wishes] == ["GPU-1"]
    latches, wishes = judge(latches, rules(ALL, Observed(gpus=()), latches), 1001)
    assert wishes == ()


# ---- engine failures

FAILURES = EngineFailuresTable(mode="stop", after=3, pause_s=100)


def test_bad_ends_in_a_row_ask_for_a_hold_that_doubles():
    failures, wish, pause_s = Failures().bad(FAILURES, "llama crashed")
    assert wish is None
    failures, wish, pause_s = failures.bad(FAILURES, "llama crashed")
    assert wish is None
    failures, wish, pause_s = failures.bad(FAILURES, "llama crashed")
    assert wish is not None
    assert wish.source is Source.ENGINE_FAILURES
    assert pause_s == 100
    assert wish.reason == "3 bad ends in a row, the last: llama crashed; tried again after 100 s"
    failures, wish, pause_s = failures.bad(FAILURES, "whisper hung")
    assert pause_s == 200
    for _ in range(100):
        failures, wish, pause_s = failures.bad(FAILURES, "whisper hung")
    assert pause_s == 86_400


def test_one_good_job_clears_the_record():
    failures = Failures()
    for _ in range(2):
        failures, _, _ = failures.bad(FAILURES, "")
    failures, wish, _ = failures.good().bad(FAILURES, "")
    assert (failures, wish) == (Failures(count=1), None)


def test_engine_failures_can_be_switched_off():
    failures, off = Failures(), EngineFailuresTable(mode="off", after=2)
    for _ in range(9):
        failures, wish, _ = failures.bad(off, "")
        assert wish is None
