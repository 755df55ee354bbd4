"""Which process is the engine, who belongs to it and what they hold, on real families."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from protocol import engine_wire as wire
from protocol.framing import FrameDecoder
from supervisor.host import family, procfs
from supervisor.host.child import open_child
from supervisor.host.launching import engine_child
from supervisor.host.work import EngineSpec, Sandbox

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
NOBODY = 2**22 + 17  # beyond the largest pid there can be
MIB = 2**20


@contextlib.contextmanager
def running(code: str) -> Iterator[subprocess.Popen[str]]:
    """A child that says "up" when it has made its family; all of it is in one group."""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        yield process
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


TREE = """
import os, signal, sys
signal.alarm(60)
held = bytearray({own} * 2**20)
told, tell = os.pipe()
for generation in range({depth}):
    if os.fork():
        if generation == 0:
            os.read(told, 1)
            print("up", flush=True)
        while True:
            signal.pause()
    signal.alarm(60)
more = b"x" * ({below} * 2**20)
os.write(tell, b"x")
while True:
    signal.pause()
"""


@pytest.mark.parametrize("mode", ["best-effort", "off"])
async def test_the_engine_is_found_below_its_warden(mode: str, tmp_path: Path):
    spec = EngineSpec(
        name="synthetic", module="engines.synthetic.engine", python=sys.executable, sandbox=Sandbox(mode=mode)
    )
    async with open_child(engine_child(spec, tmp_path), term_grace_s=1.0) as child:
        hello = await first_message(child)
        engine = family.engine_pid(child.pid)
        assert engine != child.pid
        assert family.engine_pid(child.pid, hello.pid) == engine
        assert procfs.own_number(engine) == hello.pid
        assert Path(os.readlink(f"/proc/{engine}/cwd")) == tmp_path
        members = family.members(child.pid)
        assert members[0] == child.pid
        assert members[-1] == engine
        assert len(members) == 3
        assert family.speaks_for(child.pid, hello.pid)
        assert not family.speaks_for(child.pid, NOBODY)
        assert 10 * MIB < family.rss_bytes(child.pid) < 400 * MIB
    assert family.members(child.pid) == []
    assert family.rss_bytes(child.pid) == 0
    assert family.engine_pid(child.pid) == child.pid


async def first_message(child) -> wire.Hello:
    decoder = FrameDecoder()
    with trio.fail_after(60):
        while data := await child.read():
            decoder.feed(data)
            for frame in decoder:
                message = wire.decode_up(frame)
                assert isinstance(message, wire.Hello)
                return message
    raise AssertionError(child.stderr_tail())


def test_a_child_without_anything_below_is_its_own_engine():
    with running("import time\nprint('up', flush=True)\ntime.sleep(60)") as process:
        assert family.engine_pid(process.pid) == process.pid
        assert family.engine_pid(process.pid, process.pid) == process.pid
        assert family.members(process.pid) == [process.pid]


def test_every_generation_belongs_to_it():
    with running(TREE.format(own=0, depth=4, below=0)) as process:
        members = family.members(process.pid)
        assert len(members) == 5
        assert [procfs.stat(pid).parent for pid in members[1:]] == members[:-1]


def test_a_bomb_is_counted_to_a_bound(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(family, "_MAX_MEMBERS", 3)
    with running(TREE.format(own=0, depth=5, below=0)) as process:
        assert len(family.members(process.pid)) == 3


def test_memory_of_the_whole_family_is_added_up():
    with running(TREE.format(own=0, depth=1, below=0)) as small, running(TREE.format(own=0, depth=1, below=64)) as big:
        grown = family.rss_bytes(big.pid) - family.rss_bytes(small.pid)
        assert 56 * MIB < grown < 80 * MIB


def test_mapped_files_are_counted_once(tmp_path: Path):
    weights = tmp_path / "weights"
    weights.write_bytes(b"w" * 64 * MIB)
    mapped = f"""
import mmap, sys
file = open({str(weights)!r}, "rb")
view = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)
assert sum(view[::4096]) > 0
"""
    with running(
        mapped + TREE.format(own=0, depth=3, below=0).replace("more =", mapped.replace("\n", ";")[1:-1] + ";more =")
    ) as process:
        # The leader and the last of the line have read them; so do the two between share them or not.
        rss = family.rss_bytes(process.pid)
        assert 64 * MIB < rss < 64 * MIB + 60 * MIB


@pytest.mark.parametrize("pid", [NOBODY, -1, 0])
def test_nobody_has_nothing(pid: int):
    assert family.members(pid) == []
    assert family.rss_bytes(pid) == 0
    assert family.engine_pid(pid) == pid
    assert procfs.children(pid) == []
    assert procfs.threads(pid) == []
    assert procfs.wchan(pid) == ""
    assert procfs.ran_ns(pid, pid) is None
    assert procfs.real_uid(pid) is None


def test_what_procfs_says_of_ourselves():
    me = procfs.stat(os.getpid())
    assert me is not None
    assert me.parent == os.getppid()
    assert me.session == os.getsid(0)
    assert procfs.real_uid(os.getpid()) == os.getuid()
    assert os.getpid() in procfs.pids()
    assert procfs.threads(os.getpid())[0] == os.getpid()
    assert len(procfs.boot_id()) == 36
    resident, shared = procfs.resident_bytes(os.getpid())
    assert 0 < shared < resident
    own = procfs.own_number(os.getpid())
    assert own is not None
    assert own > 0


def test_the_first_thread_is_the_process_itself_even_when_numbers_have_wrapped_around(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for thread in (21603, 327, 40000):
        (tmp_path / "21603" / "task" / str(thread)).mkdir(parents=True)
    monkeypatch.setattr(procfs, "ROOT", str(tmp_path))
    assert procfs.threads(21603) == [21603, 327, 40000]
