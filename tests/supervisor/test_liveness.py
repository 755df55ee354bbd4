"""The watchdog is fed only while every watched part lives. The clock is trio's virtual one."""

from __future__ import annotations

import itertools
import logging

import pytest
import trio

from supervisor.liveness import Liveness
from supervisor.service import Service

ALLOWED_S = 30.0


class Manager:
    """A service manager that watches: what it heard, and when."""

    def __init__(self) -> None:
        self.heard: list[tuple[float, str]] = []
        self.service = Service({"WATCHDOG_USEC": str(int(ALLOWED_S * 1e6))}, notify=self._hear)

    def _hear(self, state: str) -> None:
        self.heard.append((trio.current_time(), state))

    def pings(self, since: float = 0.0) -> list[float]:
        return [when for when, state in self.heard if state == "WATCHDOG=1" and when >= since]

    def lost_patience(self, from_: float, until: float) -> bool:
        """Whether there was a gap in which systemd would have aborted us."""
        times = [from_, *self.pings(from_), until]
        return any(later - earlier > ALLOWED_S for earlier, later in itertools.pairwise(times))


@pytest.fixture
def manager() -> Manager:
    return Manager()


async def test_nothing_to_watch_is_fed_in_half_the_time(manager, autojump_clock, nursery):
    began = trio.current_time()
    nursery.start_soon(Liveness(manager.service).run)
    await trio.sleep(100)
    assert [when - began for when in manager.pings()] == [0, 15, 30, 45, 60, 75, 90]
    nursery.cancel_scope.cancel()


async def test_a_pulse_that_stops_starves_the_watchdog_and_is_named(manager, autojump_clock, nursery, caplog):
    liveness = Liveness(manager.service)
    link = liveness.pulse("link")
    beating = trio.CancelScope()

    async def beat() -> None:
        with beating:
            while True:
                link.beat()
                await trio.sleep(5)

    nursery.start_soon(beat)
    nursery.start_soon(liveness.run)
    began = trio.current_time()
    await trio.sleep(200)
    assert not manager.lost_patience(began, trio.current_time())
    assert not caplog.records
    beating.cancel()
    stopped = trio.current_time()
    await trio.sleep(3 * ALLOWED_S)
    assert manager.lost_patience(stopped, trio.current_time())
    assert max(manager.pings()) <= stopped + ALLOWED_S
    (record,) = caplog.records
    assert record.levelno == logging.CRITICAL
    assert "link shows no life" in record.getMessage()
    nursery.cancel_scope.cancel()


async def test_a_part_that_does_not_answer_is_asked_once_and_forgiven_when_it_does(
    manager, autojump_clock, nursery, caplog
):
    asked, wedged = [], trio.Event()

    async def round_trip() -> None:
        asked.append(trio.current_time())
        if len(asked) == 3:
            await wedged.wait()

    liveness = Liveness(manager.service)
    liveness.probe("control", round_trip)
    nursery.start_soon(liveness.run)
    await trio.sleep(300)
    assert len(asked) == 3, "a wedged part gets no second question"
    assert liveness.silent() == ["control"]
    silent_from = max(manager.pings())
    wedged.set()
    await trio.sleep(60)
    assert liveness.silent() == []
    assert len(manager.pings(silent_from + 1)) >= 3
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "control shows no life for 35 s",
        "control shows life again",
    ]
    nursery.cancel_scope.cancel()


async def test_one_dead_part_is_enough_and_a_part_that_ended_in_order_is_none(manager, autojump_clock, nursery):
    liveness = Liveness(manager.service)
    good, bad = liveness.pulse("good"), liveness.pulse("bad", 10)
    nursery.start_soon(liveness.run)
    for _ in range(30):
        good.beat()
        await trio.sleep(2)
    assert bad.silent_s(trio.current_time()) == 60
    assert liveness.silent() == ["bad"]
    before = len(manager.pings())
    liveness.forget("bad")
    for _ in range(30):
        good.beat()
        await trio.sleep(2)
    assert len(manager.pings()) >= before + 3
    nursery.cancel_scope.cancel()


async def test_a_part_has_its_whole_limit_before_the_first_beat(manager, autojump_clock):
    liveness = Liveness(manager.service)
    await trio.sleep(1000)  # a long start, before anybody watches
    liveness.pulse("slow to start", 20)
    assert liveness.silent() == []
    await trio.sleep(19)
    assert liveness.silent() == []
    await trio.sleep(2)
    assert liveness.silent() == ["slow to start"]


async def test_a_probe_that_raises_ends_the_watch(manager, autojump_clock):
    async def broken() -> None:
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError

    liveness = Liveness(manager.service)
    liveness.probe("host", broken)
    with pytest.raises(ExceptionGroup) as raised:
        await liveness.run()
    assert raised.group_contains(ZeroDivisionError)


async def test_the_status_is_told_at_most_once_a_second(manager, autojump_clock, nursery):
    count = 0

    def sentence() -> str:
        nonlocal count
        count += 1
        return f"said {count}"

    nursery.start_soon(Liveness(manager.service, sentence).run)
    began = trio.current_time()
    await trio.sleep(10.5)
    told = [when - began for when, state in manager.heard if state.startswith("STATUS=")]
    assert told == list(range(11))
    nursery.cancel_scope.cancel()


async def test_a_loop_that_is_blocked_feeds_nothing():
    """No task of ours runs while the loop does not: with the real clock, a block is a gap between two pings."""
    times: list[float] = []
    pinged = trio.Event()

    def ping(_state: str) -> None:
        nonlocal pinged
        times.append(trio.current_time())
        pinged.set()
        pinged = trio.Event()

    async def hear(count: int) -> None:
        with trio.fail_after(60):
            for _ in range(count):
                await pinged.wait()

    service = Service({"WATCHDOG_USEC": "200000"}, notify=ping)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Liveness(service).run)
        await hear(3)
        began = trio.current_time()
        import time

        time.sleep(0.6)  # noqa: ASYNC251 - the mistake that this is about
        blocked_until = trio.current_time()
        await hear(1)
        nursery.cancel_scope.cancel()
    assert not [when for when in times if began < when < blocked_until]
