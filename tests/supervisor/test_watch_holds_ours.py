"""Automatic holds: our own load is no reason for one, and the real readers on the real clock."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import trio

from supervisor.intake.holds import Hold, Source
from supervisor.intake.observed import Disk, Network, Power, Presence, Unknown
from supervisor.machine.load import Ours, descends
from supervisor.machine.telemetry import GpuWatch, simulated_argv
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
from supervisor.watch_holds import WatchHolds, system_readers, threaded
from tests.supervisor.holds_world import GIB, Clock, Gpus, Kept, World


@pytest.fixture
def make(nursery):
    """Makes a world whose watch runs."""

    def build(table: HoldsTable, *kept: Hold) -> World:
        world = World(table, *kept)
        nursery.start_soon(world.watch.run)
        return world

    return build


# ---- only the worker's own load is never a reason to pause

EVERYTHING = HoldsTable(
    schedule=ScheduleTable(mode="abort"),
    presence=PresenceTable(mode="abort", when_unknown="work"),
    battery=BatteryTable(mode="abort"),
    thermal=ThermalTable(mode="abort", enter_s=0),
    foreign_vram=ForeignVramTable(mode="abort", enter_gb=0.5, leave_gb=0.1, busy=0.1, enter_s=0, leave_s=0),
    applications=ApplicationsTable(names=["python*", "llama*"], mode="abort"),
    disk=DiskTable(mode="abort", enter_s=0),
    network=NetworkTable(mode="abort"),
    engine_failures=EngineFailuresTable(mode="stop", after=2),
)
US = frozenset({7})
FULL_LOAD = ("sw-power-cap", "sw-thermal-slowdown", "hw-slowdown")


@pytest.mark.parametrize(
    ("ours", "listed"),
    [
        (Ours(pids=US, works=frozenset({"GPU-1"})), True),  # a job runs
        (Ours(pids=US), True),  # a model loads: no run yet, and nobody else is there
        (Ours(held={"GPU-1": 20 * GIB}, works=frozenset({"GPU-1"})), False),  # a driver that lists no processes
    ],
)
async def test_our_own_load_at_its_worst(autojump_clock, make, ours, listed):
    """Every rule is on and as strict as it gets; the GPU is full, busy, hot, and at its power cap, and all of it is
    ours."""
    world = make(EVERYTHING)
    world.ours = ours
    world.gpus.show(
        20,
        ours=20 if listed else 0,
        busy=1.0,
        temperature_c=88.0,
        power_w=450.0,
        clock_reasons=FULL_LOAD,
        listed=listed,
    )
    await trio.sleep(600)
    assert world.keeper.story == []


async def test_our_own_heat_counts_for_the_hardware_and_for_the_owners_limit_alone(autojump_clock, make):
    """Documented in watch_holds.py: it is the card that is spared, whoever heats it."""
    world = make(HoldsTable(thermal=ThermalTable(celsius=90, enter_s=5)))
    world.ours = Ours(pids=US, works=frozenset({"GPU-1"}))
    world.gpus.show(20, ours=20, busy=1.0, temperature_c=89.0, clock_reasons=FULL_LOAD)
    await trio.sleep(60)
    assert world.reason("GPU-1") == ""
    world.gpus.show(20, ours=20, busy=1.0, temperature_c=91.0)
    await trio.sleep(10)
    assert "91 °C, held from 90 °C until 80 °C" in world.reason("GPU-1")


async def test_our_own_jobs_and_downloads_are_no_presence_no_program_and_no_network(tmp_path):
    """The real readers beside real children that work, write and are named like the owner's game."""
    busy = "import os, sys; print(1, flush=True); open(sys.argv[1], 'wb').write(b'x' * 2**20); sys.stdin.read()"
    game = tmp_path / f"bh{os.getpid()}"  # a name that nobody else's programs have; the system keeps 15 characters
    game.symlink_to(sys.executable)
    argv = [str(game), "-c", busy, str(tmp_path / "download")]
    readers = system_readers(tmp_path)
    child = await trio.to_thread.run_sync(
        lambda: subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE), abandon_on_cancel=False
    )
    try:
        assert child.stdout is not None
        await trio.to_thread.run_sync(child.stdout.readline)
        assert psutil.Process(child.pid).name() == game.name
        assert descends(child.pid)
        with trio.fail_after(20):
            assert await readers.applications([game.name], frozenset()) == ()  # ours do not count
    finally:
        await trio.to_thread.run_sync(child.communicate, b"")
        readers.close()


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
    table = HoldsTable(presence=PresenceTable(mode="unload", enter_s=0))
    watch = WatchHolds(table, keeper, system_readers(tmp_path), Gpus(), Ours, clock)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        await keeper.until(Source.PRESENCE)
        assert keeper.holds().reason() == "held because the machine is in use (a game fills the screen)"
        scene.write_text('{"idle_s": 900}')
        await keeper.until()
        nursery.cancel_scope.cancel()


async def test_every_simulated_reason_goes_the_whole_way(tmp_path, monkeypatch):
    """Battery, network and a real disk that is never free enough, through the readers that the program uses."""
    scene = tmp_path / "scene.json"
    scene.write_text('{"battery": 40, "metered": true}')
    monkeypatch.setenv("BULKHEAD_SIMULATED_PRESENCE", str(scene))
    keeper = Kept(Clock())
    table = HoldsTable(
        battery=BatteryTable(enter_s=0, leave_s=0),
        network=NetworkTable(mode="stop", enter_s=0, leave_s=0),
        disk=DiskTable(floor_gb=1e6, enough_gb=1e6, enter_s=0),
    )
    watch = WatchHolds(table, keeper, system_readers(tmp_path), Gpus(), Ours, keeper._clock)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        await keeper.until(Source.BATTERY, Source.NETWORK, Source.DISK)
        assert "on battery at 40 %" in keeper.holds().reason()
        scene.write_text('{"metered": false}')
        watch.apply(table)  # ask all readers now: the network is asked every 15 s only
        await keeper.until(Source.DISK)
        nursery.cancel_scope.cancel()


def gpu_script(path: Path, **fields: object) -> None:
    """What the simulated GPU reader says from now on."""
    gpu = {"uuid": "GPU-sim-0", "memory_total_bytes": 8 * GIB, **fields}
    partial = path.with_suffix(".new")
    partial.write_text(json.dumps({"gpus": [gpu]}))
    partial.replace(path)


async def test_a_gpu_goes_the_whole_way(tmp_path):
    """The reader that ships, as a child; somebody's memory, then heat; our own process on it never counts."""
    script = tmp_path / "gpus.json"
    ours, theirs = {"pid": os.getpid(), "bytes": 5 * GIB}, {"pid": 1, "bytes": 3 * GIB}
    gpu_script(script, processes=[ours], busy=1.0, temperature_c=80.0, clock_reasons=["sw-power-cap"])
    gpus = GpuWatch(simulated_argv(script, interval_s=0.1))
    keeper = Kept(Clock())
    table = HoldsTable(
        battery=BatteryTable(mode="off"),
        disk=DiskTable(mode="off"),
        thermal=ThermalTable(enter_s=0, leave_s=0),
        foreign_vram=ForeignVramTable(mode="unload", enter_gb=2, leave_gb=1, busy=0.5, enter_s=0, leave_s=0),
    )
    mine = Ours(pids=frozenset({os.getpid()}))
    watch = WatchHolds(table, keeper, system_readers(tmp_path), gpus, lambda: mine, keeper._clock)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(gpus.run)
        assert await gpus.wait_known(30)
        nursery.start_soon(watch.run)
        gpu_script(script, processes=[ours, theirs])
        await keeper.until(Source.FOREIGN_VRAM)
        assert [kept.source for kept in keeper.puts] == [Source.FOREIGN_VRAM]  # ours alone was no reason
        assert "others hold 3.0 GiB" in keeper.holds().reason(gpu="GPU-sim-0")
        gpu_script(script, processes=[ours], temperature_c=97.0, clock_reasons=["hw-thermal-slowdown"])
        await keeper.until(Source.THERMAL)
        assert "is slowed down for heat at 97 °C" in keeper.holds().reason(gpu="GPU-sim-0")
        gpu_script(script, power_w=450.0, power_limit_w=300.0, clock_reasons=["hw-power-brake"])
        await keeper.until(Source.THERMAL)
        gpu_script(script)
        await keeper.until()
        nursery.cancel_scope.cancel()
