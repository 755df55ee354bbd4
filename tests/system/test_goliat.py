"""`supervisor run` works for a GOLIAT dashboard: real studies as programs, in both protocols.

The dashboard goes away in the middle, and so does the worker.
"""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from supervisor.errors import ExitCode
from supervisor.testing_goliat import Dashboard, open_dashboard

PATIENCE_S = 120.0
STUDY = "phantoms"
# Says what it does, leaves a file, and ends as its config wants.
_PROGRAM = """
import json, os, pathlib, signal, sys, time
config = json.loads(pathlib.Path(sys.argv[1]).read_text())
for number in range(config["lines"]):
    print("line", number, flush=True)
    time.sleep(config.get("pace_s", 0))
print(json.dumps({"type": "stage_progress", "name": "solve", "current": 1, "total": 1}))
told = [os.environ.get(name) for name in ("GOLIAT_ASSIGNMENT_ID", "GOLIAT_REUPLOAD_RESULTS")]
folder = pathlib.Path(sys.argv[2])
(folder / "sar.json").write_text(json.dumps({"told": told, "name": config["name"]}))
(folder / "field.bin").write_bytes(bytes(300_000))
sys.stdout.flush()
if "signal" in config:
    os.kill(os.getpid(), config["signal"])
sys.exit(config.get("exit", 0))
"""


def _config(url: str, protocol: str) -> str:
    argv = [sys.executable, "-I", "-c", _PROGRAM.replace("{", "{{").replace("}", "}}"), "{input:config}", "{folder}"]
    return f"""
[coordinator]
url = "{url}"
dialect = "goliat"
[coordinator.goliat]
protocol = "{protocol}"
model = "studies"
study = "{STUDY}"
heartbeat_s = 0.2
poll_s = 0.2
[worker]
name = "box"
state_dir = "state"
[limits]
drain_s = 10
[[models]]
name = "studies"
engine = "command"
[models.options]
argv = {json.dumps(argv)}
env_allow = ["GOLIAT_ASSIGNMENT_ID", "GOLIAT_REUPLOAD_RESULTS"]
"""


class Case:
    """A dashboard and a folder for a worker."""

    def __init__(self, dashboard: Dashboard, folder: Path, protocol: str) -> None:
        self.dashboard, self.protocol = dashboard, protocol
        self.log, self._path = folder / "log", folder / "worker.toml"
        self._path.write_text(_config(dashboard.url, protocol))
        self._process: subprocess.Popen[bytes] | None = None

    def give(self, *configs: dict[str, Any]) -> list[str]:
        """Have these studied; what `results` knows them by."""
        if self.protocol == "shipped":
            return [part.id for part in self.dashboard.study(STUDY, *configs)]
        ids = [str(config["name"]) for config in configs]
        for id_, config in zip(ids, configs, strict=True):
            self.dashboard.give(id_, json.dumps(config).encode(), flat=id_.startswith("flat"))
        return ids

    @contextlib.contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        """One life of the worker; killed when the block is left, if it still lives."""
        with self.log.open("ab") as log:
            argv = [sys.executable, "-m", "supervisor", "run", "--config", str(self._path)]
            self._process = process = subprocess.Popen(argv, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait(PATIENCE_S)

    async def until(self, true: Callable[[], Any]) -> Any:
        """Wait for what the worker has to do, as long as it lives."""
        process = self._process
        assert process is not None
        until = trio.current_time() + PATIENCE_S
        while not (value := true()):
            assert process.poll() is None, self.log.read_text()
            assert trio.current_time() < until, f"told: {self.dashboard.told}\n{self.log.read_text()}"
            with trio.move_on_after(0.05):
                await trio.sleep_forever()
        return value

    async def ended(self, count: int) -> list[str]:
        """Wait for so many ends."""
        await self.until(lambda: len(self.dashboard.ends()) >= count)
        return self.dashboard.ends()

    def results(self, known_by: str) -> tuple[str, dict[str, bytes]]:
        """The id of an assignment, and what came of it, wherever its protocol has it."""
        if self.protocol == "shipped":
            part = self.dashboard.part(known_by)
            assert part is not None
            return known_by, part.files
        for folder in (self._path.parent / "state" / "goliat" / "results").glob("*.1"):
            files = {path.name: path.read_bytes() for path in folder.iterdir()}
            if json.loads(files["sar.json"])["name"] == known_by:  # in the flat shape the worker makes up the id
                return folder.name.removesuffix(".1"), files
        raise AssertionError(f"nothing was kept of {known_by}")


@pytest.fixture(params=["planned", "shipped"])
async def case(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Case]:
    async with open_dashboard() as dashboard:
        yield Case(dashboard, tmp_path, str(request.param))


async def _stopped(process: subprocess.Popen[bytes]) -> int:
    process.send_signal(signal.SIGTERM)
    with trio.fail_after(PATIENCE_S):
        return await trio.to_thread.run_sync(process.wait)


@pytest.mark.slow
async def test_studies_end_as_their_programs_do(case: Case) -> None:
    good, *_others = case.give(
        {"name": "flat-good", "lines": 300},
        {"name": "bad", "lines": 2, "exit": 1},
        {"name": "crash", "lines": 2, "signal": int(signal.SIGSEGV)},
        {"name": "memory", "lines": 1, "exit": 42},
        {"name": "last", "lines": 1},
    )
    with case.running() as process:
        ends = await case.ended(5)
        assert ends[:5] == ["finished", "fatal_error", "fatal_error", "fatal_error", "finished"], case.log.read_text()
        assert await _stopped(process) == ExitCode.STOPPED, case.log.read_text()
    id_, files = case.results(good)
    assert json.loads(files["sar.json"]) == {"told": [id_, "false"], "name": "flat-good"}
    assert files["field.bin"] == bytes(300_000)
    assert len(case.dashboard.messages("memory_error")) == 4
    sentences = [message["message"] for message in case.dashboard.messages("fatal_error")]
    assert "exit code 1" in sentences[0] or "with 1" in sentences[0]
    assert "SIGSEGV" in sentences[1] or "signal" in sentences[1]
    assert "4 times" in sentences[2]
    assert "line 299" in case.dashboard.lines()
    assert {"type": "stage_progress", "name": "solve", "current": 1, "total": 1} in case.dashboard.messages(
        "stage_progress"
    )
    times = [told.at for told in case.dashboard.told]
    for first, sixth in zip(times, times[6:], strict=False):
        assert sixth - first > 0.9, "more than five messages a second"
    if case.protocol == "shipped":
        (parts,) = [parts for _name, parts in case.dashboard.studies.values()]
        assert [part.status for part in parts] == ["COMPLETED", "RUNNING", "RUNNING", "RUNNING", "COMPLETED"]


@pytest.mark.slow
async def test_a_dashboard_that_goes_away_in_the_middle_gets_everything_later(case: Case) -> None:
    (id_,) = case.give({"name": "long", "lines": 40, "pace_s": 0.05})
    with case.running() as process:
        await case.until(lambda: "line 0" in case.dashboard.lines())
        case.dashboard.away = True
        await case.until(lambda: "command job done" in case.log.read_text())
        case.dashboard.away = False
        assert await case.ended(1) == ["finished"]
        assert "line 39" in case.dashboard.lines()
        assert set(case.results(id_)[1]) == {"sar.json", "field.bin"}
        assert await _stopped(process) == ExitCode.STOPPED, case.log.read_text()


@pytest.mark.slow
async def test_a_worker_that_is_killed_in_the_middle_tells_so_and_works_on(case: Case) -> None:
    case.give({"name": "long", "lines": 2000, "pace_s": 0.05}, {"name": "next", "lines": 1})
    with case.running() as process:
        await case.until(lambda: "line 0" in case.dashboard.lines())
        process.send_signal(signal.SIGKILL)
        with trio.fail_after(PATIENCE_S):
            await trio.to_thread.run_sync(process.wait)
    assert case.dashboard.ends() == []
    with case.running() as process:
        assert await case.ended(2) == ["fatal_error", "finished"]
        assert "started again" in case.dashboard.messages("fatal_error")[0]["message"]
        assert await _stopped(process) == ExitCode.STOPPED, case.log.read_text()
