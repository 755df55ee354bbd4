"""What a worker accepted comes to its end once, whatever the network does in between, and whoever is killed.

Short here; `scripts/soak link` runs as many jobs and seeds as one likes (BULKHEAD_CHAOS_JOBS, BULKHEAD_CHAOS_SEED).
"""

from __future__ import annotations

import logging
import os
import random
import time
from pathlib import Path

import pytest
import trio

from tests.certificates import self_signed
from tests.chaos.asks import asks
from tests.chaos.proxy import CALM, Odds
from tests.chaos.world import World, looked, open_world, until

log = logging.getLogger(__name__)
SEED = int(os.environ.get("BULKHEAD_CHAOS_SEED", "1"))
JOBS = int(os.environ.get("BULKHEAD_CHAOS_JOBS", "30"))
ENDS_S = 30.0 + JOBS  # to the last end, after the last job was submitted
ROUGH = Odds(cut=0.004, tear=0.003, stall=0.0005, delay=0.01, double=0.003, corrupt=0.003, forget=0.01)
ROUGH_TLS = Odds(cut=0.004, tear=0.004, stall=0.0005, delay=0.01, corrupt=0.004)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.name == "nt", reason="the program whose effect is counted is a shell's"),
]


@pytest.fixture(autouse=True)
def _few_words(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "httpx")
    caplog.set_level(logging.INFO, __name__)


def tell(world: World, started: float, found: dict[str, int]) -> None:
    deeds = {f"{deed} {kind}": count for (deed, kind), count in sorted(world.proxy.deeds.items())}
    log.info("seed %d: %s, deeds %s, %.1f s", SEED, found, deeds, time.monotonic() - started)


async def settle(world: World) -> None:
    """A calm network from here on: everything comes to its end."""
    world.proxy.odds = CALM
    await world.all_ended(ENDS_S)
    await world.all_acknowledged()


async def test_no_result_is_lost_on_a_rough_road(tmp_path: Path) -> None:
    started = time.monotonic()
    async with open_world(tmp_path, SEED, ROUGH) as world:
        await world.ask_all(asks(JOBS, SEED))
        with trio.move_on_after(ENDS_S / 2):  # the network stays as it is until the last end, if that comes at all
            await looked(world.quiet)
        await settle(world)
        tell(world, started, await world.judge())
        assert world.proxy.total() >= JOBS / 40, "the road was smooth: nothing was tried"


async def test_over_tls_any_byte_may_be_wrong(tmp_path: Path) -> None:
    started = time.monotonic()
    async with open_world(tmp_path, SEED, ROUGH_TLS, tls=self_signed(tmp_path)) as world:
        await world.ask_all(asks(JOBS // 2, SEED + 1))
        await settle(world)
        tell(world, started, await world.judge())


async def test_a_worker_that_is_killed_loses_no_job(tmp_path: Path) -> None:
    started, dice = time.monotonic(), random.Random(SEED)
    kills = max(3, JOBS // 25)
    async with open_world(tmp_path, SEED, ROUGH) as world, trio.open_nursery() as nursery:
        nursery.start_soon(world.ask_all, asks(JOBS, SEED + 2))
        for number in range(kills):
            await until(lambda number=number: world.ended() > number * JOBS / (kills + 1), "jobs end", ENDS_S)
            await trio.sleep(dice.uniform(0, 0.5))
            world.kill_worker()
            if dice.random() < 0.3:  # once more while it starts
                await trio.sleep(dice.uniform(0.1, 1.5))
                world.kill_worker()
        await until(lambda: len(world.jobs) == JOBS, "all were accepted", ENDS_S)
        await settle(world)
        tell(world, started, await world.judge(killed=True))
