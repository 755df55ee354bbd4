"""Room in GPU memory under a virtual clock: who loads, who goes, and whether the memory came back."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import trio

from protocol import engine_wire as wire
from protocol.faults import FaultError
from supervisor.host.work import EngineSpec, ModelSpec
from supervisor.intake.residency import GIB
from supervisor.machine.readings import GpuReading
from supervisor.peaks import Facts
from supervisor.room import BACK_S, PATIENCE_S, SETTLE_S, VramRoom

GPU, OTHER = "GPU-one", "GPU-two"
MARGIN = GIB // 2


class FakeGpus:
    """Two GPUs of 24 GiB; `held` is pid -> device -> bytes. `slow_s`: memory comes back that much after an end."""

    def __init__(self) -> None:
        self.available = True
        self.total = {GPU: 24 * GIB, OTHER: 24 * GIB}
        self.foreign = {GPU: 0, OTHER: 0}
        self.held: dict[int, dict[str, int]] = {}
        self.tells_processes = True
        self.known_after_s = float("inf")

    def readings(self):
        if not self.available:
            return {}
        return {
            uuid: GpuReading(uuid=uuid, memory_total_bytes=total, memory_free_bytes=self.free_bytes(uuid))
            for uuid, total in self.total.items()
        }

    def device(self, uuid: str) -> GpuReading | None:
        return self.readings().get(uuid)

    def free_bytes(self, uuid: str) -> int:
        ours = sum(devices.get(uuid, 0) for devices in self.held.values())
        return self.total[uuid] - self.foreign[uuid] - ours

    def used_by(self, pids):
        if not self.tells_processes:
            return {}
        total: dict[str, int] = {}
        for pid in pids:
            for uuid, count in self.held.get(pid, {}).items():
                total[uuid] = total.get(uuid, 0) + count
        return total

    async def wait_known(self, deadline_s: float) -> bool:
        with trio.move_on_after(min(deadline_s, self.known_after_s)):
            await trio.sleep_forever()
        if self.known_after_s <= deadline_s:
            self.available = True
        return self.known_after_s <= deadline_s

    async def wait_for(self, predicate, deadline_s: float) -> bool:
        with trio.move_on_after(deadline_s):
            while True:
                await trio.sleep(0.1)
                if predicate(self.readings()):
                    return True
        return False


class FakeLane:
    """One model: loads for a second, then is idle or works until it is told otherwise."""

    count = 0

    def __init__(self, world: World, name: str, size: float, *, devices: tuple[str, ...] = (), told: float = 0) -> None:
        FakeLane.count += 1
        self.world, self.size = world, int(size * GIB)
        model = wire.Model(name=name, device="cuda", devices=devices)
        engine = EngineSpec(name="fake", module="none", python="none")
        self.spec = ModelSpec(name=name, engine=engine, model=model, vram_bytes=int(told * GIB))
        self.pid = 0
        self.wanted = True
        self.idle_since: float | None = None
        self.ready_since: float | None = None
        self.told: list[str] = []
        self.evicted: list[str] = []
        self.back_s = 0.2
        self.inside = trio.Event()
        self.left = trio.Event()
        self._works = False
        self._end = trio.Event()
        self._may_end = trio.Event()
        self._may_end.set()

    def evict(self, reason: str) -> None:
        self.evicted.append(reason)
        self._end.set()

    def tell(self, progress) -> None:
        self.told.append(progress.text)

    def work(self) -> None:
        """A run takes the slot."""
        self.wanted, self.idle_since = True, None
        self._may_end = trio.Event()

    def rest(self) -> None:
        """The run is over."""
        self.wanted, self.idle_since = False, trio.current_time()
        self._may_end.set()

    async def live(self, *, rest: bool = True, load_s: float = 1.0) -> None:
        """One instance, until it is evicted."""
        async with self.world.room.place(self):
            FakeLane.count += 1
            self.pid = FakeLane.count
            device = (*self.spec.model.devices, GPU)[0]
            pid = self.pid
            self.world.gpus.held[pid] = {device: 0}
            for step in range(1, 5):  # memory grows while it loads
                await trio.sleep(load_s / 4)
                self.world.gpus.held[pid][device] = self.size * step // 4
            self.ready_since = trio.current_time()
            self.rest() if rest else self.work()
            self.inside.set()
            self.world.seen.append(self.spec.name)
            self.world.check()
            await self._end.wait()
            await self._may_end.wait()
            self.idle_since = self.ready_since = None
            self.wanted = False
            self.world.nursery.start_soon(self.world.give_back, pid, self.back_s)
            self.pid = 0
        self.left.set()


class World:
    """A room, its GPUs, and a nursery for its lanes."""

    def __init__(self, tmp_path: Path, nursery: trio.Nursery) -> None:
        self.gpus = FakeGpus()
        self.nursery = nursery
        self.seen: list[str] = []
        self.sizes: dict[str, int] = {}
        self.lost: list[tuple[str, str]] = []
        self.path = tmp_path / "vram.json"
        self.room = self.new_room()

    def new_room(self) -> VramRoom:
        async def facts(spec: ModelSpec) -> Facts:
            return Facts(key=spec.name, file_bytes=self.sizes.get(spec.name, 0))

        def lost(uuid: str, sentence: str) -> None:
            self.lost.append((uuid, sentence))

        return VramRoom(self.gpus, MARGIN, self.path, facts=facts, pids=lambda leader: {leader}, on_lost=lost)

    async def give_back(self, pid: int, after_s: float) -> None:
        await trio.sleep(after_s)
        self.gpus.held.pop(pid, None)

    def check(self) -> None:
        """Nobody ever took more than there is."""
        for uuid in (GPU, OTHER):
            assert self.gpus.free_bytes(uuid) >= MARGIN, f"too little of {uuid} is left"

    def start(self, lane: FakeLane, **how: object) -> FakeLane:
        self.nursery.start_soon(lambda: lane.live(**how))
        return lane


@pytest.fixture
async def world(tmp_path, autojump_clock, nursery):
    return World(tmp_path, nursery)


async def soon(event: trio.Event, within_s: float = 100) -> float:
    began = trio.current_time()
    with trio.fail_after(within_s):
        await event.wait()
    return trio.current_time() - began


async def test_two_that_fit_load_at_once(world, autojump_clock):
    a = world.start(FakeLane(world, "a", 10, told=10))
    b = world.start(FakeLane(world, "b", 10, told=10))
    assert await soon(a.inside) == pytest.approx(1.0, abs=0.01)
    assert await soon(b.inside) < 0.01
    assert a.evicted == b.evicted == []


async def test_an_idle_one_goes_for_one_that_does_not_fit(world, autojump_clock):
    a = world.start(FakeLane(world, "a", 20, told=20))
    await soon(a.inside)
    b = world.start(FakeLane(world, "b", 20, told=20))
    await soon(b.inside)
    assert a.left.is_set()
    assert a.evicted == ["b needs 16.5 GiB on GPU-one"]
    assert any("ends idle a" in text for text in b.told)
    assert world.room.waiting() == {}


async def test_the_promise_of_a_load_counts_before_its_memory_is_seen(world, autojump_clock):
    a = world.start(FakeLane(world, "a", 20, told=20))
    await trio.sleep(0.01)
    b = world.start(FakeLane(world, "b", 20, told=20))
    await trio.sleep(0.1)
    assert world.gpus.free_bytes(GPU) == 24 * GIB
    assert world.room.promised() == {GPU: 20 * GIB}
    assert not b.inside.is_set()
    await soon(b.inside)
    assert world.seen == ["a", "b"]
    assert a.evicted


async def test_memory_of_other_programs_is_taken(world, autojump_clock):
    world.gpus.foreign[GPU] = 10 * GIB
    a = world.start(FakeLane(world, "a", 20, told=20))
    await trio.sleep(50)
    assert not a.inside.is_set()
    assert world.room.waiting() == {"a": "waits for 6.5 GiB on GPU-one: other programs hold 10.0 GiB there"}
    world.gpus.foreign[GPU] = 0
    assert await soon(a.inside) < 2


async def test_who_waits_for_other_programs_holds_up_nobody(world, autojump_clock):
    world.gpus.foreign[GPU] = 10 * GIB
    world.start(FakeLane(world, "big", 20, told=20))
    await trio.sleep(1)
    small = world.start(FakeLane(world, "small", 2, told=2))
    assert await soon(small.inside) < 2


async def test_first_come_first_served_on_one_gpu(world, autojump_clock):
    """A small one does not slip past a large one that waits for us; one on another GPU does not wait at all."""
    a = world.start(FakeLane(world, "a", 20, told=20), rest=False)
    await soon(a.inside)
    big = world.start(FakeLane(world, "big", 20, told=20))
    await trio.sleep(1)
    small = world.start(FakeLane(world, "small", 2, told=2), load_s=2.0)
    elsewhere = world.start(FakeLane(world, "elsewhere", 2, devices=(OTHER,), told=2))
    await soon(elsewhere.inside, 2)
    await trio.sleep(1)
    assert not small.inside.is_set()
    assert world.room.waiting()["small"] == "waits for its turn behind big"
    a.rest()
    await soon(big.inside)
    await soon(small.inside)
    assert world.seen == ["a", "elsewhere", "big", "small"]


async def test_a_working_one_goes_as_soon_as_it_is_idle(world, autojump_clock):
    a = world.start(FakeLane(world, "a", 20, told=20), rest=False)
    await soon(a.inside)
    b = world.start(FakeLane(world, "b", 20, told=20))
    await trio.sleep(5)
    assert a.evicted == []
    a.rest()
    assert await soon(b.inside) < 3


async def test_one_that_never_rests_is_asked_to_end_between_jobs(world, autojump_clock):
    a = world.start(FakeLane(world, "a", 20, told=20), rest=False)
    await soon(a.inside)
    b = world.start(FakeLane(world, "b", 20, told=20))
    await trio.sleep(PATIENCE_S + 1)
    assert a.evicted == [f"b has waited {PATIENCE_S:g} s for its turn"]
    assert not b.inside.is_set()  # its job is not interrupted
    a.rest()
    await soon(b.inside)


async def test_a_load_is_not_ended_for_another_however_long_it_takes(world, autojump_clock):
    a = world.start(FakeLane(world, "a", 20, told=20), load_s=PATIENCE_S * 4, rest=False)
    await trio.sleep(1)
    b = world.start(FakeLane(world, "b", 20, told=20))
    await soon(a.inside)
    assert a.evicted == []
    await trio.sleep(PATIENCE_S / 2)
    assert a.evicted == []  # it gets its time of work, too
    await trio.sleep(PATIENCE_S)
    assert a.evicted
    a.rest()
    await soon(b.inside)


async def test_what_can_never_fit_is_refused_with_numbers(world, autojump_clock):
    lane = FakeLane(world, "a", 30, told=30)
    with pytest.raises(FaultError) as caught:
        async with world.room.place(lane):
            pytest.fail("it was let in")
    assert caught.value.fault.code == "out_of_memory"
    assert "needs 30.0 GiB" in caught.value.fault.message
    assert world.room.waiting() == {}


async def test_a_peak_is_learned_and_outlives_the_room(world, autojump_clock):
    a = world.start(FakeLane(world, "a", 20))
    await soon(a.inside)
    await trio.sleep(SETTLE_S)
    world.room.sample()
    a.evict("enough")
    await soon(a.left)
    world.room = world.new_room()
    world.gpus.foreign[GPU] = 10 * GIB
    again = world.start(FakeLane(world, "a", 20))
    await trio.sleep(1)
    assert not again.inside.is_set()
    assert world.room.waiting() == {"a": "waits for 6.5 GiB on GPU-one: other programs hold 10.0 GiB there"}


async def test_an_estimate_comes_from_the_files(world, autojump_clock):
    world.sizes["a"] = 20 * GIB
    world.gpus.foreign[GPU] = 10 * GIB
    a = world.start(FakeLane(world, "a", 20))
    await trio.sleep(1)
    assert not a.inside.is_set()
    assert "waits for 8.9 GiB" in world.room.waiting()["a"]


async def test_a_driver_that_tells_no_processes_is_no_obstacle(world, autojump_clock):
    world.gpus.tells_processes = False
    a = world.start(FakeLane(world, "a", 20, told=20))
    await soon(a.inside)
    b = world.start(FakeLane(world, "b", 20, told=20))
    await soon(b.inside)
    assert a.left.is_set()


async def test_the_end_waits_until_the_memory_is_back(world, autojump_clock):
    a = FakeLane(world, "a", 20, told=20)
    a.back_s = 3
    world.start(a)
    await soon(a.inside)
    world.room.sample()
    a.evict("enough")
    assert await soon(a.left) == pytest.approx(3.1, abs=0.2)
    assert world.room.tainted() == {}
    assert world.lost == []


async def test_memory_that_does_not_come_back_taints_the_gpu_until_it_does(world, autojump_clock):
    a = FakeLane(world, "a", 20, told=20)
    a.back_s = 60
    world.start(a)
    await soon(a.inside)
    world.room.sample()
    a.evict("enough")
    assert await soon(a.left) == pytest.approx(BACK_S, abs=0.2)
    assert "20.0 GiB of GPU-one did not come back within 10 s after a had ended" in world.room.tainted()[GPU]
    assert world.lost == [(GPU, world.room.tainted()[GPU])]
    b = world.start(FakeLane(world, "b", 20, told=20))
    await trio.sleep(1)
    assert "did not come back" in world.room.waiting()["b"]
    await soon(b.inside)
    assert world.room.tainted() == {}


async def test_who_gives_up_waiting_leaves_no_trace(world, autojump_clock):
    a = world.start(FakeLane(world, "a", 20, told=20), rest=False)
    await soon(a.inside)
    with trio.move_on_after(2):
        await FakeLane(world, "b", 20, told=20).live()
    assert world.room.waiting() == {}
    c = world.start(FakeLane(world, "c", 2, told=2))
    assert await soon(c.inside) < 2


async def test_a_preload_ends_nobody_and_holds_up_nobody(world, autojump_clock):
    a = world.start(FakeLane(world, "a", 20, told=20))
    await soon(a.inside)
    preload = FakeLane(world, "preload", 20, told=20)
    preload.wanted = False
    world.start(preload)
    await trio.sleep(PATIENCE_S * 2)
    assert a.evicted == []
    small = world.start(FakeLane(world, "small", 2, told=2))
    assert await soon(small.inside) < 2


async def test_a_model_that_takes_no_gpu_memory_is_learned_as_such(world, autojump_clock):
    world.sizes["a"] = 20 * GIB
    a = world.start(FakeLane(world, "a", 0))
    await soon(a.inside)
    await trio.sleep(SETTLE_S)
    world.room.sample()
    a.evict("enough")
    await soon(a.left)
    world.gpus.foreign[GPU] = 20 * GIB
    again = world.start(FakeLane(world, "a", 0))
    assert await soon(again.inside) < 2


async def test_a_load_waits_for_the_first_reading(world, autojump_clock):
    world.gpus.available, world.gpus.known_after_s = False, 3.0
    a = world.start(FakeLane(world, "a", 20, told=20))
    assert await soon(a.inside) == pytest.approx(4.0, abs=0.01)
    b = world.start(FakeLane(world, "b", 20, told=20))
    await soon(b.inside)
    assert a.evicted


async def test_a_gpu_that_is_out_of_use_takes_no_load(world, autojump_clock):
    world.room._unusable = {GPU: "Xid 79: it fell off the bus.", OTHER: ""}.__getitem__
    with pytest.raises(FaultError) as caught:
        async with world.room.place(FakeLane(world, "a", 1, told=1)):
            pytest.fail("it was let in")
    assert caught.value.fault.code == "gpu_failed"
    assert "a cannot be loaded: Xid 79" in caught.value.fault.message
    b = world.start(FakeLane(world, "b", 1, told=1, devices=(OTHER,)))
    await soon(b.inside)


async def test_without_a_gpu_and_for_the_cpu_everybody_fits(world, autojump_clock):
    world.gpus.available = False
    for number in range(3):
        lane = world.start(FakeLane(world, f"m{number}", 1, told=30))
        await soon(lane.inside)
    world.gpus.available = True
    cpu = FakeLane(world, "cpu", 0, told=30)
    cpu.spec = ModelSpec(name="cpu", engine=cpu.spec.engine, model=wire.Model(name="cpu", device="cpu"))
    async with world.room.place(cpu):
        assert world.room.promised() == {}


async def test_gpu_memory_can_be_freed_for_somebody_else(world, autojump_clock):
    world.nursery.start_soon(world.room.keep_learning)
    a = world.start(FakeLane(world, "a", 5, told=5))
    b = world.start(FakeLane(world, "b", 5, told=5), rest=False)
    await soon(a.inside)
    await soon(b.inside)
    world.room.free("the operator wants the GPU")
    assert a.evicted == ["the operator wants the GPU"]
    assert b.evicted == []
    b.rest()
    await soon(b.left, 10)
    world.room.free("")
    c = world.start(FakeLane(world, "c", 5, told=5))
    await soon(c.inside)
    await trio.sleep(10)
    assert c.evicted == []


async def test_what_nobody_asks_for_is_not_loaded_while_memory_is_to_stay_free(world, autojump_clock):
    world.room.free("the operator wants the GPU")
    preload = FakeLane(world, "preload", 5, told=5)
    preload.wanted = False
    world.start(preload)
    await trio.sleep(30)
    assert not preload.inside.is_set()
    assert "the operator wants the GPU" in world.room.waiting()["preload"]
    world.room.free("")
    await soon(preload.inside)


async def test_memory_can_be_freed_where_no_gpu_is_measured(world, autojump_clock):
    world.gpus.available = False
    a = world.start(FakeLane(world, "a", 5))
    await soon(a.inside)
    world.room.free("the operator wants the GPU")
    assert a.evicted
    await soon(a.left, 1)


async def test_a_telemetry_that_dies_lets_the_waiting_in(world, autojump_clock):
    a = world.start(FakeLane(world, "a", 20, told=20), rest=False)
    await soon(a.inside)
    b = world.start(FakeLane(world, "b", 0, told=20))
    await trio.sleep(1)
    assert not b.inside.is_set()
    world.gpus.available = False
    await soon(b.inside, 2)


@pytest.mark.parametrize("seed", range(8))
async def test_many_models_on_one_gpu_all_get_their_turn(world, autojump_clock, seed):
    """Random sizes, works and rests: everybody loads again and again, and the memory is never oversold."""
    dice = random.Random(seed)
    turns: dict[str, int] = {}

    async def life(number: int) -> None:
        size = dice.randint(3, 20)
        while True:
            lane = FakeLane(world, f"m{number}", size, told=size)
            async with trio.open_nursery() as inner:
                inner.start_soon(lane.live)
                await lane.inside.wait()
                turns[lane.spec.name] = turns.get(lane.spec.name, 0) + 1
                for _ in range(dice.randint(1, 4)):
                    lane.work()
                    await trio.sleep(dice.random() * 5)
                    lane.rest()
                    await trio.sleep(dice.random())
                    world.check()
            await trio.sleep(dice.random() * 3)

    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(life, number)
        await trio.sleep(1500)
        nursery.cancel_scope.cancel()
    assert len(turns) == 5
    assert min(turns.values()) >= 5, turns
