"""The life of instances with real processes: neighbours, suspects, recycling, ceilings, the outside watch."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
import trio

from protocol import engine_wire as wire
from protocol.faults import Fault
from supervisor.host import family, watch
from supervisor.host.cgroups import Cgroup, Cgroups
from supervisor.host.host import Host, open_host
from supervisor.host.incidents import Incidents
from supervisor.host.leftovers import Ledger
from supervisor.host.means import Means
from supervisor.host.senses import Senses
from supervisor.host.watchdog import Bounds, Watchdog
from supervisor.host.work import Done, EngineSpec, Failed, InstanceStatus, ModelSpec, RunEnd, RunRequest, Started
from supervisor.settings import LimitsTable, RecycleTable

# Nothing that is well comes near these, however busy the machine is; but for a cancel that is not heeded.
LIMITS = LimitsTable(
    start_s=60, load_s=30, first_output_s=30, stall_s=30, cancel_grace_s=0.3, term_grace_s=0.3, job_s=120
)
MIB = 2**20
PATIENCE_S = 60.0

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at processes through /proc")


def model(**more: object) -> ModelSpec:
    engine = EngineSpec(name="misbehave", module="engines.synthetic.misbehave", python=sys.executable)
    return ModelSpec(name="m", engine=engine, model=wire.Model(name="synthetic-m", device="cpu"), **more)


class Bench:
    """A host with one misbehaving model; runs in the background by name."""

    def __init__(self, host: Host, folder: Path, nursery: trio.Nursery) -> None:
        self.host, self._folder, self._nursery = host, folder, nursery
        self.ends: dict[str, RunEnd] = {}
        self._started: set[str] = set()
        self._turn = trio.Event()
        host.on_change = self._changed

    def _changed(self) -> None:
        self._turn.set()
        self._turn = trio.Event()

    @property
    def status(self) -> InstanceStatus:
        return self.host.snapshot()[0]

    @property
    def engine(self) -> int:
        return family.engine_pid(self.status.pid)

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(PATIENCE_S):
            while not condition():
                await self._turn.wait()

    async def ask(self, prompt: str, name: str = "", **more: object) -> RunEnd:
        folder = self._folder / f"a{len(list(self._folder.glob('a*')))}"
        folder.mkdir()
        params = msgspec.msgpack.encode({"prompt": prompt})
        request = RunRequest(model="m", kind="llm", params=params, folder=folder, label=name or prompt, **more)

        def on_event(event: object) -> None:
            if isinstance(event, Started):
                self._started.add(name or prompt)
            self._changed()

        self._started.discard(name or prompt)
        with trio.fail_after(PATIENCE_S):
            end = await self.host.run(request, on_event)
        self.ends[name or prompt] = end
        self._changed()
        return end

    async def begin(self, prompt: str, name: str = "", **more: object) -> None:
        """Start it, and wait until it runs."""
        self._started.discard(name or prompt)
        self._nursery.start_soon(lambda: self.ask(prompt, name, **more))
        await self.until(lambda: (name or prompt) in self._started)

    async def fault(self, prompt: str, **more: object) -> Fault:
        end = await self.ask(prompt, **more)
        assert isinstance(end, Failed), end
        return end.fault

    def fault_of(self, name: str) -> Fault:
        end = self.ends[name]
        assert isinstance(end, Failed), end
        return end.fault


@contextlib.asynccontextmanager
async def bench(
    tmp_path: Path, spec: ModelSpec | None = None, limits: LimitsTable = LIMITS, **means: object
) -> AsyncIterator[Bench]:
    opened = open_host([spec or model()], limits, tmp_path / "scratch", means=Means(**means))
    async with opened as host, trio.open_nursery() as nursery:
        it = Bench(host, tmp_path, nursery)
        yield it
        host.on_change = None
        nursery.cancel_scope.cancel()


async def test_a_stuck_cancel_drains_the_instance_and_leaves_its_neighbour_alone(tmp_path):
    async with bench(tmp_path) as it:
        await it.begin("deaf", "stuck")
        first = it.status.pid
        await it.begin("deaf:5", "neighbour")
        it.host.cancel("stuck")
        await it.until(lambda: it.status.state == "draining")
        assert it.fault_of("stuck").code == "cancelled"
        assert "neighbour" not in it.ends
        assert isinstance(await it.ask("next"), Done)
        assert isinstance(it.ends["neighbour"], Done)
        assert it.status.pid != first
        assert "ignored a cancel" in it.status.last_end


async def test_a_crash_under_several_makes_suspects_and_alone_finds_the_one(tmp_path):
    async with bench(tmp_path) as it:
        await it.begin("progress", "a")
        await it.begin("progress", "b")
        assert (await it.fault("crash:SIGSEGV")).detail["suspects"] == 3
        await it.until(lambda: len(it.ends) == 3)
        assert [it.fault_of(name).detail["suspects"] for name in "ab"] == [3, 3]
        await it.begin("deaf:1", "a")
        fault = await it.fault("crash:SIGSEGV", alone=True)  # waits for a, which ends well
        assert isinstance(it.ends["a"], Done)
        assert fault.detail["alone"] is True
        assert fault.detail["end"] == "signalled"


async def test_a_kill_from_outside_is_told_within_moments(tmp_path):
    async with bench(tmp_path) as it:
        await it.begin("progress", "a")
        began = trio.current_time()
        os.kill(it.engine, signal.SIGKILL)
        await it.until(lambda: "a" in it.ends)
        assert trio.current_time() - began < LIMITS.stall_s  # measured: 3 ms alone; it is told, not looked for
        fault = it.fault_of("a")
        assert (fault.code, fault.detail["signal"], fault.detail["end"]) == ("engine_crashed", 9, "signalled")
        assert isinstance(await it.ask("next"), Done)


async def test_a_leaking_engine_is_replaced_between_two_jobs(tmp_path):
    limits = msgspec.structs.replace(LIMITS, recycle=RecycleTable(rss_growth_gb=0.1))
    async with bench(tmp_path, limits=limits) as it:
        for number in range(3):
            assert isinstance(await it.ask("hello", f"warm{number}"), Done)
        first = it.status.pid
        assert isinstance(await it.ask("memory:200"), Done)
        await it.until(lambda: it.status.pid not in (0, first) and it.status.state == "ready")
        assert "replaced between two jobs (its memory grew by 0.2 GiB" in it.status.last_end
        assert isinstance(await it.ask("next"), Done)


async def test_an_engine_over_its_memory_ceiling_is_ended(tmp_path):
    async with bench(tmp_path, model(memory_bytes=150 * MIB)) as it:
        fault = await it.fault("hoard:300")
        assert (fault.code, fault.detail["end"], fault.detail["alone"]) == ("out_of_memory", "memory", True)
        assert isinstance(await it.ask("next"), Done)


async def test_an_engine_that_fills_its_scratch_folder_is_ended_and_the_folder_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(watch, "POLL_S", 0.2)
    limits = msgspec.structs.replace(LIMITS, scratch_gb=32 / 1024)
    async with bench(tmp_path, limits=limits) as it:
        fault = await it.fault("disk-many:64")
        assert (fault.code, fault.detail["end"]) == ("engine_crashed", "scratch")
        assert isinstance(await it.ask("next"), Done)
        assert len(list((tmp_path / "scratch" / "m0").glob("i[0-9]*"))) == 1


def quick_dogs() -> Senses:
    """A watchdog without patience: what takes seconds by default takes one here."""
    bounds = Bounds(late_s=1.6, strike_s=0.7)
    return Senses(watchdog=lambda pid: Watchdog(pid, bounds=bounds))


@pytest.mark.parametrize(("prompt", "seen"), [("hang-gil", "wedged"), ("stop", "stopped")])
async def test_an_engine_that_will_never_answer_is_ended_long_before_its_limit(tmp_path, prompt, seen):
    limits = msgspec.structs.replace(LIMITS, first_output_s=100.0)
    incidents = Incidents(tmp_path / "incidents")
    async with bench(tmp_path, limits=limits, incidents=incidents, senses=quick_dogs()) as it:
        await it.ask("warm")
        began = trio.current_time()
        fault = await it.fault(prompt)
        assert trio.current_time() - began < PATIENCE_S
        assert (fault.code, fault.detail["diagnosis"], fault.detail["end"]) == ("engine_hung", seen, "wedged")
        assert isinstance(await it.ask("next"), Done)
        (incident,) = incidents.recent()
        assert (incident.diagnosis, incident.runs, incident.model) == (seen, (prompt,), "m")
        # what is stopped writes nothing; what holds the interpreter lock still does
        assert any("hang_gil" in line for line in incident.stacks) is (prompt == "hang-gil")


async def test_one_that_computes_with_the_lock_held_is_left_to_its_limit(tmp_path):
    limits = msgspec.structs.replace(LIMITS, first_output_s=60.0)
    async with bench(tmp_path, limits=limits, senses=quick_dogs()) as it:
        assert isinstance(await it.ask("spin:4"), Done)


async def test_children_are_in_the_ledger_while_they_live(tmp_path):
    ledger = Ledger(tmp_path / "ledger")
    async with bench(tmp_path, ledger=ledger) as it:
        await it.ask("hello")
        (found,) = [record for _path, record in ledger.records()]
        assert found is not None
        assert found.pid == it.status.pid
        assert Path(found.scratch).is_dir()
        await it.fault("crash:SIGSEGV")
        await it.ask("again")
        assert [record.pid for _path, record in ledger.records() if record] == [it.status.pid]
    assert ledger.records() == []


async def test_an_instance_lives_in_its_own_cgroup_where_we_may_make_one(tmp_path):
    cgroups = Cgroups.find()
    if cgroups is None:
        pytest.skip("no cgroup v2 that is ours to divide")
    ledger = Ledger(tmp_path / "ledger")
    async with bench(tmp_path, ledger=ledger, cgroups=cgroups) as it:
        await it.ask("hello")
        ((_path, record),) = ledger.records()
        assert record is not None
        inside = Cgroup(Path(record.cgroup)).pids()
        assert it.engine in inside
        assert os.getpid() not in inside
        assert isinstance(await it.ask("fork"), Done)
    assert not Path(record.cgroup).exists()
