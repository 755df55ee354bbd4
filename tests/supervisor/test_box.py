"""The machine around the host, as one life of the supervisor finds it."""

from __future__ import annotations

import json
import math
import shutil
import threading

import pytest
import trio
import trio.testing

from protocol import engine_wire as wire
from supervisor.box import Box
from supervisor.host.cgroups import Cgroups
from supervisor.host.fake import Died, FakeChild, FakeEngines, fake_means, greet_and_load
from supervisor.host.host import open_host
from supervisor.host.incidents import Incident
from supervisor.host.means import Nobody
from supervisor.host.work import EngineSpec, Failed, ModelSpec, RunRequest
from supervisor.intake.holds import Mode, Source
from supervisor.machine.readings import GpuReading
from supervisor.settings import LimitsTable, Settings
from supervisor.state import hold_state


@pytest.fixture(autouse=True)
def stay(monkeypatch):
    """A real box may move its process into a cgroup of its own; a test must not."""
    monkeypatch.setattr(Cgroups, "find", lambda: None)


async def test_a_gpu_that_an_earlier_life_took_out_of_use_stays_out_of_use(tmp_path):
    with hold_state(tmp_path / "state") as state:
        state.gpus.write_text(json.dumps({"GPU-1": "Xid 79 (GPU has fallen off the bus)", "GPU-2": "process 7"}))
        box = Box(Settings(), state)
        assert "fallen off the bus" in box.health.usable("GPU-1")
        assert "process 7" in box.health.usable("GPU-2")
        assert set(json.loads(state.gpus.read_text())) == {"GPU-1", "GPU-2"}


async def test_a_damaged_note_about_gpus_costs_nothing_but_itself(tmp_path):
    with hold_state(tmp_path / "state") as state:
        state.gpus.write_bytes(b"\xff")
        assert Box(Settings(), state).health.usable("GPU-1") == ""


# ---- GPUs


ONE, TWO = "GPU-1", "GPU-2"


def spec(name: str, *devices: str, device: str = "cuda") -> ModelSpec:
    engine = EngineSpec(name="e", module="none", python="none")
    return ModelSpec(name=name, engine=engine, model=wire.Model(name=name, device=device, devices=devices))


def listed(box: Box, *uuids: str, error: str = "") -> None:
    """The reader lists these GPUs now; none means that it fell silent."""
    readings = {uuid: GpuReading(uuid=uuid, name="g", memory_total_bytes=2**34, error=error) for uuid in uuids}
    box.watch._by_uuid = readings
    box.watch._read_at = trio.current_time() if readings else -math.inf
    box.watch._tell(readings)


@pytest.fixture
async def box(tmp_path):
    with hold_state(tmp_path / "state") as state:
        made = Box(Settings(), state)
        listed(made, ONE, TWO)
        yield made


async def test_a_model_is_barred_while_all_of_its_gpus_are_out_of_use(box):
    box.health.note_unkillable([TWO], 7)
    assert "process 7" in box.barred(spec("two", TWO))
    assert box.barred(spec("both", ONE, TWO)) == ""
    assert box.barred(spec("one", ONE)) == ""
    assert box.barred(spec("cpu", device="cpu")) == ""
    assert list(box.gpu_faults()) == [TWO]
    box.health.note_unkillable([ONE], 9)
    assert "process 9" in box.barred(spec("both", ONE, TWO))


async def test_a_model_without_a_device_set_may_use_any_gpu_also_while_the_driver_is_silent(box):
    box.health.note_unkillable([ONE], 7)
    assert box.barred(spec("m")) == ""
    box.health.note_unkillable([TWO], 7)
    assert "process 7" in box.barred(spec("m"))
    listed(box)
    assert "process 7" in box.barred(spec("m"))


async def test_an_unkillable_process_takes_the_gpu_of_its_model_though_the_reader_hangs_with_it(box):
    listed(box)  # the same driver that holds the engine holds the reader
    box._unkillable(spec("m"), ("cuda:0",), 4711)
    assert box.health.stuck() == {4711}
    assert "4711" in box.health.usable(ONE)
    box._died_late(spec("m"), ("cuda:0",), 4711)
    assert not box.health.stuck()
    assert box.health.due() == [ONE]


async def test_nothing_is_hopeless_that_may_come_back_by_itself(box):
    models = [spec("a", ONE), spec("b", TWO)]
    assert box.hopeless(models) == ""
    box.health.note_unkillable([ONE], 7)
    assert box.hopeless(models) == ""
    box.health.note_not_returned(TWO, "1 GiB did not come back")
    assert box.barred(models[1])
    assert box.hopeless(models) == ""  # suspect: it is tried in a moment
    box.health.note_unkillable([TWO], 9)
    assert "7, 9" in box.hopeless(models)
    assert box.hopeless([*models, spec("c", device="cpu")]) == ""
    assert box.hopeless([]) == ""


async def test_evidence_and_use_are_those_of_the_models_own_gpus(box):
    senses = box.means(None, None, Nobody()).senses
    assert [one["uuid"] for one in senses.gpus(spec("m", TWO))] == [TWO]
    assert senses.gpus(spec("m", device="cpu")) == ()
    box.watch._by_uuid[TWO] = GpuReading(uuid=TWO, busy=0.4)
    assert senses.gpu_share(spec("both", ONE, TWO)) == 0.4
    assert senses.gpu_share(spec("one", ONE)) is None
    assert senses.vram_bytes("m") == 0
    assert [gpu.uuid for gpu in box.gpus()] == [ONE, TWO]


async def test_an_out_of_use_gpu_is_kept_for_the_next_life_and_told(box):
    told: list[str] = []
    box.on_change = lambda: told.append("changed")
    box.health.note_unkillable([ONE], 7)
    assert "process 7" in json.loads(box._state.gpus.read_text())[ONE]
    assert told
    box._state.gpus.parent.joinpath("gpus.json").unlink()


async def test_a_disk_that_refuses_and_a_listener_in_trouble_cost_no_task(box, caplog):
    def trouble() -> None:
        raise RuntimeError("trouble")

    box.on_change = trouble
    shutil.rmtree(box._state.root)
    box.health.note_unkillable([ONE], 7)
    box.pausing.put(Source.OPERATOR, "a game", mode=Mode.UNLOAD)
    assert box.barred(spec("m", ONE))
    assert box.pausing.reason()
    assert "trouble" in caplog.text
    assert "could not be kept" in caplog.text


# ---- a host in the box


async def test_holds_free_the_gpus_and_incidents_are_counted(box, tmp_path, autojump_clock):
    async def script(child: FakeChild) -> None:
        await greet_and_load(child)
        async for message in child.inbox:
            if isinstance(message, wire.Run):
                child.say("CUDA error: an illegal memory access was encountered; Xid 79 GPU has fallen off the bus")
                raise Died(signal=11)

    freed: list[str] = []
    box.room.free = lambda reason, _gpus, cordons: freed.append(reason)
    means = fake_means(FakeEngines(script), incidents=box.means(None, None, Nobody()).incidents)
    async with open_host([spec("m", device="cpu")], LimitsTable(), tmp_path / "scratch", means=means) as host:
        box._host = host
        box._incidents.on_incident = box._incident
        for _ in range(2):
            request = RunRequest(model="m", kind="llm", params=b"\xc0", folder=tmp_path)
            assert isinstance(await host.run(request, lambda _event: None), Failed)
        await trio.testing.wait_all_tasks_blocked()
        assert box.ends() == {"m": {"engine_crashed": 2}}
        assert [one.code for one in box.recent_incidents(5)] == ["engine_crashed"] * 2
        assert len(box.recent_incidents(1)) == 1
        assert box.recent_incidents(1)[0].time
        assert Box(Settings(), box._state).recent_incidents(5) == box.recent_incidents(5)  # the next life knows them
        shutil.rmtree(box._state.incidents)
        assert len(box.recent_incidents(5)) == 2  # asked of memory: the disk may hang
        assert box.health.snapshot()[ONE].reason == ""  # a model on the CPU says nothing about a GPU
    box._hold_changed()
    box.pausing.on_change = box._hold_changed
    box.pausing.put(Source.OPERATOR, "a game")
    box.pausing.put(Source.OPERATOR, "a game", mode=Mode.UNLOAD)
    box.pausing.lift(Source.OPERATOR)
    assert [bool(reason) for reason in freed] == [False, False, True, False]


async def test_holds_of_single_gpus_are_cordons_and_those_that_unload_free_them(box):
    told: list[tuple] = []
    box.room.free = lambda reason, gpus, cordons: told.append((reason, sorted(gpus), sorted(cordons)))
    box.pausing.on_change = box._hold_changed
    box.pausing.put(Source.OPERATOR, "noisy", gpu=ONE)
    box.pausing.put(Source.THERMAL, "hot", gpu=TWO, mode=Mode.UNLOAD)
    box.pausing.put(Source.OPERATOR, "no speech", kind="audio_stt", gpu=TWO)
    assert told[0] == ("", [], [ONE])
    assert told[1:] == [("", [TWO], [ONE, TWO])] * 2
    assert "noisy" in box.barred(spec("m", ONE))
    assert box.barred(spec("m", device="cpu")) == ""


async def test_an_engines_last_words_make_its_gpu_suspect(box):
    class Lane:
        spec = spec("m", TWO)

    class OneLane:
        occupants = (Lane,)

    box._host = OneLane()
    box._incident(Incident(model="gone", engine="e", stderr=("uncorrectable ECC error encountered",)))
    assert box.health.usable(TWO) == ""
    box._incident(Incident(model="m", engine="e", stderr=("CUDA error: uncorrectable ECC error encountered",)))
    assert "ECC" in box.health.usable(TWO)
    assert box.health.usable(ONE) == ""


async def test_a_second_signal_does_not_wait_for_the_clearing_up(box, tmp_path, monkeypatch):
    done = threading.Event()
    monkeypatch.setattr("supervisor.box.sweep", lambda *_a, **_k: done.wait(120))
    try:
        with trio.fail_after(60), trio.move_on_after(0.05) as patience:
            await box.clear_leftovers(tmp_path / "control.sock")
        assert patience.cancelled_caught
    finally:
        done.set()
