"""What an owner does with a box that has one GPU and two models that do not fit together. Real processes and clock."""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import trio

from protocol import engine_wire as wire
from supervisor.cli import main
from supervisor.control.gather import Gathering, Sources
from supervisor.control.server import open_control
from supervisor.control.snapshot import Link
from supervisor.control.surface import Surface
from supervisor.host.host import Host, open_host
from supervisor.host.means import Means
from supervisor.host.work import Done, EngineSpec, ModelSpec, RunEnd, RunRequest
from supervisor.intake.holds import Mode
from supervisor.machine.gpu_metrics import gpu_metrics
from supervisor.machine.telemetry import GpuWatch, simulated_argv
from supervisor.orders import Orders
from supervisor.pausing import Pausing
from supervisor.room import VramRoom
from supervisor.settings import LimitsTable

GIB = 2**30
GPU = "GPU-sim-0"
PATIENCE_S = 60.0


def model(name: str, **options: object) -> ModelSpec:
    engine = EngineSpec(name="synthetic", module="engines.synthetic.engine", python=sys.executable)
    loads = {"gpu": GPU, "vram_bytes": 5 * GIB, **options}
    return ModelSpec(
        name=f"synthetic-{name}",
        engine=engine,
        model=wire.Model(name=f"synthetic-{name}", kinds=("llm",), device="auto", devices=(GPU,), options=loads),
        vram_bytes=5 * GIB,
    )


class Owner:
    """Types commands."""

    def __init__(self, host: Host, config: Path, capsys: Any) -> None:
        self.host, self._config, self._capsys = host, config, capsys
        self.drained: list[str] = []
        self._count = 0

    async def types(self, *words: str) -> str:
        argv = [*words, "--config", str(self._config)]
        self._capsys.readouterr()
        assert await trio.to_thread.run_sync(functools.partial(main, argv)) == 0
        return str(self._capsys.readouterr().out)

    async def status(self) -> Any:
        return json.loads(await self.types("status", "--json"))

    async def until(self, what: Callable[[Any], object]) -> Any:
        """Ask until something is so."""
        with trio.fail_after(PATIENCE_S):
            while not what(seen := await self.status()):
                pass  # each question takes its time
            return seen

    async def run(self, name: str) -> RunEnd:
        """One run, to be cancelled by the name of its model."""
        self._count += 1
        attempt = self.host.ground(f"synthetic-{name}").open_attempt(f"a{self._count}")
        params = msgspec.msgpack.encode({"prompt": "hi"})
        request = RunRequest(model=f"synthetic-{name}", kind="llm", params=params, folder=attempt.outputs, label=name)
        try:
            with trio.fail_after(PATIENCE_S):
                return await self.host.run(request, lambda _event: None)
        finally:
            attempt.close()

    async def runs(self, name: str) -> None:
        end = await self.run(name)
        assert isinstance(end, Done), end


@contextlib.asynccontextmanager
async def open_owner(tmp_path: Path, capsys: Any, *models: ModelSpec) -> AsyncIterator[Owner]:
    """The parts of the supervisor that take part, wired as it wires them."""
    gpu = {"uuid": GPU, "name": "Simulated", "memory_total_bytes": 8 * GIB}
    (tmp_path / "gpus.json").write_text(json.dumps({"gpus": [gpu]}))
    (tmp_path / "worker.toml").write_text('config_version = 1\n[worker]\nstate_dir = "."\n')
    watch = GpuWatch(simulated_argv(tmp_path / "gpus.json", tmp_path / "instances", interval_s=0.1))
    room = VramRoom(watch, GIB // 4, tmp_path / "vram.json")
    pausing = Pausing(tmp_path / "holds.json")
    pausing.on_change = lambda: room.free(
        pausing.reason() if any(hold.mode is Mode.UNLOAD for hold in pausing.holds().items) else ""
    )
    limits = LimitsTable(cancel_grace_s=1, term_grace_s=1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        nursery.start_soon(pausing.run)
        nursery.start_soon(room.keep_learning)
        assert await watch.wait_known(PATIENCE_S)
        async with open_host(models, limits, tmp_path / "instances", means=Means(room=room)) as host:
            owner = Owner(host, tmp_path / "worker.toml", capsys)
            sources = Sources(
                worker="box",
                specs=models,
                instances=host.snapshot,
                holds=pausing.holds,
                room=room,
                watch=watch,
                link=lambda: Link(url="ws://c", connected=True),
            )
            surface = Surface(
                Gathering(sources).snapshot,
                Orders(pausing, lambda reason, _restart: owner.drained.append(reason)),
                lambda: gpu_metrics(watch.readings()),
            )
            async with open_control(tmp_path / "control.sock", surface):
                yield owner
        nursery.cancel_scope.cancel()


async def test_status_says_in_one_sentence_why_the_gpu_is_idle(tmp_path, capsys):
    async with open_owner(tmp_path, capsys, model("a", tokens=10_000, delay_ms=50), model("b")) as owner:
        assert (await owner.status())["gpus"][0]["why"] == "There are no jobs."
        async with trio.open_nursery() as nursery:
            nursery.start_soon(owner.run, "a")
            seen = await owner.until(lambda seen: seen["models"][0]["state"] == "busy")
            assert (seen["state"], seen["gpus"][0]["why"]) == ("busy", "")
            nursery.start_soon(owner.runs, "b")
            # Before that it says, for a moment, that its files are being looked at.
            await owner.until(lambda seen: "synthetic-a is working" in seen["models"][1]["waits"])
            owner.host.cancel("a")

        def settled(seen: Any) -> bool:
            """What the reader tells comes a moment after the model is there."""
            told = seen["gpus"][0]["free_bytes"] == 3 * GIB and seen["gpus"][0]["ours_bytes"] == 5 * GIB
            return bool(told and seen["models"][1]["held"] and seen["models"][0]["state"] == "cold")

        seen = await owner.until(settled)
        assert seen["models"][1]["vram_bytes"] == 5 * GIB
        gpu = seen["gpus"][0]
        assert (gpu["free_bytes"], gpu["ours_bytes"], gpu["foreign_bytes"]) == (3 * GIB, 5 * GIB, 0)
        text = await owner.types("status")
        assert "3.0G" in text
        assert "There are no jobs." in text


async def test_pause_frees_the_gpu_and_resume_gives_it_back(tmp_path, capsys):
    async with open_owner(tmp_path, capsys, model("a")) as owner:
        await owner.runs("a")
        await owner.until(lambda seen: seen["models"][0]["idle_s"] is not None)
        text = await owner.types("pause", "--for", "2h", "--free-vram", "--reason", "a game")
        assert text.startswith("Paused by the operator (a game) until ")
        seen = await owner.until(lambda seen: seen["gpus"][0]["free_bytes"] == 8 * GIB and not seen["models"][0]["pid"])
        assert seen["state"] == "paused"
        assert seen["gpus"][0]["why"].startswith("Paused by the operator (a game) until ")
        assert await owner.types("resume") == "Resumed.\n"
        await owner.runs("a")
        assert (await owner.status())["holds"] == []


async def test_drain_reaches_the_supervisor(tmp_path, capsys):
    async with open_owner(tmp_path, capsys) as owner:
        assert (await owner.types("drain", "--reason", "moving house")).startswith("Draining: no jobs are running")
        assert owner.drained == ["moving house"]
