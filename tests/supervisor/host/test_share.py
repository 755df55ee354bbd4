"""Whoever works through a full pipe lets others have their turn."""

from __future__ import annotations

import time

import trio

from supervisor.host.share import SHARE_S, Share


async def test_others_run_while_one_has_much_to_do():
    turns = 0

    async def other() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    async with trio.open_nursery() as nursery:
        nursery.start_soon(other)
        share = Share()
        for _ in range(5):
            until = time.perf_counter() + 2 * SHARE_S
            while time.perf_counter() < until:
                pass
            await share.give_way()
        assert turns >= 3
        nursery.cancel_scope.cancel()


async def test_a_short_piece_of_work_is_not_interrupted():
    other = trio.Event()
    async with trio.open_nursery() as nursery:

        async def set_it() -> None:
            other.set()

        nursery.start_soon(set_it)
        await Share().give_way()
        assert not other.is_set()
