"""Every layer set against every attack: what is denied, as a committed table, and what engines need still works.

Run with the interpreter of the system, as root and as a plain user, with and without namespaces.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
ATTACKS = Path(__file__).with_name("attacks.py")
PYTHON = shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable
PLAIN_UID = 12345
SETS = {
    "none": [],
    "namespaces": ["namespaces"],
    # Root keeps CAP_PERFMON otherwise, and newer kernels let that read /proc/PID/environ before they ask Landlock.
    "landlock": ["landlock", "privileges"],
    "seccomp": ["seccomp", "privileges"],
    "landlock+seccomp": ["landlock", "seccomp", "privileges"],
    "all": ["namespaces", "landlock", "seccomp", "privileges"],
}
# x: denied, o: open; columns as in SETS. On kernels with Landlock 6 to 8.
TABLE = """
read a private file            o o x o x x
read /etc/passwd               o o x o x x
write beside the private file  o o x o x x
write to the model folder      o o x o x x
TCP connect                    o x x x x x
TCP bind                       o o x x x x
UDP send                       o x o x x x
netlink                        o o o x x x
unix socket by path            o o o x x x
abstract unix socket           o x x x x x
signal                         o x x x x x
ptrace                         o x x x x x
environ                        o x x o x x
cmdline                        o x o o o x
memory                         o x x o x x
renice                         o x o x x x
prlimit                        o x o x x x
oom_score_adj                  o x x o x x
io_uring                       o o o x x x
new user namespace             o o o x x x
keyctl                         o o o x x x
exec /bin/true                 o o x o x x
"""
EXPECTED = {line[:31].strip(): dict(zip(SETS, line[31:].split(), strict=True)) for line in TABLE.strip().splitlines()}
# A root process without capabilities is no match for one that has them all.
ROOTS_OWN = {"landlock": {"renice": "x"}, "seccomp": {"environ": "x", "memory": "x"}}


def abi() -> int:
    code = "import sys; sys.path.append(sys.argv[1]); from engines.lockdown import landlock; print(landlock.abi())"
    done = subprocess.run([PYTHON, "-I", "-S", "-c", code, str(ROOT)], capture_output=True, text=True, check=False)
    return int(done.stdout or 0)


pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the layers are Linux's"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can become the plain user and stay root"),
]


class Ground:
    """A folder that a plain user can reach, with something private, a model, a scratch folder, and open doors."""

    def __init__(self, folder: Path, uid: int) -> None:
        self.uid, self.folder = uid, folder
        for name in ("private", "model", "scratch", "root/engines/runtime", "code"):
            (folder / name).mkdir(parents=True)
        (folder / "private" / "key").write_text("secret")
        (folder / "model" / "model").write_text("weights")
        shutil.copy(ATTACKS, folder / "root/engines/runtime/boot.py")
        # The checkout may lie where a plain user cannot go.
        shutil.copytree(ROOT / "engines" / "lockdown", folder / "code/engines/lockdown")
        for name in ("__init__.py", "launch.py"):
            shutil.copy(ROOT / "engines" / name, folder / "code/engines" / name)
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, uid, uid)
        self.tcp = socket.create_server(("127.0.0.1", 0))
        self.udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.udp.bind(("127.0.0.1", 0))
        self.unix = socket.socket(socket.AF_UNIX)
        self.unix.bind(str(folder / "s"))
        os.chmod(folder / "s", 0o777)
        self.abstract = socket.socket(socket.AF_UNIX)
        self.abstract.bind("\0" + str(folder / "s"))
        for plug in (self.unix, self.abstract):
            plug.listen()
        self.victim = subprocess.Popen(
            ["sleep", "1000"], user=uid, group=uid, extra_groups=[], stdout=subprocess.DEVNULL, start_new_session=True
        )

    def close(self) -> None:
        self.victim.kill()
        self.victim.wait()
        for plug in (self.tcp, self.udp, self.unix, self.abstract):
            plug.close()

    def policy(self, layers: list[str]) -> dict[str, Any]:
        real = os.path.realpath(PYTHON)
        return {
            "mode": "best-effort",
            "layers": layers,
            "read": ["/proc", "/sys", "/etc/ld.so.cache", str(self.folder / "model"), str(self.folder / "root")],
            "execute": ["/lib", "/lib64", "/usr/lib", "/usr/local/lib", real],
            "write": [str(self.folder / "scratch")],
            "devices": ["/dev/null", "/dev/urandom"],
        }

    def run(self, layers: list[str], prefix: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
        words = [str(self.victim.pid), str(self.folder / "private/key"), str(self.folder / "model")]
        words += [str(self.tcp.getsockname()[1]), str(self.folder / "s"), str(self.udp.getsockname()[1])]
        spec = {
            "root": str(self.folder / "root"),
            "module": "none",
            "python": PYTHON,
            "scratch": str(self.folder / "scratch"),
            "parent": self.victim.pid,
            "args": words,
            "sandbox": self.policy(layers) | more,
        }
        spec.pop("parent")  # it is not the victim that started it
        lifeline, held = os.pipe()
        try:
            done = subprocess.run(
                [
                    *prefix,
                    PYTHON,
                    "-I",
                    "-S",
                    str(self.folder / "code/engines/launch.py"),
                    json.dumps(spec),
                    str(lifeline),
                ],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                pass_fds=(lifeline,),
                timeout=30,
                user=self.uid,
                group=self.uid,
                extra_groups=[],
                env={"PATH": "/usr/bin:/bin"},
                check=False,
            )
        finally:
            os.close(lifeline)
            os.close(held)
        assert done.returncode == 0, done.stderr.decode()
        return json.loads(done.stdout)


@pytest.fixture(params=[PLAIN_UID, 0], ids=["plain user", "root"])
def ground(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    base = tmp_path_factory.mktemp("g")
    for folder in (base, base.parent, base.parent.parent):  # pytest keeps its folders to itself
        folder.chmod(0o755)
    made = Ground(base / "ground", request.param)
    yield made
    made.close()


def words(table: dict[str, str]) -> dict[str, str]:
    return {name: "x" if word.startswith("denied") else "o" for name, word in table.items()}


@pytest.mark.parametrize("name", SETS)
def test_observed_is_expected_in_every_cell(ground: Ground, name: str):
    if abi() < 6 and "landlock" in name:
        pytest.skip("the table is for Landlock 6 and later")
    report = ground.run(SETS[name])
    assert report["needs"] == dict.fromkeys(report["needs"], "open")
    expected = {attack: row[name] for attack, row in EXPECTED.items()}
    if ground.uid == 0:
        expected |= ROOTS_OWN.get(name, {})
    assert words(report["attacks"]) == expected, report


def test_every_layer_is_verified_here_or_says_why(ground: Ground):
    verdicts = ground.run(SETS["all"])["verdicts"]
    for layer in ("pid", "proc", "net", "privileges", "landlock", "seccomp"):
        assert verdicts[layer] == "verified", verdicts
    assert ground.run([])["verdicts"]["seccomp"] == "off"


def test_without_user_namespaces_the_other_layers_hold(tmp_path_factory: pytest.TempPathFactory):
    base = tmp_path_factory.mktemp("g")
    for folder in (base, base.parent, base.parent.parent):
        folder.chmod(0o755)
    ground = Ground(base / "ground", PLAIN_UID)
    try:
        # Within a user namespace whose owner allows itself no further ones: clone says ENOSPC, as with the sysctl at 0.
        prefix = ("unshare", "--user", "--map-root-user", "sh", "-c")
        go = 'echo 0 > /proc/sys/user/max_user_namespaces && exec setpriv --bounding-set -all --inh-caps -all "$@"'
        report = ground.run(SETS["all"], (*prefix, go, "sh"))
    finally:
        ground.close()
    verdicts = report["verdicts"]
    assert verdicts["pid"].startswith("unavailable("), verdicts
    assert (verdicts["landlock"], verdicts["seccomp"]) == ("verified", "verified")
    expected = {attack: row["landlock+seccomp"] for attack, row in EXPECTED.items()}
    assert words(report["attacks"]) == expected, report


def test_a_required_layer_that_is_not_verified_stops_the_start(ground: Ground):
    with pytest.raises(AssertionError, match="landlock is off, seccomp is off"):
        ground.run(["namespaces", "privileges"], mode="require")
