"""A supervisor that is root, an engine that is not: a real engine from spawn to end, as the engines' user.

The interpreter is made where every user can reach it, of the system's Python and our msgspec.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import msgspec
import psutil
import pytest
import trio

from protocol import engine_wire as wire
from protocol import work
from supervisor.host.engine_user import engine_user
from supervisor.host.host import Host, open_host
from supervisor.host.launching import ROOT
from supervisor.host.work import Done, EngineSpec, Failed, ModelSpec, RunEnd, RunRequest
from supervisor.settings import LimitsTable

LIMITS = LimitsTable(start_s=60, load_s=30, first_output_s=30, stall_s=30, cancel_grace_s=0.5, term_grace_s=0.5)
SYSTEM = f"/usr/bin/python3.{sys.version_info.minor}"


def _reachable(folder: Path) -> bool:
    return all(each.stat().st_mode & 0o005 == 0o005 for each in (folder, *folder.parents))


pytestmark = [
    pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root drops engines to a user"),
    pytest.mark.skipif(
        not os.access(SYSTEM, os.X_OK), reason=f"{SYSTEM} is needed: ours may lie where only root can go"
    ),
    pytest.mark.skipif(not _reachable(ROOT), reason="this checkout lies where only root can go"),
]


@pytest.fixture
def open_folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="bulkhead-test-", dir="/var/lib") as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def python(open_folder: Path) -> str:
    """An environment of the system's interpreter with what an engine needs."""
    site = open_folder / f"venv/lib/python3.{sys.version_info.minor}/site-packages"
    shutil.copytree(Path(msgspec.__file__).parent, site / "msgspec")
    (open_folder / "venv/bin").mkdir()
    (open_folder / "venv/pyvenv.cfg").write_text("home = /usr/bin\ninclude-system-site-packages = false\n")
    (open_folder / "venv/bin/python").symlink_to(SYSTEM)
    return str(open_folder / "venv/bin/python")


class Bench:
    def __init__(self, host: Host) -> None:
        self.host, self.count = host, 0

    async def ask(self, prompt: str) -> RunEnd:
        self.count += 1
        attempt = self.host.ground("synthetic-m").open_attempt(f"job.{self.count}")
        params = msgspec.msgpack.encode({"prompt": prompt})
        request = RunRequest(model="synthetic-m", kind="llm", params=params, folder=attempt.outputs)
        try:
            with trio.fail_after(120):
                return await self.host.run(request, lambda _event: None)
        finally:
            assert attempt.remove()

    @property
    def family(self) -> list[psutil.Process]:
        leader = psutil.Process(self.host.snapshot()[0].pid)
        return [leader, *leader.children(recursive=True)]


@contextlib.asynccontextmanager
async def bench(open_folder: Path, python: str):
    engine = EngineSpec(name="misbehave", module="engines.synthetic.misbehave", python=python)
    spec = ModelSpec(name="synthetic-m", engine=engine, model=wire.Model(name="synthetic-m", device="cpu"))
    async with open_host([spec], LIMITS, open_folder / "instances") as host:
        yield Bench(host)


async def test_its_whole_family_is_the_engines_user(open_folder: Path, python: str):
    user = engine_user()
    assert user is not None
    async with bench(open_folder, python) as r:
        end = await r.ask("hello")
        assert isinstance(end, Done), end
        assert msgspec.msgpack.decode(end.body, type=work.LlmResult).content
        status = r.host.snapshot()[0]
        assert status.sandbox["uid"] == "verified", status.sandbox
        assert status.sandbox["processes"] == "verified"
        family = r.family
        assert len(family) == 3
        assert {each.uids().real for each in family} == {user.uid}
        # What the watchdog looks at stays readable for root.
        for each in family:
            for name in ("wchan", "syscall", "status", "smaps_rollup", "environ"):
                Path(f"/proc/{each.pid}/{name}").read_bytes()
    assert not any(each.is_running() for each in family)


@pytest.mark.parametrize(("prompt", "wanted"), [("crash:SIGSEGV", {"signal": 11}), ("exit:3", {"exit_code": 3})])
async def test_its_end_is_told_by_its_cause_and_the_next_job_works(
    open_folder: Path, python: str, prompt: str, wanted: dict[str, int]
):
    async with bench(open_folder, python) as r:
        end = await r.ask(prompt)
        assert isinstance(end, Failed)
        assert {key: end.fault.detail.get(key) for key in wanted} == wanted
        assert isinstance(await r.ask("hello"), Done)


async def test_a_signal_from_root_reaches_it(open_folder: Path, python: str):
    async with bench(open_folder, python) as r:
        assert isinstance(await r.ask("hello"), Done)
        leader, *_, engine = r.family
        ended = os.pidfd_open(engine.pid)
        os.kill(leader.pid, signal.SIGTERM)
        with trio.fail_after(60):
            await trio.lowlevel.wait_readable(ended)
        os.close(ended)
