"""engine-probe --sandbox: which layers hold around each engine, and which one breaks an engine that fails in it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import msgspec

from supervisor.columns import columns
from supervisor.host.grants import LAYERS
from supervisor.host.work import EngineSpec
from supervisor.probe_verdict import NOT_INSTALLED, Probe

# The columns of the table: what the launcher reports, outermost first.
VERDICTS = (
    *("warden", "uid", "user", "pid", "proc", "mounts", "net", "ipc"),
    *("processes", "privileges", "landlock", "seccomp"),
)


def without(engine: EngineSpec, *layers: str) -> EngineSpec:
    """The same engine with layers left out."""
    return msgspec.structs.replace(engine, sandbox=msgspec.structs.replace(engine.sandbox, without=layers))


async def find_guilty(engine: EngineSpec, probe: Callable[[EngineSpec], Awaitable[Probe]]) -> str:
    """Probe a failed engine again with one layer less at a time; one sentence on what that shows."""
    for layer in reversed(LAYERS):
        if (await probe(without(engine, layer))).ok:
            return f"It works without {layer}: that layer refuses something it needs."
    if (await probe(without(engine, *LAYERS))).ok:
        return "It works without any layer, and with no single layer left out: several refuse what it needs."
    return "It fails without any layer too: the sandbox is not the cause."


def render(probes: Sequence[Probe], guilt: Sequence[str]) -> str:
    """The table for people; `guilt` has a sentence, or "", for each probe."""
    told = {name for probe in probes for name in probe.sandbox}
    names = [*(name for name in VERDICTS if name in told), *sorted(told - set(VERDICTS))] or VERDICTS
    rows = [
        (probe.engine, probe.backend or "-", *(probe.sandbox.get(name, "-") for name in names))
        for probe in probes
        if probe.verdict != NOT_INSTALLED
    ]
    parts = [columns(("engine", "backend", *names), rows)]
    if platforms := {probe.platform for probe in probes if probe.platform}:
        parts = [f"platform: {', '.join(sorted(platforms))}", *parts]
    sentences = [
        f"  {probe.engine} on {probe.device_requested}: {sentence}"
        for probe, sentence in zip(probes, guilt, strict=True)
        if sentence
    ]
    return "\n".join([*parts, *(["", "What the sandbox did:", *sentences] if sentences else [])])
