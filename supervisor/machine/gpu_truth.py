"""Whether a process really is on a GPU: the driver's word, which no library can embellish.

The last step of a probe. An engine may claim a device, and even compute on it something else than the model; the
driver lists who holds memory where.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import trio

from supervisor.machine.telemetry import GpuWatch

DEADLINE_S = 20.0


class Truth(NamedTuple):
    """What the driver lists.

    Attributes:
        held: GPU or MIG device -> bytes held by the processes that were asked about.
        unknown: why nothing can be concluded from an empty `held`; "" when it means "not on a GPU".
    """

    held: dict[str, int]
    unknown: str = ""


async def where_is(
    pids: Callable[[], Iterable[int]], *, watch: GpuWatch | None = None, deadline_s: float = DEADLINE_S
) -> Truth:
    """Ask the driver where these processes hold memory, in a reading that begins now.

    Args:
        pids: an engine's family (`supervisor.host.family.members`), asked after the reading.
        watch: one that runs; None starts a reader for this question alone.

    Cancellation: the reader, if it was started here, is ended.
    """
    if watch is not None:
        return await _ask(watch, pids, deadline_s)
    watch = GpuWatch()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        truth = await _ask(watch, pids, deadline_s)
        nursery.cancel_scope.cancel()
    return truth


async def _ask(watch: GpuWatch, pids: Callable[[], Iterable[int]], deadline_s: float) -> Truth:
    if not await watch.wait_for(lambda _readings: True, deadline_s):
        return Truth({}, watch.reason or "The GPU reader does not answer.")
    held = watch.used_by(pids())
    readings = watch.readings().values()
    if held or not readings:
        return Truth(held)
    if refused := next((gpu.missing["processes"] for gpu in readings if "processes" in gpu.missing), ""):
        return Truth({}, f"The driver does not list processes: {refused}.")
    if any(gpu.memory_used_bytes and not gpu.processes and not gpu.mig for gpu in readings):
        return Truth({}, "A GPU has memory in use and lists no process: pids are hidden here (a container).")
    return Truth({})
