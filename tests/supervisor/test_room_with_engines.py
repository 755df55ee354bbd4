"""Two models that do not fit together, as real processes on a GPU that is simulated. Real clock."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import psutil
import pytest
import trio

from protocol import engine_wire as wire
from supervisor.host.host import Host, open_host
from supervisor.host.means import Means
from supervisor.host.work import Done, EngineSpec, Failed, ModelSpec, Progress, RunEnd, RunRequest
from supervisor.machine.telemetry import GpuWatch, simulated_argv
from supervisor.room import VramRoom
from supervisor.settings import LimitsTable

GIB = 2**30
GPU = "GPU-sim-0"
LIMITS = LimitsTable(start_s=60, load_s=60, first_output_s=60, stall_s=60, cancel_grace_s=1, term_grace_s=1, job_s=120)
PATIENCE_S = 60.0


def model(name: str, gib: float, told: float | None = None, **options: object) -> ModelSpec:
    """A synthetic model that takes so much of the GPU; the operator says so, or says something else."""
    engine = EngineSpec(name="synthetic", module="engines.synthetic.engine", python=sys.executable)
    taken = {"gpu": GPU, "vram_bytes": int(gib * GIB), **options}
    return ModelSpec(
        name=f"synthetic-{name}",
        engine=engine,
        model=wire.Model(name=f"synthetic-{name}", kinds=("llm",), device="auto", devices=(GPU,), options=taken),
        vram_bytes=int((gib if told is None else told) * GIB),
    )


class Box:
    """A host, a room, and a simulated GPU of 8 GiB."""

    def __init__(self, tmp_path: Path, host: Host, room: VramRoom, watch: GpuWatch) -> None:
        self.host, self.room, self.watch = host, room, watch
        self._folder, self._count = tmp_path, 0
        self._script = tmp_path / "gpus.json"
        self.told: list[str] = []

    async def ask(self, name: str, prompt: str = "hi", **more: object) -> RunEnd:
        self._count += 1
        attempt = self.host.ground(f"synthetic-{name}").open_attempt(f"a{self._count}")
        params = msgspec.msgpack.encode({"prompt": prompt})
        request = RunRequest(model=f"synthetic-{name}", kind="llm", params=params, folder=attempt.outputs, **more)
        try:
            with trio.fail_after(PATIENCE_S):
                return await self.host.run(request, self._hear)
        finally:
            attempt.close()

    async def until(self, what: Callable[[], object]) -> None:
        """Wait until something is so: looked at whenever the host changes or the GPU is read."""
        with trio.fail_after(PATIENCE_S):
            while not what():
                bell = trio.Event()
                self.host.on_change = bell.set
                stop = self.watch.subscribe(lambda _readings, bell=bell: bell.set())
                await bell.wait()
                stop()

    def _hear(self, event: object) -> None:
        if isinstance(event, Progress) and event.phase == "room":
            self.told.append(event.text)

    async def serves(self, name: str) -> None:
        end = await self.ask(name)
        assert isinstance(end, Done), end
        await self.until(lambda: self.state(name) == "ready")

    def state(self, name: str) -> str:
        return next(one.state for one in self.host.snapshot() if one.model == f"synthetic-{name}")

    def pid(self, name: str) -> int:
        return next(one.pid for one in self.host.snapshot() if one.model == f"synthetic-{name}")

    def others_hold(self, gib: float) -> None:
        script(self._script, gib)


def script(path: Path, others_gib: float = 0) -> None:
    partial = path.with_suffix(".new")
    gpu = {"uuid": GPU, "memory_total_bytes": 8 * GIB, "memory_used_bytes": int(others_gib * GIB)}
    partial.write_text(json.dumps({"gpus": [gpu]}))
    partial.replace(path)


@contextlib.asynccontextmanager
async def open_box(tmp_path: Path, *models: ModelSpec) -> AsyncIterator[Box]:
    script(tmp_path / "gpus.json")
    scratch = tmp_path / "instances"
    watch = GpuWatch(simulated_argv(tmp_path / "gpus.json", scratch, interval_s=0.1))
    room = VramRoom(watch, GIB // 4, tmp_path / "vram.json")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        nursery.start_soon(room.keep_learning)
        assert await watch.wait_known(PATIENCE_S)
        async with open_host(models, LIMITS, scratch, means=Means(room=room)) as host:
            yield Box(tmp_path, host, room, watch)
        nursery.cancel_scope.cancel()


async def test_two_models_that_do_not_fit_together_take_turns(tmp_path):
    async with open_box(tmp_path, model("a", 5), model("b", 5)) as box:
        for turn in range(2):
            await box.serves("a")
            old = box.pid("a")
            assert (box.state("a"), box.state("b")) == ("ready", "cold")
            began = trio.current_time()
            await box.serves("b")
            swap_s = trio.current_time() - began
            assert (box.state("a"), box.state("b")) == ("cold", "ready")
            assert not psutil.pid_exists(old)
            await box.until(lambda: box.watch.free_bytes(GPU) == 3 * GIB)
            assert swap_s < PATIENCE_S / 2, f"turn {turn} took {swap_s:.1f} s"
        assert any("synthetic-a is ending" in text for text in box.told)
        assert box.room.tainted() == {}


async def test_two_models_that_fit_stay(tmp_path):
    async with open_box(tmp_path, model("a", 3), model("b", 3)) as box:
        await box.serves("a")
        await box.serves("b")
        assert (box.state("a"), box.state("b")) == ("ready", "ready")


async def test_a_working_model_finishes_its_job_first(tmp_path):
    async with open_box(tmp_path, model("a", 5, tokens=80, delay_ms=50), model("b", 5)) as box:
        ends: list[tuple[str, RunEnd]] = []

        async def ask(name: str) -> None:
            ends.append((name, await box.ask(name)))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, "a")
            await box.until(lambda: box.state("a") == "busy")
            nursery.start_soon(ask, "b")
        assert [name for name, _end in ends] == ["a", "b"]
        assert all(isinstance(end, Done) for _name, end in ends)
        assert any("synthetic-a is working" in text for text in box.told)


async def test_memory_of_other_programs_is_waited_for_and_named(tmp_path):
    async with open_box(tmp_path, model("a", 5)) as box:
        box.others_hold(6)
        await box.until(lambda: box.watch.free_bytes(GPU) == 2 * GIB)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(box.serves, "a")
            # Before it waits for memory, its files are looked at.
            await box.until(lambda: "waits for" in box.room.waiting().get("synthetic-a", ""))
            assert box.room.waiting() == {
                "synthetic-a": "waits for 3.2 GiB on GPU-sim-0: other programs hold 6.0 GiB there"
            }
            box.others_hold(0)


async def test_what_never_fits_fails_with_numbers(tmp_path):
    async with open_box(tmp_path, model("a", 5, told=20)) as box:
        end = await box.ask("a")
        assert isinstance(end, Failed)
        assert end.fault.code == "out_of_memory"
        assert "needs 20.0 GiB of GPU memory, and the largest GPU it may use has 8.0 GiB" in end.fault.message


async def test_a_peak_is_learned_from_a_real_process(tmp_path):
    """Nobody tells what they take: the second time it is known, and the other has to go before the load."""
    async with open_box(tmp_path, model("a", 5, told=0), model("b", 5, told=0)) as box:
        await box.serves("a")
        await box.until((tmp_path / "vram.json").exists)
        assert box.room.held()["synthetic-a"] == {GPU: 5 * GIB}
    peaks = msgspec.json.decode((tmp_path / "vram.json").read_bytes(), type=dict[str, dict[str, int]])
    assert list(peaks.values()) == [{GPU: 5 * GIB}]


@pytest.mark.parametrize("how", ["evict", "crash"])
async def test_the_gpu_is_freed_for_its_owner(tmp_path, how):
    async with open_box(tmp_path, model("a", 5)) as box:
        await box.serves("a")
        if how == "evict":
            box.room.free("the operator wants the GPU")
        else:
            psutil.Process(box.pid("a")).kill()
        await box.until(lambda: box.watch.free_bytes(GPU) == 8 * GIB and not box.pid("a"))
