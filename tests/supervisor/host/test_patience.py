"""Limits that are fair to those who were waited for while this process stood still."""

from __future__ import annotations

import trio
import trio.testing

from supervisor.host.patience import GRANT_S, sleep_until, wait_until


async def test_a_limit_in_time_is_exact(autojump_clock):
    began = trio.current_time()
    assert not await wait_until(trio.sleep_forever, began + 5)
    assert trio.current_time() == began + 5
    event = trio.Event()
    event.set()
    assert await wait_until(event.wait, began + 6)


async def late(clock: trio.testing.MockClock, wait) -> list[bool]:
    """Wait with a limit of 5 s while this process stands still for 60 s."""
    ends: list[bool] = []
    async with trio.open_nursery() as nursery:

        async def one() -> None:
            ends.append(await wait_until(wait, trio.current_time() + 5))

        nursery.start_soon(one)
        await trio.testing.wait_all_tasks_blocked()
        clock.jump(60)
        clock.autojump_threshold = 0
    return ends


async def test_a_late_wake_up_grants_time_to_read(mock_clock):
    assert await late(mock_clock, lambda: trio.sleep_until(60 + GRANT_S / 2)) == [True]


async def test_a_grant_is_bounded(mock_clock):
    assert await late(mock_clock, trio.sleep_forever) == [False]
    assert 60 <= trio.current_time() <= 60 + GRANT_S + 0.1


async def test_sleep(autojump_clock):
    await sleep_until(trio.current_time() + 3)
    assert trio.current_time() == 3
