"""The benchmarks behind scripts/bench; BENCHMARKS.md says what each means and what was measured."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import bench_containment as containment
import httpx
import psutil
import trio
from bench_control import bench_status
from bench_coordinator import bench_coordinator
from bench_hostile import bench_hostile
from bench_journal import bench_journal
from bench_replicas import bench_replicas
from bench_schedule import bench_schedule, bench_simulate
from bench_store import bench_store

from supervisor.host.child import ChildSpec, open_child

ROOT = Path(__file__).resolve().parents[1]
FLOOR_ECHO = "import os\nwhile data := os.read(0, 2**20): os.write(1, data)"
FLOOR_SERVER = """
import sys, uvicorn
from fastapi import FastAPI, Request
app = FastAPI()
@app.post("/v1/chat/completions")
async def echo(request: Request): return await request.json()
uvicorn.run(app, host="127.0.0.1", port=int(sys.argv[1]), log_level="error")
"""
NOOP = '[[models]]\nname = "synthetic-noop"\nengine = "synthetic"\nkinds = ["llm"]\noptions = { slots = 64 }\n'
BODY = {"model": "synthetic-noop", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}


def percentiles(samples: list[float], scale: float = 1e6) -> tuple[float, float]:
    """(p50, p99) in the unit that `scale` makes of seconds."""
    ordered = sorted(samples)
    return ordered[len(ordered) // 2] * scale, ordered[int(len(ordered) * 0.99)] * scale


# ---- echo: the supervisor's pipe code against a raw pipe


def echo_raw(size: int, rounds: int) -> list[float]:
    """Blocking os.write and os.read to the same echo child: the floor."""
    process = subprocess.Popen([sys.executable, "-I", "-S", "-c", FLOOR_ECHO], stdin=-1, stdout=-1, bufsize=0)
    assert process.stdin is not None
    assert process.stdout is not None
    to_child, from_child = process.stdin.fileno(), process.stdout.fileno()
    data, samples = b"x" * size, []
    for _ in range(rounds):
        began = time.perf_counter()
        view = memoryview(data)
        got = 0
        while view or got < size:
            if view:
                view = view[os.write(to_child, view[: 2**16]) :]
            got += len(os.read(from_child, 2**20))
        samples.append(time.perf_counter() - began)
    process.stdin.close()
    process.wait()
    process.stdout.close()
    return samples


def echo_ours(size: int, rounds: int) -> list[float]:
    """The same child through `open_child`: trio, pidfd, eager pipes."""
    samples: list[float] = []

    async def main() -> None:
        spec = ChildSpec(name="echo", argv=(sys.executable, "-I", "-S", "-c", FLOOR_ECHO))
        data = b"x" * size
        async with open_child(spec) as child:
            for _ in range(rounds):
                began = time.perf_counter()
                async with contextlib.AsyncExitStack() as stack:
                    if size > 2**16:
                        nursery = await stack.enter_async_context(trio.open_nursery())
                        nursery.start_soon(child.write, data)
                    else:
                        await child.write(data)
                    got = 0
                    while got < size:
                        got += len(await child.read())
                samples.append(time.perf_counter() - began)

    trio.run(main)
    return samples


def bench_echo() -> list[dict[str, Any]]:
    rows = []
    for size, rounds in ((64, 4000), (2**16, 1500)):
        pairs = [(echo_raw(size, rounds), echo_ours(size, rounds)) for _ in range(3)]
        floor, ours = (percentiles([s for pair in pairs for s in pair[side]]) for side in (0, 1))
        rows.append(
            {
                "what": f"engine echo, {size} B",
                "floor": f"raw pipe p50 {floor[0]:.1f} µs, p99 {floor[1]:.1f} µs",
                "ours": f"p50 {ours[0]:.1f} µs, p99 {ours[1]:.1f} µs",
                "ratio": round(ours[0] / floor[0], 2),
            }
        )
    return rows


# ---- a running worker


@contextlib.contextmanager
def running(
    folder: Path,
    models: str = NOOP,
    program: tuple[str, ...] = ("-m", "supervisor"),
    environment: dict[str, str] | None = None,
) -> Iterator[tuple[str, str, subprocess.Popen[bytes], float]]:
    """A supervisor with an embedded coordinator and one synthetic model; yields url, key, process, start time."""
    config = folder / "worker.toml"
    config.write_text(
        f'config_version = 1\n[coordinator]\nlisten = "127.0.0.1:0"\n[worker]\nstate_dir = "{folder}/state"\n' + models
    )
    (folder / "state" / "endpoint.json").unlink(missing_ok=True)
    began = time.perf_counter()
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *program, "run", "--config", str(config)], stdout=log, stderr=log, env=environment
        )
    try:
        url, key = endpoint(process, folder)
        yield url, key, process, began
    finally:
        process.terminate()
        process.wait(30)


def endpoint(process: subprocess.Popen[bytes], folder: Path) -> tuple[str, str]:
    """Base URL and key, as soon as the supervisor has written them."""
    until = time.monotonic() + 60
    while time.monotonic() < until and process.poll() is None:
        with contextlib.suppress(OSError, ValueError):
            told = json.loads((folder / "state" / "endpoint.json").read_text())
            return told["url"], Path(told["client_key_file"]).read_text().strip()
        time.sleep(0.002)
    raise SystemExit((folder / "log").read_text())


def first_answer(url: str, key: str) -> float:
    """Ask until a 200 comes; the time of its first byte."""
    headers = {"Authorization": f"Bearer {key}"}
    with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            with contextlib.suppress(httpx.TransportError):
                with client.stream("POST", "/v1/chat/completions", json=BODY) as answer:
                    if answer.status_code == 200:
                        next(answer.iter_raw())
                        return time.perf_counter()
            time.sleep(0.005)
    raise SystemExit("no answer within 60 s")


def hammer(url: str, headers: dict[str, str], count: int, callers: int) -> tuple[list[float], float]:
    """POST the no-op chat; latencies and requests per second."""
    samples: list[float] = []

    async def caller(client: httpx.AsyncClient, share: int) -> None:
        for _ in range(share):
            began = time.perf_counter()
            answer = await client.post("/v1/chat/completions", json=BODY)
            answer.raise_for_status()
            samples.append(time.perf_counter() - began)

    async def main() -> float:
        async with httpx.AsyncClient(base_url=url, headers=headers, timeout=60) as client:
            await caller(client, 20)
            samples.clear()
            began = time.perf_counter()
            await asyncio.gather(*(caller(client, count // callers) for _ in range(callers)))
            return count / (time.perf_counter() - began)

    rate = asyncio.run(main())
    return samples, rate


@contextlib.contextmanager
def floor_server() -> Iterator[str]:
    """A bare FastAPI echo under uvicorn."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen([sys.executable, "-c", FLOOR_SERVER, str(port)])
    try:
        until = time.monotonic() + 30
        while time.monotonic() < until:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
                break
            time.sleep(0.05)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def bench_chat() -> list[dict[str, Any]]:
    rows = []
    with tempfile.TemporaryDirectory() as name, running(Path(name)) as (url, key, _process, _began):
        first_answer(url, key)
        with floor_server() as floor_url:
            for callers, count in ((1, 300), (16, 800)):
                floor, floor_rate = hammer(floor_url, {}, count, callers)
                ours, our_rate = hammer(url, {"Authorization": f"Bearer {key}"}, count, callers)
                low, high = percentiles(floor, 1e3), percentiles(ours, 1e3)
                rows.append(
                    {
                        "what": f"no-op chat end to end, {callers} caller{'s' * (callers > 1)}",
                        "floor": f"bare FastAPI echo p50 {low[0]:.2f} ms, p99 {low[1]:.2f} ms, {floor_rate:.0f}/s",
                        "ours": f"p50 {high[0]:.2f} ms, p99 {high[1]:.2f} ms, {our_rate:.0f}/s",
                        "ratio": round(high[0] / low[0], 2),
                    }
                )
    return rows


def bench_memory() -> list[dict[str, Any]]:
    """Resident memory, idle, before the first job."""
    with tempfile.TemporaryDirectory() as name, running(Path(name)) as (url, key, process, _began):
        until = time.monotonic() + 60
        while time.monotonic() < until:
            answer = httpx.get(f"{url}/v1/models", headers={"Authorization": f"Bearer {key}"}).json()
            if answer["data"]:
                break
            time.sleep(0.1)
        supervisor = psutil.Process(process.pid)
        coordinator = next(child for child in supervisor.children() if "coordinator" in " ".join(child.cmdline()))
        bare = subprocess.run(
            [sys.executable, "-c", "import psutil; print(psutil.Process().memory_info().rss)"],
            capture_output=True,
            check=True,
        )
        floor = int(bare.stdout) / 2**20
        rows = []
        for what, who in (("supervisor", supervisor), ("coordinator", coordinator)):
            size = who.memory_info().rss / 2**20
            rows.append(
                {
                    "what": f"resident memory idle, {what}",
                    "floor": f"python + psutil {floor:.0f} MiB",
                    "ours": f"{size:.0f} MiB",
                    "ratio": round(size / floor, 2),
                }
            )
        return rows


def bench_start() -> list[dict[str, Any]]:
    """exec of `supervisor run` to the first byte of the first answer, engine start and load included."""
    samples, floors = [], []
    with tempfile.TemporaryDirectory() as name:
        for _ in range(6):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", "import trio, httpx, msgspec"], check=True)
            floors.append(time.perf_counter() - began)
            with running(Path(name)) as (url, key, _process, began):
                samples.append(first_answer(url, key) - began)
    floor, ours = statistics.median(floors[1:]), statistics.median(samples[1:])
    return [
        {
            "what": "supervisor run to first answer (warm, median of 5)",
            "floor": f"python importing trio, httpx, msgspec {floor * 1000:.0f} ms",
            "ours": f"{ours * 1000:.0f} ms",
            "ratio": round(ours / floor, 2),
        }
    ]


BENCHES: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "echo": bench_echo,
    "chat": bench_chat,
    "memory": bench_memory,
    "start": bench_start,
    "sandbox-start": containment.bench_sandbox_start,
    "sandbox-echo": containment.bench_sandbox_echo,
    "sandbox-run": containment.bench_sandbox_run,
    "orphans": lambda: containment.bench_orphans(running),
    "faults": lambda: containment.bench_faults(running),
    "hang": lambda: containment.bench_hang(running),
    "neighbour": lambda: containment.bench_neighbour(running),
    "hostile": bench_hostile,
    "schedule": bench_schedule,
    "simulate": bench_simulate,
    "status": lambda: bench_status(running, first_answer),
    "journal": lambda: bench_journal(running, hammer, first_answer),
    "store": bench_store,
    "coordinator": lambda: bench_coordinator(percentiles),
    "replicas": lambda: bench_replicas(percentiles),
}


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*BENCHES, []], help="benches to run (all)")
    parser.add_argument("--json", action="store_true", help="print an array of objects")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in args.names or BENCHES:
        print(f"{name} …", file=sys.stderr, flush=True)
        rows += BENCHES[name]()
    if args.json:
        print(json.dumps(rows, indent=1, ensure_ascii=False))
        return 0
    print("| what | floor, same run | Bulkhead | ratio |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['what']} | {row['floor']} | {row['ours']} | {row['ratio']} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
