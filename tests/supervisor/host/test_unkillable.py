"""An engine that no signal ends: held by the freezer of cgroup v1, where SIGKILL stays pending."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
import trio

from protocol import engine_wire as wire
from supervisor.host import child as child_module
from supervisor.host import family
from supervisor.host.host import Host, open_host
from supervisor.host.means import Means
from supervisor.host.work import EngineSpec, ModelSpec, RunRequest, Sandbox, Started
from supervisor.machine.gpu_trials import still_there
from supervisor.settings import LimitsTable

FREEZER = Path("/sys/fs/cgroup/freezer")
PATIENCE_S = 60.0
LIMITS = LimitsTable(first_output_s=120, stall_s=120, cancel_grace_s=0.3, term_grace_s=0.3, job_s=120)

pytestmark = pytest.mark.skipif(
    not (sys.platform.startswith("linux") and os.access(FREEZER / "cgroup.procs", os.W_OK)),
    reason="needs root and the freezer of cgroup v1",
)


class Ice:
    """Processes that are frozen until the block is left, or `thaw` is called."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def freeze(self, pids: list[int]) -> None:
        for pid in pids:
            (self._folder / "cgroup.procs").write_text(str(pid))
        (self._folder / "freezer.state").write_text("FROZEN")

    def thaw(self) -> None:
        (self._folder / "freezer.state").write_text("THAWED")


@pytest.fixture
def ice() -> Iterator[Ice]:
    folder = FREEZER / f"bulkhead-test-{os.getpid()}"
    folder.mkdir()
    made = Ice(folder)
    try:
        yield made
    finally:
        made.thaw()
        for word in (folder / "cgroup.procs").read_text().split():
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(int(word)).wait(PATIENCE_S)
        folder.rmdir()


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(PATIENCE_S):
        while not condition():  # noqa: ASYNC110 - processes tell nobody
            await trio.sleep(0.01)


async def begin(host: Host, folder: Path, nursery: trio.Nursery) -> None:
    """Give the engine a run that never ends."""
    started = trio.Event()
    params = msgspec.msgpack.encode({"prompt": "deaf"})
    request = RunRequest(model="m", kind="llm", params=params, folder=folder, label="J.1")

    async def run() -> None:
        await host.run(request, lambda event: started.set() if isinstance(event, Started) else None)

    nursery.start_soon(run)
    with trio.fail_after(PATIENCE_S):
        await started.wait()


@pytest.mark.parametrize("mode", ["best-effort", "off"])
async def test_an_engine_that_hangs_in_the_kernel_is_told_though_its_warden_died(mode: str, ice, tmp_path, monkeypatch):
    monkeypatch.setattr(child_module, "WARDEN_S", 0.2)
    monkeypatch.setattr(child_module, "UNKILLABLE_AFTER_S", 0.5)
    told: list[tuple[str, int]] = []
    engine = EngineSpec(
        name="misbehave",
        module="engines.synthetic.misbehave",
        python=sys.executable,
        sandbox=Sandbox(mode=mode),
    )
    spec = ModelSpec(name="m", engine=engine, model=wire.Model(name="synthetic-m", device="cpu"))
    async with open_host([spec], LIMITS, tmp_path / "scratch", means=Means()) as host, trio.open_nursery() as nursery:
        host.on_unkillable = lambda which, _devices, pid: told.append(("stuck", pid))
        host.on_late_death = lambda which, _devices, pid: told.append(("dead", pid))
        await begin(host, tmp_path, nursery)
        leader = host.snapshot()[0].pid
        stuck = family.engine_pid(leader)
        assert stuck != leader
        ice.freeze([stuck])
        host.cancel("J.1")
        await until(lambda: host.snapshot()[0].state == "quarantined")
        assert told == [("stuck", stuck)]
        assert still_there([stuck])
        assert "cannot be killed" in host.snapshot()[0].reason
        ice.thaw()
        await until(lambda: len(told) == 2)
        assert told[1] == ("dead", stuck)
        assert not still_there([stuck])
        nursery.cancel_scope.cancel()
