"""The scheduler in the running supervisor, under a virtual clock: lanes, room and GPUs are real code, engines fake."""

from __future__ import annotations

import contextlib
import random
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from protocol import engine_wire as wire
from protocol.faults import FaultError
from protocol.revision import ENGINE_WIRE
from supervisor.deciding import TELL_AGAIN_S
from supervisor.host.fake import Died, FakeChild, FakeEngines, fake_means
from supervisor.host.host import Host, open_host
from supervisor.host.work import Done, EngineSpec, Failed, ModelSpec, Progress, RunEnd, RunRequest
from supervisor.machine.readings import GpuReading
from supervisor.peaks import Facts
from supervisor.room import VramRoom
from supervisor.settings import LimitsTable, RestartTable

GIB = 2**30
A, B = "GPU-a", "GPU-b"
MARGIN = GIB // 2
LIMITS = LimitsTable(
    first_output_s=1000, stall_s=1000, cancel_grace_s=1, term_grace_s=1, job_s=5000, restart=RestartTable()
)


class Gpus:
    """GPUs of so many GiB, read once a second. `held`: pid -> device -> bytes."""

    def __init__(self, **gib: float) -> None:
        self.total = {f"GPU-{name}": int(size * GIB) for name, size in gib.items()}
        self.foreign = dict.fromkeys(self.total, 0)
        self.held: dict[int, dict[str, int]] = {}
        self.available = True
        self.known_after_s = 0.0
        self._readers: list[Callable] = []

    def free(self, uuid: str) -> int:
        return self.total[uuid] - self.foreign[uuid] - sum(each.get(uuid, 0) for each in self.held.values())

    def readings(self):
        if not self.available:
            return {}
        return {
            uuid: GpuReading(uuid=uuid, memory_total_bytes=total, memory_free_bytes=self.free(uuid))
            for uuid, total in self.total.items()
        }

    def device(self, uuid: str):
        return self.readings().get(uuid)

    def used_by(self, pids):
        found: dict[str, int] = {}
        for pid in pids:
            for uuid, count in self.held.get(pid, {}).items():
                found[uuid] = found.get(uuid, 0) + count
        return found

    def subscribe(self, on_reading=None):
        self._readers.append(on_reading)
        return lambda: self._readers.remove(on_reading)

    def read(self) -> None:
        for reader in self._readers:
            reader(self.readings())

    async def run(self) -> None:
        while True:
            self.read()
            await trio.sleep(1)

    async def wait_known(self, deadline_s: float) -> bool:
        await trio.sleep(min(self.known_after_s, deadline_s))
        self.available = self.known_after_s <= deadline_s
        return self.available

    async def wait_for(self, predicate, deadline_s: float) -> bool:
        with trio.move_on_after(deadline_s):
            while not predicate(self.readings()):  # noqa: ASYNC110 - as the real watch looks again
                await trio.sleep(0.1)
            return True
        return False


class World:
    """A host on simulated GPUs. A run of "N" works for N seconds; "boom" ends its engine."""

    def __init__(self, gpus: Gpus, sizes: dict[str, int], folder: Path) -> None:
        self.gpus, self.sizes, self.files = gpus, sizes, dict[str, int]()
        self.broken: dict[str, str] = {}
        self.loads: list[tuple[str, tuple[str, ...], dict]] = []
        self.load_s = 1.0
        self.oversold: list[str] = []
        self.ends: dict[str, RunEnd] = {}
        self.waited: dict[str, float] = {}
        self.told: list[str] = []
        self.room = VramRoom(
            gpus,
            MARGIN,
            folder / "peaks.json",
            facts=self._facts,
            pids=lambda leader: [leader],
            unusable=lambda uuid: self.broken.get(uuid, ""),
        )
        self.fakes = FakeEngines(self._play)
        self.host: Host
        self.nursery: trio.Nursery

    async def _facts(self, spec: ModelSpec) -> Facts:
        await trio.lowlevel.checkpoint()
        return Facts(key=spec.name, file_bytes=self.files.get(spec.name, 0))

    async def _play(self, child: FakeChild) -> None:
        low, high = ENGINE_WIRE.low, ENGINE_WIRE.high
        child.send(wire.Hello(engine="fake", kinds=("llm",), low=low, high=high, pid=child.pid))
        model = (await child.inbox.receive()).model
        self.loads.append((model.name, model.devices, dict(model.options)))
        await trio.sleep(self.load_s)
        self._take(child.pid, model)
        try:
            child.send(wire.Ready(device="cuda", slots=2))
            async with trio.open_nursery() as nursery:
                async for message in child.inbox:
                    if isinstance(message, wire.Run):
                        nursery.start_soon(self._work, child, message)
                nursery.cancel_scope.cancel()
        except BaseExceptionGroup:
            raise Died(signal=11) from None
        finally:
            with trio.CancelScope(shield=True):
                await trio.sleep(0.3)  # the driver takes its time
            self.gpus.held.pop(child.pid, None)

    def _take(self, pid: int, model: wire.Model) -> None:
        size, devices = self.sizes.get(model.name, 0), model.devices or tuple(self.gpus.total)[:1]
        split = model.options.get("tensor_split", [1.0])
        self.gpus.held[pid] = {uuid: int(size * part / sum(split)) for uuid, part in zip(devices, split, strict=True)}
        for uuid in devices:
            if self.gpus.free(uuid) < 0:
                self.oversold.append(f"{model.name} on {uuid}: {self.gpus.free(uuid) / GIB:.1f} GiB")

    async def _work(self, child: FakeChild, run: wire.Run) -> None:
        child.send(wire.Started(run=run.run))
        words = msgspec.msgpack.decode(run.params)
        if words == "boom":
            raise Died(signal=11)
        await trio.sleep(float(words))
        child.send(wire.Result(run=run.run, body=run.params))

    async def ask(self, model: str, words: str = "1", label: str = "", **more: object) -> RunEnd:
        began = trio.current_time()
        params = msgspec.msgpack.encode(words)
        request = RunRequest(model=model, kind="llm", params=params, folder=Path("/nowhere"), label=label, **more)
        end = await self.host.run(request, self._hear)
        self.waited[label or model] = trio.current_time() - began
        self.ends[label or model] = end
        await trio.testing.wait_all_tasks_blocked()
        return end

    def _hear(self, event: object) -> None:
        if isinstance(event, Progress) and event.phase == "room":
            self.told.append(event.text)

    async def begin(self, model: str, words: str = "1", label: str = "", **more: object) -> None:
        self.nursery.start_soon(lambda: self.ask(model, words, label, **more))
        await trio.testing.wait_all_tasks_blocked()

    def state(self, model: str) -> str:
        return next(one.state for one in self.host.snapshot() if one.model == model)


def spec(name: str, gib: float = 0, *devices: str, **more: object) -> ModelSpec:
    engine = EngineSpec(name="fake", module="none", python="none")
    model = wire.Model(name=name, device="cuda", devices=devices)
    return ModelSpec(name=name, engine=engine, model=model, vram_bytes=int(gib * GIB), **more)


@contextlib.asynccontextmanager
async def world(folder: Path, gpus: Gpus, *models: ModelSpec, limits: LimitsTable = LIMITS) -> AsyncIterator[World]:
    made = World(gpus, {one.name: one.vram_bytes for one in models}, folder)
    means = fake_means(made.fakes, room=made.room)
    async with trio.open_nursery() as around:
        around.start_soon(gpus.run)
        async with (
            open_host(models, limits, folder / "s", means=means) as made.host,
            trio.open_nursery() as made.nursery,
        ):
            yield made
            made.nursery.cancel_scope.cancel()
        around.cancel_scope.cancel()
    assert made.oversold == []


async def test_two_that_fit_stay_and_each_has_a_gpu(tmp_path, autojump_clock):
    async with world(tmp_path, Gpus(a=24, b=24), spec("x", 20), spec("y", 20)) as it:
        for name in "xyxy":
            assert isinstance(await it.ask(name), Done)
        assert sorted(it.loads) == [("x", (A,), {}), ("y", (B,), {})]
        assert it.host.snapshot()[0].gpus == (A,)


async def test_its_owner_unloads_a_model_and_loads_another_anew(tmp_path, autojump_clock):
    async with world(tmp_path, Gpus(a=24, b=24), spec("x", 20), spec("y", 20)) as it:
        for name in "xy":
            assert isinstance(await it.ask(name), Done)
        await it.begin("x", "5")
        it.host.unload("x", "its owner says so", again=False)
        it.host.unload("y", "a new version", again=True)
        await trio.sleep(4)
        assert it.state("x") in ("busy", "draining"), "a job is not ended for it"
        await trio.sleep(30)
        assert (it.state("x"), it.state("y")) == ("cold", "ready")
        assert [name for name, _devices, _options in it.loads] == ["x", "y", "y"]
        assert isinstance(it.ends["x"], Done)


async def test_two_that_do_not_fit_together_swap_and_say_why(tmp_path, autojump_clock):
    async with world(tmp_path, Gpus(a=24), spec("x", 20), spec("y", 20)) as it:
        for name in "xyx":
            assert isinstance(await it.ask(name), Done)
            assert it.waited[name] < 15
        assert [name for name, _devices, _options in it.loads] == ["x", "y", "x"]
        assert "waits for 16.5 GiB on GPU-a: x is ending" in it.told
        assert it.room.waiting() == {}


async def test_a_working_model_finishes_its_job_first(tmp_path, autojump_clock):
    async with world(tmp_path, Gpus(a=24), spec("x", 20), spec("y", 20)) as it:
        await it.begin("x", "200", "long")
        await trio.sleep(5)
        await it.begin("y", "1")
        await trio.sleep(150)  # its patience is over: the place is being cleared
        assert it.room.waiting() == {"y": "waits for 16.5 GiB on GPU-a: x is working"}
        await it.begin("x", "1", "late")
        await trio.sleep(60)
        assert isinstance(it.ends["long"], Done)
        assert isinstance(it.ends["y"], Done)
        await trio.sleep(200)
        assert isinstance(it.ends["late"], Done)


async def test_the_promise_of_a_load_counts_before_its_memory_is_seen(tmp_path, autojump_clock):
    async with world(tmp_path, Gpus(a=24), spec("x", 20), spec("y", 20)) as it:
        it.load_s = 30.0
        await it.begin("x")
        await it.begin("y")
        await trio.sleep(10)
        assert it.room.promised() == {A: 20 * GIB}
        assert [name for name, *_rest in it.loads] == ["x"]
        await trio.sleep(400)
        assert isinstance(it.ends["y"], Done)


async def test_memory_of_other_programs_is_waited_for_named_and_holds_up_nobody(tmp_path, autojump_clock):
    async with world(tmp_path, Gpus(a=24), spec("big", 20), spec("small", 2)) as it:
        it.gpus.foreign[A] = 10 * GIB
        await trio.sleep(2)
        await it.begin("big")
        await trio.sleep(2 * TELL_AGAIN_S + 1)
        why = "waits for 6.5 GiB on GPU-a: other programs hold 10.0 GiB there"
        assert it.room.waiting() == {"big": why}
        assert it.told.count(why) == 3  # again and again: a sign of life for those who wait
        assert isinstance(await it.ask("small"), Done)
        assert it.waited["small"] < 5
        it.gpus.foreign[A] = 0
        await trio.sleep(8)
        assert isinstance(it.ends["big"], Done)


async def test_an_estimate_delays_and_never_refuses_and_a_peak_replaces_it(tmp_path, autojump_clock):
    async with world(tmp_path, Gpus(a=24), spec("x"), spec("y", 10)) as it:
        it.files["x"], it.sizes["x"] = 40 * GIB, 6 * GIB
        assert isinstance(await it.ask("x"), Done)
        assert it.host.deciding.why() == {}
        await trio.sleep(5)  # what it holds is what it takes
        assert isinstance(await it.ask("y"), Done)
        assert it.waited["y"] < 5
        assert (it.state("x"), it.state("y")) == ("ready", "ready")


async def test_what_can_never_fit_is_refused_with_numbers(tmp_path, autojump_clock):
    limits = msgspec.structs.replace(LIMITS, vram_threshold_gb=12.0)
    async with world(tmp_path, Gpus(a=24), spec("giant", 30), spec("x", 5), limits=limits) as it:
        end = await it.ask("giant")
        assert isinstance(end, Failed)
        assert end.fault.code == "out_of_memory"
        assert "needs 30.0 GiB of GPU memory" in end.fault.message
        end = await it.ask("x", vram_bytes=13 * GIB)
        assert isinstance(end, Failed)
        assert "vram_threshold_gb" in end.fault.message
        assert isinstance(await it.ask("x", vram_bytes=12 * GIB), Done)
        assert it.host.snapshot()[1].job_vram_bytes == 12 * GIB


async def test_loads_wait_for_the_first_reading(tmp_path, autojump_clock):
    gpus = Gpus(a=24)
    gpus.available, gpus.known_after_s = False, 3.0
    async with world(tmp_path, gpus, spec("x", 20)) as it:
        await it.begin("x")
        assert it.host.deciding.why() == {"x": "waits until the state of the GPUs is known"}
        assert it.loads == []
        await trio.sleep(6)
        assert isinstance(it.ends["x"], Done)
        assert it.loads == [("x", (A,), {})]


async def test_where_nothing_can_be_measured_everybody_fits(tmp_path, autojump_clock):
    gpus = Gpus(a=24)
    gpus.available, gpus.known_after_s = False, float("inf")
    async with world(tmp_path, gpus, spec("x", 20), spec("y", 3, A)) as it:
        assert isinstance(await it.ask("x"), Done)
        assert 10 <= it.waited["x"] < 13
        assert isinstance(await it.ask("y"), Done)
        assert it.loads == [("x", (), {}), ("y", (A,), {})]


async def test_a_telemetry_that_dies_lets_the_waiting_in(tmp_path, autojump_clock):
    async with world(tmp_path, Gpus(a=24), spec("x", 20)) as it:
        it.gpus.foreign[A] = 20 * GIB
        it.sizes["x"] = 0
        await trio.sleep(2)
        await it.begin("x")
        await trio.sleep(5)
        assert it.loads == []
        it.gpus.available = False
        await trio.sleep(5)
        assert isinstance(it.ends["x"], Done)


async def test_a_gpu_out_of_use_is_avoided_and_with_none_left_jobs_are_refused(tmp_path, autojump_clock):
    async with world(tmp_path, Gpus(a=24, b=24), spec("x", 5), spec("only", 5, A)) as it:
        it.broken[A] = "Xid 79: it fell off the bus."
        await trio.sleep(2)
        assert isinstance(await it.ask("x"), Done)
        assert it.loads == [("x", (B,), {})]
        for _ in range(6):  # the GPU's fault, not the model's: it is put out of service by nobody
            end = await it.ask("only")
            assert isinstance(end, Failed)
            assert (end.fault.code, "Xid 79" in end.fault.message) == ("gpu_failed", True)
        it.broken[A] = ""
        await trio.sleep(2)
        assert isinstance(await it.ask("only"), Done)


async def test_a_preload_ends_nobody_and_waits_for_the_end_of_a_hold(tmp_path, autojump_clock):
    async with world(tmp_path, Gpus(a=24), spec("x", 20), spec("wished", 20), spec("small", 2)) as it:
        assert isinstance(await it.ask("x"), Done)
        it.host.preload("wished")
        await trio.sleep(300)
        assert (it.state("x"), it.state("wished")) == ("ready", "cold")
        assert "nobody is ended for a preload" in it.host.deciding.why()["wished"]
        it.room.free("a game")
        await trio.sleep(10)
        assert (it.state("x"), it.state("wished")) == ("cold", "cold")
        assert "a game" in it.host.deciding.why()["wished"]
        assert isinstance(await it.ask("small"), Done)  # what was taken before is still done
        await trio.sleep(5)
        assert it.state("small") == "cold"
        it.room.free("")
        await trio.sleep(5)
        assert it.state("wished") == "ready"


async def test_a_pinned_model_stays_and_comes_back_after_a_crash(tmp_path, autojump_clock):
    async with world(tmp_path, Gpus(a=24), spec("pinned", 20, pin=True), spec("x", 20)) as it:
        it.host.preload("pinned")
        await trio.sleep(3)
        await it.begin("x", "1", "x")
        await trio.sleep(1000)
        assert "pinned is pinned" in it.room.waiting()["x"]
        it.host.cancel("x")  # else it would take its chance
        end = await it.ask("pinned", "boom")
        assert isinstance(end, Failed)
        await trio.sleep(5)
        assert it.state("pinned") == "ready"


async def test_of_an_exclusive_group_only_one_is_loaded(tmp_path, autojump_clock):
    async with world(tmp_path, Gpus(a=24, b=24), spec("x", 2, group="g"), spec("y", 2, group="g")) as it:
        for name in "xyx":
            assert isinstance(await it.ask(name), Done)
            assert sorted([it.state("x"), it.state("y")]) == ["cold", "ready"]


async def test_a_model_that_fits_on_no_gpu_is_spread_where_it_can_be(tmp_path, autojump_clock):
    async with world(tmp_path, Gpus(a=24, b=48), spec("huge", 60, split=True)) as it:
        assert isinstance(await it.ask("huge"), Done)
        ((_name, devices, options),) = it.loads
        assert devices == (A, B)
        smaller, larger = options["tensor_split"]
        assert smaller < larger < 2.2 * smaller
        it.gpus.held.clear()


async def test_one_hot_model_works_on_every_gpu_and_shares_its_ground(tmp_path, autojump_clock):
    async with world(tmp_path, Gpus(a=24, b=24, c=24), spec("hot", 20, copies=3)) as it:
        for number in range(40):
            await it.begin("hot", "30", f"j{number}")
        await trio.sleep(200)
        assert sorted(devices for _name, devices, _options in it.loads) == [(A,), (B,), ("GPU-c",)]
        assert [(one.copy, one.state, one.running) for one in it.host.snapshot()] == [(n, "busy", 2) for n in range(3)]
        folders = {child.spec.argv for child in it.fakes.children}
        assert len(folders) == len(it.fakes.children) == 3  # each has a scratch folder of its own
        ground = it.host.ground("hot")
        assert {lane.ground for lane in it.host.occupants} == {ground}
        assert {path.name for path in ground.root.iterdir()} == {"in", "out", "i1", "i2", "i3"}
        await trio.sleep(200)
        assert len(it.ends) == 40
        assert it.room.held() == {"hot": {A: 20 * GIB, B: 20 * GIB, "GPU-c": 20 * GIB}}
        assert it.room.vram_bytes("hot") == 20 * GIB


async def test_a_copy_in_quarantine_leaves_the_work_to_the_others(tmp_path, autojump_clock):
    limits = msgspec.structs.replace(LIMITS, restart=RestartTable(quarantine_after=2, reprobe_s=5000))
    async with world(tmp_path, Gpus(a=24, b=24), spec("m", 20, copies=2), limits=limits) as it:
        for _ in range(2):
            assert isinstance(await it.ask("m", "boom"), Failed)
            await trio.sleep(5)
        assert [one.state for one in it.host.snapshot()] == ["quarantined", "cold"]
        assert isinstance(await it.ask("m"), Done)
        for _ in range(2):
            assert isinstance(await it.ask("m", "boom"), Failed)
            await trio.sleep(100)
        end = await it.ask("m")
        assert isinstance(end, Failed)
        assert end.fault.code == "quarantined"


async def test_a_host_that_ends_answers_whoever_waits(tmp_path, autojump_clock):
    async with world(tmp_path, Gpus(a=24), spec("x", 20)) as it:
        it.gpus.foreign[A] = 20 * GIB
        await trio.sleep(2)
        await it.begin("x")
        it.host._scope.cancel()
        await trio.sleep(1)
        end = it.ends["x"]
        assert isinstance(end, Failed)
        assert end.fault.code == "worker_stopping"
        assert isinstance(await it.ask("x"), Failed)


async def test_a_model_in_backoff_keeps_no_memory_from_others(tmp_path, autojump_clock):
    async with world(tmp_path, Gpus(a=24), spec("bad", 20), spec("good", 20)) as it:
        for _ in range(3):
            assert isinstance(await it.ask("bad", "boom"), Failed)
        await it.begin("bad", "1", "later")
        assert (
            "started again" in it.host.deciding.why().get("bad", "") or "after a pause" in it.host.deciding.why()["bad"]
        )
        assert isinstance(await it.ask("good"), Done)
        await trio.sleep(300)
        assert isinstance(it.ends["later"], Done)


# ---- whatever happens


class Life:
    """A random life of a box, replayable by its seed."""

    def __init__(self, seed: int) -> None:
        self.dice = random.Random(seed)

    def models(self) -> list[ModelSpec]:
        return [
            spec(
                f"m{number}",
                self.dice.choice([3, 6, 9, 14, 20]),
                copies=self.dice.choice([1, 1, 1, 2]),
                group=self.dice.choice(["", "", "", "g"]),
                keep_alive_s=self.dice.choice([0.0, 0.0, 30.0]),
            )
            for number in range(self.dice.randint(2, 7))
        ]

    async def ask(self, it: World, number: int, models: list[ModelSpec]) -> None:
        await trio.sleep(200 * self.dice.random())
        model, label = self.dice.choice(models).name, f"j{number}"
        words = "boom" if self.dice.random() < 0.03 else str(self.dice.choice([0, 1, 5, 20]))
        cancels = self.dice.random() < 0.1
        async with trio.open_nursery() as nursery:

            async def run() -> None:
                alone, priority = self.dice.random() < 0.05, self.dice.choice([0, 0, 1, -1])
                await it.ask(model, words, label, alone=alone, priority=priority)
                nursery.cancel_scope.cancel()

            nursery.start_soon(run)
            await trio.sleep(10 * self.dice.random() if cancels else 1e6)
            it.host.cancel(label)
            await trio.sleep_forever()

    def _others_take(self, it: World, uuid: str, count: int) -> None:
        """What is free and promised to nobody; and it is read at once, for nobody could know before."""
        mine = it.gpus.foreign[uuid]
        spare = it.gpus.free(uuid) + mine - it.room.promised().get(uuid, 0)
        it.gpus.foreign[uuid] = max(0, min(count, spare))
        it.gpus.read()

    async def trouble(self, it: World) -> None:
        """The owner plays, pauses, and GPUs fail and come back; in the end all is well again."""
        for _ in range(8):
            await trio.sleep(25 * self.dice.random())
            uuid = self.dice.choice([A, B])
            match self.dice.randrange(5):
                case 0:
                    self._others_take(it, uuid, self.dice.choice([0, 4, 10]) * GIB)
                case 1:
                    it.room.free(self.dice.choice(["", "a game"]), cordons={uuid: "cordoned"})
                case 2:
                    it.broken = {uuid: "a fault"}
                case 3:
                    it.host.preload(f"m{self.dice.randrange(2)}")
                case 4:
                    it.broken = {}
        it.gpus.foreign, it.broken = dict.fromkeys(it.gpus.total, 0), {}
        it.room.free("")


async def live(seed: int, folder: Path) -> None:
    life = Life(seed)
    models = life.models()
    limits = msgspec.structs.replace(LIMITS, restart=RestartTable(quarantine_after=50))
    async with world(folder, Gpus(a=24, b=24), *models, limits=limits) as it:
        it.load_s = life.dice.choice([0.5, 3.0])
        it.room._tells = True  # as after a first load: until then what others take meanwhile may be taken for ours
        async with trio.open_nursery() as nursery:
            nursery.start_soon(life.trouble, it)
            for number in range(60):
                nursery.start_soon(life.ask, it, number, models)
        assert len(it.ends) == 60
        codes = {end.fault.code for end in it.ends.values() if isinstance(end, Failed)}
        assert codes <= {"cancelled", "engine_crashed", "gpu_failed"}, codes
        assert max(it.waited.values()) < 900, it.waited  # nothing starves
        assert it.host.deciding.why() == {} or all("preload" in text for text in it.host.deciding.why().values())


def run_life(seed: int, folder: Path) -> None:
    """The same seed gives the same life: also the order in which tasks that are ready at once are run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trio._core._run._ALLOW_DETERMINISTIC_SCHEDULING", True)
        patch.setattr("trio._core._run._r", random.Random(seed))
        trio.run(live, seed, folder, clock=trio.testing.MockClock(autojump_threshold=0))


@settings(max_examples=8, deadline=None, derandomize=True)
@given(st.integers(0, 10**9))
def test_no_load_exceeds_a_device_every_run_ends_and_nothing_starves(tmp_path_factory, seed):
    run_life(seed, tmp_path_factory.mktemp("life"))


@pytest.mark.parametrize("seed", range(3))
def test_lives_that_are_always_lived(tmp_path, seed):
    run_life(seed, tmp_path)


# ---- models that come and go while it runs


async def test_a_model_that_is_taken_on_is_served_and_one_that_is_let_go_ends_after_its_last_run(
    tmp_path, autojump_clock
):
    async with world(tmp_path, Gpus(a=24), spec("x", 20)) as it:
        changes: list[int] = []
        it.host.on_change = lambda: changes.append(len(it.host.snapshot()))
        it.sizes["y"] = 20 * GIB
        it.host.take_on(spec("y", 20))
        with pytest.raises(ValueError, match="'y' already"):
            it.host.take_on(spec("y", 20))
        assert [one.model for one in it.host.snapshot()] == ["x", "y"]
        assert isinstance(await it.ask("y"), Done)
        await it.begin("y", "50", "long")
        await it.begin("y", "1", "beside")
        await it.begin("y", "1", "waits")
        async with trio.open_nursery() as nursery:
            for _ in range(2):  # two who want the same get the same
                nursery.start_soon(it.host.let_go, "y", "its owner says so")
            await trio.sleep(10)
            assert it.state("y") in ("busy", "draining"), "a job is not ended for it"
            end = it.ends["waits"]
            assert isinstance(end, Failed)
            assert (end.fault.code, end.fault.may_retry) == ("worker_stopping", True)
            with pytest.raises(ValueError, match="'y' already"):
                it.host.take_on(spec("y", 20))
        assert isinstance(it.ends["long"], Done)
        assert it.gpus.held == {}
        assert [one.model for one in it.host.snapshot()] == ["x"]
        assert changes[-1] == 1
        assert not (tmp_path / "s" / "m1").exists()
        end = await it.ask("y")
        assert isinstance(end, Failed)
        assert end.fault.code == "model_not_found"
        with pytest.raises(FaultError, match="not served here any more"):
            it.host.ground("y")
        await it.host.let_go("y", "there is none")
        it.sizes["y"] = 10 * GIB
        it.host.take_on(spec("y", 10, copies=2))
        assert isinstance(await it.ask("y"), Done)
        assert isinstance(await it.ask("x"), Done)
        assert [name for name, *_rest in it.loads] == ["y", "y", "x"]


@pytest.mark.parametrize("state", ["cold", "loading", "quarantined", "waits for room"])
async def test_a_model_is_let_go_in_whatever_state_it_is(tmp_path, autojump_clock, state):
    limits = msgspec.structs.replace(LIMITS, restart=RestartTable(quarantine_after=2, reprobe_s=10_000))
    async with world(tmp_path, Gpus(a=24), spec("x", 20), limits=limits) as it:
        it.sizes["y"] = 20 * GIB
        it.host.take_on(spec("y", 20, pin=True))
        if state == "quarantined":
            for _ in range(3):
                await it.ask("y", "boom")
        elif state == "waits for room":
            it.gpus.foreign[A] = 20 * GIB
            await trio.sleep(2)
        if state in ("loading", "waits for room"):
            it.load_s = 1000
            await it.begin("y")
            await trio.sleep(3)
        assert it.state("y") in (state, "cold" if state == "waits for room" else state)
        with trio.fail_after(20):
            await it.host.let_go("y", "its owner says so")
        await trio.testing.wait_all_tasks_blocked()
        assert [one.model for one in it.host.snapshot()] == ["x"]
        assert it.gpus.held == {}
        it.gpus.foreign[A] = 0
        await trio.sleep(2)
        it.load_s = 1
        assert isinstance(await it.ask("x"), Done)


async def test_whoever_gives_up_waiting_for_a_model_to_go_does_not_keep_it(tmp_path, autojump_clock):
    async with world(tmp_path, Gpus(a=24), spec("x", 20)) as it:
        await it.begin("x", "50")
        await trio.sleep(5)
        with trio.move_on_after(5):
            await it.host.let_go("x", "its owner says so")
        assert it.state("x") in ("busy", "draining")
        await trio.sleep(60)
        assert it.host.snapshot() == []
        assert isinstance(it.ends["x"], Done)
        it.host.take_on(spec("x", 20))
        assert isinstance(await it.ask("x"), Done)


async def test_the_end_of_the_host_is_the_end_of_waiting_for_a_model_to_go(tmp_path, autojump_clock):
    async with trio.open_nursery() as around:
        async with world(tmp_path, Gpus(a=24), spec("x", 20)) as it:
            await it.begin("x", "5000")
            await trio.sleep(5)
            around.start_soon(it.host.let_go, "x", "its owner says so")
            await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ValueError, match="none can be taken on"):
            it.host.take_on(spec("z"))
