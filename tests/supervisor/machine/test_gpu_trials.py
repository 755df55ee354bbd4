"""The task that tries GPUs: what is due, one at a time, and processes that cannot be killed. Virtual clock."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys

import pytest
import trio
import trio.testing

from supervisor.machine import gpu_trials
from supervisor.machine.gpu_health import FIRST_TRIAL_S, GpuHealth
from supervisor.machine.gpu_trials import GpuTrials, still_there
from supervisor.machine.readings import GpuEvent, GpuReading

GPU, OTHER = "GPU-1", "GPU-2"


class Attempts:
    """A fake `try_gpu` that answers from a list; the last answer for ever."""

    def __init__(self, *answers: tuple[str, int]) -> None:
        self._answers = answers
        self.made: list[tuple[str, float]] = []
        self.at_once = 0

    async def __call__(self, uuid: str) -> tuple[str, int]:
        self.at_once += 1
        assert self.at_once == 1
        self.made.append((uuid, trio.current_time()))
        await trio.sleep(0.5)
        self.at_once -= 1
        return self._answers[min(len(self.made), len(self._answers)) - 1]


@contextlib.asynccontextmanager
async def trying(*answers: tuple[str, int]):
    attempts = Attempts(*answers)
    health = GpuHealth(trio.current_time, lambda _uuid: trials.wake())
    trials = GpuTrials(health, attempts)
    health.note_readings({uuid: GpuReading(uuid=uuid) for uuid in (GPU, OTHER)})
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trials.run)
        await trio.testing.wait_all_tasks_blocked()
        yield health, attempts
        nursery.cancel_scope.cancel()


def xid(number: int, uuid: str = GPU) -> GpuEvent:
    return GpuEvent(kind="xid", uuid=uuid, xid=number)


async def test_healthy_gpus_are_left_alone(autojump_clock):
    async with trying(("", 0)) as (_health, attempts):
        await trio.sleep(10_000)
        assert attempts.made == []


async def test_a_suspect_is_tried_at_once_and_back_within_a_second(autojump_clock):
    async with trying(("", 0)) as (health, attempts):
        await trio.sleep(100)
        health.note_event(xid(94))
        assert health.usable(GPU)
        await trio.sleep(1)
        assert health.usable(GPU) == ""
        assert attempts.made == [(GPU, 100)]


async def test_a_quarantined_gpu_comes_back_by_itself(autojump_clock):
    async with trying(("cuInit failed", 0), ("cuInit failed", 0), ("", 0)) as (health, attempts):
        health.note_event(xid(48))
        await trio.sleep(300)
        assert health.usable(GPU) == ""
        assert [round(at) for _uuid, at in attempts.made] == [15, 30, 61]


async def test_several_are_tried_one_after_the_other(autojump_clock):
    async with trying(("", 0)) as (health, attempts):
        health.note_event(xid(94))
        health.note_event(xid(94, OTHER))
        await trio.sleep(2)
        assert [uuid for uuid, _at in attempts.made] == [GPU, OTHER]
        assert health.usable(GPU) == health.usable(OTHER) == ""


async def test_a_stuck_process_is_watched_until_it_is_gone(autojump_clock, monkeypatch):
    there = {41}
    monkeypatch.setattr(gpu_trials, "still_there", lambda pids: set(pids) & there)
    async with trying(("", 0)) as (health, attempts):
        health.note_unkillable([GPU], 41)
        await trio.sleep(1000)
        assert attempts.made == []
        there.clear()
        await trio.sleep(FIRST_TRIAL_S)
        assert health.usable(GPU) == ""
        assert len(attempts.made) == 1


async def test_a_trial_that_gets_stuck_is_not_repeated_beside_itself(autojump_clock, monkeypatch):
    monkeypatch.setattr(gpu_trials, "still_there", set)
    async with trying(("hangs", 99)) as (health, attempts):
        health.note_event(xid(94))
        await trio.sleep(10_000)
        assert len(attempts.made) == 1
        assert "process 99" in health.usable(GPU)


def test_a_process_that_ended_is_not_there_even_as_a_zombie():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    assert still_there([process.pid, 2**22 + 1]) == {process.pid}
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert still_there([process.pid]) == set()
    process.communicate()


@pytest.mark.parametrize("pids", [[], [2**22 + 1]])
def test_nothing_is_there(pids):
    assert still_there(pids) == set()
