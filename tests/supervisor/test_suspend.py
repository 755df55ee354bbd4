"""A sleep of the machine is reported once, and a busy loop is none."""

from __future__ import annotations

import sys
import time

import pytest
import trio

from supervisor.suspend import Clocks, SleepWatch, system_clocks


class Machine:
    """Time, awake and in all."""

    def __init__(self) -> None:
        self.awake = 100.0
        self.always = 5000.0

    def clocks(self) -> Clocks:
        return Clocks(lambda: self.awake, lambda: self.always)

    def work(self, seconds: float) -> None:
        self.awake += seconds
        self.always += seconds

    def sleep(self, seconds: float) -> None:
        self.always += seconds


def test_each_sleep_is_reported_once():
    machine, slept = Machine(), []
    watch = SleepWatch(slept.append, clocks=machine.clocks())
    assert watch.look() == 0
    machine.work(3600)
    assert watch.look() == 0
    machine.sleep(90)
    machine.work(1)
    assert watch.look() == 90
    machine.work(1)
    assert watch.look() == 0
    machine.sleep(3)
    assert watch.look() == 3
    assert slept == [90, 3]


def test_a_blink_is_no_sleep_and_blinks_do_not_add_up():
    machine, slept = Machine(), []
    watch = SleepWatch(slept.append, clocks=machine.clocks())
    for _ in range(100):
        machine.sleep(1.9)
        assert watch.look() == 0
    assert slept == []


def test_a_clock_that_steps_back_is_no_sleep():
    machine, slept = Machine(), []
    watch = SleepWatch(slept.append, clocks=machine.clocks())
    machine.always -= 50
    assert watch.look() == 0
    machine.sleep(10)
    assert watch.look() == 10


async def test_the_task_looks_every_second(autojump_clock):
    machine, slept = Machine(), []
    watch = SleepWatch(slept.append, clocks=machine.clocks())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        await trio.sleep(10.5)
        machine.sleep(7200)
        await trio.sleep(1)
        assert slept == [7200]
        await trio.sleep(10)
        assert slept == [7200]
        nursery.cancel_scope.cancel()


async def test_without_clocks_nothing_is_watched(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("supervisor.suspend.system_clocks", lambda: None)
    watch = SleepWatch(lambda _slept: None)
    with trio.fail_after(20):
        await watch.run()
    assert watch.look() == 0


def test_the_clocks_of_this_system_run_alike_while_it_is_awake():
    clocks = system_clocks()
    assert clocks is not None

    def lag() -> tuple[float, float]:
        """Between what and what `always` is ahead: this process may stand still between two looks at clocks."""
        before = clocks.awake()
        always = clocks.always()
        return always - clocks.awake(), always - before

    least, most = lag()
    assert most > -1.0
    until = time.monotonic() + 0.05
    before = clocks.awake()
    while time.monotonic() < until:
        pass
    assert clocks.awake() - before >= 0.03
    later_least, later_most = lag()
    assert later_most > least - 0.1
    assert later_least < most + 0.1


def test_macs_have_clocks_of_other_names(monkeypatch: pytest.MonkeyPatch):
    ticking = {4: 5.0, 8: 77.0}
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(time, "CLOCK_MONOTONIC_RAW", 4, raising=False)
    monkeypatch.delattr(time, "CLOCK_UPTIME_RAW", raising=False)
    assert system_clocks() is None
    monkeypatch.setattr(time, "CLOCK_UPTIME_RAW", 8, raising=False)
    monkeypatch.setattr(time, "clock_gettime", ticking.__getitem__)
    clocks = system_clocks()
    assert clocks is not None
    assert (clocks.awake(), clocks.always()) == (77.0, 5.0)


def test_windows_has_calls_of_its_own(monkeypatch: pytest.MonkeyPatch):
    class Call:
        def __init__(self, does) -> None:
            self.does = does

        def __call__(self, *args: object):
            return self.does(*args)

    class Kernel:
        GetTickCount64 = Call(lambda: 90_500)
        QueryUnbiasedInterruptTime = Call(lambda out: setattr(out._obj, "value", 305_000_000) or 1)

    class Windll:
        kernel32 = Kernel

    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.setattr("ctypes.windll", Windll, raising=False)
    clocks = system_clocks()
    assert clocks is not None
    assert (clocks.awake(), clocks.always()) == (30.5, 90.5)
