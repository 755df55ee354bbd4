"""Other programs, space, and GPUs without what is ours."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import psutil
import pytest

from supervisor.intake.observed import Disk, Gpu, Unknown
from supervisor.machine.load import Ours, descends, foreign, free_space, processes, running
from supervisor.machine.readings import GpuProcess, GpuReading, MigDevice

GIB = 2**30


def reading(used: int | None, *listed: tuple[int, int | None], **more: Any) -> dict[str, GpuReading]:
    found = tuple(GpuProcess(pid=pid, bytes=size) for pid, size in listed)
    return {"GPU-1": GpuReading(uuid="GPU-1", memory_used_bytes=used, processes=found, busy=0.9, **more)}


@pytest.mark.parametrize(
    ("readings", "ours", "bytes_", "busy"),
    [
        # our own load is none: not the memory, not the time
        (reading(9 * GIB, (7, 8 * GIB), (99, GIB)), Ours(pids=frozenset({7}), works=frozenset({"GPU-1"})), GIB, None),
        (reading(8 * GIB, (7, 8 * GIB)), Ours(pids=frozenset({7}), works=frozenset({"GPU-1"})), 0, 0.0),
        # busy, though no run goes on, and nobody else is there: that is a load of ours
        (reading(8 * GIB, (7, 8 * GIB)), Ours(pids=frozenset({7})), 0, 0.0),
        (reading(8 * GIB, (7, 7 * GIB)), Ours(pids=frozenset({7})), GIB, 0.9),  # somebody whom the driver hides
        (reading(8 * GIB, (7, 8 * GIB), (99, None)), Ours(pids=frozenset({7})), 0, 0.9),
        # a driver that lists nothing (a container, WDDM): what we believe to hold counts
        (reading(9 * GIB), Ours(held={"GPU-1": 8 * GIB}), GIB, 0.9),
        (reading(9 * GIB, (7, None)), Ours(pids=frozenset({7}), held={"GPU-1": 8 * GIB}), GIB, 0.9),
        # while a model loads, its promise is ahead of what is listed
        (reading(3 * GIB, (7, 2 * GIB)), Ours(pids=frozenset({7}), held={"GPU-1": 8 * GIB}), 0, 0.0),
        (reading(None), Ours(), None, 0.9),
        # another GPU's work says nothing of this one
        (reading(GIB), Ours(held={"GPU-2": GIB}, works=frozenset({"GPU-2"})), GIB, 0.9),
    ],
)
def test_what_is_ours_is_left_out(readings, ours, bytes_, busy):
    (found,) = foreign(readings, ours)
    assert (found.foreign_bytes, found.foreign_busy) == (bytes_, busy)


def test_slices_of_a_gpu_are_added_up():
    parts = (
        MigDevice(uuid="MIG-1", memory_used_bytes=5 * GIB, processes=(GpuProcess(pid=7, bytes=4 * GIB),)),
        MigDevice(uuid="MIG-2", memory_used_bytes=2 * GIB),
    )
    ours = Ours(pids=frozenset({7}), works=frozenset({"MIG-1"}))
    (found,) = foreign(reading(None, mig=parts), ours)
    assert (found.foreign_bytes, found.foreign_busy) == (3 * GIB, None)


def test_heat_and_power_come_along():
    readings = reading(
        0, temperature_c=90.0, power_w=300.0, power_limit_w=350.0, clock_reasons=("gpu-idle", "hw-slowdown")
    )
    assert foreign(readings, Ours()) == (
        Gpu(
            uuid="GPU-1",
            foreign_bytes=0,
            foreign_busy=0.9,
            temperature_c=90.0,
            power_w=300.0,
            power_limit_w=350.0,
            slowed=("hw-slowdown",),
        ),
    )


def test_free_space(tmp_path):
    found = free_space(tmp_path)
    assert isinstance(found, Disk)
    assert found.free_bytes == pytest.approx(psutil.disk_usage(str(tmp_path)).free, abs=GIB)
    assert isinstance(free_space(tmp_path / "none"), Unknown)


def nobodys(_pid: int) -> bool:
    """None of these is ours."""
    return False


LIST = [(1, "systemd"), (2, "Blender"), (3, "EldenRing.exe"), (4, "steam_app_12345"), (5, "python3"), (6, "")]


@pytest.mark.parametrize(
    ("names", "own", "found"),
    [
        (["blender"], (), ("Blender",)),
        (["blender.exe", "eldenring"], (), ("Blender", "EldenRing.exe")),
        (["steam_app_*"], (), ("steam_app_12345",)),
        (["blend"], (), ()),
        (["python*"], (), ("python3",)),
        (["python*"], {5}, ()),
        (["*"], {5}, ("Blender", "EldenRing.exe", "steam_app_12345", "systemd")),
        ([], (), ()),
    ],
)
def test_programs_are_found_by_name(names, own, found):
    listed = [(pid, name) for pid, name in LIST if name]
    assert running(names, own, lambda: listed, nobodys) == found


def test_a_name_that_linux_cut_off_is_found():
    assert running(["Cyberpunk2077.exe"], (), lambda: [(1, "Cyberpunk2077.e")], nobodys) == ("Cyberpunk2077.e",)
    assert running(["SomeVeryLongGame"], (), lambda: [(1, "SomeVeryLongGam")], nobodys) == ("SomeVeryLongGam",)
    assert running(["Cyberpunk2077.exe"], (), lambda: [(1, "Cyberpunk")], nobodys) == ()


def test_a_system_that_lists_nothing_is_unknown():
    def refuse():
        raise psutil.AccessDenied(1)

    assert isinstance(running(["x"], (), refuse), Unknown)


def test_real_processes_have_names_and_ours_can_be_left_out(tmp_path):
    name = f"bh{os.getpid()}"  # one that nobody else's programs have
    (tmp_path / name).symlink_to(sys.executable)
    code = "print(1, flush=True); input()"
    child = subprocess.Popen([tmp_path / name, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        assert {called for pid, called in processes() if pid == child.pid} == {name}
        assert os.getpid() in {pid for pid, _ in processes()}
        assert running([name], (), ours=nobodys) == (name,)
        assert running([name], {child.pid}, ours=nobodys) == ()
        # Whatever we started counts as ours, known or not: a coordinator, a download, an engine named like a game.
        assert running([name], ()) == ()
    finally:
        child.communicate(b"\n")


GRANDCHILD = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'print(1, flush=True); input()'])"


def test_what_our_children_start_is_ours_too():
    child = subprocess.Popen([sys.executable, "-c", GRANDCHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        child.stdout.readline()
        (grandchild,) = psutil.Process(child.pid).children()
        assert descends(grandchild.pid)
        assert descends(grandchild.pid, child.pid)
        assert not descends(child.pid, grandchild.pid)
        assert not descends(os.getppid())
    finally:
        child.communicate(b"\n")
    assert not descends(child.pid)  # gone
