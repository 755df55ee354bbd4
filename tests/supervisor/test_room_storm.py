"""Many models on one small GPU, engines that crash and hang: everybody is answered, and nobody waits for ever."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import trio

from protocol import engine_wire as wire
from protocol.revision import ENGINE_WIRE
from supervisor.host.fake import Died, FakeChild, FakeEngines, fake_means
from supervisor.host.host import open_host
from supervisor.host.work import Done, EngineSpec, Failed, ModelSpec, RunRequest
from supervisor.machine.readings import GpuReading
from supervisor.peaks import Facts
from supervisor.room import VramRoom
from supervisor.settings import LimitsTable, RestartTable

GIB = 2**30
GPU = "GPU-one"
MODELS, RUNS = 30, 120
LIMITS = LimitsTable(
    first_output_s=20, stall_s=10, cancel_grace_s=2, term_grace_s=1, restart=RestartTable(quarantine_after=8)
)


class OneGpu:
    """24 GiB, of which engines take what `held` says; `least` is the least that ever was free."""

    available = True

    def __init__(self) -> None:
        self.held: dict[int, int] = {}
        self.readers: list = []
        self.least = 24 * GIB

    def take(self, pid: int, count: int) -> None:
        self.held[pid] = count
        self.least = min(self.least, 24 * GIB - sum(self.held.values()))

    def readings(self) -> dict[str, GpuReading]:
        free = 24 * GIB - sum(self.held.values())
        return {GPU: GpuReading(uuid=GPU, memory_total_bytes=24 * GIB, memory_free_bytes=free)}

    def device(self, uuid: str) -> GpuReading | None:
        return self.readings().get(uuid)

    def used_by(self, pids) -> dict[str, int]:
        return {GPU: sum(self.held.get(pid, 0) for pid in pids)}

    def subscribe(self, on_reading):
        self.readers.append(on_reading)
        return lambda: self.readers.remove(on_reading)

    async def run(self) -> None:
        while True:
            await trio.sleep(1)
            for reader in self.readers:
                reader(self.readings())

    async def wait_known(self, _deadline_s: float) -> bool:
        await trio.lowlevel.checkpoint()
        return True

    async def wait_for(self, predicate, deadline_s: float) -> bool:
        with trio.move_on_after(deadline_s):
            while not predicate(self.readings()):  # noqa: ASYNC110 - as the real watch looks again
                await trio.sleep(0.1)
            return True
        return False


class Engines:
    """Load for a while, take their memory, and now and then crash or forget a run."""

    def __init__(self, gpu: OneGpu, sizes: dict[str, int], dice: random.Random) -> None:
        self._gpu, self._sizes, self._dice = gpu, sizes, dice

    async def play(self, child: FakeChild) -> None:
        low, high = ENGINE_WIRE.low, ENGINE_WIRE.high
        child.send(wire.Hello(engine="fake", kinds=("llm",), low=low, high=high, pid=child.pid))
        load = await child.inbox.receive()
        assert isinstance(load, wire.Load)
        await trio.sleep(3 * self._dice.random())
        self._gpu.take(child.pid, self._sizes[load.model.name])
        try:
            await self._serve(child)
        except BaseExceptionGroup:
            raise Died(signal=11) from None
        finally:
            self._gpu.held.pop(child.pid, None)

    async def _serve(self, child: FakeChild) -> None:
        if self._dice.random() < 0.05:
            raise Died(signal=11)
        child.send(wire.Ready(device="cuda:0", slots=2))
        async with trio.open_nursery() as nursery:
            async for message in child.inbox:
                luck = self._dice.random()
                if isinstance(message, wire.Run) and luck < 0.03:
                    raise Died(signal=11)
                if isinstance(message, wire.Run) and luck > 0.05:
                    nursery.start_soon(self._run, child, message)
            nursery.cancel_scope.cancel()

    async def _run(self, child: FakeChild, run: wire.Run) -> None:
        child.send(wire.Started(run=run.run))
        await trio.sleep(2 * self._dice.random())
        child.send(wire.Result(run=run.run, body=run.params))


@pytest.mark.parametrize("seed", [1, 2, 3])
async def test_everybody_is_answered_whatever_comes_together(seed: int, tmp_path, autojump_clock):
    dice = random.Random(seed)
    gpu = OneGpu()
    sizes = {f"m{number}": dice.choice([4, 7, 9, 15]) * GIB for number in range(MODELS)}
    engine = EngineSpec(name="fake", module="none", python="none")
    models = [
        ModelSpec(name=name, engine=engine, model=wire.Model(name=name, device="cuda"), vram_bytes=size)
        for name, size in sizes.items()
    ]

    async def facts(spec: ModelSpec) -> Facts:
        await trio.lowlevel.checkpoint()
        return Facts(key=spec.name)

    room = VramRoom(gpu, GIB // 2, tmp_path / "peaks.json", facts=facts, pids=lambda leader: [leader])
    fakes = FakeEngines(Engines(gpu, sizes, dice).play)
    ends: list[Done | Failed] = []
    async with open_host(models, LIMITS, tmp_path / "scratch", means=fake_means(fakes, room=room)) as host:

        async def ask() -> None:
            await trio.sleep(100 * dice.random())
            model, alone = f"m{dice.randrange(MODELS)}", dice.random() < 0.05
            folder = Path("/nowhere")
            request = RunRequest(model=model, kind="llm", params=b"\xc0", folder=folder, deadline_s=5000, alone=alone)
            ends.append(await host.run(request, lambda _event: None))

        async with trio.open_nursery() as around:
            around.start_soon(gpu.run)
            async with trio.open_nursery() as nursery:
                for _ in range(RUNS):
                    nursery.start_soon(ask)
            around.cancel_scope.cancel()
        assert not room.waiting()
    counts = Counter("done" if isinstance(end, Done) else end.fault.code for end in ends)
    assert sum(counts.values()) == RUNS
    assert set(counts) <= {"done", "engine_crashed", "engine_hung", "quarantined"}
    assert counts["done"] > RUNS / 2
    assert gpu.least >= 0  # never more at once than there is
    assert not gpu.held
    assert trio.current_time() < 1000
