"""What an engine does to the box, without anything that contains it; every process ends by itself or here."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from protocol.engine_wire import Cancel, Model, Progress

MODULE = "engines.synthetic.misbehave"
PATIENCE_S = 90.0


@pytest.fixture
def child(spawn):
    child = spawn(MODULE)
    child.load(Model(name="synthetic-bad", device="cpu"))
    yield child
    for process in _family(child):
        with contextlib.suppress(psutil.Error):
            process.kill()
    child.process.kill()


def _family(child) -> list[psutil.Process]:
    """Its processes, wherever they have gone: they keep its folder in their environment."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("TMPDIR") == str(child.folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _wait_family(child, count: int) -> list[psutil.Process]:
    _wait(lambda: len(_family(child)) >= count, f"{count} processes")
    return _family(child)


def _wait(true: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < until, what
        time.sleep(0.01)


def _ignores_term(pid: int) -> bool:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    mask = next(int(line.split()[1], 16) for line in lines if line.startswith("SigIgn"))
    return bool(mask & 1 << (signal.SIGTERM - 1))


def test_a_fork_bomb_grows_to_its_size_and_no_further(child):
    child.begin("llm", {"prompt": "fork-bomb:20"})
    found = _wait_family(child, 21)
    assert len(found) == 21
    strays = [process.pid for process in found if process.pid != child.process.pid]
    _wait(lambda: len({os.getsid(process.pid) for process in found}) == 21, "a group signal reaches one of them")
    _wait(lambda: all(map(_ignores_term, strays)), "each is deaf to SIGTERM")
    time.sleep(0.2)  # what could still grow would do so now
    assert len(_family(child)) == 21
    for pid in strays:
        os.kill(pid, signal.SIGTERM)
    assert len(_family(child)) == 21  # none obeys


def test_a_fork_bomb_is_bounded_by_itself(child):
    from engines.synthetic.misdeeds_box import MOST_PROCESSES

    assert MOST_PROCESSES <= 300


def test_a_daemon_has_a_session_and_a_parent_of_its_own(child):
    pid = int(child.run("llm", {"prompt": "daemon"}).body.content)
    daemon = psutil.Process(pid)
    assert os.getsid(pid) != os.getsid(child.process.pid)
    assert daemon.ppid() != child.process.pid
    assert daemon.cwd() == "/"
    assert child.run("llm", {"prompt": "still here"}).body.content == "still here"
    daemon.send_signal(signal.SIGKILL)


def test_a_daemon_outlives_an_engine_that_nothing_contains(child):
    child.begin("llm", {"prompt": "daemon:exit"})
    assert child.process.wait(PATIENCE_S) == 9
    assert len(_family(child)) == 1


def test_hoarding_grows_and_goes_on_with_progress_until_it_is_cancelled(child):
    answer = child.begin("llm", {"prompt": "hoard:40"})
    phases = set()
    while "sit" not in phases:
        message = child.receive(PATIENCE_S)
        if isinstance(message, Progress):
            phases.add(message.phase)
    assert phases == {"grow", "sit"}
    assert psutil.Process(child.process.pid).memory_info().rss > 40 * 2**20
    child.send(Cancel(run=1))
    assert child.finish(answer).fault.code == "cancelled"


@pytest.mark.parametrize(("word", "files"), [("disk", 1), ("disk-many", 10)])
def test_filling_the_disk_writes_into_its_own_folder(child, word, files):
    answer = child.begin("llm", {"prompt": f"{word}:10"})
    while not (isinstance(message := child.receive(PATIENCE_S), Progress) and message.phase == "sit"):
        pass
    sizes = [path.stat().st_size for path in child.folder.glob("filler*")]
    assert (len(sizes), sum(sizes)) == (files, 10 * 2**20)
    child.send(Cancel(run=1))
    assert child.finish(answer).fault.code == "cancelled"
