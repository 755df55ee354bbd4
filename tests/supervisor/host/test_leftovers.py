"""What an earlier life left is found and ended, and nobody else: on real processes."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from supervisor.host import leftovers, procfs
from supervisor.host.cgroups import Cgroups
from supervisor.host.child import ChildSpec, open_child
from supervisor.host.leftovers import Ledger, Record, Swept, start_of, sweep

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are recognised by /proc")
ROOT = Path(__file__).parents[3]
PATIENCE_S = 60.0
NOBODY = 2**22 + 19

STAY = """
import os, signal, sys
for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
    signal.signal(number, signal.SIG_IGN)
signal.alarm(120)
def stay():
    os.write(1, b"%d\\n" % os.getpid())
    signal.alarm(120)
    while True:
        signal.pause()
"""
ALONE = STAY + "stay()"
# A child, and one in a session of its own.
FAMILY = STAY + "if os.fork() == 0: stay()\nif os.fork() == 0: os.setsid(); stay()\nstay()"
# Orphaned: the one who started it has gone.
ORPHAN = STAY + "if os.fork() == 0: os.setsid(); stay()\n"
# One that starts another every two milliseconds.
BREEDER = (
    STAY
    + """
import time
os.write(1, b"%d\\n" % os.getpid())
for _ in range(3000):
    if os.fork() == 0:
        signal.alarm(30)
        while True:
            signal.pause()
    time.sleep(0.002)
"""
)


def alive(pid: int) -> bool:
    return start_of(pid) is not None


def until(true: Callable[[], bool]) -> None:
    patience = time.monotonic() + PATIENCE_S
    while not true():
        assert time.monotonic() < patience
        time.sleep(0.005)


class Zoo:
    """Starts real processes and sees to it that none of them outlives the test."""

    def __init__(self) -> None:
        self.started: list[subprocess.Popen[str]] = []
        self.pids: list[int] = []

    def start(self, code: str, count: int = 1, cwd: Path | None = None) -> list[int]:
        """Start `code` and wait until `count` processes said their numbers."""
        process = subprocess.Popen(
            [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=cwd, start_new_session=True
        )
        self.started.append(process)
        assert process.stdout is not None
        said = [int(process.stdout.readline()) for _ in range(count)]
        self.pids += said
        return sorted(said, key=lambda pid: pid != process.pid)

    def end(self) -> None:
        for pid in self.pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for process in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            assert process.stdout is not None
            process.stdout.close()


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever was killed has gone when it was its turn on the processor."""
    monkeypatch.setattr(leftovers, "WAIT_S", PATIENCE_S)


@pytest.fixture
def zoo() -> Iterator[Zoo]:
    made = Zoo()
    yield made
    made.end()


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    return Ledger(tmp_path / "state" / "children")


@pytest.fixture
def instances(tmp_path: Path) -> Path:
    folder = tmp_path / "state" / "instances"
    folder.mkdir(parents=True)
    return folder


def write(ledger: Ledger, record: Record) -> Path:
    ledger.folder.mkdir(parents=True, exist_ok=True)
    path = ledger.folder / f"{record.pid}.json"
    path.write_bytes(msgspec.json.encode(record))
    return path


def record_of(pid: int, **changed: object) -> Record:
    started = start_of(pid)
    assert started is not None
    return msgspec.structs.replace(Record(pid=pid, started=started, boot=procfs.boot_id(), name="llm"), **changed)


# ---- who is ended


def test_a_recorded_child_and_its_family_are_ended(ledger: Ledger, zoo: Zoo):
    pids = zoo.start(FAMILY, 3)
    assert ledger.spawned(pids[0], name="llm") is not None
    began = time.monotonic()
    swept = sweep(ledger)
    assert time.monotonic() - began < PATIENCE_S
    assert not any(map(alive, pids))
    assert {found.pid: found.why for found in swept.processes} == {
        pids[0]: "recorded",
        pids[1]: "family",
        pids[2]: "family",
    }
    assert all(found.gone and found.name == "llm" for found in swept.processes)
    assert swept.unkillable == ()
    assert "ended llm (pid" in swept.describe()
    assert ledger.records() == []


def test_one_that_was_stopped_is_ended_too(ledger: Ledger, zoo: Zoo):
    (pid,) = zoo.start(ALONE)
    os.kill(pid, signal.SIGSTOP)
    ledger.spawned(pid, name="llm")
    assert [found.gone for found in sweep(ledger).processes] == [True]
    assert not alive(pid)


def test_a_family_that_grows_meanwhile_does_not_get_away(ledger: Ledger, zoo: Zoo):
    (pid,) = zoo.start(BREEDER)
    until(lambda: len(procfs.children(pid)) > 20)
    ledger.spawned(pid, name="llm")
    session = procfs.stat(pid).session
    sweep(ledger)
    left = [each for each in procfs.pids() if alive(each) and (seen := procfs.stat(each)) and seen.session == session]
    assert left == []


def test_a_number_that_was_given_to_somebody_else_is_spared(ledger: Ledger, zoo: Zoo):
    (pid,) = zoo.start(ALONE)
    record = record_of(pid)
    write(ledger, msgspec.structs.replace(record, started=record.started - 1))
    assert sweep(ledger) == Swept()
    assert alive(pid)
    assert ledger.records() == []


def test_another_boot_is_another_life(ledger: Ledger, zoo: Zoo):
    (pid,) = zoo.start(ALONE)
    write(ledger, record_of(pid, boot="00000000-0000-0000-0000-000000000000"))
    assert sweep(ledger) == Swept()
    assert alive(pid)
    assert ledger.records() == []


def test_a_number_given_away_between_the_look_and_the_kill_is_spared(ledger: Ledger, zoo: Zoo):
    (pid,) = zoo.start(ALONE)
    started = start_of(pid)
    assert started is not None
    leftovers._signal(pid, started - 1, "SIGKILL")
    assert leftovers._wait_gone(pid, started - 1, 0.0)  # that one is gone
    assert alive(pid)
    leftovers._signal(NOBODY, 1.0, "SIGKILL")


def test_an_orphan_that_works_in_our_scratch_is_ended(ledger: Ledger, zoo: Zoo, instances: Path, tmp_path: Path):
    scratch, elsewhere = instances / "m0" / "i1", tmp_path / "elsewhere"
    scratch.mkdir(parents=True)
    elsewhere.mkdir()
    (ours,) = zoo.start(ORPHAN, cwd=scratch)
    (theirs,) = zoo.start(ORPHAN, cwd=elsewhere)
    zoo.started[0].wait()
    zoo.started[1].wait()
    adopter = procfs.stat(procfs.stat(ours).parent)
    if procfs.stat(ours).parent != 1 and adopter.comm not in leftovers._ADOPTERS:
        pytest.skip(f"orphans are adopted by {adopter.comm} here")
    swept = sweep(ledger, scratch=[instances])
    assert [(found.pid, found.why, found.gone) for found in swept.processes] == [(ours, "orphan", True)]
    assert alive(theirs)
    assert not alive(ours)
    assert swept.folders == 1
    assert list(instances.iterdir()) == []


def test_somebody_who_looks_into_our_scratch_is_spared(ledger: Ledger, zoo: Zoo, instances: Path):
    (shell,) = zoo.start(ALONE, cwd=instances)  # a child of ours, as a shell is one of its terminal
    assert sweep(ledger, scratch=[instances]).processes == ()
    assert alive(shell)


def test_we_and_those_who_started_us_are_spared_whatever_is_recorded(ledger: Ledger, monkeypatch: pytest.MonkeyPatch):
    signalled: list[int] = []
    monkeypatch.setattr(leftovers, "_signal", lambda pid, *_rest: signalled.append(pid))
    write(ledger, record_of(os.getpid()))
    write(ledger, record_of(os.getppid()))
    monkeypatch.setattr(leftovers.family, "members", lambda pid: [pid])
    assert sweep(ledger).processes == ()
    assert signalled == []


def test_members_of_our_cgroup_are_ended_without_their_leader(ledger: Ledger, zoo: Zoo):
    places = Cgroups.find()
    group = places.make("leftover") if places is not None else None
    if group is None:
        pytest.skip("no cgroup v2 that is ours to divide")
    join = f"open({str(group.path / 'cgroup.procs')!r}, 'w').write('0')\n"
    (orphan,) = zoo.start(join + ORPHAN)
    leader = zoo.started[0]
    leader.wait()
    write(
        ledger,
        Record(pid=NOBODY, started=1.0, boot=procfs.boot_id(), name="llm", cgroup=str(group.path)),
    )
    swept = sweep(ledger)
    assert [(found.pid, found.why, found.gone) for found in swept.processes] == [(orphan, "cgroup", True)]
    assert not alive(orphan)
    assert not group.path.exists()


def test_a_folder_that_is_no_cgroup_of_ours_is_left_alone(ledger: Ledger, tmp_path: Path, zoo: Zoo):
    (pid,) = zoo.start(ALONE)
    for name in ("bulkhead-x", "precious"):  # the first one is no cgroup, the second one has not our name
        (tmp_path / name).mkdir()
        record = Record(pid=NOBODY, started=1.0, boot=procfs.boot_id(), cgroup=str(tmp_path / name))
        write(ledger, record).rename(ledger.folder / f"{name}.json")
    (tmp_path / "precious" / "cgroup.procs").write_text(f"{pid}\n")
    assert sweep(ledger) == Swept()
    assert alive(pid)
    assert (tmp_path / "bulkhead-x").exists()
    assert ledger.records() == []


def test_one_that_cannot_be_ended_is_told_and_stays_on_record(
    ledger: Ledger, zoo: Zoo, monkeypatch: pytest.MonkeyPatch
):
    (pid,) = zoo.start(ALONE)
    ledger.spawned(pid, name="llm")
    monkeypatch.setattr(leftovers, "WAIT_S", 0.05)
    with monkeypatch.context() as stuck:
        stuck.setattr(leftovers, "_signal", lambda *_args: None)  # as if it hung in the kernel
        swept = sweep(ledger)
    assert [found.pid for found in swept.unkillable] == [pid]
    assert "cannot be ended" in swept.describe()
    assert len(ledger.records()) == 1
    assert sweep(ledger).unkillable == ()  # it came back: the next life ends it
    assert ledger.records() == []


# ---- the record


def test_a_child_is_on_record_while_it_lives(ledger: Ledger, zoo: Zoo):
    (pid,) = zoo.start(ALONE)
    path = ledger.spawned(pid, name="llm", scratch=Path("/s"), cgroup=Path("/c"))
    assert path is not None
    assert path.stat().st_mode & 0o777 == 0o600
    ((_, record),) = ledger.records()
    assert record == record_of(pid, scratch="/s", cgroup="/c")
    ledger.ended(path)
    ledger.ended(path)
    ledger.ended(None)
    assert ledger.records() == []


def test_one_that_died_at_once_is_not_on_record(ledger: Ledger):
    assert ledger.spawned(NOBODY, name="llm") is None
    process = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.read() == b""
    until(lambda: not alive(process.pid))  # a zombie: nobody has reaped it
    assert ledger.spawned(process.pid, name="llm") is None
    process.stdout.close()
    process.wait()


def test_a_disk_that_refuses_costs_the_record_alone(tmp_path: Path, caplog):
    (tmp_path / "file").write_text("")
    refused = Ledger(tmp_path / "file" / "children")
    assert refused.spawned(os.getpid(), name="llm") is None
    assert "could not be written down" in caplog.text
    assert sweep(refused) == Swept()


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"pid": "x"}', b"\xff\xfe", b'{"pid": -1, "started": 1}'])
def test_what_is_no_record_is_removed(ledger: Ledger, text: bytes):
    ledger.folder.mkdir(parents=True)
    (ledger.folder / "x.json").write_bytes(text)
    assert sweep(ledger) == Swept()
    assert list(ledger.folder.iterdir()) == []


async def test_recording_wraps_the_life_of_a_child(ledger: Ledger, tmp_path: Path):
    spec = ChildSpec(name="sleeper", argv=(sys.executable, "-c", "input()"), cwd=tmp_path)
    async with ledger.recording(open_child)(spec, term_grace_s=1.0) as child:
        ((_, record),) = ledger.records()
        assert record == record_of(child.pid, name="sleeper", scratch=str(tmp_path))
    assert ledger.records() == []
    with pytest.raises(OSError):
        async with ledger.recording(open_child)(ChildSpec(name="none", argv=("/nowhere/at/all",))):
            pass
    assert ledger.records() == []


_LIFE = """
import sys, trio
from pathlib import Path
from supervisor.host.child import ChildSpec, open_child
from supervisor.host.leftovers import Ledger

async def main():
    spec = ChildSpec(name="deaf", argv=(sys.executable, "-c", sys.argv[2]))
    async with Ledger(Path(sys.argv[1])).recording(open_child)(spec) as child:
        print((await child.read()).decode().strip(), flush=True)
        await trio.sleep_forever()
trio.run(main)
"""


def test_what_a_killed_supervisor_left_is_found_by_the_next(ledger: Ledger, zoo: Zoo):
    life = subprocess.Popen(
        [sys.executable, "-c", _LIFE, str(ledger.folder), ALONE], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert life.stdout is not None
    with life:
        pid = int(life.stdout.readline())
        zoo.pids.append(pid)
        life.kill()
    assert alive(pid)  # no warden, no lifeline: a child that outlives us
    assert [(found.pid, found.name) for found in sweep(ledger).processes] == [(pid, "deaf")]
    assert not alive(pid)


# ---- folders and sockets


def test_folders_and_stale_sockets_go_and_live_ones_stay(
    ledger: Ledger, instances: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (instances / "m0" / "i1").mkdir(parents=True)
    (instances / "m0" / "i1" / "file").write_text("x")
    (instances / "m1").mkdir()
    (instances / "link").symlink_to(tmp_path)
    # A relative name keeps a deep temporary folder below the 108 bytes of a socket's path.
    monkeypatch.chdir(tmp_path)
    stale, live, file = Path("stale.sock"), Path("live.sock"), Path("file.sock")
    file.write_text("mine")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(stale))
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(live))
        server.listen()
        swept = sweep(ledger, scratch=[instances], sockets=[stale, live, file, Path("none.sock")])
    assert (swept.folders, swept.sockets) == (3, 1)
    assert list(instances.iterdir()) == []
    assert not stale.exists()
    assert live.exists()
    assert file.exists()
    assert tmp_path.exists()
    assert swept.describe() == "Left by an earlier life: removed 3 scratch folders; removed 1 stale sockets."


def test_nothing_left_is_nothing_said(ledger: Ledger, instances: Path, tmp_path: Path, caplog):
    swept = sweep(ledger, scratch=[instances, tmp_path / "nowhere"], sockets=[tmp_path / "none.sock"])
    assert swept == Swept()
    assert swept.describe() == ""
    assert caplog.text == ""
