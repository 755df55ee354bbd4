"""The real kernel ends families by their cgroup; a folder that looks like cgroupfs stands in for memory ceilings."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisor.host import cgroups, family, procfs
from supervisor.host.cgroups import Cgroup, Cgroups, most_processes, system_oom_kills

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="cgroups are Linux's")
PATIENCE_S = 20.0

# A family that no list of children finds: a child in a session of its own and a daemon that init adopted.
FAMILY = """
import os, signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
told, tell = os.pipe()
def stay():
    os.write(tell, b"%d\\n" % os.getpid())
    signal.alarm(60)
    while True:
        signal.pause()
if os.fork() == 0:
    os.setsid()
    stay()
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        stay()
    os._exit(0)
os.wait()
said = b""
while said.count(b"\\n") < 2:
    said += os.read(told, 64)
os.write(1, said + b"up\\n")
stay()
"""


def until_gone(pids: list[int]) -> None:
    until = time.monotonic() + PATIENCE_S
    while left := [pid for pid in pids if (seen := procfs.stat(pid)) and seen.state not in "ZXx"]:
        assert time.monotonic() < until, left
        time.sleep(0.002)


@pytest.fixture
def real() -> Cgroups:
    found = Cgroups.find()
    if found is None:
        pytest.skip("no cgroup v2 that is ours to divide")
    return found


@pytest.fixture
def group(real: Cgroups) -> Iterator[Cgroup]:
    made = real.make("test")
    assert made is not None
    yield made
    made.kill()
    assert made.remove(PATIENCE_S)


@contextlib.contextmanager
def started(group: Cgroup | None, code: str = FAMILY) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A family that joined the cgroup before it forked; its members by number, the leader first."""
    join = "" if group is None else f"open({str(group.path / 'cgroup.procs')!r}, 'w').write('0')\n"
    process = subprocess.Popen(
        [sys.executable, "-c", join + code], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    members = [process.pid]
    try:
        assert process.stdout is not None
        while (line := process.stdout.readline().strip()) != "up":
            assert line, "it died"
            members.append(int(line))
        yield process, members
    finally:
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()


# ---- the real kernel


def test_kill_ends_the_whole_family_at_once(group: Cgroup):
    with started(group) as (process, members):
        assert len(members) == 3
        assert sorted(group.pids()) == sorted(members)
        assert not set(members) <= set(family.members(process.pid))  # the daemon is beyond a list of children
        assert not group.remove(0.05)  # somebody is in it
        before = time.monotonic()
        assert group.kill()
        until_gone(members)
        assert time.monotonic() - before < PATIENCE_S
        assert process.wait(PATIENCE_S) == -signal.SIGKILL
    assert group.pids() == []


def test_what_is_gone_cannot_join(group: Cgroup):
    assert not group.join(2**22 + 11)


def test_empty_cgroups_of_supervisors_that_are_gone_are_removed(real: Cgroups):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    dead, ours = real.make(f"{gone.pid}-m0-1-x"), real.make(f"{os.getpid()}-m0-1-x")
    other = real.base / "somebody-elses"
    other.mkdir(exist_ok=True)
    try:
        assert dead is not None
        assert ours is not None
        assert real.remove_dead() >= 1
        assert not dead.path.exists()
        assert ours.path.exists()
        assert other.exists()
    finally:
        other.rmdir()
        if ours is not None:
            ours.remove()


def test_names_of_two_instances_never_meet(real: Cgroups):
    first, second = real.make("same"), real.make("same")
    assert first is not None
    assert second is not None
    assert first.path != second.path
    assert first.remove()
    assert second.remove()
    assert second.remove()  # gone is gone
    assert not first.kill()
    assert first.pids() == []
    assert (first.memory_bytes(), first.oom_kills()) == (0, 0)


def test_a_real_memory_ceiling_kills_the_whole_group(real: Cgroups):
    if not real.limits:
        pytest.skip("no memory controller is handed to us")
    made = real.make("ceiling", 64 * 2**20)
    assert made is not None
    try:
        assert made.limited
        with started(made, "import os\nos.write(1, b'up\\n')\nheld = [bytearray(2**20) for _ in range(4096)]\n") as (
            process,
            _members,
        ):
            assert process.wait(PATIENCE_S) == -signal.SIGKILL
        assert made.oom_kills() >= 1
    finally:
        made.kill()
        assert made.remove(PATIENCE_S)


def test_a_real_ceiling_on_processes_holds(real: Cgroups):
    if not real.counts:
        pytest.skip("no pids controller is handed to us")
    made = real.make("bomb", processes=8)
    assert made is not None
    code = (
        "import errno, os\ncount = 0\ntry:\n"
        "    while os.fork(): count += 1\n"
        "except OSError as error:\n"
        "    os.write(1, b'%d %s\\nup\\n' % (count, errno.errorcode[error.errno].encode()))\n"
        "import signal\nsignal.pause()\n"
    )
    path = made.path / "cgroup.procs"
    process = subprocess.Popen(
        [sys.executable, "-c", f"open({str(path)!r}, 'w').write('0')\n{code}"], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "7 EAGAIN\n"
    finally:
        made.kill()
        process.wait(PATIENCE_S)
        process.stdout.close()
        assert made.remove(PATIENCE_S)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="only root can become somebody else")
def test_a_plain_user_has_nothing_to_divide_here():
    found = Cgroups.find()
    if found is None or os.stat(found.base).st_uid != 0:
        pytest.skip("there is no cgroup of root's to be refused")
    # Imported first: a plain user may not be able to read this checkout.
    code = "import os; from supervisor.host.cgroups import Cgroups; os.setuid(12345); print(Cgroups.find())"
    root = Path(__file__).parents[3]
    ran = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert ran.stdout == "None\n", ran.stderr


def test_the_kernels_count_of_kills_is_read():
    count = system_oom_kills()
    assert count is None or count >= 0
    assert system_oom_kills(Path("/nowhere")) is None


# ---- a folder that looks like cgroupfs


class Kernel:
    """Stands in for cgroupfs: furnishes new folders, and takes writes as plain files do.

    But for the controllers that are handed down: those add up, and only those that are there can be.
    """

    def __init__(self, root: Path, *, controllers: str) -> None:
        self.root = root
        self.controllers = controllers

    def furnish(self, path: Path, *, handed_down: str = "", procs: str = "") -> Path:
        path.mkdir(parents=True, exist_ok=True)
        for name in ("cgroup.kill", "memory.max", "memory.swap.max", "memory.oom.group", "memory.current", "pids.max"):
            (path / name).write_text("")
        (path / "cgroup.procs").write_text(procs)
        (path / "cgroup.controllers").write_text(self.controllers)
        (path / "cgroup.subtree_control").write_text(handed_down)
        (path / "memory.events").write_text("low 0\nhigh 3\nmax 9\noom 1\noom_kill 2\noom_group_kill 1\n")
        return path

    def write(self, path: Path, text: str) -> bool:
        if path.name != "cgroup.subtree_control":
            return _PLAIN_WRITE(path, text)
        name, before = text.removeprefix("+"), path.read_text().split()
        if name not in self.controllers.split():
            return False
        return _PLAIN_WRITE(path, " ".join(dict.fromkeys([*before, name])))


_PLAIN_WRITE = cgroups._write


@pytest.fixture
def kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Kernel:
    made = Kernel(tmp_path / "cgroup", controllers="cpu memory pids")
    made.furnish(made.root)

    def make_folder(path: Path) -> None:
        path.mkdir()
        made.furnish(path)

    remove = os.rmdir

    def remove_folder(path: Path) -> None:
        for file in Path(path).iterdir():  # the kernel's own files are no reason to refuse
            if file.is_file():
                file.unlink()
        remove(path)

    monkeypatch.setattr(cgroups, "_write", made.write)
    monkeypatch.setattr(cgroups, "_make_folder", make_folder)
    monkeypatch.setattr(cgroups, "_remove_folder", remove_folder)
    return made


def own(tmp_path: Path, line: str) -> Path:
    path = tmp_path / "own"
    path.write_text(f"9:name=systemd:/\n4:memory:/x\n{line}\n")
    return path


def test_a_delegated_cgroup_gives_ceilings(kernel: Kernel, tmp_path: Path):
    kernel.furnish(kernel.root / "unit.service", handed_down="memory")
    found = Cgroups.find(kernel.root, own(tmp_path, "0::/unit.service"))
    assert found is not None
    assert (found.base, found.limits) == (kernel.root / "unit.service", True)
    assert not list(found.base.glob("bulkhead-*"))  # the trial was removed
    made = found.make("chat", 3 * 2**30)
    assert made is not None
    assert made.limited
    assert made.path.name.startswith("bulkhead-chat-")
    for name, text in (("memory.max", "3221225472"), ("memory.swap.max", "0"), ("memory.oom.group", "1")):
        assert (made.path / name).read_text() == text
    assert (made.path / "pids.max").read_text() == str(most_processes())
    (made.path / "memory.current").write_text("12345\n")
    assert (made.memory_bytes(), made.oom_kills()) == (12345, 2)
    assert made.kill()
    assert (made.path / "cgroup.kill").read_text() == "1"


def test_without_a_size_there_is_no_ceiling(kernel: Kernel, tmp_path: Path):
    kernel.furnish(kernel.root / "unit.service", handed_down="memory")
    found = Cgroups.find(kernel.root, own(tmp_path, "0::/unit.service"))
    assert found is not None
    made = found.make("chat")
    assert made is not None
    assert not made.limited
    assert (made.path / "memory.max").read_text() == ""
    assert (made.path / "pids.max").read_text() == str(most_processes())  # that one is for all


def test_without_the_controller_limited_is_false(kernel: Kernel, tmp_path: Path):
    kernel.controllers = "hugetlb"
    kernel.furnish(kernel.root / "unit.service")
    found = Cgroups.find(kernel.root, own(tmp_path, "0::/unit.service"))
    assert found is not None
    assert not found.limits
    made = found.make("chat", 2**30)
    assert made is not None
    assert not made.limited
    assert (made.path / "memory.max").read_text() == ""
    assert (made.path / "pids.max").read_text() == ""


@pytest.mark.parametrize(("controllers", "has"), [("memory", (True, False)), ("pids", (False, True))])
def test_one_controller_does_without_the_other(
    kernel: Kernel, tmp_path: Path, controllers: str, has: tuple[bool, bool]
):
    kernel.controllers = controllers
    kernel.furnish(kernel.root / "unit.service")
    found = Cgroups.find(kernel.root, own(tmp_path, "0::/unit.service"))
    assert found is not None
    assert (found.limits, found.counts) == has


def test_a_kernel_that_refuses_the_ceiling_is_believed(kernel: Kernel, tmp_path: Path, monkeypatch):
    kernel.furnish(kernel.root / "unit.service", handed_down="memory")
    found = Cgroups.find(kernel.root, own(tmp_path, "0::/unit.service"))
    assert found is not None
    write = cgroups._write
    monkeypatch.setattr(cgroups, "_write", lambda path, text: path.name != "memory.max" and write(path, text))
    made = found.make("chat", 2**30)
    assert made is not None
    assert not made.limited


def refusing(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A controller is handed down only while no process is in the cgroup itself, as the kernel has it."""
    write = cgroups._write

    def judged(path: Path, text: str) -> bool:
        if path == base / "cgroup.subtree_control" and (base / "cgroup.procs").read_text().strip():
            return False
        if path.name == "cgroup.procs" and path.parent != base and text in (base / "cgroup.procs").read_text().split():
            rest = [pid for pid in (base / "cgroup.procs").read_text().split() if pid != text]
            (base / "cgroup.procs").write_text("\n".join(rest))
        return write(path, text)

    monkeypatch.setattr(cgroups, "_write", judged)


def test_we_move_into_a_leaf_when_we_are_alone(kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    unit = kernel.furnish(kernel.root / "unit.service", procs=f"{os.getpid()}\n")
    refusing(unit, monkeypatch)
    found = Cgroups.find(kernel.root, own(tmp_path, "0::/unit.service"))
    assert found is not None
    assert found.limits
    assert (unit / "supervisor" / "cgroup.procs").read_text() == str(os.getpid())
    assert (unit / "cgroup.subtree_control").read_text() == "memory pids"
    # A second look, from inside the leaf, finds the same place.
    again = Cgroups.find(kernel.root, own(tmp_path, "0::/unit.service/supervisor"))
    assert again is not None
    assert (again.base, again.limits) == (unit, True)


def test_others_are_never_moved(kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    unit = kernel.furnish(kernel.root / "unit.service", procs=f"{os.getpid()}\n1\n")
    refusing(unit, monkeypatch)
    found = Cgroups.find(kernel.root, own(tmp_path, "0::/unit.service"))
    assert found is not None  # still good for ending families
    assert not found.limits
    assert not (unit / "supervisor").exists()
    assert (unit / "cgroup.procs").read_text() == f"{os.getpid()}\n1\n"


def test_a_hybrid_tree_has_v2_beside_v1(kernel: Kernel, tmp_path: Path):
    shutil.rmtree(kernel.root)
    kernel.furnish(kernel.root / "unified" / "x")
    kernel.furnish(kernel.root / "unified")
    found = Cgroups.find(kernel.root, own(tmp_path, "0::/x"))
    assert found is not None
    assert found.base == kernel.root / "unified" / "x"


@pytest.mark.parametrize("line", ["", "0::/gone", "1:memory:/unit.service"])
def test_where_there_is_no_v2_there_is_nothing(kernel: Kernel, tmp_path: Path, line: str):
    kernel.furnish(kernel.root / "unit.service")
    assert Cgroups.find(kernel.root, own(tmp_path, line)) is None
    assert Cgroups.find(tmp_path / "nowhere", own(tmp_path, "0::/unit.service")) is None


def test_a_folder_that_cannot_be_divided_is_none(kernel: Kernel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refused(_path: Path) -> None:
        raise PermissionError

    kernel.furnish(kernel.root / "unit.service", handed_down="memory")
    monkeypatch.setattr(cgroups, "_make_folder", refused)
    assert Cgroups.find(kernel.root, own(tmp_path, "0::/unit.service")) is None


def test_a_cgroup_that_cannot_be_made_costs_only_itself(kernel: Kernel, monkeypatch: pytest.MonkeyPatch, caplog):
    def full(_path: Path) -> None:
        raise OSError(28, "No space left on device")  # cgroup.max.descendants

    monkeypatch.setattr(cgroups, "_make_folder", full)
    assert Cgroups(kernel.root, limits=True).make("chat", 2**30) is None
    assert "No cgroup for chat" in caplog.text
