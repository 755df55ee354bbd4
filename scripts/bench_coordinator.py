"""The coordinator's part of scripts/bench: how long a job is on its way, how late a token is, what idle workers cost.

The coordinator is a process of its own, over SQLite as by default; client and worker are one process here, so that both
ends read the same clock. The floor is a Starlette app that relays: a POST to a worker's WebSocket, the worker's
messages as server-sent events; no store, no queue, no checks.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import httpx
import msgspec
import psutil
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from protocol import link_wire as wire
from protocol.revision import LINK_SUBPROTOCOL, LINK_WIRE

Percentiles = Callable[[list[float], float], tuple[float, float]]

IDLE_WORKERS = int(os.environ.get("BULKHEAD_BENCH_WORKERS", "5000"))
JOBS, TOKENS = 100, 10
WARM = 10
TOKEN_PAUSE_S = 0.005
AT_ONCE = 50  # handshakes
WATCHED_S = 20.0  # how long CPU is measured: four beats of each worker
PATIENCE_S = 300.0
RELAY = """
import asyncio, sys, uvicorn
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route, WebSocketRoute
there = asyncio.Queue()
back = asyncio.Queue()
async def worker(socket):
    await socket.accept()
    async def down():
        while True: await socket.send_bytes(await there.get())
    task = asyncio.create_task(down())
    try:
        while True: back.put_nowait(await socket.receive_bytes())
    except Exception: task.cancel()
async def chat(request):
    there.put_nowait(await request.body())
    async def events():
        while (data := await back.get()) != b"end": yield b"data: " + data + b"\\n\\n"
    return StreamingResponse(events(), media_type="text/event-stream")
app = Starlette(routes=[WebSocketRoute("/v1/worker", worker), Route("/v1/chat/completions", chat, methods=["POST"])])
uvicorn.run(app, port=0, log_level="info", ws="websockets-sansio")
"""


class Program(NamedTuple):
    """A server that runs; `key` and `token` are "" for the floor."""

    process: psutil.Process
    url: str
    key: str = ""
    token: str = ""

    def connect(self) -> Any:
        """A worker's connection, as a context manager."""
        subprotocols = [Subprotocol(LINK_SUBPROTOCOL)] if self.token else None
        return connect(
            f"{self.url.replace('http', 'ws', 1)}/v1/worker",
            subprotocols=subprotocols,
            additional_headers={"Authorization": f"Bearer {self.token}"} if self.token else {},
            compression=None,
            max_size=wire.MAX_MESSAGE_BYTES,
            proxy=None,
            open_timeout=PATIENCE_S,
            ping_interval=None,
        )

    def client(self) -> httpx.AsyncClient:
        """For clients' requests."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        return httpx.AsyncClient(base_url=self.url, headers=headers, timeout=PATIENCE_S)

    def used_s(self) -> float:
        """CPU seconds so far."""
        times = self.process.cpu_times()
        return float(times.user + times.system)


def _started(argv: list[str], log: BinaryIO) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, *argv], stdout=log, stderr=log, stdin=subprocess.DEVNULL)


@contextlib.asynccontextmanager
async def serving(folder: Path, argv: list[str], says: str) -> AsyncIterator[tuple[psutil.Process, str]]:
    """A program, as soon as it says its address. Raises SystemExit with its words when it does not."""
    path = folder / "log"
    with path.open("wb") as log:
        process = _started(argv, log)
    try:
        until = time.monotonic() + PATIENCE_S
        while not (found := re.search(says, path.read_text())):
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(path.read_text())
            await asyncio.sleep(0.02)
        yield psutil.Process(process.pid), found[1]
    finally:
        process.terminate()
        process.wait(60)


@contextlib.asynccontextmanager
async def coordinating() -> AsyncIterator[Program]:
    """A coordinator over a new state folder."""
    with tempfile.TemporaryDirectory() as name:

        def key(scope: str) -> str:
            argv = ["-m", "coordinator", "keys", "create", "--state", f"{name}/state", "--scope", scope, "--name", "b"]
            made = subprocess.run([sys.executable, *argv], capture_output=True, check=True, text=True)
            return made.stdout.strip().split()[-1]

        client, worker = key("client"), key("worker")
        argv = ["-m", "coordinator", "serve", "--listen", "127.0.0.1:0", "--state", f"{name}/state"]
        async with serving(Path(name), argv, r"Serving (http://[^\s/]+)/v1") as (process, url):
            yield Program(process, url, client, worker)


@contextlib.asynccontextmanager
async def relaying() -> AsyncIterator[Program]:
    """The floor."""
    with tempfile.TemporaryDirectory() as name:
        async with serving(Path(name), ["-c", RELAY], r"running on (http://[^\s/]+)") as (process, url):
            yield Program(process, url)


async def greet(socket: ClientConnection, name: str, model: str) -> float:
    """Say hello and hear welcome; seconds between two beats."""
    offer = wire.ModelOffer(name=model, kinds=("llm",), engine="bench", slots=2, resident=True)
    announced = wire.Capabilities(models=(offer,), labels={"name": name})
    await socket.send(
        wire.encode(wire.Hello(worker=name, low=LINK_WIRE.low, high=LINK_WIRE.high, capabilities=announced))
    )
    welcome, _, _ = await hear(socket, wire.Welcome)
    return float(welcome.heartbeat_ms) / 1000


async def hear(socket: ClientConnection, kind: type[wire.Body]) -> tuple[Any, str, int]:
    """The next message of this kind, with job and attempt; others are passed over."""
    while True:
        data = await socket.recv()
        assert isinstance(data, bytes)
        envelope = wire.decode_envelope(data)
        body = wire.decode_body(envelope, wire.DOWN)
        if isinstance(body, kind):
            return body, envelope.job, envelope.attempt


class Times(NamedTuple):
    """Seconds: from a client's POST to the worker that reads the job; from a token's sending to its client."""

    there: list[float]
    token: list[float]
    cpu_s: float


async def work(socket: ClientConnection, ours: bool, taken: asyncio.Queue[float]) -> None:
    """Take jobs until cancelled, and answer each with tokens that say when they were sent."""
    while True:
        if ours:
            _, job, attempt = await hear(socket, wire.Offer)
        else:
            await socket.recv()
        taken.put_nowait(time.perf_counter())
        if ours:
            for body in (wire.Accept(), wire.Started()):
                await socket.send(wire.encode(body, job, attempt))
        for n in range(TOKENS):
            await asyncio.sleep(TOKEN_PAUSE_S)
            said = f"@{time.perf_counter():.6f}@"
            if ours:
                data = msgspec.Raw(msgspec.msgpack.encode({"delta": {"content": said}}))
                await socket.send(wire.encode(wire.Chunk(seq=n, data=data), job, attempt))
            else:
                await socket.send(said.encode())
        if ours:
            result = msgspec.Raw(msgspec.msgpack.encode({"content": "done"}))
            await socket.send(wire.encode(wire.Complete(result=result), job, attempt))
        else:
            await socket.send(b"end")


async def times(program: Program, model: str = "chat") -> Times:
    """Ask for streams one after another; a worker of this process answers them."""
    there, token, taken = list[float](), list[float](), asyncio.Queue[float]()
    body = {"model": model, "stream": True, "messages": [{"role": "user", "content": "hi"}]}
    async with program.connect() as socket, program.client() as client:
        if program.token:
            await greet(socket, f"worker-{model}", model)
        worker = asyncio.create_task(work(socket, bool(program.token), taken))
        used = program.used_s()
        for number in range(-WARM, JOBS):  # the first warm up
            began = time.perf_counter()
            async with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                answer.raise_for_status()
                async for line in answer.aiter_lines():
                    if (sent := re.search(r"@([0-9.]+)@", line)) and number >= 0:
                        token.append(time.perf_counter() - float(sent[1]))
            at = (await taken.get()) - began
            if number >= 0:
                there.append(at)
        used = program.used_s() - used
        worker.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await worker
    return Times(there, token, used / (JOBS + WARM))


@contextlib.asynccontextmanager
async def idle(program: Program, count: int) -> AsyncIterator[list[ClientConnection]]:
    """So many workers that wait; each sends its beats from its welcome on, and reads what it is told."""
    turn, sockets = asyncio.Semaphore(AT_ONCE), list[ClientConnection]()
    shares: list[list[ClientConnection]] = [[] for _ in range(50)]
    tasks: list[asyncio.Task[None]] = []

    async def beats(share: list[ClientConnection], after_s: float, every_s: float) -> None:
        await asyncio.sleep(after_s)
        beat, due = 0, time.monotonic()
        while True:
            beat, due = beat + 1, due + every_s
            for socket in share:
                with contextlib.suppress(ConnectionClosed):  # it is counted as lost
                    await socket.send(wire.encode(wire.Heartbeat(n=beat)))
            await asyncio.sleep(max(0.0, due - time.monotonic()))

    async def listen(socket: ClientConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            async for _ in socket:
                pass

    async def arrive(n: int) -> None:
        async with turn:
            socket = await program.connect()
            every_s = await greet(socket, f"idle-{n}", "waiting")
            sockets.append(socket)
            shares[n % len(shares)].append(socket)
            tasks.append(asyncio.create_task(listen(socket)))
            if n < len(shares):
                tasks.append(asyncio.create_task(beats(shares[n], every_s * n / len(shares), every_s)))

    try:
        await asyncio.gather(*(arrive(n) for n in range(count)))
        yield sockets
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _row(what: str, floor: str, ours: str, ratio: float) -> dict[str, Any]:
    return {"what": what, "floor": floor, "ours": ours, "ratio": round(ratio, 2)}


def _pair(what: str, floor: list[float], ours: list[float], percentiles: Percentiles) -> dict[str, Any]:
    low, high = percentiles(floor, 1e3), percentiles(ours, 1e3)
    return _row(
        what,
        f"bare relay p50 {low[0]:.2f} ms, p99 {low[1]:.2f} ms",
        f"p50 {high[0]:.2f} ms, p99 {high[1]:.2f} ms",
        high[0] / low[0],
    )


async def _measure(percentiles: Percentiles) -> list[dict[str, Any]]:
    async with relaying() as relay, coordinating() as coordinator:
        floor, ours = await times(relay), await times(coordinator)
    rows = [
        _pair("submit to worker: a client's POST to the job at the worker", floor.there, ours.there, percentiles),
        _pair("token lag: sent by the worker to read by the client", floor.token, ours.token, percentiles),
    ]
    async with coordinating() as coordinator:
        alone = await times(coordinator)
        size, began, used = coordinator.process.memory_info().rss, time.perf_counter(), coordinator.used_s()
        async with idle(coordinator, IDLE_WORKERS) as sockets:
            took, joining = time.perf_counter() - began, coordinator.used_s() - used
            await asyncio.sleep(5.0)  # a beat of each
            used, began = coordinator.used_s(), time.perf_counter()
            await asyncio.sleep(WATCHED_S)
            share = (coordinator.used_s() - used) / (time.perf_counter() - began)
            grown = coordinator.process.memory_info().rss - size
            crowded = await times(coordinator)
            gone = sum(socket.close_code is not None for socket in sockets)
    several = f"{IDLE_WORKERS:,} idle workers on one replica"
    rows += [
        _row(
            f"{several}: memory",
            f"without them {size / 2**20:.0f} MiB",
            f"+{grown / 2**20:.0f} MiB, {grown / 1024 / IDLE_WORKERS:.1f} KiB each, {gone} lost",
            (size + grown) / size,
        ),
        _row(
            f"{several}: CPU, a beat each per 5 s (ratio: of one core)",
            f"joining: {joining / IDLE_WORKERS * 1e3:.2f} ms CPU each, all within {took:.0f} s",
            f"{share * 1e3:.0f} ms CPU a second, {share * 5e6 / IDLE_WORKERS:.0f} µs a beat",
            share,
        ),
        {
            **_pair(f"{several}: submit to worker beside them", alone.there, crowded.there, percentiles),
            "floor": "without them p50 {:.2f} ms, p99 {:.2f} ms; {:.2f} ms CPU a job".format(
                *percentiles(alone.there, 1e3), alone.cpu_s * 1e3
            ),
            "ours": "p50 {:.2f} ms, p99 {:.2f} ms; {:.2f} ms CPU a job".format(
                *percentiles(crowded.there, 1e3), crowded.cpu_s * 1e3
            ),
        },
    ]
    return rows


def bench_coordinator(percentiles: Percentiles) -> list[dict[str, Any]]:
    """Rows of one coordinator on this machine."""
    return asyncio.run(_measure(percentiles))
