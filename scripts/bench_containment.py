"""Benchmarks of containment: what is left after a kill and for how long, what a crash costs callers and neighbours.

Each row has its bar beside it; BENCHMARKS.md says what was measured. The engines are the synthetic and the
misbehaving one, so nothing here needs a model or a GPU.
"""

from __future__ import annotations

import contextlib
import os
import random
import select
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil
import trio

from protocol import engine_wire as wire
from protocol.framing import FrameDecoder
from supervisor.host.child import open_child
from supervisor.host.host import Host, open_host
from supervisor.host.launching import engine_child
from supervisor.host.work import Done, EngineSpec, ModelSpec, RunRequest, Sandbox
from supervisor.settings import LimitsTable

LIVES = int(os.environ.get("BULKHEAD_BENCH_LIVES", "20"))
CRASHES = int(os.environ.get("BULKHEAD_BENCH_CRASHES", "100"))
STORM_PAUSE_S = 0.3  # and about 0.2 for the kill, the restart, and the next answer
SEED = int(os.environ.get("BULKHEAD_BENCH_SEED", "1"))
MODELS = """
[engines.odd]
module = "engines.synthetic.misbehave"
[[models]]
name = "synthetic-odd"
engine = "odd"
kinds = ["llm"]
[[models]]
name = "synthetic-stream"
engine = "synthetic"
kinds = ["llm"]
options = { slots = 4, tokens = 4000, delay_ms = 20 }
[[models]]
name = "synthetic-noop"
engine = "synthetic"
kinds = ["llm"]
options = { slots = 64 }
"""
Row = dict[str, Any]
Running = Callable[..., contextlib.AbstractContextManager[tuple[str, str, subprocess.Popen[bytes], float]]]


def _quantile(samples: list[float], q: float) -> float:
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * q))]


def _chat(model: str, prompt: str, **more: Any) -> Row:
    return {"model": model, "messages": [{"role": "user", "content": prompt}], **more}


def _client(url: str, key: str) -> httpx.Client:
    return httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60)


def _announced(client: httpx.Client, *names: str) -> None:
    until = time.monotonic() + 60
    while time.monotonic() < until:
        with contextlib.suppress(httpx.TransportError):
            if {model["id"] for model in client.get("/v1/models").json()["data"]} >= set(names):
                return
        time.sleep(0.02)
    raise SystemExit(f"not announced within 60 s: {names}")


# ---- the supervisor is killed


def _last_gone_s(family: list[psutil.Process], kill: Callable[[], None]) -> float:
    """From the kill to the moment the last of the family is dead, by pidfds opened before."""
    poll, open_fds = select.poll(), []
    for process in family:
        with contextlib.suppress(ProcessLookupError):
            open_fds.append(os.pidfd_open(process.pid))
            poll.register(open_fds[-1], select.POLLIN)
    began = time.perf_counter()
    kill()
    left = set(open_fds)
    last = began
    while left and time.perf_counter() - began < 10:
        for fd, _ in poll.poll(1000):
            last = time.perf_counter()
            poll.unregister(fd)
            left.discard(fd)
    for fd in open_fds:
        os.close(fd)
    if left:
        raise SystemExit(f"{len(left)} processes outlived the supervisor by 10 s")
    return last - began


def bench_orphans(running: Running) -> list[Row]:
    """SIGKILL of the supervisor with a hostile family below it: a setsid child, a daemon, the GIL held in C."""
    chance = random.Random(SEED)
    times, sizes = [], []
    before = set(os.listdir("/dev/shm"))
    with tempfile.TemporaryDirectory() as name:
        for _ in range(LIVES):
            with running(Path(name), MODELS) as (url, key, process, _began), _client(url, key) as client:
                _announced(client, "synthetic-odd")
                for prompt in ("fork", "daemon"):
                    client.post("/v1/chat/completions", json=_chat("synthetic-odd", prompt)).raise_for_status()
                threading.Thread(target=_ask_in_vain, args=(url, key, "hang-gil"), daemon=True).start()
                time.sleep(0.1 + chance.random() * 0.2)  # the attack's moment
                family = [
                    member
                    for child in psutil.Process(process.pid).children()
                    if "/instances/" in " ".join(child.cmdline())
                    for member in (child, *child.children(recursive=True))
                ]
                sizes.append(len(family))
                times.append(_last_gone_s(family, process.kill))
                process.wait()
    left = set(os.listdir("/dev/shm")) - before
    worst = _quantile(times, 0.99) * 1e3
    return [
        {
            "what": f"SIGKILL of the supervisor to the last of {max(sizes)} engine processes gone, {LIVES} lives",
            "floor": "bar: p99 50 ms, nothing in /dev/shm",
            "ours": f"p50 {statistics.median(times) * 1e3:.1f} ms, p99 {worst:.1f} ms, {len(left)} left in /dev/shm",
            "ratio": round(worst / 50, 2),
        }
    ]


def _ask_in_vain(url: str, key: str, prompt: str) -> None:
    with contextlib.suppress(httpx.HTTPError), _client(url, key) as client:
        client.post("/v1/chat/completions", json=_chat("synthetic-odd", prompt))


# ---- an engine is killed in mid-call


def _engine_of(supervisor: int, lane: str) -> tuple[int, int]:
    """(leader that the supervisor waits for, engine process below it)."""
    for child in psutil.Process(supervisor).children():
        line = " ".join(child.cmdline())
        if f"/instances/{lane}/" in line:
            below = child.children(recursive=True)
            return child.pid, (below[-1] if below else child).pid
    raise LookupError(lane)


def _crash_once(client: httpx.Client, supervisor: int) -> tuple[float, float]:
    """Kill an engine in mid-stream: seconds from its pidfd event to the fault at the client, and to the next answer."""
    with client.stream(
        "POST", "/v1/chat/completions", json=_chat("synthetic-stream", "a b", stream=True, max_tokens=4000)
    ) as answer:
        lines = answer.iter_lines()
        for line in lines:
            if '"content":"' in line and '"content":""' not in line:  # the first chunk has only the role
                break
        else:
            raise SystemExit(f"no stream began: HTTP {answer.status_code}")
        leader, engine = _engine_of(supervisor, "m1")  # by its place in MODELS
        watched = os.pidfd_open(leader)
        died: list[float] = []

        def watch() -> None:
            select.select([watched], [], [])
            died.append(time.perf_counter())

        watcher = threading.Thread(target=watch)
        watcher.start()
        os.kill(engine, 9)
        told = 0.0
        seen = []
        for line in lines:
            seen.append(line)
            if '"error"' in line:
                told = time.perf_counter()
                break
        watcher.join()
        os.close(watched)
    if not told:
        raise SystemExit(f"the stream ended without its fault: {seen[-3:]}")
    while True:
        body = _chat("synthetic-stream", "x", max_tokens=1)
        if client.post("/v1/chat/completions", json=body).status_code == 200:
            return max(0.0, told - died[0]), time.perf_counter() - died[0]


def bench_faults(running: Running) -> list[Row]:
    """From the death of an engine to its caller's answer, and to the model's next success."""
    with (
        tempfile.TemporaryDirectory() as name,
        running(Path(name), MODELS) as (url, key, process, _began),
        _client(url, key) as client,
    ):
        _announced(client, "synthetic-stream")
        pairs = [_crash_once(client, process.pid) for _ in range(CRASHES)]
    faults, again = [pair[0] * 1e3 for pair in pairs], [pair[1] for pair in pairs]
    return [
        {
            "what": f"engine killed in mid-stream: pidfd event to the fault at the client, {CRASHES} times",
            "floor": "bar: p99 50 ms",
            "ours": f"p50 {statistics.median(faults):.1f} ms, p99 {_quantile(faults, 0.99):.1f} ms",
            "ratio": round(_quantile(faults, 0.99) / 50, 2),
        },
        {
            "what": "the same, to the next success on that model",
            "floor": "bar: 1 s",
            "ours": f"p50 {statistics.median(again):.2f} s, p99 {_quantile(again, 0.99):.2f} s",
            "ratio": round(_quantile(again, 0.99), 2),
        },
    ]


def bench_hang(running: Running) -> list[Row]:
    """A job that hangs with the GIL held is answered at its deadline."""
    late = []
    with tempfile.TemporaryDirectory() as name, running(Path(name), MODELS) as (url, key, _process, _began):
        with _client(url, key) as client:
            _announced(client, "synthetic-odd")
            params = {"prompt": "hang-gil"}
            for _ in range(5):
                body = {"kind": "llm", "model": "synthetic-odd", "params": params, "deadline_ms": 1000, "wait": 30}
                began = time.perf_counter()
                answer = client.post("/v1/jobs", json=body)
                late.append(time.perf_counter() - began - 1.0)
                if answer.json()["fault"]["code"] != "deadline_exceeded":
                    raise SystemExit(answer.text)
    return [
        {
            "what": "job that hangs with the GIL held: answer after its deadline, worst of 5",
            "floor": "bar: 0.5 s",
            "ours": f"{max(late):.2f} s",
            "ratio": round(max(late) / 0.5, 2),
        }
    ]


def bench_neighbour(running: Running) -> list[Row]:
    """No-op chats on one engine, calm and while another one is crashed again and again, in turns."""
    calm: list[float] = []
    stormy: list[float] = []
    faults = 0
    with (
        tempfile.TemporaryDirectory() as name,
        running(Path(name), MODELS) as (url, key, process, _began),
        _client(url, key) as client,
        _client(url, key) as other,
    ):
        _announced(client, "synthetic-stream", "synthetic-noop")
        for _ in range(50):
            client.post("/v1/chat/completions", json=_chat("synthetic-noop", "x", max_tokens=1))
        for _turn in range(5):
            for samples, storm in ((calm, False), (stormy, True)):
                over = threading.Event()
                thread = threading.Thread(target=_storm, args=(other, process.pid, over))
                if storm:
                    thread.start()
                for _ in range(200):
                    began = time.perf_counter()
                    answer = client.post("/v1/chat/completions", json=_chat("synthetic-noop", "x", max_tokens=1))
                    samples.append((time.perf_counter() - began) * 1e3)
                    faults += answer.status_code != 200
                over.set()
                if storm:
                    thread.join()
    low, high = _quantile(calm, 0.99), _quantile(stormy, 0.99)
    return [
        {
            "what": "neighbour's no-op chat, another engine killed twice a second (bar: 0 faults, p99 1.5 times)",
            "floor": f"undisturbed p50 {statistics.median(calm):.1f} ms, p99 {low:.1f} ms",
            "ours": f"{faults} faults, p50 {statistics.median(stormy):.1f} ms, p99 {high:.1f} ms",
            "ratio": round(high / low, 2),
        }
    ]


def _storm(client: httpx.Client, supervisor: int, over: threading.Event) -> None:
    while not over.wait(STORM_PAUSE_S):
        _crash_once(client, supervisor)


# ---- what the sandbox costs


def _spec(mode: str) -> ModelSpec:
    name = "synthetic-noop"
    engine = EngineSpec(
        name="synthetic", module="engines.synthetic.engine", python=sys.executable, sandbox=Sandbox(mode=mode)
    )
    return ModelSpec(name=name, engine=engine, model=wire.Model(name=name, kinds=("llm",), device="cpu"))


def bench_sandbox_start() -> list[Row]:
    """Start to ready with and without the sandbox, in turns, against a bare interpreter."""
    on: list[float] = []
    off: list[float] = []
    bare: list[float] = []

    async def once(mode: str, folder: Path) -> float:
        async with open_host([_spec(mode)], LimitsTable(), folder) as host:
            loaded = trio.Event()
            host.on_change = lambda: loaded.set() if host.snapshot()[0].state == "ready" else None
            began = time.perf_counter()
            host.preload("synthetic-noop")
            await loaded.wait()
            return (time.perf_counter() - began) * 1e3

    async def main(folder: Path) -> None:
        for number in range(27):
            began = time.perf_counter()
            await trio.run_process([sys.executable, "-I", "-S", "-c", "pass"])
            bare.append((time.perf_counter() - began) * 1e3)
            off.append(await once("off", folder / f"off{number}"))
            on.append(await once("best-effort", folder / f"on{number}"))

    with tempfile.TemporaryDirectory() as name:
        trio.run(main, Path(name))
    floor, without, with_it = (statistics.median(samples[2:]) for samples in (bare, off, on))
    bar = 2 * floor + 10
    return [
        {
            "what": "sandbox, added to an engine's start (median of 25 interleaved; bar: twice the floor + 10 ms)",
            "floor": f"`python -I -S -c pass` {floor:.1f} ms; start without it {without:.1f} ms",
            "ours": f"+{with_it - without:.1f} ms (start {with_it:.1f} ms), bar {bar:.1f} ms",
            "ratio": round((with_it - without) / bar, 2),
        }
    ]


async def _pings(child: Any, count: int) -> list[float]:
    """Round trips of a small frame through an engine's own I/O loop, in µs."""
    samples, decoder = [], FrameDecoder()
    for number in range(count):
        began = time.perf_counter()
        await child.write(*wire.encode(wire.Ping(n=number)))
        while not list(decoder):
            decoder.feed(await child.read())
        samples.append((time.perf_counter() - began) * 1e6)
    return samples


def bench_sandbox_echo() -> list[Row]:
    """Echo of a small frame through an engine in the sandbox and through one without, in turns."""
    ratios, pairs = [], []

    async def main(folder: Path) -> None:
        async with contextlib.AsyncExitStack() as stack:
            children = []
            for mode in ("off", "best-effort"):
                spec, scratch = _spec(mode), folder / mode
                scratch.mkdir()
                child = await stack.enter_async_context(
                    open_child(engine_child(spec.engine, scratch, model=spec.model))
                )
                await child.read()  # hello
                await _pings(child, 500)
                children.append(child)
            for _ in range(5):
                samples: tuple[list[float], list[float]] = ([], [])
                for _ in range(10):  # short turns: the machine changes its mood
                    for side, child in enumerate(children):
                        samples[side].extend(await _pings(child, 200))
                pairs.append([statistics.median(each) for each in samples])
                ratios.append(pairs[-1][1] / pairs[-1][0])

    with tempfile.TemporaryDirectory() as name:
        trio.run(main, Path(name))
    without, with_it = (statistics.median(pair[side] for pair in pairs) for side in (0, 1))
    return [
        {
            "what": "echo of a small frame through an engine, sandbox on (p50, median of 5 interleaved runs; bar 1.05)",
            "floor": f"sandbox off {without:.1f} µs",
            "ours": f"{with_it:.1f} µs",
            "ratio": round(statistics.median(ratios), 3),
        }
    ]


async def _runs(host: Host, folder: Path, count: int) -> list[float]:
    samples = []
    params = msgspec.msgpack.encode({"prompt": "x", "max_tokens": 1})
    for _ in range(count):
        began = time.perf_counter()
        request = RunRequest(model="synthetic-noop", kind="llm", params=params, folder=folder)
        end = await host.run(request, lambda _event: None)
        samples.append((time.perf_counter() - began) * 1e6)
        assert isinstance(end, Done), end
    return samples


def bench_sandbox_run() -> list[Row]:
    """No-op runs through the host, sandbox on and off, five runs in turns."""
    medians: list[tuple[float, float]] = []

    async def main(folder: Path) -> None:
        (folder / "out").mkdir()
        async with (
            open_host([_spec("off")], LimitsTable(), folder / "off") as off,
            open_host([_spec("best-effort")], LimitsTable(), folder / "on") as on,
        ):
            for host in (off, on):
                await _runs(host, folder / "out", 200)
            for _ in range(5):
                samples: tuple[list[float], list[float]] = ([], [])
                for _ in range(10):
                    for side, host in enumerate((off, on)):
                        samples[side].extend(await _runs(host, folder / "out", 100))
                medians.append((statistics.median(samples[0]), statistics.median(samples[1])))

    with tempfile.TemporaryDirectory() as name:
        trio.run(main, Path(name))
    without, with_it = (statistics.median(pair[side] for pair in medians) for side in (0, 1))
    return [
        {
            "what": "no-op run through the host, sandbox on (p50, median of 5 interleaved runs)",
            "floor": f"sandbox off {without:.0f} µs",
            "ours": f"{with_it:.0f} µs",
            "ratio": round(statistics.median(b / a for a, b in medians), 3),
        }
    ]
