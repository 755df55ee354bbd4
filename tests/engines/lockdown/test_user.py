"""Root becomes the engines' user, for good, or stays root and says what stood in the way."""

from __future__ import annotations

import json
import os
import select
import signal
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can change"),
]
UID = 65521
SETS = {
    "all": {},
    "no namespaces": {"layers": ["uid", "privileges", "landlock", "seccomp"]},
    "alone": {"layers": ["uid"]},
}


def told(done) -> tuple[list[str], dict[str, str]]:
    assert done.returncode == 0, done.stderr
    *lines, verdicts = done.stdout.splitlines()
    return lines, json.loads(verdicts)


@pytest.mark.parametrize("name", SETS)
def test_every_process_of_the_family_is_that_user_for_good(confined, name: str):
    code = (
        "import os\n"
        "print(os.getresuid(), os.getresgid(), os.getgroups(), flush=True)\n"
        "open('mine', 'w').close(); print(os.stat('mine').st_uid, flush=True)\n"
        "open('/dev/stderr', 'w').write('heard\\n')\n"
    )
    done = confined(code, drop=True, write=["/"], **SETS[name])
    lines, verdicts = told(done)
    assert verdicts["uid"] == "verified"
    assert lines == [f"({UID}, {UID}, {UID}) ({UID}, {UID}, {UID}) []", str(UID)]
    assert "heard" in done.stderr


def test_no_namespace_keeps_a_root_of_the_family(confined, reachable: Path):
    """Warden and whoever is between it and the engine: seen from outside while the engine lives."""
    code = "import os\nos.mkfifo('up'); os.mkfifo('go')\nopen('up', 'w').write('x'); open('go').read()\n"
    child = os.fork()
    if child == 0:
        os._exit(confined(code, drop=True).returncode)
    while not (reachable / "scratch/up").exists():
        os.sched_yield()
    (reachable / "scratch/up").read_text()
    try:
        family = [
            Path(f"/proc/{pid}/status").read_text()
            for pid in filter(str.isdigit, os.listdir("/proc"))
            if str(reachable / "root").encode() in _cmdline(pid)
        ]
        users = {next(line for line in status.splitlines() if line.startswith("Uid:")) for status in family}
        assert len(family) == 3
        assert users == {f"Uid:\t{UID}\t{UID}\t{UID}\t{UID}"}
    finally:
        (reachable / "scratch/go").write_text("x")
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def _cmdline(pid: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


@pytest.mark.parametrize("what", ["runs", "reads", "a file in a folder", "writes"])
def test_what_only_root_can_reach_keeps_it_root_and_is_named(confined, reachable: Path, what: str):
    closed = reachable / "closed"
    (closed / "deeper").mkdir(parents=True)
    (closed / "deeper/file").write_text("x")
    closed.chmod(0o700)
    user = {"uid": UID, "gid": UID, "runs": [], "reads": [], "writes": []}
    named = str(closed)
    if what == "a file in a folder":
        closed.chmod(0o755)
        (closed / "deeper/file").chmod(0o600)
        user["reads"], named = [str(closed)], str(closed / "deeper/file")
    else:
        user[what] = [str(closed / "deeper/file")]
    lines, verdicts = told(confined("import os; print(os.getresuid(), os.getgroups(), flush=True)", user=user))
    assert verdicts["uid"] == f"unavailable(EACCES {named})"
    assert verdicts["landlock"] == "verified"
    assert lines == [f"(0, 0, 0) {os.getgroups()}"]


@pytest.mark.parametrize(("name", "seen"), [("no namespaces", 106), ("all", 65534)])
def test_groups_that_own_the_granted_devices_are_kept(confined, reachable: Path, name: str, seen: int):
    """In a namespace that maps only the engine's own, a group has no number any more and opens doors all the same."""
    for node, mode, group in (
        ("render", 0o660, 106),
        ("open", 0o666, 107),
        ("roots", 0o660, 0),
        ("closed", 0o600, 108),
    ):
        os.mknod(reachable / node, mode | 0o20000, os.makedev(1, 3))
        os.chown(reachable / node, 0, group)
        (reachable / node).chmod(mode)
    nodes = [str(reachable / name) for name in ("render", "open", "roots", "closed", "none")]
    code = f"import os; print(os.getgroups(), flush=True); os.close(os.open({nodes[0]!r}, os.O_RDWR))"
    lines, verdicts = told(confined(code, drop=True, devices=["/dev/null", *nodes], **SETS[name]))
    assert verdicts["uid"] == "verified"
    assert lines == [f"[{seen}]"]


def test_an_engine_killed_by_a_signal_is_mirrored(confined):
    done = confined("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", drop=True)
    assert done.returncode == -11


@pytest.mark.parametrize("name", ["all", "no namespaces"])
def test_a_launcher_without_a_lifeline_still_dies_with_its_parent(launcher, reachable: Path, name: str):
    """The wish to die with the parent is cleared by the change of user, so it is made again."""
    fifo = reachable / "scratch/up"
    code = "import signal\nopen('up', 'w').write('x')\nsignal.pause()\n"
    argv = launcher(code, drop=True, spec={"parent": 0}, **SETS[name])
    os.mkfifo(fifo)
    fifo.chmod(0o666)
    told, tell = os.pipe()
    parent = os.fork()
    if parent == 0:
        argv[-1] = json.dumps(json.loads(argv[-1]) | {"parent": os.getpid()})
        os.write(tell, f"{os.posix_spawn(argv[0], argv, {'PATH': '/usr/bin'})}\n".encode())
        signal.pause()
    warden = os.pidfd_open(int(os.read(told, 20)))
    fifo.read_text()
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    assert select.select([warden], [], [], 60)[0]
    for fd in (warden, told, tell):
        os.close(fd)
