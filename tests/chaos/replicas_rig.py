"""Real replica processes over one real PostgreSQL, behind a proxy, that a test may kill, stop and start again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from tests.chaos.replicas_proxy import PeerProxy

START_S = END_S = 60.0
LISTENS = "0A"  # in /proc/net/tcp
AGAIN_S = 2.0  # as the unit of an installed coordinator says: RestartSec
ROOT = Path(__file__).resolve().parents[2]


class NotServing(Exception):
    """It ended instead."""


class Replica:
    """One `coordinator serve` process; started again it is another replica, for clients at another address.

    Attributes:
        url: where clients and workers reach it; "" while it does not serve.
        ends: how often it was ended, or began to be; odd while it does not serve again.
        stops: how often it was stopped.
    """

    def __init__(self, number: int, folder: Path, store: str, state: Path, proxy: PeerProxy) -> None:
        self.number, self.url = number, ""
        self.ends = self.stops = 0
        self._folder, self._store, self._proxy = folder, store, proxy
        self._config = folder / f"replica{number}.toml"
        self._config.write_text(
            f'config_version = 1\nlisten = "127.0.0.1:0"\nstate = "{state}"\ndrain_s = 4\n'
            f'[replica]\nlisten = "127.0.0.1:0"\nadvertise = "127.0.0.1:{proxy.port}"\n'
            f'secret_file = "{folder / "secret"}"\n'
        )
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start, and return when it serves. Raises TimeoutError, NotServing."""
        with (self._folder / f"replica{self.number}.log").open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "coordinator", "serve", "--config", str(self._config)),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                env={**os.environ, "COORDINATOR_STORE": self._store},
            )
        assert self._process.stdout is not None
        line = await asyncio.wait_for(self._process.stdout.readline(), START_S)
        if not line.startswith(b"Serving "):
            tail = (self._folder / f"replica{self.number}.log").read_text(errors="replace")[-2000:]
            await self._process.wait()
            raise NotServing(f"replica {self.number} does not serve: {line!r}\n{tail}")
        self.url = line.split()[1].decode().removesuffix("/v1")
        (self._proxy.target,) = _listens_at(self._process.pid) - {int(self.url.rpartition(":")[2])}
        self.ends += self.ends % 2

    async def start_again(self) -> None:
        """As a unit of systemd does: again and again, until it serves."""
        while True:
            try:
                await self.start()
                return
            except NotServing:
                await asyncio.sleep(AGAIN_S)

    def silences(self) -> list[float]:
        """For how many seconds none of its beats had reached the database, each time that it was too long."""
        text = (self._folder / f"replica{self.number}.log").read_text(errors="replace")
        return [float(found) for found in re.findall(r"No beat reached the database for ([0-9.]+) s", text)]

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        assert self._process is not None
        self.stops += number is signal.SIGSTOP
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def end(self, number: signal.Signals) -> int:
        """Send a signal that ends it, and wait for the end; its exit code."""
        assert self._process is not None
        self.ends += 1 - self.ends % 2
        self.url = "" if number is signal.SIGKILL else self.url
        self.signal(signal.SIGCONT)
        self.signal(number)
        try:
            code = await asyncio.wait_for(self._process.wait(), END_S)
        except TimeoutError:
            self.signal(signal.SIGKILL)
            code = await self._process.wait()
        self.url = ""
        return code


def _listens_at(pid: int) -> set[int]:
    """Ports of TCP over IPv4 at which a process listens, as the kernel tells: its door's is told to replicas alone."""
    mine = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            mine.add(os.readlink(entry))
    ports = set()
    for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]:
        _, local, _, state, *_, inode = line.split()[:10]
        if state == LISTENS and f"socket:[{inode}]" in mine:
            ports.add(int(local.rpartition(":")[2], 16))
    return ports


class Cluster:
    """Replicas over one state folder, so that they have the same files and keys; each has a proxy before its door."""

    def __init__(self, folder: Path, store: str, proxies: Sequence[PeerProxy]) -> None:
        (folder / "secret").write_text("0123456789abcdef0123456789abcdef\n")
        self.state = folder / "state"
        self.proxies = proxies
        self.replicas = [Replica(number, folder, store, self.state, proxy) for number, proxy in enumerate(proxies)]

    @property
    def urls(self) -> list[str]:
        """Of the replicas that serve, as a load balancer has them: one that is stopped is still among them."""
        return [one.url for one in self.replicas if one.url]

    @property
    def client_key(self) -> str:
        """Of all replicas."""
        return (self.state / "client.key").read_text().strip()

    @property
    def worker_token(self) -> str:
        """Of all replicas."""
        return (self.state / "worker.token").read_text().strip()

    async def __aenter__(self) -> Cluster:
        """Start all: the first one alone, because it makes the keys."""
        await self.replicas[0].start()
        await asyncio.gather(*(one.start() for one in self.replicas[1:]))
        return self

    async def __aexit__(self, *_exc: object) -> None:
        """End all."""
        await asyncio.gather(*(one.end(signal.SIGKILL) for one in self.replicas))
