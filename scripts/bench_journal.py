"""The records' part of scripts/bench: what writing claims and ends down costs a job, and what the store can write.

Two workers run side by side, one as it is and one whose records are kept in memory only; callers take turns between
them. The store alone is held against bare SQLite: the same row and pragmas, one transaction a row, in the same folder.
"""

from __future__ import annotations

import functools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import msgspec
import trio

from protocol import link_wire as wire
from supervisor.link.journal import Journal
from supervisor.store import connect, open_store, prepare

Row = dict[str, Any]
Hammer = Callable[[str, dict[str, str], int, int], tuple[list[float], float]]
FirstAnswer = Callable[[str, str], float]
# Starts a supervisor that notes how long each offer took until it was accepted, and writes that down at its end.
SUPERVISOR = """
import json, os, sys, time
import trio
from protocol import link_wire as wire
from supervisor import app, cli
from supervisor.link.attempts import Attempts
from supervisor.link.keeping import InMemory

class Memory(InMemory):
    def __init__(self, store, outbox): self.on_change = lambda: None
    def reason(self): return ""
    async def restore(self): return []
    async def run(self): await trio.sleep_forever()

if os.environ["BENCH_KEEPS"] == "memory":
    app.OnDisk = Memory
began, took = {}, []
begin, tell = Attempts.begin, Attempts._tell
def noted_begin(self, job, attempt, offer):
    began[job] = time.perf_counter()
    begin(self, job, attempt, offer)
def noted_tell(self, claim, body):
    tell(self, claim, body)
    if isinstance(body, wire.Accept):
        took.append(time.perf_counter() - began.pop(claim.job))
Attempts.begin, Attempts._tell = noted_begin, noted_tell
code = cli.main()
with open(os.environ["BENCH_TOOK"], "w") as out:
    json.dump(took, out)
sys.exit(code)
"""
# Callers, jobs a turn, turns. Each turn warms up with 20 jobs (`hammer`).
PHASES = ((1, 150, 3), (16, 320, 3))
WARM_UP = 20
WRITERS = (1, 16, 200)
STORE_S = 2.0


def bench_journal(
    running: Callable[..., AbstractContextManager[tuple[str, str, Any, float]]],
    hammer: Hammer,
    first_answer: FirstAnswer,
) -> list[Row]:
    """A no-op chat with its records on disk against one without, and the store alone."""
    with tempfile.TemporaryDirectory() as name:
        return [*_road(Path(name), running, hammer, first_answer), *_store(Path(name))]


def _road(
    folder: Path,
    running: Callable[..., AbstractContextManager[tuple[str, str, Any, float]]],
    hammer: Hammer,
    first_answer: FirstAnswer,
) -> list[Row]:
    chats: dict[tuple[str, int], list[float]] = {}
    with tempfile.TemporaryDirectory() as other:
        homes = {"disk": folder, "memory": Path(other)}
        with _keeping("disk", folder, running) as disk, _keeping("memory", Path(other), running) as memory:
            ends = {"disk": disk, "memory": memory}
            for url, key, *_ in ends.values():
                first_answer(url, key)
            for callers, count, turns in PHASES:
                for _ in range(turns):
                    for keeps, (url, key, *_) in ends.items():
                        samples, _rate = hammer(url, {"Authorization": f"Bearer {key}"}, count, callers)
                        chats.setdefault((keeps, callers), []).extend(samples)
        took = {keeps: json.loads((home / "took").read_text()) for keeps, home in homes.items()}
    rows: list[Row] = []
    for callers, accepts in _phases(took).items():
        who = f"{callers} caller{'s' * (callers > 1)}"
        rows.append(_against(f"offer to accept, claim on disk, {who}", accepts["memory"], accepts["disk"]))
        rows.append(_against(f"no-op chat, records on disk, {who}", chats["memory", callers], chats["disk", callers]))
    return rows


def _keeping(keeps: str, folder: Path, running: Callable[..., Any]) -> AbstractContextManager[tuple[Any, ...]]:
    environment = {**os.environ, "BENCH_KEEPS": keeps, "BENCH_TOOK": str(folder / "took")}
    found: AbstractContextManager[tuple[Any, ...]] = running(
        folder, program=("-c", SUPERVISOR), environment=environment
    )
    return found


def _phases(took: dict[str, list[float]]) -> dict[int, dict[str, list[float]]]:
    """Callers -> keeping -> seconds to accept, without the warm-ups; counted from the last job backwards."""
    found: dict[int, dict[str, list[float]]] = {callers: {} for callers, _count, _turns in PHASES}
    for keeps, seconds in took.items():
        end = len(seconds)
        for callers, count, turns in reversed(PHASES):
            for _ in range(turns):
                found[callers].setdefault(keeps, []).extend(seconds[end - count : end])
                end -= count + WARM_UP
    return found


def _against(what: str, floor: list[float], ours: list[float]) -> Row:
    low, high = _percentiles(floor), _percentiles(ours)
    return {
        "what": what,
        "floor": f"records in memory: p50 {low[0]:.2f} ms, p99 {low[1]:.2f} ms",
        "ours": f"p50 {high[0]:.2f} ms, p99 {high[1]:.2f} ms ({high[1] / low[1]:.2f} times)",
        "ratio": round(high[0] / low[0], 2),
    }


def _percentiles(seconds: list[float]) -> tuple[float, float]:
    ordered = sorted(seconds)
    return ordered[len(ordered) // 2] * 1e3, ordered[int(len(ordered) * 0.99)] * 1e3


# ---- the store alone


OFFER = wire.Offer(kind="llm", model="m", params=msgspec.Raw(b"\x80"), upload="/v1/results/{name}", deadline_ms=60_000)


def _bare(path: Path) -> float:
    """Rows a second of bare SQLite: one row, one transaction."""
    connection = connect(path)
    prepare(connection)
    offer, count, began = msgspec.msgpack.encode(OFFER), 0, time.perf_counter()
    while (passed := time.perf_counter() - began) < STORE_S:
        connection.execute("BEGIN IMMEDIATE")
        connection.execute(
            "INSERT INTO claims (job, attempt, offer, taken_ms) VALUES (?, ?, ?, ?)", (str(count), 1, offer, 0)
        )
        connection.execute("COMMIT")
        count += 1
    connection.close()
    return count / passed


async def _written(path: Path, writers: int) -> tuple[float, list[float]]:
    """Rows a second of so many tasks that each write one claim after the other, and how long each took."""
    samples: list[float] = []

    async def write(journal: Journal, number: int) -> None:
        while (now := time.perf_counter()) < began + STORE_S:
            await journal.claimed(f"{number}-{len(samples)}", 1, OFFER)
            samples.append(time.perf_counter() - now)

    async with open_store(path) as store:
        journal, began = Journal(store), time.perf_counter()
        async with trio.open_nursery() as nursery:
            for number in range(writers):
                nursery.start_soon(write, journal, number)
        return len(samples) / (time.perf_counter() - began), samples


def _store(folder: Path) -> list[Row]:
    rows = []
    for writers in WRITERS:
        turns = []
        for turn in range(3):
            floor = _bare(folder / f"bare-{writers}-{turn}")
            turns.append((floor, *trio.run(functools.partial(_written, folder / f"store-{writers}-{turn}", writers))))
        floor, ours = (statistics.median(turn[side] for turn in turns) for side in (0, 1))
        p50, p99 = _percentiles([seconds for turn in turns for seconds in turn[2]])
        rows.append(
            {
                "what": f"claims written down by the store, {writers} at once (rate: more is better)",
                "floor": f"bare SQLite, a transaction a row: {floor:.0f}/s",
                "ours": f"{ours:.0f}/s, each p50 {p50:.2f} ms, p99 {p99:.2f} ms",
                # Turn by turn: a shared disk is ten times slower in one second than in the next.
                "ratio": round(statistics.median(turn[1] / turn[0] for turn in turns), 2),
            }
        )
    return rows
