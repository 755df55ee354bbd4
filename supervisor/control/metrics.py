"""A snapshot as Prometheus text (the text format 0.0.4). Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from protocol.revision import LINK_WIRE
from supervisor.control.snapshot import ModelView, Snapshot

PREFIX = "bulkhead_"
STATES = ("starting", "idle", "busy", "draining", "paused", "offline")
# A model is up when it would serve a job now, or after a load that nothing speaks against.
_DOWN = ("backoff", "quarantined", "failed")

Sample = tuple[Mapping[str, str], float]


def metrics(snapshot: Snapshot, more: Iterable[str] = ()) -> str:
    """The text of a scrape; `more` are whole lines of other families (the GPUs')."""
    lines = [line for family in _families(snapshot) for line in _lines(*family)]
    return "\n".join([*lines, *more]) + "\n"


def _families(snapshot: Snapshot) -> Iterable[tuple[str, str, str, Sequence[Sample]]]:
    one: Mapping[str, str] = {}
    yield "up", "gauge", "Whether the supervisor answers.", [(one, 1)]
    which = {"version": snapshot.version, "worker": snapshot.worker, "protocol": str(LINK_WIRE.high)}
    yield "info", "gauge", "Which supervisor this is.", [(which, 1)]
    yield "uptime_seconds", "gauge", "Since it was started.", [(one, snapshot.uptime_s)]
    yield "state", "gauge", "State of the worker.", [({"state": s}, s == snapshot.state) for s in STATES]
    # Its key: a source may hold two GPUs, and a scrape with a series twice is refused as a whole.
    holds = [({"source": str(hold.source), "gpu": hold.gpu, "kind": hold.kind}, 1) for hold in snapshot.holds]
    yield "hold", "gauge", "Reasons for not taking work.", holds
    yield "coordinator_connected", "gauge", "Whether there is a session.", [(one, snapshot.link.connected)]
    yield "jobs_inflight", "gauge", "Attempts that this worker holds.", [(one, snapshot.jobs)]
    yield "queue_depth", "gauge", "Runs that wait for an engine.", [(one, sum(m.queued for m in snapshot.models))]
    yield from _of_models(snapshot.models)


def _of_models(models: Sequence[ModelView]) -> Iterable[tuple[str, str, str, Sequence[Sample]]]:
    def each(value: Mapping[str, float]) -> list[Sample]:
        engine = {model.name: model.engine for model in models}
        return [({"model": name, "engine": engine[name]}, number) for name, number in value.items()]

    yield "engine_up", "gauge", "Whether the model can serve.", each({m.name: m.state not in _DOWN for m in models})
    yield (
        "engine_state",
        "gauge",
        "State of the model's instance.",
        [({"model": model.name, "engine": model.engine, "state": model.state}, 1) for model in models],
    )
    yield "engine_jobs_running", "gauge", "Runs in the instance.", each({m.name: m.running for m in models})
    yield "engine_jobs_queued", "gauge", "Runs that wait for it.", each({m.name: m.queued for m in models})
    yield "engine_restarts_total", "counter", "Starts after the first.", each({m.name: m.restarts for m in models})
    yield (
        "engine_ends_total",
        "counter",
        "Ends of instances by cause.",
        [
            ({"model": model.name, "engine": model.engine, "cause": cause}, count)
            for model in models
            for cause, count in sorted(model.ends.items())
        ],
    )
    yield "engine_rss_bytes", "gauge", "Resident memory of the instance.", each({m.name: m.rss_bytes for m in models})
    yield "engine_vram_bytes", "gauge", "GPU memory of the instance.", each({m.name: m.vram_bytes for m in models})
    yield (
        "engine_sandbox",
        "gauge",
        "Verdict of each layer of the sandbox.",
        [
            ({"model": model.name, "engine": model.engine, "layer": layer, "verdict": verdict}, 1)
            for model in models
            for layer, verdict in model.sandbox.items()
        ],
    )


def _lines(name: str, kind: str, about: str, samples: Sequence[Sample]) -> Iterable[str]:
    if samples:
        yield f"# HELP {PREFIX}{name} {about}"
        yield f"# TYPE {PREFIX}{name} {kind}"
    for labels, value in samples:
        inner = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        yield f"{PREFIX}{name}{f'{{{inner}}}' if inner else ''} {_number(value)}"


def _number(value: float) -> str:
    return repr(value) if isinstance(value, float) else str(int(value))


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
