"""engine-probe: try every engine on every device in a child of its own, and say what really works.

    engine-probe [ENGINE …] [--device cpu|cuda|all] [--config worker.toml] [--sandbox] [--json]
    engine-probe --module their_pkg.engine [--python PATH]
    engine-probe --conformance NAME

A claim of a library is worth nothing until an answer was checked: each child loads the shipped fixture, asks a question
whose answer is known, and says where it ran (engines/runtime/modes.py); of a GPU the driver is asked as well
(supervisor/machine/gpu_truth.py). Exit code 0 when all that was asked for is ok, 1 when not, 64 for a wrong command
line.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import msgspec
import trio

from engines.catalog import CATALOG, Entry
from supervisor import conformance, probe_climb, probe_sandbox
from supervisor.columns import columns
from supervisor.config import find_config, load, sandbox_of
from supervisor.errors import ConfigError, ExitCode
from supervisor.host.containment import backend as containment
from supervisor.host.work import EngineSpec
from supervisor.interrupts import ended
from supervisor.machine.gpu import Machine, read_machine, wait_for_gpu
from supervisor.machine.telemetry import GpuWatch
from supervisor.probe_verdict import NOT_INSTALLED, OK, Probe, judge, summary
from supervisor.settings import EngineTable

DEADLINE_S = 30.0
AT_ONCE = 2  # a probe uses several threads of its own; more at once would measure the queue, not the engine
QUIET_S = 2.0  # nobody needs progress for something shorter


class Target(msgspec.Struct, frozen=True, kw_only=True):
    """One probe to be made.

    Attributes:
        must: whether the exit code depends on it even when it is not installed.
        counts: whether the exit code depends on it at all.
    """

    name: str
    engine: EngineSpec
    backend: str = ""
    device: str = "cpu"
    must: bool = False
    counts: bool = True


async def probe_engine(
    name: str,
    engine: EngineSpec,
    backend: str,
    device: str,
    *,
    deadline_s: float = DEADLINE_S,
    machine: Machine | None = None,
    folder: Path | None = None,
    watch: GpuWatch | None = None,
) -> Probe:
    """Probe one engine on one device in a child.

    Args:
        name: of the catalogue or of worker.toml.
        backend: "" means the engine's default.
        device: "cpu" or "cuda".
        deadline_s: for the whole ladder; then the child is ended and the verdict is `hung`.
        machine: GPU and driver, for better hints.
        folder: where the probe's own folder is made; None means the system's place for temporary files.
        watch: one that runs, to ask whether the driver sees the engine on a GPU; None starts a reader for it.

    Cancellation: the child is ended and reaped, its folder removed.
    """
    if not os.access(engine.python, os.X_OK):
        message = f"There is no interpreter {engine.python}."
        hint = f"Correct [engines.{name}] python, or run `supervisor setup --engines {name}`."
        return Probe(
            engine=name, backend=backend, device_requested=device, verdict="failed", message=message, hint=hint
        )
    scratch = await trio.to_thread.run_sync(lambda: Path(tempfile.mkdtemp(prefix="bh-probe-", dir=folder)))
    try:
        climb = await probe_climb.climb(engine, scratch, backend, device, deadline_s, watch)
    finally:
        with trio.CancelScope(shield=True):
            await trio.to_thread.run_sync(lambda: shutil.rmtree(scratch, ignore_errors=True))
    probe = judge(name, backend, device, engine.python, climb, machine)
    around = containment()
    return msgspec.structs.replace(
        probe, platform=around.facts()["platform"], sandbox={**around.verdicts(), **probe.sandbox}
    )


async def probe_all(
    targets: Sequence[Target], *, deadline_s: float, machine: Machine | None, progress: bool = False
) -> list[Probe]:
    """Probe all targets, `AT_ONCE` at a time; results in the order of `targets`."""
    found: dict[int, Probe] = {}
    limiter = trio.CapacityLimiter(AT_ONCE)

    async def one(number: int, target: Target) -> None:
        async with limiter:
            found[number] = await probe_engine(
                target.name, target.engine, target.backend, target.device, deadline_s=deadline_s, machine=machine
            )

    async with trio.open_nursery() as nursery:
        if progress:
            nursery.start_soon(_show_progress, found, len(targets))
        async with trio.open_nursery() as work:
            for number, target in enumerate(targets):
                work.start_soon(one, number, target)
        nursery.cancel_scope.cancel()
    return [found[number] for number in range(len(targets))]


async def _show_progress(found: Mapping[int, Probe], total: int) -> None:
    await trio.sleep(QUIET_S)
    try:
        while True:
            sys.stderr.write(f"\rprobing: {len(found)} of {total} done ")
            sys.stderr.flush()
            await trio.sleep(0.5)
    finally:
        sys.stderr.write("\r\033[K")


# ---- what to probe -----------------------------------------------------------------------------------------


def engine_specs(tables: Mapping[str, EngineTable]) -> dict[str, EngineSpec]:
    """Every engine of the catalogue and of worker.toml: name -> how to start it."""
    names = [*CATALOG, *(name for name in tables if name not in CATALOG)]
    return {name: engine_spec(name, tables.get(name, EngineTable())) for name in names}


def engine_spec(name: str, table: EngineTable) -> EngineSpec:
    """How to start one engine. Raises ValueError when nobody says which module it is."""
    entry = CATALOG.get(name)
    module = table.module or (entry.module if entry else "")
    if not module:
        raise ValueError(f"engine {name!r} is neither in the catalogue nor has it a `module` in worker.toml")
    python = table.python or sys.executable
    return EngineSpec(name=name, module=module, python=python, env=table.env, sandbox=sandbox_of(table))


def targets(
    asked: Sequence[str],
    engines: Mapping[str, EngineSpec],
    devices: Iterable[str],
    *,
    backend: str = "",
    device_asked: bool = False,
) -> list[Target]:
    """Spread engines over backends and devices.

    Args:
        asked: names given by the user; empty means all.
        devices: to try, where the engine knows them.
        backend: only this one.
        device_asked: whether the user named the device; an unasked GPU does not decide the exit code.
    """
    found = []
    for name in asked or engines:
        entry = CATALOG.get(name, Entry(module="", kinds=()))
        backends = (backend,) if backend else entry.backends
        for device in devices:
            if device not in entry.devices and not (asked and device_asked):
                continue
            found += [
                Target(
                    name=name,
                    engine=engines[name],
                    backend=each,
                    device=device,
                    # One backend is enough for an engine asked by name, unless the user named the backend.
                    must=bool(asked) and (each == entry.backends[0] or bool(backend)),
                    counts=device == "cpu" or device_asked,
                )
                for each in backends
            ]
    return found


def all_well(targets: Sequence[Target], probes: Sequence[Probe]) -> bool:
    """Whether everything that was asked for is ok."""
    for target, probe in zip(targets, probes, strict=True):
        if probe.ok or not target.counts:
            continue
        if probe.verdict != NOT_INSTALLED or (target.must and not _other_backend_ok(target, targets, probes)):
            return False
    return True


def _other_backend_ok(missing: Target, targets: Sequence[Target], probes: Sequence[Probe]) -> bool:
    return any(
        probe.ok and (target.name, target.device) == (missing.name, missing.device)
        for target, probe in zip(targets, probes, strict=True)
    )


# ---- output ------------------------------------------------------------------------------------------------


def render(probes: Sequence[Probe]) -> str:
    """The table for people, with hints and licences below."""
    head = ("engine", "backend", "asked", "ran on", "compute", "load ms", "infer ms", "RSS MiB", "verdict")
    rows = [
        (
            probe.engine,
            probe.backend or "-",
            probe.device_requested,
            probe.device_executed or "-",
            probe.compute_type or "-",
            _number(probe.load_ms),
            _number(probe.infer_ms),
            _number(probe.rss_bytes and probe.rss_bytes / 2**20),
            probe.verdict,
        )
        for probe in probes
    ]
    parts = [columns(head, rows, right=(5, 6, 7)), "", summary(probes)]
    parts += _below("How to mend it", [line for probe in probes for line in _mending(probe)])
    licences = {f"{probe.engine}: {probe.licence}" for probe in probes if _is_notable(probe.licence)}
    parts += _below("Licences", sorted(licences))
    return "\n".join(parts)


def _mending(probe: Probe) -> list[str]:
    if probe.verdict == OK:
        return []
    which = probe.engine + (f" ({probe.backend})" if probe.backend else "")
    words = " ".join(part for part in (probe.message, probe.hint) if part)
    return [f"{which} on {probe.device_requested}: {words}"]


def _below(title: str, lines: Sequence[str]) -> list[str]:
    return ["", f"{title}:", *(f"  {line}" for line in lines)] if lines else []


def _is_notable(licence: str) -> bool:
    """Whether a licence asks something of whoever ships the engine."""
    return "GPL" in licence


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


# ---- command line ------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(ExitCode.USAGE, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="engine-probe", description="Try the inference engines and say which really work, and where.")
    parser.add_argument("engine", nargs="*", help="names of engines; default: all")
    parser.add_argument("--device", choices=("cpu", "cuda", "all"), help="default: cpu, and cuda where a GPU is")
    parser.add_argument("--backend", default="", help="only this backend of the engine")
    parser.add_argument("--config", help="worker.toml whose [engines] are probed as well, with their interpreters")
    parser.add_argument("--module", help="probe an engine of another repository: pkg.engine")
    parser.add_argument("--python", default="", help="interpreter for --module or for the engines named")
    parser.add_argument("--json", action="store_true", help="an array of objects for programs")
    parser.add_argument("--sandbox", action="store_true", help="what holds around each engine, and what breaks it")
    parser.add_argument("--wait-for-gpu", type=float, metavar="S", help="first wait up to S seconds until CUDA answers")
    parser.add_argument("--deadline", type=float, default=DEADLINE_S, metavar="S", help="for each probe, seconds")
    parser.add_argument("--conformance", metavar="NAME", help="run the whole engine suite on one engine")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `engine-probe`; returns the exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        engines = _engines(args)
        unknown = [name for name in [*args.engine, *filter(None, [args.conformance])] if name not in engines]
        if unknown:
            parser.error(f"there is no engine {unknown[0]!r}; known are {', '.join(engines)}")
    except ConfigError as error:
        print(error, file=sys.stderr)
        return int(error.exit_code)
    return ended(lambda: trio.run(_conform if args.conformance else _probe, args, engines), "stopped")


def _engines(args: argparse.Namespace) -> dict[str, EngineSpec]:
    tables = _tables(args.config)
    if args.module:
        name = args.conformance or (args.engine[0] if args.engine else args.module.split(".")[0])
        table = EngineTable(module=args.module, python=args.python)
        if not args.conformance:
            args.engine = [name]
        return engine_specs(tables) | {name: engine_spec(name, table)}
    engines = engine_specs(tables)
    if args.python:
        engines = {name: msgspec.structs.replace(engine, python=args.python) for name, engine in engines.items()}
    return engines


def _tables(given: str | None) -> Mapping[str, EngineTable]:
    """[engines] of the file given, or of the one that `supervisor run` would take; none is fine then."""
    try:
        path = find_config(given)
    except ConfigError:
        if given:
            raise
        return {}
    return load(path).engines


async def _conform(args: argparse.Namespace, engines: Mapping[str, EngineSpec]) -> int:
    results = await conformance.run_suite(engines[args.conformance], backend=args.backend)
    print(conformance.to_json(results) if args.json else conformance.render(results))
    return ExitCode.STOPPED if conformance.passed(results) else ExitCode.FAILED


async def _guilt(target: Target, probe: Probe, deadline_s: float) -> str:
    """Which layer breaks an engine that failed; "" for one that did not."""
    if probe.ok or probe.verdict == NOT_INSTALLED:
        return ""

    async def again(engine: EngineSpec) -> Probe:
        return await probe_engine(target.name, engine, target.backend, target.device, deadline_s=deadline_s)

    return await probe_sandbox.find_guilty(target.engine, again)


async def _probe(args: argparse.Namespace, engines: Mapping[str, EngineSpec]) -> int:
    machine = await (wait_for_gpu(args.wait_for_gpu) if args.wait_for_gpu else read_machine())
    devices = {None: ("cpu", "cuda") if machine.gpus else ("cpu",), "all": ("cpu", "cuda")}.get(
        args.device, (args.device,)
    )
    asked = targets(args.engine, engines, devices, backend=args.backend, device_asked=args.device is not None)
    probes = await probe_all(
        asked, deadline_s=args.deadline, machine=machine, progress=sys.stderr.isatty() and not args.json
    )
    print(msgspec.json.format(msgspec.json.encode(probes)).decode() if args.json else render(probes))
    if args.sandbox and not args.json:
        guilt = [await _guilt(target, probe, args.deadline) for target, probe in zip(asked, probes, strict=True)]
        print("\n" + probe_sandbox.render(probes, guilt))
    well = all_well(asked, probes)
    if args.wait_for_gpu and not machine.usable:
        print(f"no GPU answered: {machine.error or machine.cuda_error}", file=sys.stderr)
        well = False
    return ExitCode.STOPPED if well else ExitCode.FAILED


if __name__ == "__main__":
    sys.exit(main())
