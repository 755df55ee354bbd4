"""Room in GPU memory under a virtual clock: what is told of the GPUs, what is learned, and whether memory came back.

Who loads beside whom is decided elsewhere: tests/supervisor/test_deciding.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import trio

from protocol import engine_wire as wire
from supervisor.host.work import EngineSpec, ModelSpec
from supervisor.intake import effects as fx
from supervisor.intake.residency import GIB
from supervisor.machine.readings import GpuReading, MigDevice
from supervisor.peaks import Facts
from supervisor.room import BACK_S, KNOWN_S, SETTLE_S, VramRoom

GPU, OTHER = "GPU-one", "GPU-two"
MARGIN = GIB // 2


class FakeGpus:
    """Two GPUs of 24 GiB; `held` is pid -> device -> bytes."""

    def __init__(self) -> None:
        self.available = True
        self.total = {GPU: 24 * GIB, OTHER: 24 * GIB}
        self.foreign = {GPU: 0, OTHER: 0}
        self.held: dict[int, dict[str, int]] = {}
        self.mig: tuple[MigDevice, ...] = ()
        self.tells_processes = True
        self.known_after_s = float("inf")
        self.readers: list = []

    def readings(self):
        if not self.available:
            return {}
        return {
            uuid: GpuReading(
                uuid=uuid,
                memory_total_bytes=total,
                memory_free_bytes=self.free_bytes(uuid),
                mig=self.mig if uuid == OTHER else (),
            )
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

    def subscribe(self, on_reading):
        self.readers.append(on_reading)
        return lambda: self.readers.remove(on_reading)

    def read(self) -> None:
        for reader in self.readers:
            reader(self.readings())

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


class Told:
    """Whoever decides; takes note of what it is told."""

    def __init__(self) -> None:
        self.events: list[fx.Event] = []
        self.waiting: dict[str, str] = {}

    def tell(self, event: fx.Event) -> None:
        self.events.append(event)

    def waits(self) -> dict[str, str]:
        return self.waiting

    def of(self, kind: type) -> list:
        return [event for event in self.events if isinstance(event, kind)]


class FakeLane:
    """One instance: `take` memory while it lives in its place, `end` it."""

    count = 100

    def __init__(self, world: World, name: str = "a", *, devices: tuple[str, ...] = (GPU,), told: float = 0) -> None:
        self.world = world
        model = wire.Model(name=name, device="cuda", devices=devices)
        engine = EngineSpec(name="fake", module="none", python="none")
        self.spec = ModelSpec(name=name, engine=engine, model=model, vram_bytes=int(told * GIB))
        self.pid = 0
        self.idle_since: float | None = None
        self.left = trio.Event()
        self._end = trio.Event()
        self.back_s = 0.2

    def take(self, gib: float, device: str = GPU) -> None:
        self.world.gpus.held.setdefault(self.pid, {})[device] = int(gib * GIB)

    async def rest(self) -> None:
        self.idle_since = trio.current_time()
        await trio.sleep(SETTLE_S)
        self.world.room.sample()

    def end(self) -> None:
        self._end.set()

    async def live(self, number: int, shares, task_status=trio.TASK_STATUS_IGNORED) -> None:
        async with self.world.room.place(self, number, shares):
            FakeLane.count += 1
            self.pid = FakeLane.count
            task_status.started()
            await self._end.wait()
            self.world.nursery.start_soon(self.world.give_back, self.pid, self.back_s)
            self.pid, self.idle_since = 0, None
        self.left.set()


class World:
    def __init__(self, tmp_path: Path, nursery: trio.Nursery) -> None:
        self.gpus, self.nursery, self.books = FakeGpus(), nursery, Told()
        self.sizes: dict[str, int] = {}
        self.lost: list[tuple[str, str]] = []
        self.broken: dict[str, str] = {}
        self.path = tmp_path / "vram.json"
        self.room = self.new_room()

    def new_room(self) -> VramRoom:
        async def facts(spec: ModelSpec) -> Facts:
            await trio.lowlevel.checkpoint()
            return Facts(key=spec.name, file_bytes=self.sizes.get(spec.name, 0))

        room = VramRoom(
            self.gpus,
            MARGIN,
            self.path,
            facts=facts,
            pids=lambda leader: {leader},
            on_lost=lambda uuid, sentence: self.lost.append((uuid, sentence)),
            unusable=lambda uuid: self.broken.get(uuid, ""),
        )
        room.bind(self.books)
        return room

    async def give_back(self, pid: int, after_s: float) -> None:
        await trio.sleep(after_s)
        self.gpus.held.pop(pid, None)

    async def start(self, lane: FakeLane, number: int = 1, **gib: float) -> FakeLane:
        device = (*lane.spec.model.devices, GPU)[0]
        shares = {device: int(gib["gib"] * GIB)} if gib else {}
        await self.nursery.start(lane.live, number, shares)
        return lane


@pytest.fixture
async def world(tmp_path, autojump_clock, nursery):
    return World(tmp_path, nursery)


async def test_the_gpus_are_told_as_soon_as_they_are_known(world, autojump_clock):
    world.gpus.available, world.gpus.known_after_s = False, 3.0
    began = trio.current_time()
    world.room.sample()
    assert not world.books.events
    await world.room.open()
    assert trio.current_time() - began == 3.0
    (listed,) = world.books.of(fx.Listed)
    assert listed.devices == (
        fx.DevicePlan(uuid=GPU, total_bytes=24 * GIB),
        fx.DevicePlan(uuid=OTHER, total_bytes=24 * GIB),
    )


async def test_a_driver_that_never_answers_is_waited_for_a_while_and_then_there_is_none(world, autojump_clock):
    world.gpus.available = False
    began = trio.current_time()
    await world.room.open()
    assert trio.current_time() - began == KNOWN_S
    assert world.books.of(fx.Listed) == [fx.Listed(())]  # nothing to place models on, and nothing to wait for
    world.gpus.available = True
    world.gpus.read()
    assert len(world.books.of(fx.Listed)[-1].devices) == 2
    world.gpus.available = False
    world.gpus.read()
    assert world.books.of(fx.Listed)[-1].devices == ()


async def test_a_gpu_that_is_cut_up_is_its_parts(world, autojump_clock):
    world.gpus.mig = (MigDevice(uuid="MIG-1", memory_total_bytes=5 * GIB, memory_free_bytes=4 * GIB),)
    await world.room.open()
    assert [plan.uuid for plan in world.books.of(fx.Listed)[-1].devices] == [GPU, "MIG-1"]


async def test_what_is_nobodys_of_ours_is_foreign_and_told_when_it_changes(world, autojump_clock):
    world.gpus.foreign[GPU] = 3 * GIB
    await world.room.open()
    lane = await world.start(FakeLane(world), number=7, gib=10)
    lane.take(4)
    world.gpus.read()
    assert world.books.of(fx.Reading)[-1] == fx.Reading(GPU, 3 * GIB, {7: 4 * GIB})
    assert world.room.held() == {"a": {GPU: 4 * GIB}}
    assert world.room.promised() == {GPU: 6 * GIB}
    assert world.room.vram_bytes("a") == 4 * GIB
    before = len(world.books.events)
    world.gpus.read()
    assert len(world.books.events) == before
    world.gpus.foreign[GPU] = 5 * GIB
    world.gpus.read()
    assert world.books.events[before:] == [fx.Reading(GPU, 5 * GIB, {7: 4 * GIB})]


async def test_a_gpu_out_of_use_is_told_and_told_again_when_the_driver_has_been_silent(world, autojump_clock):
    world.broken[GPU] = "Xid 79: it fell off the bus."
    await world.room.open()
    assert world.books.of(fx.Broken)[0] == fx.Broken(GPU, "Xid 79: it fell off the bus.")
    world.gpus.available = False
    world.gpus.read()
    world.broken.clear()
    world.gpus.available = True
    world.gpus.read()
    assert [event for event in world.books.of(fx.Broken) if event.uuid == GPU][-1] == fx.Broken(GPU, "")
    world.broken[OTHER] = "in quarantine"
    world.room.look_again()
    assert world.books.of(fx.Broken)[-1] == fx.Broken(OTHER, "in quarantine")


async def test_memory_can_be_freed_for_somebody_else(world, autojump_clock):
    world.room.free("a game")
    world.room.free("a game", {GPU: "too hot"}, cordons={GPU: "too hot", OTHER: "cordoned"})
    world.room.free("", cordons={OTHER: "cordoned"})
    whole = fx.HoldPut("", "a game", unload=True, finish=True)
    hot = fx.HoldPut(GPU, "too hot", unload=True, finish=True)
    cordon = fx.HoldPut(OTHER, "cordoned", finish=True)
    assert world.books.events[0] == whole
    assert set(map(str, world.books.events[1:3])) == {str(hot), str(cordon)}
    assert set(map(str, world.books.events[3:])) == {str(fx.HoldLifted("")), str(fx.HoldLifted(GPU))}
    await world.room.open()  # a GPU that is listed late is held all the same
    assert world.books.of(fx.HoldPut)[-1] == cordon


async def test_what_a_load_takes_is_told_learned_or_estimated(world, autojump_clock):
    await world.room.open()
    told, files, nothing = FakeLane(world, "told", told=5), FakeLane(world, "files"), FakeLane(world, "nothing")
    world.sizes["files"] = 20 * GIB
    assert await world.room.need(told.spec) == (5 * GIB, False)
    need, estimated = await world.room.need(files.spec)
    assert (need > 20 * GIB, estimated) == (True, True)
    assert await world.room.need(nothing.spec) == (0, True)
    await world.start(files, gib=23)
    files.take(15)
    await files.rest()
    assert await world.room.need(files.spec) == (15 * GIB, True)  # it was seen to fit: it is not refused for ever
    assert world.books.of(fx.Learned)[-1] == fx.Learned("files", 15 * GIB, True)
    world.room = world.new_room()
    assert (await world.room.need(files.spec))[0] == 15 * GIB


async def test_an_idle_model_settles_at_what_it_holds(world, autojump_clock):
    await world.room.open()
    lane = await world.start(FakeLane(world), number=3, gib=20)
    lane.take(5)
    await lane.rest()
    assert world.books.of(fx.Settles) == [fx.Settles(3, {GPU: 5 * GIB})]
    assert world.room.promised() == {}


async def test_a_model_that_takes_no_gpu_memory_is_learned_as_such(world, autojump_clock):
    world.sizes["a"] = 20 * GIB
    await world.room.open()
    lane = await world.start(FakeLane(world), gib=23)
    await lane.rest()
    assert world.books.of(fx.Settles) == [fx.Settles(1, {})]
    assert (await world.room.need(lane.spec))[0] == 0


async def test_a_driver_that_tells_no_processes_is_no_obstacle(world, autojump_clock):
    world.gpus.tells_processes = False
    await world.room.open()
    lane = await world.start(FakeLane(world), gib=10)
    lane.take(8)
    await lane.rest()
    assert world.room.held() == {"a": {GPU: 8 * GIB}}
    assert world.books.of(fx.Reading)[-1] == fx.Reading(GPU, 0, {1: 8 * GIB})


async def test_what_others_take_while_a_model_loads_is_not_taken_for_its_own(world, autojump_clock):
    await world.room.open()
    first = await world.start(FakeLane(world, "first"), number=1, gib=4)
    first.take(4)
    world.gpus.read()  # the driver tells what processes hold
    await world.start(FakeLane(world, "second"), number=2, gib=10)
    world.gpus.foreign[GPU] = 3 * GIB
    world.gpus.read()
    assert world.books.of(fx.Reading)[-1] == fx.Reading(GPU, 3 * GIB, {1: 4 * GIB})
    assert world.room.promised() == {GPU: 10 * GIB}


async def test_the_end_waits_until_the_memory_is_back(world, autojump_clock):
    await world.room.open()
    lane = await world.start(FakeLane(world), gib=20)
    lane.take(20)
    lane.back_s = 3
    world.room.sample()
    began = trio.current_time()
    lane.end()
    await lane.left.wait()
    assert trio.current_time() - began == pytest.approx(3.1, abs=0.2)
    assert world.room.tainted() == {}
    assert world.lost == []
    assert world.books.of(fx.Reading)[-1] == fx.Reading(GPU, 0, {})


async def test_memory_that_was_free_before_its_owner_is_known_to_have_ended_is_back(world, autojump_clock):
    """A reading between the death of the process and the word of it shows less in use than we hold ourselves."""
    await world.room.open()
    lane = await world.start(FakeLane(world), gib=20)
    lane.take(20)
    world.room.sample()
    world.gpus.held.pop(lane.pid)
    world.room.sample()
    began = trio.current_time()
    lane.end()
    await lane.left.wait()
    assert trio.current_time() - began < 1
    assert world.room.tainted() == {}
    assert world.lost == []


async def test_memory_that_does_not_come_back_taints_the_gpu_until_it_does(world, autojump_clock):
    await world.room.open()
    lane = await world.start(FakeLane(world), gib=20)
    lane.take(20)
    lane.back_s = 60
    world.room.sample()
    began = trio.current_time()
    lane.end()
    await lane.left.wait()
    assert trio.current_time() - began == pytest.approx(BACK_S, abs=0.2)
    assert "20.0 GiB of GPU-one did not come back within 10 s after a had ended" in world.room.tainted()[GPU]
    assert world.lost == [(GPU, world.room.tainted()[GPU])]
    assert world.books.of(fx.Reading)[-1] == fx.Reading(GPU, 20 * GIB, {})  # before it is said to be gone
    world.books.waiting = {"b": "waits for 16.5 GiB on GPU-one: other programs hold 20.0 GiB there"}
    assert "did not come back" in world.room.waiting()["b"]
    await trio.sleep(60)
    assert world.room.tainted() == {}
    assert "did not come back" not in world.room.waiting()["b"]


async def test_a_model_on_the_cpu_has_no_part_in_it(world, autojump_clock):
    await world.room.open()
    lane = FakeLane(world)
    lane.spec = ModelSpec(name="cpu", engine=lane.spec.engine, model=wire.Model(name="cpu", device="cpu"))
    await world.start(lane)
    assert world.room.held() == {}
    lane.end()
    await lane.left.wait()


async def test_keep_learning_looks_by_itself(world, autojump_clock):
    await world.room.open()
    world.nursery.start_soon(world.room.keep_learning)
    lane = await world.start(FakeLane(world), gib=10)
    lane.take(6)
    await trio.sleep(5)
    assert world.room.held() == {"a": {GPU: 6 * GIB}}
