"""Ceilings that hold: a fork bomb, a file that never ends, a cgroup."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest

from engines.lockdown import limits
from supervisor.host.cgroups import Cgroups

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can start it as somebody else")

_BOMB = """
import os, signal, sys
count = 0
while True:
    try:
        if os.fork() == 0:
            while True:
                signal.pause()
    except OSError as error:
        print(count, error.errno, flush=True)
        break
    count += 1
    if count == 2000:
        print(count, 0, flush=True)
        break
"""
_THREADS = """
import _thread, time
count = 0
lock = _thread.allocate_lock()
lock.acquire()
try:
    while count < 2000:
        _thread.start_new_thread(lock.acquire, ())
        count += 1
except RuntimeError:
    pass
print(count, flush=True)
"""


def told(done) -> tuple[list[str], dict[str, str]]:
    assert done.returncode == 0, done.stderr
    *lines, verdicts = done.stdout.splitlines()
    return lines, json.loads(verdicts)


@as_root
@pytest.mark.parametrize("who", [{"uid": 12345}, {"drop": True}], ids=["plain user", "root, dropped"])
def test_a_fork_bomb_is_bounded_and_nobody_is_left(confined, reachable: Path, who: dict):
    lines, verdicts = told(confined(_BOMB, processes=100, **who))
    assert verdicts["processes"] == "verified"
    count, error = map(int, lines[0].split())
    assert (90 <= count <= 100, error) == (True, 11)
    assert not [pid for pid in filter(str.isdigit, os.listdir("/proc")) if str(reachable).encode() in _cmdline(pid)]


def _cmdline(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@as_root
def test_threads_count(confined):
    lines, _ = told(confined(_THREADS, uid=12345, processes=100))
    assert 90 <= int(lines[0]) <= 100


@as_root
def test_one_engines_bomb_leaves_room_for_a_neighbour_of_the_same_user(confined, reachable: Path):
    """The count belongs to the namespace: so a second one starts while the first is full."""
    code = (
        "import os, sys\n"
        f"{_BOMB}\n"
        "os.mkfifo('full'); os.mkfifo('go')\n"
        "open('full', 'w').write('x'); open('go').read()\n"
    )
    first = os.fork()
    if first == 0:
        os._exit(confined(code, uid=12345, processes=100).returncode)
    until_full = reachable / "scratch/full"
    while not until_full.exists():
        os.sched_yield()
    until_full.read_text()
    try:
        lines, _ = told(confined("print('fine', flush=True)", uid=12345, processes=100))
        assert lines == ["fine"]
    finally:
        (reachable / "scratch/go").write_text("x")
        assert os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) == 0


@as_root
def test_what_cannot_be_held_says_so(confined):
    _, verdicts = told(confined("pass", processes=100))
    assert verdicts["processes"] == "unavailable(root)"
    _, verdicts = told(confined("pass", uid=12345, processes=100, layers=["privileges", "landlock", "seccomp"]))
    assert verdicts["processes"] == "unavailable(shared user)"


@as_root
def test_a_user_of_their_own_is_held_without_namespaces_too(confined):
    # All processes of that user on the box are counted, so not the one that the engines of other tests have.
    lines, verdicts = told(confined(_BOMB, drop=65530, processes=20, layers=["uid", "privileges", "landlock"]))
    assert verdicts["processes"] == "verified"
    assert 0 < int(lines[0].split()[0]) <= 160


def test_no_file_grows_beyond_the_limit(confined):
    code = (
        "import errno, os\n"
        "fd = os.open('big', os.O_CREAT | os.O_WRONLY)\n"
        "try:\n"
        "    while True: os.write(fd, bytes(4096))\n"
        "except OSError as error:\n"
        "    print(errno.errorcode[error.errno], os.fstat(fd).st_size, flush=True)\n"
        "try: os.ftruncate(fd, 10**12)\n"
        "except OSError as error: print(errno.errorcode[error.errno], flush=True)\n"
    )
    lines, _ = told(confined(code, spec={"rlimits": {"FSIZE": 10**6}}))
    assert lines == ["EFBIG 1000000", "EFBIG"]


def _own_cgroup() -> Path | None:
    for root in (Path("/sys/fs/cgroup"), Path("/sys/fs/cgroup/unified")):
        if (root / "cgroup.controllers").exists():
            line = next(each for each in Path("/proc/self/cgroup").read_text().splitlines() if each.startswith("0::"))
            folder = root / line[3:].lstrip("/")
            return folder if os.access(folder, os.W_OK) else None
    return None


@pytest.mark.parametrize("drop", [False, True], ids=["as we are", "dropped"])
def test_the_whole_family_is_in_the_cgroup(confined, drop: bool):
    base = _own_cgroup()
    if base is None:
        pytest.skip("no cgroup v2 of our own here")
    if drop and os.geteuid() != 0:
        pytest.skip("only root drops")
    folder = base / f"bulkhead-test-{os.getpid()}"
    folder.mkdir()
    try:
        done = confined("print(open('/proc/self/cgroup').read(), flush=True)", drop=drop, spec={"cgroup": str(folder)})
        lines, verdicts = told(done)
        assert verdicts["cgroup"] == "verified"
        assert next(line for line in lines if line.startswith("0::")).endswith(folder.name)
    finally:
        folder.rmdir()


def test_whether_a_cgroup_counts_is_read(tmp_path: Path):
    (tmp_path / "pids.max").write_text("max\n")
    assert not limits.counted(str(tmp_path))
    (tmp_path / "pids.max").write_text("544\n")
    assert limits.counted(str(tmp_path))
    assert not limits.counted(str(tmp_path / "none"))


@as_root
def test_a_real_cgroup_that_counts_is_told(confined):
    found = Cgroups.find()
    if found is None or not found.counts:
        pytest.skip("no pids controller is handed to us")
    made = found.make("counted")
    assert made is not None
    _, verdicts = told(confined("pass", processes=100, spec={"cgroup": str(made.path)}))
    assert made.remove()
    assert verdicts["processes"] == "claimed"


def test_a_cgroup_that_cannot_be_joined_costs_only_itself(confined, tmp_path: Path):
    _, verdicts = told(confined("pass", spec={"cgroup": str(tmp_path / "none")}))
    assert verdicts["cgroup"] == "unavailable(ENOENT)"
    assert verdicts["landlock"] != "off"
