"""The replicas' part of scripts/bench: what it costs that a client hangs on one replica and the worker on another.

Two coordinators over one PostgreSQL that syncs, a worker at the second. The floor is the same stream in the same run,
asked for at the worker's own replica; then at the other one, in turns. The clock is one process's, which is both the
worker and the client: from the POST to the first token, and from each token's sending to its being read.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib.util
import os
import re
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import msgspec
from websockets.asyncio.client import ClientConnection, connect
from websockets.typing import Subprotocol

from protocol import link_wire as wire
from protocol.revision import LINK_SUBPROTOCOL, LINK_WIRE

TURNS = int(os.environ.get("BULKHEAD_BENCH_TURNS", "12"))
AT_ONCE = (1, 8)  # streams
TOKENS, TOKEN_PAUSE_S = 30, 0.02
MODEL = "chat"
PATIENCE_S = 60.0
BEAT_S = 2.0
Percentiles = Callable[[list[float], float], tuple[float, float]]


class Times(NamedTuple):
    """Seconds: from a POST to its first token, and from the sending of each token to its client."""

    first: list[float]
    lag: list[float]


@contextlib.asynccontextmanager
async def replica(folder: Path, number: int, store: str) -> AsyncIterator[str]:
    """URL of one more coordinator over the folder's state. Raises SystemExit with its words when it does not serve."""
    config = folder / f"{number}.toml"
    config.write_text(
        f'config_version = 1\nlisten = "127.0.0.1:0"\nstate = "{folder / "state"}"\ndrain_s = 1\n'
        f'[replica]\nlisten = "127.0.0.1:0"\nsecret_file = "{folder / "secret"}"\n'
    )
    with (folder / f"{number}.log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "coordinator", "serve", "--config", str(config)),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env={**os.environ, "COORDINATOR_STORE": store},
        )
    try:
        assert process.stdout is not None
        line = await asyncio.wait_for(process.stdout.readline(), PATIENCE_S)
        if not line.startswith(b"Serving "):
            raise SystemExit((folder / f"{number}.log").read_text())
        yield line.split()[1].decode().removesuffix("/v1")
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        await process.wait()


async def work(url: str, token: str) -> None:
    """Be a worker at this replica until cancelled: each token says when it was sent."""
    async with connect(
        url.replace("http", "ws", 1) + "/v1/worker",
        subprotocols=[Subprotocol(LINK_SUBPROTOCOL)],
        additional_headers={"authorization": f"Bearer {token}"},
        compression=None,
        proxy=None,
        max_size=wire.MAX_MESSAGE_BYTES,
    ) as socket:
        offer = wire.ModelOffer(name=MODEL, kinds=("llm",), engine="bench", slots=2 * AT_ONCE[-1], resident=True)
        hello = wire.Hello(
            worker="bench",
            low=LINK_WIRE.low,
            high=LINK_WIRE.high,
            capabilities=wire.Capabilities(models=(offer,)),
        )
        await socket.send(wire.encode(hello))
        async with asyncio.TaskGroup() as group:
            group.create_task(_beat(socket))
            while True:
                data = await socket.recv()
                assert isinstance(data, bytes)
                envelope = wire.decode_envelope(data)
                if envelope.t == "offer":
                    group.create_task(_answer(socket, envelope.job, envelope.attempt))


async def _beat(socket: ClientConnection) -> None:
    beat = 0
    while True:
        await asyncio.sleep(BEAT_S)
        beat += 1
        await socket.send(wire.encode(wire.Heartbeat(n=beat)))


async def _answer(socket: ClientConnection, job: str, attempt: int) -> None:
    for body in (wire.Accept(), wire.Started()):
        await socket.send(wire.encode(body, job, attempt))
    for n in range(TOKENS):
        data = msgspec.msgpack.encode({"delta": {"content": f"@{time.perf_counter():.6f}@"}})
        await socket.send(wire.encode(wire.Chunk(seq=n, data=msgspec.Raw(data)), job, attempt))
        await asyncio.sleep(TOKEN_PAUSE_S)
    result = msgspec.Raw(msgspec.msgpack.encode({"content": "done"}))
    await socket.send(wire.encode(wire.Complete(result=result), job, attempt))


async def stream(client: httpx.AsyncClient, url: str, times: Times) -> None:
    """One stream at this replica."""
    body = {"model": MODEL, "stream": True, "messages": [{"role": "user", "content": "hi"}]}
    began, seen = time.perf_counter(), 0
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.aiter_lines():
            if sent := re.search(r"@([0-9.]+)@", line):
                now = time.perf_counter()
                times.lag.append(now - float(sent[1]))
                if not seen:
                    times.first.append(now - began)
                seen += 1
    if seen != TOKENS:
        raise SystemExit(f"{seen} of {TOKENS} tokens came as they were sent")


async def both(client: httpx.AsyncClient, here: str, there: str, at_once: int) -> tuple[Times, Times]:
    """So many streams at once at the worker's replica, and at the other one, in turns; the first turn warms up."""
    floor, ours = Times([], []), Times([], [])
    for turn in range(TURNS + 1):
        for url, times in ((there, floor), (here, ours)):
            taken = times if turn else Times([], [])
            await asyncio.gather(*(stream(client, url, taken) for _ in range(at_once)))
    return floor, ours


def rows(at_once: int, floor: Times, ours: Times, percentiles: Percentiles) -> list[dict[str, Any]]:
    """A row for the first token, and one for all of them."""
    found = []
    for what, low, high in (("first token", floor.first, ours.first), ("token lag", floor.lag, ours.lag)):
        one, two = percentiles(low, 1e3), percentiles(high, 1e3)
        found.append(
            {
                "what": f"{what}, worker at another replica, {at_once} stream{'s' * (at_once > 1)} at once",
                "floor": f"at the worker's replica p50 {one[0]:.2f} ms, p99 {one[1]:.2f} ms",
                "ours": f"p50 {two[0]:.2f} ms, p99 {two[1]:.2f} ms",
                "ratio": round(two[0] / one[0], 2),
            }
        )
    return found


async def _measure(store: str, percentiles: Percentiles) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "secret").write_text("0123456789abcdef0123456789abcdef\n")
        async with replica(folder, 0, store) as here, replica(folder, 1, store) as there:
            key, token = ((folder / "state" / file).read_text().strip() for file in ("client.key", "worker.token"))
            working = asyncio.create_task(work(there, token))
            limits = httpx.Limits(max_connections=2 * AT_ONCE[-1])
            headers = {"authorization": f"Bearer {key}"}
            async with httpx.AsyncClient(headers=headers, timeout=PATIENCE_S, limits=limits, trust_env=False) as client:
                until = time.monotonic() + PATIENCE_S
                for url in (here, there):  # both know of the worker
                    while MODEL not in (await client.get(f"{url}/v1/models")).text:
                        if working.done() or time.monotonic() > until:
                            raise SystemExit("the replicas have not found each other")
                        await asyncio.sleep(0.05)
                for at_once in AT_ONCE:
                    found += rows(at_once, *await both(client, here, there, at_once), percentiles)
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
    return found


def bench_replicas(percentiles: Percentiles) -> list[dict[str, Any]]:
    """Rows of two replicas; none where PostgreSQL is not installed."""
    if importlib.util.find_spec("psycopg_pool") is None:
        print("SKIPPED: psycopg is not installed (extra: postgres)", file=sys.stderr)
        return []
    from coordinator.testing_postgres import postgres_server, why_not

    if reason := why_not():
        print(f"SKIPPED: {reason}", file=sys.stderr)
        return []
    with postgres_server(durable=True) as server:
        return asyncio.run(_measure(server.url, percentiles))


def _percentiles(samples: list[float], scale: float) -> tuple[float, float]:
    ordered = sorted(samples)
    return ordered[len(ordered) // 2] * scale, ordered[int(len(ordered) * 0.99)] * scale


if __name__ == "__main__":
    for one in bench_replicas(_percentiles):
        print(f"| {one['what']} | {one['floor']} | {one['ours']} | {one['ratio']} |")
