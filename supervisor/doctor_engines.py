"""What `doctor` looks at around the engines: GPUs and driver, probes, model files, what confines an engine."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import trio

from supervisor.doctor import Finding, Patient, fail, ok, warn
from supervisor.host.work import EngineSpec, ModelSpec
from supervisor.machine.telemetry import GpuWatch
from supervisor.probe import engine_spec, probe_engine
from supervisor.probe_verdict import Probe
from supervisor.proving import Verdicts, circumstances_of
from supervisor.settings import EngineTable

GPU_S = 25.0  # a cold driver takes up to five seconds per GPU
PROBE_S = 40.0
# The engine that needs nothing but Python: if a layer does not hold around it, it holds around none.
CANARY = "synthetic"
_FINE = frozenset({"verified", "claimed"})


async def gpus(patient: Patient) -> Iterable[Finding]:
    """The driver answers, through the reader that may hang."""
    if patient.seen is not None:
        return _seen_gpus(patient)
    watch = GpuWatch()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch.run)
        known = await watch.wait_known(GPU_S)
        reason, driver, readings = watch.reason, watch.driver, dict(watch.readings())
        nursery.cancel_scope.cancel()
    if not known:
        cure = "Look at `nvidia-smi` and at the kernel's log; a hung driver needs a reset or a reboot."
        return [fail("gpu", f"The driver gave no answer: {reason}", cure)]
    if not readings:
        return [_no_gpu(patient, reason)]
    found = [ok("driver", f"{driver or 'It answers'}.")] if driver else []
    for uuid, gpu in readings.items():
        if gpu.error:
            found.append(fail(f"gpu {uuid}", gpu.error, "Reset the GPU or reboot."))
        else:
            free, total = (gpu.memory_free_bytes or 0) / 2**30, (gpu.memory_total_bytes or 0) / 2**30
            found.append(ok(f"gpu {uuid}", f"{gpu.name}: {free:.1f} of {total:.1f} GiB free."))
    return found


def _seen_gpus(patient: Patient) -> list[Finding]:
    seen = patient.seen or {}
    views = seen.get("gpus") or ()
    if not views:
        return [_no_gpu(patient, str(seen.get("gpu_reason") or "None is known."))]
    found = []
    for view in views:
        name, bad = f"gpu {view.get('uuid')}", view.get("fault") or view.get("tainted")
        if bad:
            found.append(fail(name, f"It is out of service: {bad}", "Reset the GPU or reboot."))
        else:
            free, total = (view.get("free_bytes") or 0) / 2**30, (view.get("total_bytes") or 0) / 2**30
            found.append(ok(name, f"{view.get('name')}: {free:.1f} of {total:.1f} GiB free."))
    return found


def _no_gpu(patient: Patient, reason: str) -> Finding:
    wants = [model.name for model in (patient.settings.models if patient.settings else ()) if model.device == "cuda"]
    if wants:
        cure = 'Install the driver, or give them device = "cpu".'
        return fail("gpu", f"{reason} {', '.join(wants)} cannot run.", cure)
    return ok("gpu", reason)


# ---- engines


def engines(patient: Patient) -> Iterator[Finding]:
    """Each engine that a model uses is installed, and its probe was passed under today's circumstances."""
    passed = Verdicts(patient.state / "verdicts.json")
    for key, engine in _used(patient).items():
        name = f"engine {engine.name}"
        if not os.access(engine.python, os.X_OK):
            cure = f"Correct [engines.{engine.name}] python, or run `supervisor setup --engines {engine.name}`."
            yield fail(name, f"There is no interpreter {engine.python}.", cure)
        elif passed.holds(key, circumstances_of(engine)):
            yield ok(name, f"Its probe was passed ({key.partition('/')[2].strip('/') or 'cpu'}).")
        else:
            cure = f"`engine-probe --engine {engine.name}` tries it now; a running supervisor does so by itself."
            yield warn(name, "It has not passed its probe since something it needs has changed.", cure)


def _specs(patient: Patient) -> list[ModelSpec]:
    from supervisor.config import build_models

    return build_models(patient.settings) if patient.settings is not None else []


def _used(patient: Patient) -> dict[str, EngineSpec]:
    """Key of a probe -> engine, as `proving` writes them down."""
    specs = _specs(patient)
    return {"/".join((spec.engine.name, spec.model.backend, spec.model.device)): spec.engine for spec in specs}


def models(patient: Patient) -> Iterator[Finding]:
    """The files of every model are there, and of the size that was pulled; nothing large is read."""
    from supervisor.model_store import home_of

    served = {view.get("name"): view for view in (patient.seen or {}).get("models") or ()}
    if patient.settings is not None and not patient.settings.models:
        yield warn("models", "None is configured.", "`supervisor models search`, then `supervisor models pull NAME`.")
    for model in patient.settings.models if patient.settings is not None else ():
        name = f"model {model.name}"
        paths = [Path(text) for text in (model.path, *model.files.values()) if text]
        if missing := [str(path) for path in paths if not path.exists()]:
            cure = "Correct its path, or pull it again with --force."
            yield fail(name, f"{', '.join(missing)} does not exist.", cure)
            continue
        home = home_of(paths[0]) if paths else None
        manifest = home[0].manifest(home[1]) if home else None
        if home and manifest:
            folder = home[0].folder(home[1])
            wrong = [file for file, kept in manifest.files.items() if _size(folder / file) != kept.size_bytes]
            if wrong:
                cure = f"`supervisor models verify {model.name}`, then pull it again with --force."
                yield fail(name, f"{', '.join(wrong)} is not as it was pulled.", cure)
                continue
        view = served.get(model.name) or {}
        if view.get("state") == "quarantined":
            cure = f"`supervisor engines restart {model.name}` when it is mended; `supervisor status` tells more."
            yield fail(name, f"It is out of service: {view.get('reason')}", cure)
        else:
            digests = "its digests are checked before a load" if model.sha256 else "no digest to compare with"
            yield ok(name, f"{model.engine}{f', {digests}' if paths else ''}.")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


# ---- confinement


async def sandbox(patient: Patient) -> Iterable[Finding]:
    """Each layer is tried from inside an engine, by doing what it forbids."""
    spec = engine_spec(CANARY, EngineTable())
    probe = await probe_engine(CANARY, spec, "", "cpu", deadline_s=PROBE_S - 5.0)
    return _layers(patient, probe)


def _layers(patient: Patient, probe: Probe) -> list[Finding]:
    required = [
        name
        for name, table in (patient.settings.engines if patient.settings is not None else {}).items()
        if table.sandbox == "require"
    ]
    if not probe.ok and not probe.sandbox:
        return [fail("sandbox", f"The engine {CANARY} does not start: {probe.message}", probe.hint or "`engine-probe`")]
    held = {layer for layer, verdict in probe.sandbox.items() if verdict in _FINE}
    weak = {layer: verdict for layer, verdict in probe.sandbox.items() if layer not in held}
    if not weak:
        return [ok("sandbox", f"All {len(held)} layers hold.")]
    words = "; ".join(f"{layer}: {verdict}" for layer, verdict in sorted(weak.items()))
    cure = "`engine-probe --sandbox` shows each layer; what is missing costs itself only."
    if required:
        return [fail("sandbox", f"{words}. {', '.join(required)} require every layer.", cure)]
    return [warn("sandbox", f"{len(held)} layers hold. {words}.", cure)]
