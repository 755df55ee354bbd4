"""`supervisor setup`: one environment per engine, pinned and hash-checked, probed before it is used.

The plan is `setup_plan`'s. Each environment is made in a folder of its own name and digest, so that a running engine
keeps its old one; what is complete is not made again. worker.toml gets `[engines.NAME] python` and `device` only where
the probe's verdict is ok.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import sys
import time
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

import msgspec
import trio

from engines.catalog import CATALOG
from supervisor.columns import columns
from supervisor.config import load, state_dir
from supervisor.errors import ExitCode, NoPermission, SupervisorError
from supervisor.host.child import ChildSpec, open_child
from supervisor.host.work import EngineSpec
from supervisor.interrupts import ended
from supervisor.machine.gpu import Machine, read_machine
from supervisor.probe import probe_engine
from supervisor.probe_verdict import Probe
from supervisor.pull import config_path
from supervisor.settings import Settings
from supervisor.setup_plan import TABLE, VenvPlan, plan
from supervisor.worker_toml import WorkerToml

PROBE_DEADLINE_S = 120.0  # the first start compiles bytecode, and CUDA kernels on some cards
STEP_EVERY_S = 2.0  # a long download must not look like a hang
_COMPLETE = ".complete"


class SetupFailed(SupervisorError):
    """An environment cannot be made; the text is a sentence with the cure."""

    exit_code = ExitCode.FAILED


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one plan.

    Attributes:
        python: the interpreter of the environment; "" when there is none.
        verdict: of the probe, or "not made".
        written: whether worker.toml uses it now.
    """

    plan: VenvPlan
    verdict: str
    python: str = ""
    message: str = ""
    hint: str = ""
    written: bool = False


# ---- command line ------------------------------------------------------------------------------------------


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of `supervisor setup` to `parser`."""
    parser.add_argument("--dry-run", action="store_true", help="print the plan and change nothing")
    parser.add_argument("--engines", nargs="+", metavar="ENGINE", help=f"default: {' '.join(TABLE)}")
    parser.add_argument("--device", choices=("cpu",), default="", help="cpu: leave the GPU alone")
    parser.add_argument("--venvs", metavar="DIR", help="where the environments go; default: venvs/ in the state folder")
    parser.add_argument("--config", help="worker.toml to write; default: the one that `supervisor run` takes")
    parser.add_argument("--json", action="store_true", help="an array of objects for programs")


def main(args: argparse.Namespace) -> int:
    """Run the command; returns the exit code and prints one sentence when it fails."""
    return ended(lambda: trio.run(_main, args), "stopped; run the same command again")


async def _main(args: argparse.Namespace) -> int:
    engines = [name for word in args.engines or TABLE for name in word.replace(",", " ").split()]
    for name in engines:
        if name not in TABLE:
            known = "needs no environment" if name in CATALOG else "is not known"
            raise SetupFailed(f"--engines: {name!r} {known}; take from {', '.join(TABLE)}.")
    machine = await read_machine()
    plans = plan(machine, engines, args.device)
    if args.dry_run:
        _say(_json(plans) if args.json else render_plan(machine, plans))
        return ExitCode.STOPPED
    toml = WorkerToml(config_path(args.config))
    venvs = _venvs(args.venvs, toml.path)
    if not args.json:
        _say(render_plan(machine, plans) + "\n")
    outcomes = [await carry_out(each, venvs, machine, toml) for each in plans]
    _say(_json(outcomes) if args.json else render(outcomes, toml.path))
    return ExitCode.STOPPED if all(outcome.written for outcome in outcomes) else ExitCode.FAILED


def _venvs(given: str | None, config: Path) -> Path:
    if given:
        return Path(given).expanduser().absolute()
    return state_dir(load(config) if config.exists() else Settings()) / "venvs"


# ---- one environment ---------------------------------------------------------------------------------------


async def carry_out(what: VenvPlan, venvs: Path, machine: Machine, toml: WorkerToml) -> Outcome:
    """Make, probe, write. A failure of one engine leaves the others alone.

    Cancellation: pip is ended; the unfinished folder is made anew next time.
    """
    if not what.requirements:
        return Outcome(plan=what, verdict="not made", message=what.reason)
    try:
        python = await make_venv(what, venvs)
    except SetupFailed as failure:
        return Outcome(plan=what, verdict="not made", message=str(failure))
    entry = CATALOG[what.engine]
    spec = EngineSpec(name=what.engine, module=entry.module, python=str(python))
    _progress(f"{what.engine}: probing on {what.device}")
    probe = await probe_engine(
        what.engine, spec, entry.backends[0], what.device, deadline_s=PROBE_DEADLINE_S, machine=machine
    )
    if probe.ok:
        # Saved after each engine: what was proven stays proven when a later one is interrupted.
        toml.set_engine(what.engine, {"python": str(python), "device": what.device})
        toml.save()
    return _outcome(what, python, probe)


def _outcome(what: VenvPlan, python: Path, probe: Probe) -> Outcome:
    hint = probe.hint
    if not probe.ok and what.device == "cuda":
        hint = " ".join((hint, f"Meanwhile: `supervisor setup --device cpu --engines {what.engine}`.")).strip()
    return Outcome(
        plan=what, python=str(python), verdict=probe.verdict, message=probe.message, hint=hint, written=probe.ok
    )


async def make_venv(what: VenvPlan, venvs: Path) -> Path:
    """Make the environment, or find it complete; returns its interpreter.

    Raises:
        SetupFailed: no space, or pip failed.
    """
    pinned = resources.files("supervisor").joinpath(f"requirements/{what.requirements}.txt")
    digest = hashlib.sha256(pinned.read_bytes() + sys.version.encode()).hexdigest()[:8]
    folder = venvs / f"{what.engine}-{what.requirements.rpartition('-')[2]}-{digest}"
    python = folder / "bin" / "python"
    if (folder / _COMPLETE).exists():
        _progress(f"{what.engine}: {folder} is complete")
        return python
    _prepare(folder, what.mib)
    _progress(f"{what.engine}: making {folder} (about {what.mib} MiB): {', '.join(what.packages)}")
    await _run(what.engine, (sys.executable, "-m", "venv", "--clear", str(folder)))
    with resources.as_file(pinned) as file:
        # --no-deps: the set is complete, and piper-tts must not bring the CPU build that its GPU set leaves out.
        await _run(what.engine, (str(python), "-m", "pip", "install", *_PIP, "-r", str(file)))
    (folder / _COMPLETE).write_text(f"{what.requirements}\n")
    return python


_PIP = tuple("--require-hashes --no-deps --only-binary :all: --no-input --progress-bar off".split())


def _prepare(folder: Path, mib: int) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NoPermission(f"{folder.parent} cannot be made: {error.strerror}; name another with --venvs.") from None
    free = shutil.disk_usage(folder.parent).free / 2**20
    if free < mib * 1.5:  # pip unpacks beside what it downloads
        raise SetupFailed(f"{folder.parent} has {free:.0f} MiB free, and {mib * 1.5:.0f} are needed; see --venvs.")


async def _run(name: str, argv: tuple[str, ...]) -> None:
    """Run a tool to its end, showing its steps. Raises SetupFailed with its last words."""
    spec = ChildSpec(name=f"setup of {name}", argv=argv)
    words: list[str] = []
    rest = b""
    shown_s = time.monotonic()
    async with open_child(spec) as child:
        child.close_stdin()
        while data := await child.read():
            *lines, rest = (rest + data).split(b"\n")
            for line in lines:
                words.append(line.decode(errors="replace").strip())
                if words[-1] and time.monotonic() - shown_s >= STEP_EVERY_S:
                    shown_s = time.monotonic()
                    _progress(f"{name}: {words[-1][:160]}")
        how = await child.wait()
    if how.code != 0:
        said = [line for line in (*words[-3:], *child.stderr_tail(6)) if line]
        raise SetupFailed(f"{Path(argv[0]).name} {' '.join(argv[1:4])} {how.describe()}: {' | '.join(said)}")


# ---- output ------------------------------------------------------------------------------------------------


def render_plan(machine: Machine, plans: Sequence[VenvPlan]) -> str:
    """What was found and what will be done, for people."""
    gpus = ", ".join(f"{gpu.name} ({gpu.memory_bytes / 2**30:.0f} GiB)" for gpu in machine.gpus)
    found = f"{gpus}; driver {machine.driver}, CUDA up to {machine.cuda_max}" if gpus else "no NVIDIA GPU"
    system = f"{machine.os} {machine.arch}{' (WSL2)' if machine.wsl2 else ''}, Python {machine.python}"
    rows = [(each.engine, each.device or "-", f"{each.mib} MiB", " ".join(each.packages)) for each in plans]
    parts = [f"{system}, {found}", "", columns(("engine", "device", "size", "packages"), rows, right=(2,))]
    remarks: dict[str, list[str]] = {}
    for each in plans:
        for text in (each.reason, *each.notes):
            remarks.setdefault(text, []).append(each.engine)
    return "\n".join([*parts, "", *(f"  {', '.join(names)}: {text}" for text, names in remarks.items())])


def render(outcomes: Sequence[Outcome], config: Path) -> str:
    """What became of it, for people."""
    rows = [
        (each.plan.engine, each.plan.device or "-", each.verdict, each.python if each.written else "-")
        for each in outcomes
    ]
    lines = [columns(("engine", "device", "verdict", "python"), rows)]
    lines += [f"  {each.plan.engine}: {each.message} {each.hint}".rstrip() for each in outcomes if not each.written]
    written = [each.plan.engine for each in outcomes if each.written]
    lines += ["", f"{config} now uses: {', '.join(written)}" if written else f"{config} was not changed"]
    return "\n".join(lines)


def _json(values: Sequence[msgspec.Struct]) -> str:
    return msgspec.json.format(msgspec.json.encode(values)).decode()


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def _progress(text: str) -> None:
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
