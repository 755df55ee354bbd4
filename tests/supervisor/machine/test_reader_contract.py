"""What every GPU reader does, as a real process: the simulated one always, the real one on a box with a GPU.

The simulated reader's moods follow, which a real one can only be wished.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import trio

from supervisor.host.child import Child, ChildSpec, open_child
from supervisor.machine import readings as data
from supervisor.machine.gpu import read_machine
from supervisor.machine.readings import GpuEvent, NoGpu, Reading
from supervisor.machine.telemetry import GpuWatch, reader_argv, simulated_argv

GIB = 2**30
UUID = "GPU-sim-0"
PATIENCE_S = 60


class Box:
    """A script and a folder of allocations for the simulated reader."""

    def __init__(self, folder: Path) -> None:
        self.script_file, self.instances = folder / "script.json", folder / "instances"
        self.instances.mkdir()
        self.script(gpus=[{"memory_total_bytes": 8 * GIB}])

    def script(self, **script: object) -> None:
        new = self.script_file.with_suffix(".new")
        new.write_text(json.dumps(script))
        new.rename(self.script_file)

    def argv(self, interval_s: float = 0.05) -> tuple[str, ...]:
        return simulated_argv(self.script_file, self.instances, interval_s)

    def allocate(self, name: str, **held: object) -> Path:
        folder = self.instances / name
        folder.mkdir(parents=True)
        (folder / "vram.json").write_text(json.dumps(held))
        return folder


@pytest.fixture
def box(tmp_path: Path) -> Box:
    return Box(tmp_path)


@pytest.fixture(params=["simulated", pytest.param("real", marks=pytest.mark.gpu)])
def argv(request: pytest.FixtureRequest, box: Box) -> tuple[str, ...]:
    """A reader that says something at once, and then hardly ever unless it is asked."""
    if request.param == "simulated":
        return box.argv(interval_s=60)
    machine = trio.run(read_machine)
    if not machine.gpus:
        pytest.skip(f"this machine has no NVIDIA GPU: {machine.error}")
    return reader_argv(interval_s=60)


class Ear:
    """Lines of one reader."""

    def __init__(self, child: Child) -> None:
        self.child, self._rest = child, b""

    async def line(self) -> data.Spoken:
        while b"\n" not in self._rest:
            chunk = await self.child.read()
            assert chunk, f"the reader {self.child.exit}: {self.child.stderr_tail()}"
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return data.decode(line)

    async def reading(self) -> Reading:
        while not isinstance(found := await self.line(), Reading):
            assert not isinstance(found, NoGpu), found.error
        return found


@contextlib.asynccontextmanager
async def listening(argv: tuple[str, ...]):
    with trio.fail_after(PATIENCE_S):
        async with open_child(ChildSpec(name="reader", argv=argv), term_grace_s=1) as child:
            yield Ear(child)


# ---- the contract


async def test_the_first_line_is_a_reading_of_every_gpu(argv):
    async with listening(argv) as ear:
        reading = await ear.reading()
        assert reading.driver
        assert reading.gpus
        assert len({gpu.uuid for gpu in reading.gpus}) == len(reading.gpus)
        for gpu in reading.gpus:
            assert gpu.uuid.startswith("GPU-")
            assert gpu.name
            assert gpu.memory_total_bytes
            assert gpu.memory_used_bytes is not None
            assert gpu.memory_free_bytes is not None
            assert gpu.memory_used_bytes + gpu.memory_free_bytes <= gpu.memory_total_bytes
            assert gpu.busy is None or 0 <= gpu.busy <= 1
            assert not gpu.error


async def test_a_question_is_answered_by_a_reading_that_says_so(argv):
    async with listening(argv) as ear:
        assert (await ear.reading()).asked == 0
        for number in (3, 4, 10):
            await ear.child.write(b"read %d\n" % number)
            assert (await ear.reading()).asked == number


async def test_many_questions_at_once_cost_few_readings_and_the_last_is_answered(argv):
    async with listening(argv) as ear:
        await ear.reading()
        await ear.child.write(b"".join(b"read %d\n" % number for number in range(1, 1001)))
        count = 1
        while (await ear.reading()).asked < 1000:
            count += 1
        assert count < 20


async def test_nonsense_on_its_input_is_ignored(argv):
    async with listening(argv) as ear:
        await ear.reading()
        await ear.child.write(b"\xff\x00 read\nread\nread two\nread -1\n\n" + b"x" * 100_000 + b"\nread 5\n")
        assert (await ear.reading()).asked == 5


async def test_the_end_of_its_input_ends_it(argv):
    async with listening(argv) as ear:
        await ear.reading()
        ear.child.close_stdin()
        how = await ear.child.wait()
        assert how.code == 0


async def test_sigterm_ends_it_at_once(argv):
    async with listening(argv) as ear:
        await ear.reading()
        how = await ear.child.end(PATIENCE_S)
        assert how.signal == signal.SIGTERM  # it was not killed: that comes after the grace


PARENT = """
import subprocess, sys
child = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
sys.stdin.read()
"""


def test_it_dies_with_its_parent(argv):
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, *argv], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        pid = int(parent.stdout.readline())
        pidfd = os.pidfd_open(pid)
        parent.kill()
        try:
            assert _readable_within(pidfd, PATIENCE_S), "the reader outlived its parent"
        finally:
            os.close(pidfd)


def _readable_within(fd: int, patience_s: float) -> bool:
    return bool(select.select([fd], [], [], patience_s)[0])


async def test_the_watch_reads_it_and_asks_it(argv):
    watch = GpuWatch(argv)
    async with running(watch):
        assert await watch.wait_known(PATIENCE_S)
        assert watch.available
        began = trio.current_time()
        assert await watch.wait_for(lambda readings: len(readings) > 0, PATIENCE_S)
        assert trio.current_time() - began < PATIENCE_S  # by itself it says something once in a minute


@contextlib.asynccontextmanager
async def running(watch: GpuWatch):
    with trio.fail_after(PATIENCE_S):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch.run)
            yield
            nursery.cancel_scope.cancel()


async def until(watch: GpuWatch, condition: Callable[[], bool]) -> None:
    """Wait for a reading, or the news that there is none, after which `condition` holds."""
    met = trio.Event()
    leave = watch.subscribe(lambda _readings: met.set() if condition() else None)
    if not condition():
        await met.wait()
    leave()


# ---- what only the simulated one can be made to do


async def test_memory_of_an_engine_is_used_while_its_file_is_there(box):
    watch = GpuWatch(box.argv(interval_s=30))
    async with running(watch):
        await watch.wait_known(PATIENCE_S)
        assert watch.free_bytes(UUID) == 8 * GIB
        folder = box.allocate("m0/i1", uuid=UUID, bytes=6 * GIB)
        assert await watch.wait_for(lambda _readings: watch.free_bytes(UUID) == 2 * GIB, PATIENCE_S)
        (folder / "vram.json").unlink()
        assert await watch.wait_for(lambda _readings: watch.free_bytes(UUID) == 8 * GIB, PATIENCE_S)


async def test_a_process_is_found_by_its_working_folder(box):
    folder = box.allocate("m0/i1", uuid=UUID, bytes=6 * GIB)
    watch = GpuWatch(box.argv())
    sleeper = ChildSpec(name="sleeper", argv=(sys.executable, "-c", "import sys; sys.stdin.read()"), cwd=folder)
    async with running(watch), open_child(sleeper) as child:
        assert await watch.wait_for(lambda _readings: watch.used_by([child.pid]) == {UUID: 6 * GIB}, PATIENCE_S)
        assert watch.foreign_bytes(UUID, [child.pid]) == 0
        assert watch.foreign_bytes(UUID, []) == 6 * GIB


async def test_events_come_at_once(box):
    watch = GpuWatch(box.argv(interval_s=60))
    heard: list[GpuEvent] = []
    async with running(watch):
        watch.subscribe(on_event=heard.append)
        await watch.wait_known(PATIENCE_S)
        box.script(gpus=[{}], events=[{"kind": "xid", "uuid": UUID, "xid": 79}])
        assert await watch.wait_for(lambda _readings: bool(heard), PATIENCE_S)
        assert heard == [GpuEvent(kind="xid", uuid=UUID, xid=79)]


@pytest.mark.parametrize("mood", ["hang", "stubborn", "die", "nonsense", "flood"])
async def test_whatever_it_does_it_is_replaced_and_stops_nothing(box, mood):
    watch = GpuWatch(box.argv(), stale_s=1.0, first_line_s=PATIENCE_S)
    async with running(watch):
        await watch.wait_known(PATIENCE_S)
        box.script(gpus=[{}], mood=mood)
        await until(watch, lambda: not watch.available)
        assert watch.readings() == {}
        box.script(gpus=[{}])
        assert await watch.wait_known(PATIENCE_S)
        assert watch.restarts >= 1


async def test_garbage_between_readings_is_tolerated(box):
    watch = GpuWatch(box.argv(), stale_s=PATIENCE_S)
    async with running(watch):
        await watch.wait_known(PATIENCE_S)
        box.script(gpus=[{}], mood="garbage")
        while watch.garbage < 20:
            assert await watch.wait_for(lambda _readings: True, PATIENCE_S)
        assert watch.restarts == 0


async def test_without_a_gpu_it_says_so_and_ends(box):
    box.script(gpus=[])
    watch = GpuWatch(box.argv())
    async with running(watch):
        assert await watch.wait_known(PATIENCE_S)
        assert watch.no_gpu
        box.script(gpus=[{}])
        watch.look_again()
        await until(watch, lambda: watch.available)


@pytest.fixture(autouse=True)
def no_reader_is_left() -> Iterator[None]:
    yield
    left: list[Any] = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if any("telemetry" in word for word in child.cmdline()):
                left.append(child)
    assert left == []
