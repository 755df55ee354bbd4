"""A lane's record of bad ends, and the quarantine that outlives the supervisor."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest
import trio

from protocol import engine_wire as wire
from protocol.faults import Fault, FaultError
from supervisor.host.means import Means
from supervisor.host.quarantine import Quarantines, Standing, identity
from supervisor.host.work import EngineSpec, ModelSpec
from supervisor.settings import LimitsTable, RestartTable

LIMITS = LimitsTable(restart=RestartTable(quarantine_after=2, reprobe_s=60))
CRASH = Fault("engine_crashed", "It crashed.")


def spec(**options: object) -> ModelSpec:
    engine = EngineSpec(name="e", module="none", python="none")
    return ModelSpec(name="m", engine=engine, model=wire.Model(name="m", options=options))


class Probe:
    """Fails as often as it is told, with a sentence or a fault."""

    def __init__(self, *answers: str | Fault) -> None:
        self.answers = list(answers)
        self.asked: list[float] = []

    async def __call__(self, _spec: ModelSpec) -> str:
        await trio.lowlevel.checkpoint()
        self.asked.append(trio.current_time())
        answer = self.answers.pop(0) if self.answers else ""
        if isinstance(answer, Fault):
            raise FaultError(answer)
        return answer


class Gone:
    """A child that could not be killed."""

    stuck_pid = 77

    def __init__(self) -> None:
        self.gone = trio.Event()


def means(path: Path, *, wall: float = 1000.0, probe: Probe | None = None) -> Means:
    return Means(memory=Quarantines(path), wall=lambda: wall, jitter=lambda: 0.5, reprobe=probe or Probe())


def barred(path: Path, **more: object) -> Standing:
    standing = Standing(spec(), LIMITS, means(path, **more))
    assert not standing.bad_end(CRASH, well=False, loading=False).quarantined
    assert standing.bad_end(CRASH, well=False, loading=False).quarantined
    return standing


async def test_it_says_why_and_where_the_cause_lies(tmp_path):
    fault = barred(tmp_path / "q").fault
    assert fault is not None
    assert (fault.code, fault.may_retry, fault.detail) == ("quarantined", True, {"cause": "engine_crashed"})
    assert "It crashed." in fault.message


@pytest.mark.parametrize(("wall", "left"), [(1010.0, 50.0), (1e9, 0.0), (-1e9, 3600.0)])
async def test_it_outlives_the_supervisor_whatever_the_wall_clock_does(tmp_path, wall, left):
    barred(tmp_path / "q")
    standing = Standing(spec(), LIMITS, means(tmp_path / "q", wall=wall))
    assert standing.recalled() == left
    assert standing.fault is not None
    assert "It crashed." in standing.fault.message
    # it goes on where it was: another one is twice as long
    assert standing.barred(CRASH).pause_s == 120


async def test_another_configuration_is_another_model(tmp_path):
    barred(tmp_path / "q")
    standing = Standing(spec(n_ctx=4096), LIMITS, means(tmp_path / "q"))
    assert standing.recalled() is None
    assert Quarantines(tmp_path / "q").load("m") == {}


def test_a_new_file_under_the_old_name_is_another_model(tmp_path):
    file = tmp_path / "model.gguf"
    model = wire.Model(name="m", files={"model": str(file)})
    before = identity(msgspec.structs.replace(spec(), model=model))
    file.write_bytes(b"new")
    assert identity(msgspec.structs.replace(spec(), model=model)) != before


async def test_a_probe_that_passes_lifts_it_and_one_that_fails_prolongs_it(tmp_path, autojump_clock):
    probe = Probe("Still broken.", Fault("model_corrupt", "The file was changed."))
    standing = barred(tmp_path / "q", probe=probe)
    await standing.serve(60)
    assert probe.asked == [60, 180, 420]
    assert standing.fault is None
    assert Quarantines(tmp_path / "q").load("m") == {}
    assert standing.bad_end(CRASH, well=False, loading=True).pause_s == 480  # on probation


async def test_a_probe_without_an_end_is_a_failed_one(tmp_path, autojump_clock):
    asked: list[float] = []

    async def probe(_spec: ModelSpec) -> str:
        asked.append(trio.current_time())
        if len(asked) == 1:
            await trio.sleep_forever()
        await trio.lowlevel.checkpoint()
        return ""

    standing = Standing(spec(), LIMITS, means(tmp_path / "q")._replace(reprobe=probe))
    standing.barred(CRASH)
    await standing.serve(60)
    limit_s = LIMITS.start_s + LIMITS.load_s + LIMITS.first_output_s
    assert asked == [60, 60 + limit_s + 120]


async def test_no_probe_passes_while_a_process_cannot_be_killed_and_its_death_is_waited_for(tmp_path, autojump_clock):
    probe = Probe()
    standing, child = barred(tmp_path / "q", probe=probe), Gone()
    standing.abandon(child)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(standing.serve, 60)
        await trio.sleep(70)
        assert probe.asked == []
        assert standing.fault is not None
        assert "77" in standing.fault.message
        child.gone.set()
    assert probe.asked == [70]


def test_a_broken_file_or_disk_costs_the_memory_only(tmp_path):
    path = tmp_path / "q"
    path.write_bytes(b"{not json")
    kept = Quarantines(path)
    assert kept.load("m") == {}
    kept.save("m", {"until": 1})
    assert json.loads(path.read_text()) == {"m": {"until": 1}}
    kept.save("other", {})
    kept.save("m", {})
    assert json.loads(path.read_text()) == {}
    nowhere = Quarantines(tmp_path / "no" / "folder")
    nowhere.save("m", {"until": 1})
    assert nowhere.load("m") == {}


async def test_a_memory_of_another_shape_is_none(tmp_path):
    (tmp_path / "q").write_text('{"m": {"until": "soon"}}')
    assert Standing(spec(), LIMITS, means(tmp_path / "q")).recalled() is None
