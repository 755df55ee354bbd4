"""How an engine child is started: the launcher's argv and environment."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from protocol.engine_wire import Model
from supervisor.host.child import ChildSpec
from supervisor.host.containment.seatbelt_profile import profile
from supervisor.host.engine_user import engine_user, why_not
from supervisor.host.grants import found_below, policy
from supervisor.host.ground import Ground, give
from supervisor.host.work import EngineSpec

log = logging.getLogger(__name__)

# The folder that holds the packages `engines` and `protocol` of this very installation.
ROOT = Path(__file__).resolve().parents[2]

_KEPT = ("PATH", "LANG", "LC_ALL", "TZ", "SYSTEMROOT")
_LIBRARY_PATH = "LD_LIBRARY_PATH"
_WSL_LIBRARIES = Path("/usr/lib/wsl/lib")


def engine_argv(
    engine: EngineSpec,
    scratch: Path,
    args: Sequence[str] = (),
    model: Model | None = None,
    *,
    ground: Ground | None = None,
    cgroup: str | None = None,
) -> tuple[str, ...]:
    """argv that starts `engine` in `scratch` (absolute, exists); `args` as in engines/runtime/boot.py.

    The launcher runs on our own interpreter; it execs the engine's. The values of `engine.env` travel in the
    environment (see `engine_env`), since argv can be read by every user of the box.
    """
    told = args[args.index("--device") + 1] if "--device" in args else "auto"
    device = told if model is None else model.device
    user = engine_user() if engine.sandbox.mode != "off" else None
    spec: dict[str, Any] = {
        "root": str(ROOT),
        "module": engine.module,
        "python": engine.python,
        "scratch": str(scratch),
        "parent": os.getpid(),
        "keep": sorted(engine.env),
        "args": list(args),
        "sandbox": policy(engine, scratch, ROOT, model, device, ground=ground, user=user),
    }
    if reason := why_not():
        spec["sandbox"]["no_user"] = reason
    if sys.platform == "darwin":
        spec["seatbelt"] = seatbelt(spec["sandbox"], device)
    if cgroup is not None:
        spec["cgroup"] = cgroup
    if ground is not None and ground.limit_bytes:
        spec["rlimits"] = {"FSIZE": ground.limit_bytes}
    if _LIBRARY_PATH not in engine.env and (folders := cuda_libraries(engine.python)):
        spec["env"] = {_LIBRARY_PATH: folders}  # for the engine alone: the launcher needs no foreign libraries
    launcher = str(ROOT / "engines" / "launch.py")
    return (sys.executable, "-I", "-S", launcher, msgspec.json.encode(spec).decode())


def seatbelt(policy: dict[str, Any], device: str) -> str:
    """macOS's profile of an engine on `device`; "" when it cannot be written, which the launcher then tells."""
    try:
        return profile(policy, metal=device != "cpu", launcher=[sys.prefix, sys.base_prefix, str(ROOT / "engines")])
    except ValueError as error:
        log.warning("No sandbox profile: %s.", error)
        return ""


def cuda_libraries(python: str) -> str:
    """LD_LIBRARY_PATH for the CUDA wheels beside an interpreter; "" when there are none.

    The nvidia-… wheels put their libraries where no loader looks, and the variable must be there before the process
    starts. Without it ctranslate2 loads its model and fails at the first encode, for want of libcublas. Read off the
    path: nothing is run, and no link is followed, because the interpreter of a venv is one.
    """
    found = found_below(Path(python).parent.parent, "lib*/python*/site-packages/nvidia/*/lib")
    if _WSL_LIBRARIES.is_dir():  # WSL2 keeps libcuda where only a distribution made for it looks
        found.append(str(_WSL_LIBRARIES))
    return os.pathsep.join(found)


def engine_env(engine: EngineSpec) -> Mapping[str, str]:
    """Environment of the launcher: a few of ours, and what the engine is granted."""
    return {name: os.environ[name] for name in _KEPT if name in os.environ} | dict(engine.env)


def engine_child(
    engine: EngineSpec,
    scratch: Path,
    args: Sequence[str] = (),
    *,
    model: Model | None = None,
    ground: Ground | None = None,
    cgroup: str | None = None,
    **options: object,
) -> ChildSpec:
    """`ChildSpec` of an engine.

    When we are root, `scratch` is given to the engines' user.

    Args:
        model: as in `grants.policy`.
        ground: where its attempts work; made here. Its limit is the largest file that the engine can write.
        cgroup: absolute folder of a cgroup that the child joins before it does anything else.
        options: further fields of the spec.

    Raises:
        OSError: the ground cannot be made, or the scratch folder is not ours to give.
    """
    if ground is not None:
        ground.make()
    if engine.sandbox.mode != "off" and scratch.is_dir():
        give(scratch, engine_user())
    return ChildSpec(
        name=engine.name,
        argv=engine_argv(engine, scratch, args, model, ground=ground, cgroup=cgroup),
        lifeline=True,
        env=engine_env(engine),
        **options,  # type: ignore[arg-type]
    )
