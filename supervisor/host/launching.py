"""How an engine child is started: the launcher's argv and environment."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from supervisor.host.child import ChildSpec
from supervisor.host.work import EngineSpec

# The folder that holds the packages `engines` and `protocol` of this very installation.
ROOT = Path(__file__).resolve().parents[2]

_KEPT = ("PATH", "LANG", "LC_ALL", "TZ", "SYSTEMROOT")


def engine_argv(engine: EngineSpec, scratch: Path, args: Sequence[str] = ()) -> tuple[str, ...]:
    """argv that starts `engine` in `scratch` (absolute, exists); `args` as in engines/runtime/boot.py.

    The launcher runs on our own interpreter; it execs the engine's. The values of `engine.env` travel in the
    environment (see `engine_env`), since argv can be read by every user of the box.
    """
    spec = {
        "root": str(ROOT),
        "module": engine.module,
        "python": engine.python,
        "scratch": str(scratch),
        "parent": os.getpid(),
        "keep": sorted(engine.env),
        "args": list(args),
    }
    launcher = str(ROOT / "engines" / "launch.py")
    return (sys.executable, "-I", "-S", launcher, msgspec.json.encode(spec).decode())


def engine_env(engine: EngineSpec) -> Mapping[str, str]:
    """Environment of the launcher: a few of ours, and what the engine is granted."""
    return {name: os.environ[name] for name in _KEPT if name in os.environ} | dict(engine.env)


def engine_child(engine: EngineSpec, scratch: Path, args: Sequence[str] = (), **options: object) -> ChildSpec:
    """`ChildSpec` of an engine; `options` are further fields of it."""
    return ChildSpec(
        name=engine.name,
        argv=engine_argv(engine, scratch, args),
        env=engine_env(engine),
        **options,  # type: ignore[arg-type]
    )
