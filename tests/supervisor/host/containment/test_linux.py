"""The Linux leash's parts that the child tests do not reach."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import trio

from supervisor.host.child import ChildSpec, Exit, open_child
from supervisor.host.containment import linux

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's own")


@pytest.fixture
def sleeper():
    process = subprocess.Popen(["sleep", "1000"])
    yield process
    process.kill()
    process.wait()


@pytest.mark.parametrize(
    ("release", "wsl2"),
    [
        ("5.15.153.1-microsoft-standard-WSL2", True),
        ("6.6.87.2-microsoft-standard-WSL2+", True),
        ("4.4.0-19041-Microsoft", False),  # WSL1 has no Linux kernel at all
        ("6.1.0-32-amd64", False),
    ],
)
def test_wsl2_is_told_by_its_kernel(release: str, wsl2: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(linux.platform, "release", lambda: release)
    assert linux.Linux().facts() == {"platform": "wsl2" if wsl2 else "linux"}
    assert linux.Linux().verdicts() == {}


def test_a_signal_reaches_exactly_the_process_that_was_meant(sleeper: subprocess.Popen):
    began = linux.start_time(sleeper.pid)
    assert began
    assert not linux.signal_exactly(sleeper.pid, "1", signal.SIGKILL)  # a namesake: the number was used before
    assert sleeper.poll() is None
    assert linux.signal_exactly(sleeper.pid, began, signal.SIGKILL)
    assert sleeper.wait(60) == -signal.SIGKILL
    assert not linux.signal_exactly(sleeper.pid, began, signal.SIGKILL)
    assert linux.start_time(sleeper.pid) == ""


def test_the_same_without_pidfds(sleeper: subprocess.Popen, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "pidfd_open")
    began = linux.start_time(sleeper.pid)
    assert not linux.signal_exactly(sleeper.pid, "1", signal.SIGKILL)
    assert linux.signal_exactly(sleeper.pid, began, signal.SIGKILL)
    assert sleeper.wait(60) == -signal.SIGKILL
    assert not linux.signal_exactly(sleeper.pid, began, signal.SIGKILL)


async def test_the_end_is_seen_without_pidfds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(os, "pidfd_open")
    with trio.fail_after(60):
        async with open_child(ChildSpec(name="cat", argv=("cat",))) as child:
            child.close_stdin()
            assert await child.wait() == Exit(code=0)


def test_families_are_found_to_any_depth():
    code = "import os, signal\nfor _ in range(4):\n    if os.fork(): break\nos.write(1, b'x')\nsignal.pause()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    for _ in range(5):
        assert process.stdout.read(1) == b"x"
    found = linux.members(process.pid)
    assert len(found) == 4
    for pid, began in found.items():
        assert linux.signal_exactly(pid, began, signal.SIGKILL)
    process.kill()
    process.wait()
    process.stdout.close()
    assert linux.members(process.pid) == {}
