"""One probe child, from its start to its end: what it wrote, how it ended, and whether the driver knows of it.

An engine that says it ran on a GPU is held at its last rung, with its model still loaded, until the driver was asked
whether it has memory there: the child waits for the end of its input (engines/runtime/modes.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import trio

from supervisor.host.child import Child, open_child
from supervisor.host.family import members
from supervisor.host.launching import engine_child
from supervisor.host.work import EngineSpec
from supervisor.machine.gpu_truth import Truth, where_is
from supervisor.machine.telemetry import GpuWatch
from supervisor.probe_verdict import Climb

MAX_OUTPUT_BYTES = 2**20
# From the end of its input a child that has told everything is gone in milliseconds; libraries take their time.
FAREWELL_S = 5.0
END_GRACE_S = 1.0


async def climb(
    engine: EngineSpec, scratch: Path, backend: str, device: str, deadline_s: float, watch: GpuWatch | None = None
) -> Climb:
    """Let a child of `engine` climb the ladder in `scratch`.

    Args:
        deadline_s: for the ladder. The driver's word comes after it and has a deadline of its own.
        watch: a GPU watch that runs; None starts a reader when one is needed.

    Cancellation: the child is ended and reaped.
    """
    args = ["probe", "--device", device] + (["--backend", backend] if backend else [])
    gpu = device.startswith("cuda")
    output = bytearray()
    truth: Truth | None = None
    async with open_child(engine_child(engine, scratch, args)) as child:
        if not gpu:
            child.close_stdin()
        with trio.move_on_after(deadline_s) as scope:
            await _listen(child, output, until_answer=gpu)
            if not gpu:
                await child.wait()
        if gpu and not scope.cancelled_caught:
            if child.exit is None and _claims_gpu(output):
                truth = await _ask_driver(child, watch)
            child.close_stdin()
            with trio.move_on_after(FAREWELL_S):
                await _listen(child, output)
                await child.wait()
        await child.end(END_GRACE_S)
        with trio.move_on_after(FAREWELL_S):  # what it had said before, and a busy machine had not read yet
            await _listen(child, output)
    assert child.exit is not None
    return Climb(
        rungs=rungs(bytes(output)),
        how=child.exit,
        hung=scope.cancelled_caught,
        deadline_s=deadline_s,
        stderr=tuple(child.stderr_tail(20)),
        held=None if truth is None else truth.held,
        unknown="" if truth is None else truth.unknown,
    )


async def _listen(child: Child, output: bytearray, *, until_answer: bool = False) -> None:
    while len(output) < MAX_OUTPUT_BYTES and (data := await child.read()):
        output += data
        if until_answer and _last(output).get("rung") in ("answer", "fault"):
            return


async def _ask_driver(child: Child, watch: GpuWatch | None) -> Truth:
    if not members(child.pid):
        return Truth({}, "Its processes cannot be looked up on this system.")
    truth = await where_is(lambda: members(child.pid), watch=watch)
    if not truth.held and child.exit is not None:
        return Truth({}, "It ended before the driver had answered.")
    return truth


def _claims_gpu(output: bytearray) -> bool:
    """Whether the ladder was climbed, and on a GPU by the engine's own word."""
    found = {str(rung["rung"]): rung for rung in rungs(bytes(output))}
    return "answer" in found and str(found.get("infer", {}).get("ready", {}).get("device", "")).startswith("cuda")


def _last(output: bytearray) -> dict[str, Any]:
    return (rungs(bytes(output)) or ({},))[-1]


def rungs(output: bytes) -> tuple[dict[str, Any], ...]:
    """Complete lines only: a child that dies may leave half of one."""
    found = []
    for line in output.split(b"\n"):
        try:
            value = msgspec.json.decode(line, type=dict[str, Any])
        except msgspec.MsgspecError:
            continue
        if "rung" in value:
            found.append(value)
    return tuple(found)
