"""What scripts/replicas starts and ends: a PostgreSQL, replicas, a worker, and a small proxy before the replicas."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from coordinator.testing_postgres import postgres_server, why_not

ROOT = Path(__file__).resolve().parents[1]
START_S = 120.0
END_S = 90.0
LOOK_S = 0.05
HEALTH_S = 2.0
CHUNK = 65536


class Wrong(Exception):
    """It does not go as it is told."""


def until(true: Callable[[], Any], what: str, patience_s: float = START_S) -> Any:
    """The first value of `true` that counts as true. Raises Wrong."""
    end = time.monotonic() + patience_s
    while not (found := true()):
        if time.monotonic() > end:
            raise Wrong(f"not within {patience_s:g} s: {what}")
        time.sleep(LOOK_S)
    return found


def environment(store: str = "") -> dict[str, str]:
    """Ours, without what would be stronger than the files that are written here."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("BULKHEAD_", "COORDINATOR_"))}
    return {**ours, "COORDINATOR_STORE": store} if store else ours


def command(program: str, *arguments: str, store: str = "") -> str:
    """Run one of ours to its end; what it said. Raises Wrong with what it complained of."""
    done = subprocess.run(
        [sys.executable, "-m", program, *arguments],
        cwd=ROOT,
        env=environment(store),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=START_S,
        check=False,
    )
    if done.returncode:
        raise Wrong(f"`{program} {arguments[0]}` ended with exit code {done.returncode}: {done.stderr.strip()}")
    return done.stdout


class Program:
    """One of our processes that stays; its words go to a file. A session of its own: Ctrl-C is the script's alone."""

    def __init__(self, log: Path) -> None:
        self.log = log
        self._process: subprocess.Popen[str] | None = None

    def start(self, program: str, *arguments: str, store: str = "") -> None:
        """Start it."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", program, *arguments],
                cwd=ROOT,
                env=environment(store),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                text=True,
                start_new_session=True,
            )

    @property
    def runs(self) -> bool:
        """Whether it lives."""
        return self._process is not None and self._process.poll() is None

    def check(self) -> None:
        """Raises Wrong with its last words when it has ended."""
        if not self.runs:
            tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])
            raise Wrong(f"{self.log.stem} has ended. Its last words:\n{tail}")

    def send(self, number: signal.Signals) -> None:
        """Send a signal, where it lives."""
        if self._process is not None and self.runs:
            self._process.send_signal(number)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal that ends it, and wait; its exit code. It is killed when it does not end."""
        if self._process is None:
            return 0
        self.send(number)
        try:
            return self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


# ---- PostgreSQL and the replicas


@contextlib.contextmanager
def database(given: str) -> Iterator[str]:
    """URL of the database: the one that was given, or of a server of our own. Raises Wrong without a server."""
    if given:
        yield given
        return
    if lack := why_not():
        raise Wrong(f"{lack}. Install it (Debian, Ubuntu: apt install postgresql), or give --store postgres://…")
    with postgres_server(durable=True) as server:
        yield server.url


class Replica(Program):
    """One `coordinator serve`; at another port after each start.

    Attributes:
        port: where it serves; 0 while it does not.
    """

    def __init__(self, number: int, folder: Path, config: Path, store: str) -> None:
        super().__init__(folder / f"replica{number}.log")
        self.number, self.port = number, 0
        self._config, self._store = config, store

    @property
    def url(self) -> str:
        """Its own base URL."""
        return f"http://127.0.0.1:{self.port}"

    def serve(self) -> None:
        """Start, and return when it serves. Raises Wrong."""
        self.log.unlink(missing_ok=True)
        self.start("coordinator", "serve", "--config", str(self._config), store=self._store)
        self.port = until(self._said, f"replica {self.number} serves")

    def _said(self) -> int:
        self.check()
        for line in self.log.read_text(errors="replace").splitlines():
            if line.startswith("Serving http://") and "/v1" in line:
                return int(line.split()[1].removesuffix("/v1").rpartition(":")[2])
        return 0

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """See `Program.end`."""
        try:
            return super().end(number)
        finally:
            self.port = 0


# ---- in front of them


class Front(threading.Thread):
    """Hands each new connection to the next replica whose /healthz says 200; bytes go through as they are.

    It stands for a load balancer, and is none: it knows no TLS, and looks at a replica once per connection.

    Attributes:
        url: where it listens.
        worker_at: number of the replica that had the latest WebSocket.
    """

    def __init__(self, replicas: list[Replica]) -> None:
        super().__init__(name="front", daemon=True)
        self.url, self.worker_at = "", -1
        self._replicas, self._turn = replicas, itertools.count()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._over = asyncio.Event()
        self._open = threading.Event()

    def run(self) -> None:
        """The thread."""
        asyncio.run(self._main())

    def __enter__(self) -> Front:
        """Listen."""
        self.start()
        if not self._open.wait(START_S):
            raise Wrong("the proxy did not start")
        return self

    def __exit__(self, *_: object) -> None:
        """Cut everything."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._over.set)
        self.join(END_S)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._open.set()
        await self._over.wait()
        server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        there: asyncio.StreamWriter | None = None
        with contextlib.suppress(OSError, asyncio.CancelledError):
            replica = await self._well()
            if replica is not None:
                back, there = await asyncio.open_connection("127.0.0.1", replica.port)
                await self._through(replica, reader, writer, back, there)
        for one in (writer, there):
            if one is not None:
                one.close()

    async def _well(self) -> Replica | None:
        """The next one that may be asked; None when there is none for long."""
        end = time.monotonic() + END_S
        while time.monotonic() < end:
            for _ in self._replicas:
                replica = self._replicas[next(self._turn) % len(self._replicas)]
                if replica.port and await _is_well(replica.port):
                    return replica
            await asyncio.sleep(LOOK_S)
        return None

    async def _through(
        self,
        replica: Replica,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        back: asyncio.StreamReader,
        there: asyncio.StreamWriter,
    ) -> None:
        first = await reader.read(CHUNK)
        if b"upgrade: websocket" in first.lower():
            self.worker_at = replica.number
        there.write(first)
        ways = [asyncio.create_task(_pump(reader, there)), asyncio.create_task(_pump(back, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()


async def _is_well(port: int) -> bool:
    """Whether /healthz there says 200."""
    try:
        async with asyncio.timeout(HEALTH_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(b"GET /healthz HTTP/1.1\r\nhost: 127.0.0.1\r\nconnection: close\r\n\r\n")
                return (await reader.readline()).split()[1:2] == [b"200"]
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await reader.read(CHUNK):
            writer.write(data)
            await writer.drain()


# ---- the worker

CHAT, TALK = "replicas-chat", "synthetic-replicas"
WORD_MS = 20
WORKER = """\
config_version = 1
[coordinator]
url = "embedded"
listen = "127.0.0.1:0"
[worker]
name = "box"
state_dir = "state"
[limits]
drain_s = 10
[[models]]
name = "{chat}"
engine = "llm"
path = {path}
[[models]]
name = "{talk}"
engine = "synthetic"
options = {{ slots = 8, delay_ms = {delay} }}
"""


class Worker(Program):
    """`supervisor run` with a tiny chat model, and one that says its prompt back at 50 words a second."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder / "worker.log")
        self.config, self.state = folder / "worker.toml", folder / "state"
        model = json.dumps(str(ROOT / "engines/llm/fixture/chat-q8_0.gguf"))
        self.config.write_text(WORKER.format(chat=CHAT, talk=TALK, path=model, delay=WORD_MS))

    def run(self) -> None:
        """Start."""
        self.start("supervisor", "run", "--config", str(self.config))

    def order(self, verb: str) -> None:
        """`supervisor pause` and `resume`. Raises Wrong."""
        command("supervisor", verb, "--config", str(self.config))

    def endpoint(self) -> tuple[str, str]:
        """Base URL and key of the embedded coordinator, once it answers. Raises Wrong."""

        def told() -> tuple[str, str] | None:
            self.check()
            with contextlib.suppress(OSError, ValueError, KeyError):
                said = json.loads((self.state / "endpoint.json").read_text())
                return str(said["url"]), Path(said["client_key_file"]).read_text().strip()
            return None

        found: tuple[str, str] = until(told, "the embedded coordinator answers")
        return found

    def announced(self, http: httpx.Client) -> None:
        """Wait until both models are served. Raises Wrong."""

        def both() -> bool:
            self.check()
            with contextlib.suppress(httpx.HTTPError, ValueError, KeyError):
                return {CHAT, TALK} <= {model["id"] for model in http.get("/v1/models").json()["data"]}
            return False

        until(both, "the worker's models are announced")
