"""On a box with an NVIDIA GPU: the probe's word about each engine is backed by what executed."""

from __future__ import annotations

import sys

import pytest
import trio

from engines.catalog import CATALOG
from supervisor.host.work import EngineSpec
from supervisor.machine.gpu import read_machine
from supervisor.probe import probe_engine

ON_GPU = [(name, backend) for name, entry in CATALOG.items() if "cuda" in entry.devices for backend in entry.backends]


@pytest.fixture(scope="module")
def gpu():
    machine = trio.run(read_machine)
    if not machine.gpus:
        pytest.skip("this machine has no NVIDIA GPU")
    return machine


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "backend"), ON_GPU)
async def test_asked_for_cuda_it_runs_there_or_says_that_it_does_not(gpu, name, backend):
    spec = EngineSpec(name=name, module=CATALOG[name].module, python=sys.executable)
    probe = await probe_engine(name, spec, backend, "cuda", deadline_s=120)
    if probe.verdict == "ok":
        assert probe.device_executed.startswith("cuda")
        assert probe.held_bytes or probe.notes, "the driver was not asked"
    else:
        assert probe.verdict in ("cpu-fallback", "failed", "not-installed")
        assert probe.hint


@pytest.mark.gpu
async def test_the_gpu_has_a_name_memory_and_an_identity(gpu):
    first = gpu.gpus[0]
    assert first.uuid.startswith("GPU-")
    assert first.name
