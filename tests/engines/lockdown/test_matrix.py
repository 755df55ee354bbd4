"""Every layer set against every attack: what is denied, as a committed table, and what engines need still works.

Run with the interpreter of the system, as root, as root that drops to the engines' user, and as a plain user, with
and without namespaces. The table is matrix.txt.
"""

from __future__ import annotations

import json
import os
import secrets
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
MATRIX = Path(__file__).with_name("matrix.txt")
PYTHON = shutil.which("python3", path="/usr/bin:/usr/local/bin") or sys.executable
PLAIN_UID = 12345
ENGINE_UID = 65521
SETS = {
    "none": [],
    "namespaces": ["namespaces"],
    # Root keeps CAP_PERFMON otherwise, and newer kernels let that read /proc/PID/environ before they ask Landlock.
    "landlock": ["landlock", "privileges"],
    "seccomp": ["seccomp", "privileges"],
    "landlock+seccomp": ["landlock", "seccomp", "privileges"],
    "all": ["namespaces", "landlock", "seccomp", "privileges"],
}
WHO = ("plain user", "root", "root, dropped")


def expected(who: str) -> dict[str, dict[str, str]]:
    """Attack -> layer set -> "x" or "o", of one section of the table."""
    found: dict[str, dict[str, dict[str, str]]] = {}
    section: dict[str, dict[str, str]] = {}
    for line in MATRIX.read_text().splitlines():
        if line.startswith("["):
            section = found.setdefault(line[1 : line.index("]")], {})
        elif line and not line.startswith("#") and not line.startswith(" "):
            (*words,) = line.rsplit(maxsplit=len(SETS))
            section[words[0]] = dict(zip(SETS, words[1:], strict=True))
    return found[who]


def abi() -> int:
    code = "import sys; sys.path.append(sys.argv[1]); from engines.lockdown import landlock; print(landlock.abi())"
    done = subprocess.run([PYTHON, "-I", "-S", "-c", code, str(ROOT)], capture_output=True, text=True, check=False)
    return int(done.stdout or 0)


pytestmark = [
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the layers are Linux's"),
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can become the plain user and stay root"),
]


class Place:
    """A folder that anybody can reach, with a ground, a neighbour's ground, something private, and open doors."""

    def __init__(self, folder: Path, who: str) -> None:
        self.who, self.folder = who, folder
        self.uid = PLAIN_UID if who == "plain user" else 0
        self.engine_uid = ENGINE_UID if who == "root, dropped" else self.uid
        for name in ("private", "model", "root/engines/runtime", "root/protocol", "code"):
            (folder / name).mkdir(parents=True)
        (folder / "private" / "key").write_text("secret")
        (folder / "model" / "model").write_text("weights")
        shutil.copy(ATTACKS, folder / "root/engines/runtime/boot.py")
        # The checkout may lie where a plain user cannot go.
        shutil.copytree(ROOT / "engines" / "lockdown", folder / "code/engines/lockdown")
        for name in ("__init__.py", "launch.py"):
            shutil.copy(ROOT / "engines" / name, folder / "code/engines" / name)
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, self.uid, self.uid)
        (folder / "private/key").chmod(0o600)
        (folder / "roots").write_text("secret")
        (folder / "roots").chmod(0o600)
        for name in ("m0", "m1"):
            self._ground(folder / name)
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
            ["sleep", "1000"],
            user=self.uid,
            group=self.uid,
            extra_groups=[],
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )

    def _ground(self, folder: Path) -> None:
        """As supervisor/host/ground.py makes it: inputs are the supervisor's, the rest is the engine's."""
        for name in ("i1", "in/j", "out/j"):
            (folder / name).mkdir(parents=True)
        (folder / "in/j/audio").write_text("RIFF")
        (folder / "i1/key").write_text("secret")
        for path in [folder, *folder.rglob("*")]:
            os.chown(path, self.uid, self.uid)
        for name in ("i1", "i1/key", "out/j"):
            os.chown(folder / name, self.engine_uid, self.uid)
            (folder / name).chmod(0o770)

    def close(self) -> None:
        self.victim.kill()
        self.victim.wait()
        for plug in (self.tcp, self.udp, self.unix, self.abstract):
            plug.close()

    def policy(self, layers: list[str]) -> dict[str, Any]:
        real = os.path.realpath(PYTHON)
        made: dict[str, Any] = {
            "mode": "best-effort",
            "layers": [*layers, "uid"],
            "read": [
                *("/proc", "/sys", "/etc/ld.so.cache"),
                *(str(self.folder / name) for name in ("model", "root", "m0/in")),
            ],
            "execute": ["/lib", "/lib64", "/usr/lib", "/usr/local/lib", real],
            "write": [str(self.folder / "m0/i1"), str(self.folder / "m0/out")],
            "devices": ["/dev/null", "/dev/urandom"],
        }
        if self.who == "root, dropped":
            made["user"] = {
                "uid": ENGINE_UID,
                "gid": ENGINE_UID,
                "runs": [PYTHON],
                "reads": [str(self.folder / "root"), str(self.folder / "model")],
                "writes": [str(self.folder / "m0/i1")],
            }
        return made

    def run(self, layers: list[str], prefix: tuple[str, ...] = (), **more: Any) -> dict[str, Any]:
        token = f"bulkhead-{secrets.token_hex(8)}"
        names = {"private": "private/key", "model": "model", "roots": "roots", "ground": "m0", "neighbour": "m1"}
        given = {key: str(self.folder / name) for key, name in names.items()} | {
            "victim": self.victim.pid,
            "tcp": self.tcp.getsockname()[1],
            "unix": str(self.folder / "s"),
            "udp": self.udp.getsockname()[1],
            "token": token,
        }
        spec = {
            "root": str(self.folder / "root"),
            "module": "none",
            "python": PYTHON,
            "scratch": str(self.folder / "m0/i1"),
            "args": [json.dumps(given)],
            "sandbox": self.policy(layers) | more,
        }
        lifeline, held = os.pipe()
        try:
            done = subprocess.run(
                [
                    *prefix,
                    *(PYTHON, "-I", "-S", str(self.folder / "code/engines/launch.py"), json.dumps(spec), str(lifeline)),
                ],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                pass_fds=(lifeline,),
                timeout=120,
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
        report = json.loads(done.stdout)
        for folder in ("/tmp", "/dev/shm"):
            left = Path(folder) / token
            if report["attacks"][f"left in {folder}"] == "open" and not left.exists():
                report["attacks"][f"left in {folder}"] = "denied: it was a private one"
            left.unlink(missing_ok=True)
        return report


@pytest.fixture(params=WHO)
def place(request: pytest.FixtureRequest, reachable: Path) -> Iterator[Place]:
    made = Place(reachable / "place", request.param)
    yield made
    made.close()


def words(table: dict[str, str]) -> dict[str, str]:
    return {name: "x" if word.startswith("denied") else "o" for name, word in table.items()}


@pytest.mark.parametrize("name", SETS)
def test_observed_is_expected_in_every_cell(place: Place, name: str):
    if abi() < 6 and "landlock" in name:
        pytest.skip("the table is for Landlock 6 and later")
    report = place.run(SETS[name])
    assert report["needs"] == dict.fromkeys(report["needs"], "open")
    assert words(report["attacks"]) == {attack: row[name] for attack, row in expected(place.who).items()}, report


def test_the_table_names_every_attack_in_every_section():
    assert len({tuple(expected(who)) for who in WHO}) == 1


def test_every_layer_is_verified_here_or_says_why(place: Place):
    verdicts = place.run(SETS["all"])["verdicts"]
    for layer in ("pid", "proc", "net", "privileges", "landlock", "seccomp"):
        assert verdicts[layer] == "verified", verdicts
    assert verdicts["uid"] == ("verified" if place.who == "root, dropped" else "off")
    assert place.run([])["verdicts"]["seccomp"] == "off"


def no_more_user_namespaces(*then: str) -> tuple[str, ...]:
    """Within a user namespace whose owner allows itself no further ones: clone says ENOSPC, as with the sysctl at 0."""
    go = f'echo 0 > /proc/sys/user/max_user_namespaces && exec {" ".join(then)} "$@"'
    return ("unshare", "--user", "--map-root-user", "sh", "-c", go, "sh")


def test_without_user_namespaces_the_other_layers_hold(reachable: Path):
    place = Place(reachable / "place", "plain user")
    try:
        prefix = no_more_user_namespaces("setpriv", "--bounding-set", "-all", "--inh-caps", "-all")
        report = place.run(SETS["all"], prefix)
    finally:
        place.close()
    verdicts = report["verdicts"]
    assert verdicts["pid"].startswith("unavailable("), verdicts
    assert (verdicts["landlock"], verdicts["seccomp"]) == ("verified", "verified")
    wanted = {attack: row["landlock+seccomp"] for attack, row in expected("plain user").items()}
    # It is root in that namespace, and nothing outside it.
    assert words(report["attacks"]) == wanted | {"become root": "o"}, report


_TWO_USERS = """
import os, sys
ready, go = os.pipe(), os.pipe()
pid = os.fork()
if pid == 0:
    import ctypes
    if ctypes.CDLL(None).unshare(0x10000000):
        os._exit(99)
    os.write(ready[1], b"x")
    os.read(go[0], 1)
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    with open("/proc/sys/user/max_user_namespaces", "w") as file:
        file.write("0")
    os.execv(sys.argv[1], sys.argv[1:])
os.read(ready[0], 1)
for name in ("uid_map", "gid_map"):
    with open(f"/proc/{pid}/{name}", "w") as file:
        file.write("0 0 1\\n65521 65521 1\\n")
os.write(go[1], b"x")
sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""


def test_root_makes_the_other_namespaces_before_it_drops_where_there_are_no_user_namespaces(
    reachable: Path,
):
    place = Place(reachable / "place", "root, dropped")
    try:
        report = place.run(SETS["all"], (PYTHON, "-I", "-S", "-c", _TWO_USERS.replace("\\\\n", "\\n")))
    finally:
        place.close()
    verdicts = report["verdicts"]
    assert verdicts["user"] == "unavailable(ENOSPC)", verdicts
    for layer in ("uid", "pid", "proc", "net", "privileges", "landlock", "seccomp"):
        assert verdicts[layer] == "verified", verdicts
    wanted = {attack: row["all"] for attack, row in expected("root, dropped").items()}
    assert words(report["attacks"]) == wanted, report


def test_a_required_layer_that_is_not_verified_stops_the_start(place: Place):
    with pytest.raises(AssertionError, match="landlock is off, seccomp is off"):
        place.run(["namespaces", "privileges"], mode="require")
