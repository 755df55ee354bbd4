"""A small machine of its own whose PID 1 is a real systemd, made of namespaces over this machine's root.

Theory of operation. `unshare` gives a process its own pid, mount, uts, ipc, net and cgroup namespaces; a shell in
it lays an overlay over the host's root (whatever is written goes to a tmpfs and is gone with the box), mounts a
fresh /proc, /sys, /dev and /run, empties the places where the host enables its own units, pivots and becomes
systemd. An overlay needs no download and no copy, and the interpreter finds the libraries that it was built for,
which a bootstrapped Debian could not promise. Only the repository and the interpreter are bound from the host,
read-only. `nsenter` runs programs inside. Killing the box's PID 1 ends all of it: the kernel takes the processes,
the mounts and the network with the namespaces.

It needs root, a cgroup v2 hierarchy, and the packages systemd, dbus and libpam-systemd (for user managers);
`missing` says what is not there. There are no memory or CPU controllers where the host keeps them on cgroup v1.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 120.0
POLL_S = 0.02
_SYSTEMD = ("/usr/lib/systemd/systemd", "/lib/systemd/systemd")
_PAM = ("/usr/lib", "/lib")

# $1 the box's folder, $2 systemd, then the folders that are bound read-only. Runs as PID 1 of the new namespaces.
_PRELUDE = r"""
set -eu
box=$1 systemd=$2
shift 2
mount --make-rprivate /
mount -t tmpfs -o mode=755,size=1g box "$box"
mkdir "$box/upper" "$box/work" "$box/root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$box/upper,workdir=$box/work" "$box/root"
root=$box/root
mount -t proc proc "$root/proc"
mount -t sysfs -o ro sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t tmpfs -o mode=755 dev "$root/dev"
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=0666,mode=620 devpts "$root/dev/pts"
mount -t tmpfs -o mode=1777 shm "$root/dev/shm"
ln -s pts/ptmx "$root/dev/ptmx"
ln -s /proc/self/fd "$root/dev/fd"
for node in null:3 zero:5 full:7 random:8 urandom:9; do
    mknod -m 666 "$root/dev/${node%:*}" c 1 "${node#*:}"
done
mknod -m 666 "$root/dev/tty" c 5 0
for place in /run /var/log /var/lib/systemd /etc/systemd/system /etc/systemd/user; do
    mkdir -p "$root$place"
    mount -t tmpfs -o mode=755 box "$root$place"
done
mount -t tmpfs -o mode=1777 box "$root/tmp"
for folder in "$@"; do
    # The service's user has to reach it; what lies in the overlay is this box's alone.
    mkdir -p "$root$folder"
    parent=$(dirname "$folder")
    while [ "$parent" != / ]; do
        chmod o+rx "$root$parent" 2>/dev/null || true
        parent=$(dirname "$parent")
    done
    mount --bind "$folder" "$root$folder"
    mount -o remount,bind,ro "$root$folder"
done
rm -f "$root/etc/fstab" "$root/etc/machine-id" "$root/etc/resolv.conf"
echo 0123456789abcdef0123456789abcdef > "$root/etc/machine-id"
mkdir -p "$root/etc/systemd/system.conf.d" "$root/mnt"
# What asks the hardware, or a person, has nothing to do here.
for unit in getty.target systemd-udevd.service systemd-udev-trigger.service systemd-firstboot.service \
    systemd-pcrphase.service systemd-pcrphase-sysinit.service systemd-binfmt.service systemd-sysctl.service \
    proc-sys-fs-binfmt_misc.automount systemd-modules-load.service kmod-static-nodes.service systemd-repart.service \
    dev-hugepages.mount dev-mqueue.mount sys-kernel-config.mount sys-kernel-debug.mount sys-kernel-tracing.mount \
    sys-fs-fuse-connections.mount systemd-tmpfiles-clean.timer systemd-random-seed.service; do
    ln -s /dev/null "$root/etc/systemd/system/$unit"
done
hostname box
cd "$root"
pivot_root . mnt
umount -l /mnt
exec env -i container=bulkhead-test PATH=/usr/sbin:/usr/bin:/sbin:/bin \
    "$systemd" --system --unit=multi-user.target --log-target=journal --show-status=false
"""


@functools.cache
def missing() -> str:
    """Why there can be no box here, as one sentence; "" when there can."""
    if sys.platform != "linux":
        return "systemd needs Linux"
    if os.geteuid() != 0:
        return "a box with its own systemd needs root"
    tools = [name for name in ("unshare", "nsenter", "systemctl", "loginctl", "dbus-daemon") if not shutil.which(name)]
    if tools or _systemd() is None or not _has_pam():
        return "there is no systemd to boot: apt-get install systemd dbus libpam-systemd dbus-user-session util-linux"
    if _cgroup2() is None:
        return "there is no writable cgroup v2 hierarchy"
    tried = subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "mount", "-t", "tmpfs", "none", "/mnt"],
        capture_output=True,
        check=False,
    )
    return "" if tried.returncode == 0 else f"mounting is not allowed: {tried.stderr.decode(errors='replace').strip()}"


def _systemd() -> str | None:
    return next((path for path in _SYSTEMD if os.access(path, os.X_OK)), None)


def _has_pam() -> bool:
    return any(Path(root).glob("*/security/pam_systemd.so") for root in _PAM) or any(
        Path(root, "security/pam_systemd.so").exists() for root in _PAM
    )


def _cgroup2() -> Path | None:
    for line in Path("/proc/mounts").read_text().splitlines():
        _source, place, kind, *_rest = line.split()
        if kind == "cgroup2" and os.access(place, os.W_OK):
            return Path(place)
    return None


def until(true: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    """Look again and again until `true()` is; returns its value. AssertionError after `patience_s`."""
    end = time.monotonic() + patience_s
    while not (value := true()):
        assert time.monotonic() < end, f"not within {patience_s:g} s: {what}"
        time.sleep(POLL_S)
    return value


class Box:
    """A booted box. Made by `booted` only.

    Args:
        init: pid of its systemd, as the host sees it.
        cgroup: the box's own, on the host.
    """

    def __init__(self, init: int, cgroup: Path) -> None:
        self.init, self.cgroup = init, cgroup

    # ---- doing

    def run(
        self, argv: Sequence[str], *, user: str = "", stdin: str = "", env: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a program inside, to its end; as root, or as `user` with that user's manager in reach."""
        words = ["nsenter", "-t", str(self.init), "-m", "-u", "-i", "-n", "-p", "-C"]
        if user:
            uid = self.uid(user)
            words += ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--init-groups"]
        else:
            uid = 0
        home = f"/home/{user}" if user else "/root"
        inside = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": home, "USER": user or "root", "LC_ALL": "C.UTF-8"}
        if user:
            inside["XDG_RUNTIME_DIR"] = f"/run/user/{uid}"
        return subprocess.run(
            [*words, *argv],
            input=stdin,
            capture_output=True,
            text=True,
            check=False,
            timeout=240,
            env=inside | (env or {}),
        )

    def ok(self, *argv: str, user: str = "", stdin: str = "") -> str:
        """Run a program that must succeed; its stdout."""
        done = self.run(argv, user=user, stdin=stdin)
        assert done.returncode == 0, f"{argv}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        """Write a file inside, with its folders."""
        self.ok(
            "sh",
            "-c",
            'mkdir -p "$(dirname "$1")" && cat > "$1" && chmod "$2" "$1"',
            "sh",
            path,
            f"{mode:o}",
            stdin=text,
        )

    def uid(self, user: str) -> int:
        """Number of a user of the box."""
        return int(self.ok("id", "-u", user))

    # ---- looking

    def show(self, unit: str, *names: str, user: str = "") -> dict[str, str]:
        """Properties of a unit."""
        scope = ["--user"] if user else []
        text = self.ok("systemctl", *scope, "show", unit, f"--property={','.join(names)}", user=user)
        return dict(line.split("=", 1) for line in text.splitlines() if "=" in line)

    def log(self, unit: str) -> str:
        """What the journal has of a unit, its starts and ends included."""
        return self.run(["journalctl", "-q", "-o", "cat", "-u", unit]).stdout

    def processes(self) -> dict[int, str]:
        """Every process of the box but its PID 1 and zombies: pid inside -> command line."""
        script = (
            "for p in /proc/[0-9]*; do n=${p#/proc/}; "
            'read -r _ _ state _ < "$p/stat" 2>/dev/null || continue; [ "$state" = Z ] && continue; '
            "printf '%s ' \"$n\"; tr '\\0\\n' '  ' < \"$p/cmdline\" 2>/dev/null; echo; done"
        )
        found = {}
        for line in self.ok("bash", "-c", script).splitlines():
            number, _, words = line.partition(" ")
            if words.strip() and "/proc/[0-9]*" not in words:
                found[int(number)] = words.strip()
        return found


@contextlib.contextmanager
def booted(folder: Path) -> Iterator[Box]:
    """Boot a box; leaving the block ends it and everything in it.

    Raises:
        AssertionError: it does not come up within PATIENCE_S.
    """
    systemd, hierarchy = _systemd(), _cgroup2()
    assert systemd is not None
    assert hierarchy is not None
    cgroup = hierarchy / f"bulkhead-box-{os.getpid()}-{folder.name}"
    cgroup.mkdir()
    shown = sorted({str(ROOT), sys.prefix, sys.base_prefix})
    shown = [path for path in shown if not any(path.startswith(f"{other}/") for other in shown)]
    inside = ["unshare", "--pid", "--fork", "--kill-child", "--mount", "--uts", "--ipc", "--net", "--cgroup"]
    enter = 'echo $$ > "$1/cgroup.procs"; shift; exec "$@"'
    log = folder / "console"
    with log.open("wb") as console:
        outer = subprocess.Popen(
            ["sh", "-c", enter, "sh", cgroup, *inside, "sh", "-c", _PRELUDE, "sh", folder, systemd, *shown],
            stdin=subprocess.DEVNULL,
            stdout=console,
            stderr=console,
        )
    try:
        init = until(lambda: _only_child(outer), f"systemd is PID 1\n{log.read_text()}")
        box = Box(init, cgroup)
        until(lambda: _is_up(box, outer, log), "the box is up")
        yield box
    finally:
        outer.kill()  # --kill-child takes PID 1 along, and that the rest
        outer.wait(PATIENCE_S)
        until(lambda: not _members(cgroup), "the box is gone")
        for path, _folders, _files in os.walk(cgroup, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(path)


def _only_child(outer: subprocess.Popen[bytes]) -> int:
    assert outer.poll() is None, f"the box ended with {outer.returncode}"
    for text in Path(f"/proc/{outer.pid}/task/{outer.pid}/children").read_text().split():
        return int(text)
    return 0


def _is_up(box: Box, outer: subprocess.Popen[bytes], log: Path) -> bool:
    assert outer.poll() is None, f"the box ended with {outer.returncode}\n{log.read_text()}"
    if Path(f"/proc/{box.init}/comm").read_text().strip() != "systemd":
        return False
    return box.run(["systemctl", "is-system-running"]).stdout.strip() in ("running", "degraded")


def _members(cgroup: Path) -> list[int]:
    found = []
    for path, _folders, _files in os.walk(cgroup):  # which passes over groups that go meanwhile
        with contextlib.suppress(OSError):
            found += [int(text) for text in Path(path, "cgroup.procs").read_text().split()]
    return found


# ---- a service in a box ------------------------------------------------------------------------------------------

TOML = """\
[coordinator]
listen = "127.0.0.1:0"
[limits]
drain_s = 20
cancel_grace_s = 1
term_grace_s = 1
[engines.odd]
module = "engines.synthetic.misbehave"
[[models]]
name = "synthetic-slow"
engine = "synthetic"
options = { slots = 2, tokens = 400, delay_ms = 25 }
[[models]]
name = "synthetic-odd"
engine = "odd"
kinds = ["llm"]
"""
# What tests change of a unit: its pace. RestartSec=2 and WatchdogSec=30 are for people.
QUICK = "[Service]\nRestartSec=200ms\n"
# Longer than a machine with much to do may stand still: a supervisor reports twice within it.
WATCHDOG_S = 10.0
WATCHED = f"{QUICK}WatchdogSec={WATCHDOG_S:g}\n"
_PYTHON = (sys.executable, "-P", "-m")
_CHAT = """
import json, sys, urllib.request
url, key, model, text, tokens = sys.argv[1:]
body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": int(tokens)}
headers = {"Authorization": "Bearer " + key, "Content-Type": "application/json"}
asked = urllib.request.Request(url + "/v1/chat/completions", json.dumps(body).encode(), headers)
with urllib.request.urlopen(asked, timeout=120) as answer:
    print(json.load(answer)["choices"][0]["message"]["content"])
"""
_MODELS = """
import json, sys, urllib.request
asked = urllib.request.Request(sys.argv[1] + "/v1/models", headers={"Authorization": "Bearer " + sys.argv[2]})
with urllib.request.urlopen(asked, timeout=120) as answer:
    print(*(model["id"] for model in json.load(answer)["data"]))
"""


class Worker:
    """One service of the supervisor in a box, under a name of its own.

    Args:
        user: whose unit it is; "" for one of the system.
    """

    def __init__(self, box: Box, name: str, *, user: str = "", toml: str = TOML) -> None:
        self.box, self.name, self.user = box, name, user
        self.unit = f"{name}.service"
        self.config = f"/home/{user}/{name}.toml" if user else f"/etc/{name}/worker.toml"
        self.state_dir = f"/home/{user}/.local/state/bulkhead" if user else f"/var/lib/{name}"
        self._asked: list[subprocess.Popen[str]] = []
        self.rewrite(toml)

    def rewrite(self, toml: str) -> None:
        """Replace worker.toml."""
        self.box.write(self.config, toml)

    def service(self, verb: str, *words: str) -> subprocess.CompletedProcess[str]:
        """`supervisor service VERB`."""
        scope = () if self.user else ("--system",)
        argv = (*_PYTHON, "supervisor", "service", verb, *scope, "--name", self.name, *words)
        return self.box.run(argv, user=self.user)

    def install(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`supervisor service install`."""
        return self.service("install", "--config", self.config, *words)

    def drop_in(self, text: str) -> None:
        """Change the unit beside its file."""
        self.box.write(f"/etc/systemd/system/{self.unit}.d/test.conf", text)
        self.box.ok("systemctl", "daemon-reload")

    def ctl(self, verb: str, *words: str) -> subprocess.CompletedProcess[str]:
        """systemctl VERB on the unit."""
        return self.box.run(["systemctl", *(["--user"] if self.user else []), verb, *words, self.unit], user=self.user)

    def show(self, name: str) -> str:
        """One property of the unit."""
        return self.box.show(self.unit, name, user=self.user).get(name, "")

    def pid(self) -> int:
        """The supervisor's pid inside the box."""
        return int(self.show("MainPID"))

    def endpoint(self) -> tuple[str, str]:
        """Address and client key of the embedded coordinator."""
        told = json.loads(self.box.ok("cat", f"{self.state_dir}/endpoint.json"))
        return told["url"], self.box.ok("cat", told["client_key_file"]).strip()

    def models(self) -> set[str]:
        """What the coordinator offers now. AssertionError when it does not answer."""
        return set(self.box.ok(sys.executable, "-c", _MODELS, *self.endpoint()).split())

    def serving(self) -> None:
        """Wait until both models are offered."""
        until(lambda: self.models() >= {"synthetic-slow", "synthetic-odd"}, f"models of {self.name} are offered")

    def chat(self, model: str, text: str, tokens: int = 20) -> subprocess.Popen[str]:
        """Ask; the answer is its stdout. Ended with the worker."""
        words = ["nsenter", "-t", str(self.box.init), "-n", "-m", "-p", "-C"]
        argv = [*words, sys.executable, "-c", _CHAT, *self.endpoint(), model, text, str(tokens)]
        self._asked.append(subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        return self._asked[-1]

    def remove(self) -> None:
        """Take it away, whatever its state."""
        for asked in self._asked:
            with asked:  # waits, and closes its pipes
                asked.kill()
        self.ctl("kill", "--signal=SIGKILL", "--kill-whom=all")
        self.service("uninstall")
        self.box.run(["rm", "-rf", f"/etc/systemd/system/{self.unit}.d"])
