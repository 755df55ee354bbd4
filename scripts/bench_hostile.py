"""The hostile part of scripts/bench: what an engine that floods the wire does to its host's loop and memory."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import trio

from protocol import engine_wire as wire
from supervisor.host.child import open_child
from supervisor.host.host import open_host
from supervisor.host.means import Means
from supervisor.host.work import EngineSpec, ModelSpec
from supervisor.settings import LimitsTable

ROOT = str(Path(__file__).resolve().parents[1])
TICK_S = 0.005
SECONDS = 6.0
# Says hello, takes the load, and then floods: frames that mean nothing, and lines on stderr, as fast as pipes go.
FLOOD = """
import os, sys, struct, threading
sys.path.insert(0, ROOT)
from protocol import engine_wire as wire
def frame(message): return b"".join(bytes(part) for part in wire.encode(message))
os.write(1, frame(wire.Hello(engine="flood", kinds=("llm",), low=1, high=1, pid=os.getpid())))
os.read(0, 2**20)
os.write(1, frame(wire.Ready(device="cpu", slots=4)))
small = frame(wire.Pong(n=1)) * 20000
big = frame(wire.Log(level="debug", message="x" * 60000)) * 20
lines = b"y" * 40 + b"\\n"
def shout():
    while True: os.write(2, lines * 1500)
threading.Thread(target=shout, daemon=True).start()
while True:
    os.write(1, small)
    os.write(1, big)
"""


async def ticker(seconds: float, gaps: list[float]) -> None:
    """Sleep 5 ms again and again; how much later than asked each wake-up came, in seconds."""
    end = trio.current_time() + seconds
    while (before := time.perf_counter()) and trio.current_time() < end:
        await trio.sleep(TICK_S)
        gaps.append(time.perf_counter() - before - TICK_S)


async def bare() -> dict[str, float]:
    """The floor: nothing but the ticker."""
    gaps: list[float] = []
    await ticker(SECONDS, gaps)
    return {"gap": max(gaps)}


async def flooded() -> dict[str, float]:
    """The ticker beside a host whose engine floods it."""
    program = (sys.executable, "-c", FLOOD.replace("ROOT", repr(ROOT)))

    def spawn(spec: Any, **options: Any) -> Any:
        import msgspec

        return open_child(msgspec.structs.replace(spec, argv=program, lifeline=False), **options)

    engine = EngineSpec(name="flood", module="none", python=sys.executable)
    spec = ModelSpec(name="m", engine=engine, model=wire.Model(name="m"))
    gaps: list[float] = []
    with tempfile.TemporaryDirectory() as name:
        async with open_host([spec], LimitsTable(), Path(name) / "s", means=Means(spawn=spawn)) as host:
            loaded = trio.Event()
            host.on_change = lambda: loaded.set() if host.snapshot()[0].state == "ready" else None
            host.preload("m")
            with trio.fail_after(30):
                await loaded.wait()
            before = psutil.Process().memory_info().rss
            await ticker(SECONDS, gaps)
            after = psutil.Process().memory_info().rss
            assert host.snapshot()[0].state == "ready", host.snapshot()[0]
    return {"gap": max(gaps), "rss": after - before}


async def stormed(frames: int) -> dict[str, float]:
    """Memory before and after so many hostile frames from fake engines."""
    from supervisor.testing_hostile import storm

    with tempfile.TemporaryDirectory() as name:
        await storm(0, frames // 10, Path(name) / "warm")
        before = psutil.Process().memory_info().rss
        await storm(1, frames, Path(name) / "s")
        return {"rss": psutil.Process().memory_info().rss - before}


def _in_a_process(which: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, which], capture_output=True, check=True, text=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


def bench_hostile() -> list[dict[str, Any]]:
    """Rows for scripts/bench."""
    floor, ours, stormy = (_in_a_process(which) for which in ("bare", "flooded", "stormed"))
    late = (ours["gap"] - floor["gap"]) * 1e3
    return [
        {
            "what": "longest gap of a 5 ms ticker beside an engine that floods frames and stderr (bar: floor + 50 ms)",
            "floor": f"bare trio process {floor['gap'] * 1e3:.1f} ms",
            "ours": f"{ours['gap'] * 1e3:.1f} ms, memory {ours['rss'] / 2**20:+.1f} MiB",
            "ratio": round(late / 50, 2),
        },
        {
            "what": "memory after 200,000 hostile frames (bar: 32 MiB)",
            "floor": "-",
            "ours": f"{stormy['rss'] / 2**20:+.1f} MiB",
            "ratio": round(stormy["rss"] / 2**25, 2),
        },
    ]


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    if sys.argv[1] == "stormed":
        import trio.testing

        clock = trio.testing.MockClock(autojump_threshold=0)
        print(json.dumps(trio.run(stormed, 200_000, clock=clock)))
    else:
        print(json.dumps(trio.run({"bare": bare, "flooded": flooded}[sys.argv[1]])))
