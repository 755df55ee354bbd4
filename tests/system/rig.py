"""A whole supervisor with its embedded coordinator in one folder, for tests that attack it. Loaded by conftest.py."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import psutil

from supervisor.cli import main
from supervisor.control.client import ask

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 120.0  # what is waited for takes seconds at most; a machine with much to do may stand still for some
POLL_S = 0.02
# The bars of the project after a SIGKILL of the supervisor, which scripts/soak holds it to: until nothing of its tree
# is left (a lone warden needs about 3 ms), and until the next life serves (about 2 s). Otherwise the tests run beside
# others, on a machine that may stand still for seconds.
_SOAK = "BULKHEAD_ATTACK_SEEDS" in os.environ
GONE_S = 2.0 if _SOAK else 20.0
SERVES_S = 15.0 if _SOAK else 90.0

# Writes `count` files of `size` bytes each into its attempt's folder.
_PROGRAM = """
import pathlib, sys
folder, count, size = pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for number in range(count):
    (folder / ("part-%d.bin" % number)).write_bytes(bytes([number % 256]) * size)
print("wrote", count)
"""

MODELS = f"""
[engines.odd]
module = "engines.synthetic.misbehave"
[[models]]
name = "synthetic"
engine = "synthetic"
[[models]]
name = "synthetic-slow"
engine = "synthetic"
options = {{ slots = 2, tokens = 4000, delay_ms = 25 }}
[[models]]
name = "synthetic-flood"
engine = "synthetic"
options = {{ slots = 2, tokens = 1000000, delay_ms = 0 }}
[[models]]
name = "synthetic-late"
engine = "synthetic"
options = {{ load_s = 1.0 }}
[[models]]
name = "synthetic-odd"
engine = "odd"
kinds = ["llm"]
[[models]]
name = "files"
engine = "command"
options = {{ argv = {json.dumps([sys.executable, "-I", "-c", _PROGRAM, "{folder}", "{count}", "{size}"])} }}
[[models]]
name = "chat"
engine = "llm"
path = {json.dumps(str(ROOT / "engines/llm/fixture/chat-q8_0.gguf"))}
"""
NAMES = frozenset({"synthetic", "synthetic-slow", "synthetic-flood", "synthetic-late", "synthetic-odd", "files"})


def until(true: Callable[[], Any], what: str, patience_s: float = PATIENCE_S) -> Any:
    """Look again and again until `true()` is; returns its value. AssertionError after `patience_s`."""
    end = time.monotonic() + patience_s
    while not (value := true()):
        assert time.monotonic() < end, f"not within {patience_s:g} s: {what}"
        time.sleep(POLL_S)
    return value


def free_port() -> int:
    """A port that nobody has now, and that the system gives to nobody who asks for any port: it stays free."""
    for port in random.SystemRandom().sample(range(20_000, 30_000), 100):
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no port of 100 is free")


def processes_of(folder: Path) -> list[psutil.Process]:
    """Every process that belongs to a state folder: by command line, environment or working folder.

    A zombie is no process any more: its parent, which may be gone, has only not asked for its exit code.
    """
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            mine = process.pid != os.getpid() and any(str(folder) in word for word in _words_of(process))
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _words_of(process: psutil.Process) -> list[str]:
    """Each of the three is asked for by itself: a process of another user shows its command line only."""
    words: list[str] = []
    with contextlib.suppress(psutil.Error, OSError):
        words += process.cmdline()
    with contextlib.suppress(psutil.Error, OSError):
        words.append(process.cwd())
    with contextlib.suppress(psutil.Error, OSError):
        words += process.environ().values()
    return words


def entries(folder: Path) -> list[Path]:
    """What lies in a folder; nothing when it has gone, as folders of engines do at any time."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return sorted(folder.iterdir())
    return []


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those that still do something; a zombie only waits for somebody who asks for its exit code."""
    found = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


class Rig:
    """One worker.toml, one state folder, and at most one running `supervisor run`.

    Args:
        limits: what stands below `[limits]`; further tables of it may follow.
        models: engines and models of worker.toml; `MODELS` unless told.
        verdicts: probes that were passed before; copied into the state folder so that a start need not wait.
        want: models that `ready` waits for.
        env: more environment for the supervisor.
    """

    def __init__(
        self,
        folder: Path,
        *,
        port: int = 0,
        limits: str = "drain_s = 20",
        models: str = MODELS,
        verdicts: Path | None = None,
        want: frozenset[str] = NAMES,
        env: Mapping[str, str] | None = None,
    ) -> None:
        self.folder, self.want = folder, want
        self.state = folder / "state"
        self.log = folder / "log"
        self.config = folder / "worker.toml"
        self._verdicts = verdicts
        self.config.write_text(
            f'[coordinator]\nlisten = "127.0.0.1:{port}"\n[worker]\nname = "box"\nstate_dir = "state"\n'
            f"[limits]\n{limits}\n{models}"
        )
        self._env = {**os.environ, **(env or {})}
        self.process: subprocess.Popen[bytes] | None = None
        self._clients: list[httpx.Client] = []

    # ---- life

    def argv(self) -> list[str]:
        """What starts it."""
        return [sys.executable, "-m", "supervisor", "run", "--config", str(self.config)]

    def start(self) -> subprocess.Popen[bytes]:
        """Start, without waiting for anything."""
        if self._verdicts is not None and self._verdicts.exists() and not (self.state / "verdicts.json").exists():
            self.state.mkdir(mode=0o700, exist_ok=True)
            shutil.copy(self._verdicts, self.state / "verdicts.json")
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.argv(), stdout=log, stderr=log, stdin=subprocess.DEVNULL, cwd=ROOT, env=self._env
            )
        return self.process

    def ready(self) -> httpx.Client:
        """Start when it is not running; wait until every wanted model is announced."""
        process = self.process if self.process is not None and self.process.poll() is None else self.start()

        def up() -> httpx.Client | None:
            assert process.poll() is None, f"ended with {process.returncode}\n{self.words()}"
            with contextlib.suppress(OSError, ValueError, KeyError, httpx.HTTPError):
                told = self.endpoint()
                if told["pid"] != process.pid:
                    return None
                client = self.client()
                listed = {model["id"] for model in client.get("/v1/models").json()["data"]}
                if listed >= self.want:
                    return client
                client.close()
            return None

        client = until(up, f"the models are announced\n{self.words()}")
        if self._verdicts is not None and not self._verdicts.exists():
            with contextlib.suppress(OSError):
                shutil.copy(self.state / "verdicts.json", self._verdicts)
        return client

    def kill(self) -> None:
        """SIGKILL of the supervisor alone."""
        assert self.process is not None
        self.process.kill()
        self.process.wait(PATIENCE_S)

    def end(self, number: int = signal.SIGTERM) -> int:
        """Ask for the end and wait for it."""
        assert self.process is not None
        self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)

    def sweep(self) -> None:
        """Leave nothing behind, whatever the test did."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(PATIENCE_S)
        for process in processes_of(self.folder):
            with contextlib.suppress(psutil.Error):
                process.kill()
        for client in self._clients:
            client.close()

    # ---- looking

    def words(self) -> str:
        """The log of all lives."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def endpoint(self) -> dict[str, Any]:
        """endpoint.json."""
        return json.loads((self.state / "endpoint.json").read_text())

    def key(self) -> str:
        """The client key."""
        return (self.state / "coordinator" / "client.key").read_text().strip()

    @property
    def port(self) -> int:
        """Where the coordinator listens."""
        return int(self.endpoint()["url"].rpartition(":")[2])

    def client(self, timeout_s: float = PATIENCE_S) -> httpx.Client:
        """An HTTP client with the key; closed by `sweep`."""
        headers = {"Authorization": f"Bearer {self.key()}"}
        url = self.endpoint()["url"]
        self._clients.append(httpx.Client(base_url=url, headers=headers, timeout=timeout_s, trust_env=False))
        return self._clients[-1]

    def children(self, words: str) -> list[psutil.Process]:
        """Children of the running supervisor whose command line has these words."""
        assert self.process is not None
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                if words in " ".join(child.cmdline()):
                    found.append(child)
        return found

    def descendants(self) -> list[psutil.Process]:
        """Every process below the running supervisor; those that detached themselves hang below a warden, too."""
        assert self.process is not None
        return psutil.Process(self.process.pid).children(recursive=True)

    def coordinator(self) -> psutil.Process:
        """The embedded coordinator."""
        (one,) = until(lambda: self.children("-m coordinator serve"), "there is a coordinator")
        return one

    def engine(self, module: str) -> psutil.Process:
        """The one running instance of an engine module; not its warden, whose command line is the launcher's."""

        def engines() -> list[psutil.Process]:
            found = []
            for each in self.children(f"engines.{module}"):
                with contextlib.suppress(psutil.Error):
                    if (words := " ".join(each.cmdline())) and "launch.py" not in words:
                        found.append(each)
            return found

        (one,) = until(engines, f"there is an instance of {module}")
        return one

    # ---- the owner's socket

    def order(self, *words: str) -> subprocess.CompletedProcess[str]:
        """`supervisor WORDS`, as its owner types it, but in this process.

        An interpreter of its own takes seconds to start where there is much to do, and the work that a test asks about
        goes on meanwhile.
        """
        argv = [*words, "--config", str(self.config)]
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(argv)
        return subprocess.CompletedProcess(argv, code, out.getvalue(), err.getvalue())

    def ask(self, method: str, route: str, body: object = None) -> dict[str, Any]:
        """What the control socket answers."""
        found: dict[str, Any] = ask(self.state / "control.sock", method, route, body, patience_s=PATIENCE_S)
        return found

    def status(self) -> dict[str, Any]:
        """What `supervisor status --json` shows."""
        return self.ask("GET", "/v1/status")

    def model(self, name: str) -> dict[str, Any]:
        """One model of the status."""
        return next(model for model in self.status()["models"] if model["name"] == name)

    def gpu(self, uuid: str) -> dict[str, Any]:
        """One GPU of the status."""
        return next(gpu for gpu in self.status()["gpus"] if gpu["uuid"] == uuid)

    # ---- what is left

    def scratch(self) -> list[str]:
        """Whatever lies in the scratch folders of instances, attempts and probes; their empty grounds may stay."""
        left = [str(path) for path in entries(self.state / "probes")]
        for ground in entries(self.state / "instances"):
            left += [str(path) for path in entries(ground) if path.name not in ("in", "out")]
        return left + self.attempts()

    def attempts(self) -> list[str]:
        """Folders of attempts, with inputs or outputs."""
        grounds = entries(self.state / "instances")
        return [str(path) for ground in grounds for part in ("in", "out") for path in entries(ground / part)]


def chat(text: str, model: str = "synthetic", **more: Any) -> dict[str, Any]:
    """The body of a chat request."""
    return {"model": model, "messages": [{"role": "user", "content": text}], **more}


def job(text: str, tokens: int = 20, model: str = "synthetic-slow", **more: Any) -> dict[str, Any]:
    """The body of a chat as a job; the slow model needs 25 ms for each token."""
    params = {"messages": [{"role": "user", "content": text}], "max_tokens": tokens}
    return {"kind": "llm", "model": model, "params": params, **more}


def submit(client: httpx.Client, body: dict[str, Any]) -> str:
    """Submit a job; its id."""
    return client.post("/v1/jobs", json=body).raise_for_status().json()["id"]


def ended(client: httpx.Client, id_: str, patience_s: float = PATIENCE_S) -> dict[str, Any]:
    """The job, when it has ended. A coordinator that is away for a moment is asked again."""

    def look() -> dict[str, Any] | None:
        with contextlib.suppress(httpx.TransportError):
            answer = client.get(f"/v1/jobs/{id_}")
            assert answer.status_code == 200, f"{id_}: {answer.status_code} {answer.text}"
            found = answer.json()
            return found if found["state"] in ("succeeded", "failed", "cancelled") else None
        return None

    return until(look, f"{id_} ends", patience_s)


def state_of(client: httpx.Client, id_: str) -> str:
    """State of a job."""
    return client.get(f"/v1/jobs/{id_}").raise_for_status().json()["state"]


@contextlib.contextmanager
def tiny_disk(folder: Path, size: str, access: str = "rw") -> Iterator[Path]:
    """A tmpfs of this size, mounted at `folder`. Raises PermissionError where mounting is not allowed."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"{access},size={size},mode=700", "none", str(folder)],
        capture_output=True,
        check=False,
    )
    if done.returncode != 0:
        raise PermissionError(done.stderr.decode(errors="replace").strip())
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
