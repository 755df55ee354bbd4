"""On a box with an NVIDIA GPU: CUDA works inside the full sandbox, and what dies there gives its memory back."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest
import trio

from protocol import engine_wire as wire
from supervisor.host.family import members
from supervisor.host.host import Host, open_host
from supervisor.host.work import Done, EngineSpec, Failed, ModelSpec, Progress, RunEnd, RunRequest, Sandbox
from supervisor.machine.gpu import Machine, try_gpu
from supervisor.machine.gpu_truth import where_is
from supervisor.machine.gpu_words import GpuFault, classify
from supervisor.machine.telemetry import GpuWatch
from supervisor.settings import LimitsTable

pytestmark = pytest.mark.gpu

MIB = 2**20
HOLD = 512 * MIB
LIMITS = LimitsTable(
    start_s=60, load_s=120, first_output_s=120, stall_s=120, cancel_grace_s=1, term_grace_s=1, job_s=300
)


class Bench:
    """A host with CUDA engines "a" and "b", and a watch over the GPUs."""

    def __init__(self, host: Host, watch: GpuWatch, folder: Path, uuid: str) -> None:
        self.host, self.watch, self.uuid = host, watch, uuid
        self._folder, self._count = folder, 0

    async def ask(self, model: str, do: str, working: trio.Event | None = None) -> RunEnd:
        """Run one job; `working` is set when the engine has gone to the GPU."""
        self._count += 1
        folder = self._folder / f"job{self._count}"
        folder.mkdir()
        folder.chmod(0o777)

        def on_event(event: object) -> None:
            if working is not None and isinstance(event, Progress) and event.phase == "on the GPU":
                working.set()

        params = msgspec.msgpack.encode({"do": do})
        return await self.host.run(RunRequest(model=model, kind="x-cuda", params=params, folder=folder), on_event)

    def leader(self, model: str) -> int:
        return next(status.pid for status in self.host.snapshot() if status.model == model)

    async def used_bytes(self) -> int:
        assert await self.watch.wait_for(lambda _readings: True, 20)
        return self.watch.readings()[self.uuid].memory_used_bytes or 0


@pytest.fixture
def uuid(machine: Machine) -> str:
    return machine.gpus[0].uuid


@pytest.fixture
async def bench(machine: Machine, uuid: str, python: str, tmp_path: Path) -> AsyncIterator[Bench]:
    engine = EngineSpec(name="cuda-test", module="cuda_engine", python=python, sandbox=Sandbox(mode="require"))
    models = [
        ModelSpec(
            name=name,
            engine=engine,
            model=wire.Model(name=name, device="cuda", devices=(uuid,), options={"hold_bytes": HOLD}),
        )
        for name in ("a", "b")
    ]
    watch = GpuWatch()
    with trio.fail_after(280):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch.run)
            assert await watch.wait_known(30), watch.reason
            assert watch.available, watch.reason
            async with open_host(models, LIMITS, tmp_path / "s") as host:
                yield Bench(host, watch, tmp_path, uuid)
            nursery.cancel_scope.cancel()


async def test_cuda_allocates_and_computes_inside_the_full_sandbox(bench):
    end = await bench.ask("a", "triple")
    assert isinstance(end, Done), end
    status = next(status for status in bench.host.snapshot() if status.model == "a")
    assert status.device == "cuda:0"
    for layer in ("pid", "proc", "net", "privileges", "landlock", "seccomp"):
        assert status.sandbox[layer] == "verified", status.sandbox


async def test_the_driver_lists_the_engine_with_its_memory(bench):
    assert isinstance(await bench.ask("a", "triple"), Done)
    truth = await where_is(lambda: members(bench.leader("a")), watch=bench.watch)
    if truth.unknown:
        pytest.skip(truth.unknown)
    assert set(truth.held) == {bench.uuid}
    assert truth.held[bench.uuid] >= HOLD
    foreign = bench.watch.foreign_bytes(bench.uuid, members(bench.leader("a")))
    assert foreign is not None
    assert foreign < await bench.used_bytes()


async def test_sigkill_in_the_middle_of_a_kernel_gives_the_memory_back_within_two_seconds(bench, record_property):
    before = await bench.used_bytes()
    ends: list[RunEnd] = []
    working = trio.Event()

    async def spin() -> None:
        ends.append(await bench.ask("a", "spin", working))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(spin)
        await working.wait()
        # The kernel is launched right after that sign; a busy GPU is the proof that it runs.
        assert await bench.watch.wait_for(lambda readings: (readings[bench.uuid].busy or 0) > 0.5, 20)
        assert await bench.used_bytes() >= before + HOLD
        killed = trio.current_time()
        for pid in members(bench.leader("a")):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        back = await bench.watch.wait_for(
            lambda readings: (readings[bench.uuid].memory_used_bytes or 0) <= before + 64 * MIB, 10
        )
        took = trio.current_time() - killed
    record_property("memory_back_s", round(took, 3))
    assert back
    assert took <= 2
    assert isinstance(ends[0], Failed)
    assert ends[0].fault.code == "engine_crashed"
    assert isinstance(await bench.ask("a", "triple"), Done)
    assert await try_gpu(bench.uuid) == ("", 0)


async def test_out_of_memory_in_one_engine_leaves_the_other_running(bench):
    assert isinstance(await bench.ask("a", "triple"), Done)
    ends: list[RunEnd] = []
    async with trio.open_nursery() as nursery:

        async def neighbour() -> None:
            while True:
                ends.append(await bench.ask("a", "triple"))

        nursery.start_soon(neighbour)
        full = await bench.ask("b", "fill")
        after = len(ends)
        while len(ends) < after + 5:
            assert await bench.watch.wait_for(lambda _readings: True, 20)
        nursery.cancel_scope.cancel()
    assert isinstance(full, Failed)
    verdict = classify([full.fault.message])
    assert verdict is not None
    assert verdict.fault is GpuFault.OUT_OF_MEMORY
    assert all(isinstance(end, Done) for end in ends), ends
    assert isinstance(await bench.ask("b", "triple"), Done)


async def test_a_trial_passes_on_a_healthy_gpu(uuid):
    assert await try_gpu(uuid) == ("", 0)
    error, _stuck = await try_gpu("GPU-00000000-0000-0000-0000-000000000000")
    assert error
