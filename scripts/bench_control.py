"""The control part of scripts/bench: what `supervisor status` costs, and an answer of the control API."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from supervisor import config
from supervisor.control.client import ask

Row = dict[str, Any]
# The floor of an answer: the standard library's server behind a Unix socket, which always says the same.
FLOOR = """
import http.server, socketserver, sys
class Answer(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def address_string(self): return ""
    def log_message(self, *_): pass
    def do_GET(self):
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("x-bulkhead-api", "1")
        self.send_header("content-length", sys.argv[2])
        self.end_headers()
        self.wfile.write(b"0".rjust(int(sys.argv[2])))
socketserver.UnixStreamServer(sys.argv[1], Answer).serve_forever()
"""
TURNS = 25
ASKED = 400
BAR_MS = 100.0


def bench_status(
    running: Callable[[Path], AbstractContextManager[tuple[str, str, Any, float]]],
    first_answer: Callable[[str, str], float],
) -> list[Row]:
    """`supervisor status` of a worker that serves, in turns with an interpreter that does nothing."""
    with tempfile.TemporaryDirectory() as name, running(Path(name)) as (url, key, _process, _began):
        first_answer(url, key)
        file = Path(name) / "worker.toml"
        commands = {
            "pass": [sys.executable, "-c", "pass"],
            "status": [str(Path(sys.executable).parent / "supervisor"), "status", "--config", str(file)],
        }
        wall: dict[str, list[float]] = {what: [] for what in commands}
        cpu: dict[str, list[float]] = {what: [] for what in commands}
        for _ in range(TURNS):
            for what, command in commands.items():
                took, worked = _run(command)
                wall[what].append(took)
                cpu[what].append(worked)
        answers = _answers(Path(name), config.control_socket(config.load(file)))
    floor, ours = ((statistics.median(wall[what]), statistics.median(cpu[what])) for what in ("pass", "status"))
    return [
        {
            "what": f"supervisor status, exec to exit (median of {TURNS}; bar: {BAR_MS:g} ms)",
            "floor": f"`python -c pass`: {floor[0]:.1f} ms, CPU {floor[1]:.1f} ms",
            "ours": f"{ours[0]:.1f} ms, CPU {ours[1]:.1f} ms ({ours[1] / floor[1]:.2f} times)",
            "ratio": round(ours[0] / floor[0], 2),
        },
        *answers,
    ]


def _answers(folder: Path, path: Path) -> list[Row]:
    """One question after the other, each with a connection of its own, in turns with the floor's."""
    size = len(json.dumps(ask(path, "GET", "/v1/status")))
    floor_path = folder / "floor.sock"
    process = subprocess.Popen([sys.executable, "-c", FLOOR, str(floor_path), str(size)])
    ends = {"floor": (floor_path, "/"), "health": (path, "/v1/health"), "status": (path, "/v1/status")}
    took: dict[str, list[float]] = {what: [] for what in ends}
    try:
        until = time.monotonic() + 30
        while not floor_path.exists() and time.monotonic() < until:
            time.sleep(0.01)
        for _ in range(ASKED):
            for what, (where, route) in ends.items():
                began = time.perf_counter()
                ask(where, "GET", route)
                took[what].append((time.perf_counter() - began) * 1e3)
    finally:
        process.terminate()
        process.wait()
    low = sorted(took["floor"])
    rows = []
    for what in ("health", "status"):
        ours = sorted(took[what])
        rows.append(
            {
                "what": f"GET /v1/{what} at the control socket, a connection each",
                "floor": f"http.server behind a Unix socket: p50 {low[ASKED // 2]:.2f} ms, "
                f"p99 {low[ASKED * 99 // 100]:.2f} ms",
                "ours": f"p50 {ours[ASKED // 2]:.2f} ms, p99 {ours[ASKED * 99 // 100]:.2f} ms",
                "ratio": round(ours[ASKED // 2] / low[ASKED // 2], 2),
            }
        )
    return rows


def _run(command: list[str]) -> tuple[float, float]:
    """Wall and CPU time of one run, in milliseconds."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
    took, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return took * 1e3, (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1e3
