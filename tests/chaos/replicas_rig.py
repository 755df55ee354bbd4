"""Real replica processes over one real PostgreSQL, behind a proxy, that a test may kill, stop and start again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from pathlib import Path

START_S = END_S = 60.0
ROOT = Path(__file__).resolve().parents[2]


class Replica:
    """One `coordinator serve` process; started again it is another replica at another address.

    Attributes:
        url: where clients and workers reach it; "" while it does not serve.
    """

    def __init__(self, number: int, folder: Path, store: str, state: Path) -> None:
        self.number, self.url = number, ""
        self._folder, self._store = folder, store
        self._config = folder / f"replica{number}.toml"
        self._config.write_text(
            f'config_version = 1\nlisten = "127.0.0.1:0"\nstate = "{state}"\ndrain_s = 4\n'
            f'[replica]\nlisten = "127.0.0.1:0"\nsecret_file = "{folder / "secret"}"\n'
        )
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start, and return when it serves. Raises TimeoutError."""
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
            raise TimeoutError(f"replica {self.number} does not serve: {line!r}\n{tail}")
        self.url = line.split()[1].decode().removesuffix("/v1")

    def signal(self, number: signal.Signals) -> None:
        """Send a signal."""
        assert self._process is not None
        with contextlib.suppress(ProcessLookupError):
            self._process.send_signal(number)

    async def end(self, number: signal.Signals) -> int:
        """Send a signal that ends it, and wait for the end; its exit code."""
        assert self._process is not None
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


class Cluster:
    """Three replicas over one state folder, so that they have the same files and keys."""

    def __init__(self, folder: Path, store: str, count: int = 3) -> None:
        (folder / "secret").write_text("0123456789abcdef0123456789abcdef\n")
        self.state = folder / "state"
        self.replicas = [Replica(number, folder, store, self.state) for number in range(count)]

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
