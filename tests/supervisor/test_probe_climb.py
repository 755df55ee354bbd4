"""The last step of the ladder: an engine says that it is on a GPU, and a simulated driver says what it sees."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trio
import trio.testing

from supervisor import probe_climb
from supervisor.machine.gpu_truth import Truth
from supervisor.machine.telemetry import GpuWatch, simulated_argv
from supervisor.probe import probe_engine
from supervisor.probe_climb import rungs

GPU = {"memory_total_bytes": 2**33}

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="families are looked up in /proc")


@contextlib.asynccontextmanager
async def watching(tmp_path: Path, **gpu: object) -> AsyncIterator[tuple[GpuWatch, Path]]:
    """A driver that counts what is held below a folder, and the folder."""
    folder = tmp_path / "probes"
    folder.mkdir()
    (tmp_path / "script.json").write_text(json.dumps({"gpus": [GPU | gpu]}))
    watch = GpuWatch(simulated_argv(tmp_path / "script.json", folder, 0.2))
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch.run)
            yield watch, folder
            nursery.cancel_scope.cancel()


async def test_the_driver_confirms_an_engine_while_it_lives(tmp_path: Path, wordy):
    async with watching(tmp_path) as (watch, folder):
        probe = await probe_engine("wordy", wordy("holds-gpu"), "", "cuda", watch=watch, folder=folder)
    assert (probe.verdict, probe.device_executed) == ("ok", "cuda:0"), probe
    assert probe.held_bytes == {"GPU-sim-0": 2**20}
    assert probe.notes == ()


async def test_a_liar_fell_back_to_the_cpu(tmp_path: Path, wordy):
    async with watching(tmp_path, processes=[{"pid": 1, "bytes": 5}]) as (watch, folder):
        probe = await probe_engine("wordy", wordy("no-gpu"), "", "cuda", watch=watch, folder=folder)
    assert probe.verdict == "cpu-fallback", probe
    assert "the driver lists no memory of it" in probe.message
    assert probe.hint


async def test_a_driver_that_lists_nobody_proves_nothing(tmp_path: Path, wordy):
    async with watching(tmp_path, missing={"processes": "Not Supported"}) as (watch, folder):
        probe = await probe_engine("wordy", wordy("no-gpu"), "", "cuda", watch=watch, folder=folder)
    assert probe.verdict == "ok", probe
    assert probe.held_bytes == {}
    assert "Not Supported" in probe.notes[0]


async def test_whoever_did_not_claim_a_gpu_is_not_looked_for(wordy, monkeypatch: pytest.MonkeyPatch):
    async def never(*_: object, **__: object) -> Truth:
        raise AssertionError("the driver was asked")

    monkeypatch.setattr(probe_climb, "where_is", never)
    assert (await probe_engine("wordy", wordy("no-gpu"), "", "cpu")).ok
    assert (await probe_engine("wordy", wordy(), "", "cuda")).verdict == "cpu-fallback"


async def test_one_that_is_killed_meanwhile_is_no_liar(wordy, monkeypatch: pytest.MonkeyPatch):
    async def kill(pids, **_: object) -> Truth:
        leader, *_rest = pids()
        ended = os.pidfd_open(leader)
        os.kill(leader, 9)
        await trio.lowlevel.wait_readable(ended)
        os.close(ended)
        await trio.testing.wait_all_tasks_blocked(0.05)
        return Truth({})

    monkeypatch.setattr(probe_climb, "where_is", kill)
    probe = await probe_engine("wordy", wordy("no-gpu"), "", "cuda")
    assert probe.verdict == "ok", probe
    assert "ended before the driver" in probe.notes[0]


def test_half_a_line_and_foreign_ones_are_no_rungs():
    output = b'noise\n{"rung": "import"}\n[]\n{"other": 1}\n{"rung": "load"'
    assert rungs(output) == ({"rung": "import"},)
