"""Where processes hold memory, by the driver's word: simulated readings, and a synthetic engine that really runs."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import msgspec
import pytest
import trio

from protocol import engine_wire as wire
from supervisor.host.family import members
from supervisor.host.host import open_host
from supervisor.host.work import Done, EngineSpec, ModelSpec, RunRequest
from supervisor.machine import gpu_truth
from supervisor.machine.gpu_truth import where_is
from supervisor.machine.telemetry import GpuWatch, simulated_argv
from supervisor.settings import LimitsTable

GIB = 2**30


@contextlib.asynccontextmanager
async def watching(tmp_path: Path, *gpus: dict[str, object], allocations: Path | None = None, **script: object):
    file = tmp_path / "script.json"
    file.write_text(json.dumps({"gpus": list(gpus), **script}))
    watch = GpuWatch(simulated_argv(file, allocations, 0.2))
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch.run)
            yield watch
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("gpu", "held", "unknown"),
    [
        ({"processes": [{"pid": 7, "bytes": 5}, {"pid": 8, "bytes": 9}]}, {"GPU-sim-0": 5}, ""),
        ({"processes": [{"pid": 8, "bytes": 9}]}, {}, ""),
        ({}, {}, ""),
        ({"memory_used_bytes": GIB}, {}, "pids are hidden"),
        ({"missing": {"processes": "NVMLError_NotSupported: Not Supported"}}, {}, "does not list processes: NVMLError"),
    ],
)
async def test_the_drivers_word(tmp_path, gpu, held, unknown):
    async with watching(tmp_path, gpu) as watch:
        truth = await where_is(lambda: [7], watch=watch)
    assert truth.held == held
    assert unknown in truth.unknown
    assert bool(unknown) == bool(truth.unknown)


async def test_without_a_gpu_nothing_can_be_concluded(tmp_path):
    async with watching(tmp_path) as watch:
        truth = await where_is(lambda: [7], watch=watch)
    assert truth.held == {}
    assert "There is no GPU" in truth.unknown


async def test_a_reader_may_be_started_for_one_question(tmp_path, monkeypatch):
    (tmp_path / "script.json").write_text(json.dumps({"gpus": [{"processes": [{"pid": 7, "bytes": 5}]}]}))
    argv = simulated_argv(tmp_path / "script.json")
    monkeypatch.setattr(gpu_truth, "GpuWatch", lambda: GpuWatch(argv))
    with trio.fail_after(30):
        assert (await where_is(lambda: [7])).held == {"GPU-sim-0": 5}


async def test_an_engine_in_its_sandbox_is_found_and_its_memory_is_back_after_its_death(tmp_path):
    """The whole chain: the engine is some generations below what was started, and sees itself under another pid."""
    engine = EngineSpec(name="synthetic", module="engines.synthetic.engine", python=sys.executable)
    options = {"gpu": "GPU-sim-0", "vram_bytes": 3 * GIB}
    model = wire.Model(name="synthetic-m", device="cpu", options=options)
    scratch = tmp_path / "instances"
    (tmp_path / "job").mkdir()
    (tmp_path / "job").chmod(0o777)
    params = msgspec.msgpack.encode({"prompt": "hi"})
    request = RunRequest(model="synthetic-m", kind="llm", params=params, folder=tmp_path / "job")
    specs = [ModelSpec(name="synthetic-m", engine=engine, model=model)]
    async with (
        watching(tmp_path, {"memory_total_bytes": 8 * GIB}, allocations=scratch) as watch,
        open_host(specs, LimitsTable(), scratch) as host,
    ):
        assert isinstance(await host.run(request, lambda _event: None), Done)
        leader = host.snapshot()[0].pid
        truth = await where_is(lambda: members(leader), watch=watch)
        assert truth.held == {"GPU-sim-0": 3 * GIB}
        assert watch.foreign_bytes("GPU-sim-0", members(leader)) == 0
        assert watch.free_bytes("GPU-sim-0") == 5 * GIB
        for pid in members(leader):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        assert await watch.wait_for(lambda _readings: watch.free_bytes("GPU-sim-0") == 8 * GIB, 10)
