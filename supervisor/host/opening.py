"""An instance's process and what belongs to it, from spawn to reaped: scratch folder, cgroup, entry in the ledger."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import trio

from protocol.faults import refuse
from supervisor.host.cgroups import Cgroup
from supervisor.host.ground import Ground
from supervisor.host.instance import Instance
from supervisor.host.launching import engine_child
from supervisor.host.means import REAL_MEANS, Means
from supervisor.host.watch import ceiling_bytes
from supervisor.host.work import ModelSpec
from supervisor.settings import LimitsTable

# Gigabytes that an engine left are removed by a thread, and nobody waits longer than this for it.
REMOVE_S = 10.0


@contextlib.asynccontextmanager
async def open_instance(
    spec: ModelSpec, limits: LimitsTable, ground: Ground, number: int, *, means: Means = REAL_MEANS
) -> AsyncIterator[Instance]:
    """Start an engine; leaving the block ends it and removes its scratch folder.

    Args:
        ground: where the model's instances work.
        number: of this instance, never used there before.
        means: how to spawn, what to look with, and how to remove the folder.

    Raises:
        FaultError: it cannot be started.

    Cancellation: the end of the process is shielded and bounded, see `open_child`.
    """
    cgroup = _cgroup(spec, ground, number, means)
    record: Path | None = None
    instance: Instance | None = None
    try:
        async with contextlib.AsyncExitStack() as stack:
            instance = await _spawned(stack, spec, limits, ground, number, means, cgroup)
            if means.ledger is not None:
                record = means.ledger.spawned(
                    instance.child.pid,
                    name=spec.engine.name,
                    scratch=ground.instance(number),
                    cgroup=cgroup.path if cgroup else None,
                )
            nursery = await stack.enter_async_context(trio.open_nursery())
            nursery.start_soon(instance.read)
            nursery.start_soon(instance.watch.run)
            try:
                yield instance
            finally:
                await instance.shut_down()
                nursery.cancel_scope.cancel()
    finally:
        how = instance.child.exit if instance is not None else None
        if how is None or not how.unkillable:  # else it may still be in there, and nobody could wait for it
            if means.ledger is not None:
                means.ledger.ended(record)
            await _clear(ground.instance(number), cgroup, means)


async def _spawned(
    stack: contextlib.AsyncExitStack,
    spec: ModelSpec,
    limits: LimitsTable,
    ground: Ground,
    number: int,
    means: Means,
    cgroup: Cgroup | None,
) -> Instance:
    heard: list[Callable[[str], None]] = []

    def line(text: str) -> None:
        for listener in heard:
            listener(text)

    joins = str(cgroup.path) if cgroup else None
    try:
        scratch = ground.make_instance(number)
        child_spec = engine_child(
            spec.engine, scratch, model=spec.model, ground=ground, cgroup=joins, on_stderr_line=line
        )
        if cgroup is not None:
            child_spec = msgspec.structs.replace(child_spec, cgroup=cgroup.path)
        child = await stack.enter_async_context(means.spawn(child_spec, term_grace_s=limits.term_grace_s))
    except OSError as error:
        raise refuse("load_failed", f"Engine {spec.engine.name} cannot be started: {error}.") from None
    instance = Instance(spec, limits, child, means, scratch, cgroup)
    heard.append(instance.line)
    return instance


def _cgroup(spec: ModelSpec, ground: Ground, number: int, means: Means) -> Cgroup | None:
    """A cgroup of its own, where we may make one."""
    if means.cgroups is None:
        return None
    name = re.sub(r"[^A-Za-z0-9]+", "-", f"{os.getpid()}-{ground.root.name}-{number}-{spec.name}")
    return means.cgroups.make(name[:100], ceiling_bytes(spec))


async def _clear(scratch: Path, cgroup: Cgroup | None, means: Means) -> None:
    """Remove what the instance leaves. Cancellation: shielded, bounded by `REMOVE_S`."""
    with trio.CancelScope(shield=True), trio.move_on_after(REMOVE_S):
        if cgroup is not None:
            await trio.to_thread.run_sync(cgroup.remove, abandon_on_cancel=True)
        await means.remove(scratch)
