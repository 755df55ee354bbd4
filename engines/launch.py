"""First code of every engine child: lock down, then become the engine.

    python -I -S engines/launch.py '{"root": …, "module": …, "python": …}'

Standard library only, run with `-I -S`: nothing third-party can be imported before the process is locked down.
Today it sets limits, ties the child to its parent, and cleans descriptors and environment; the sandbox layers
(namespaces, Landlock, seccomp) belong here too, between `_limits` and `_become`.

The engine's interpreter may be another venv's; it is exec'ed on this installation's `engines` and `protocol`
(`root`), so the two ends of the wire cannot be of different revisions.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any, NoReturn

_PR_SET_PDEATHSIG = 1

# The engine's whole environment, besides what the spec grants. Why each:
ENVIRONMENT = {
    "PYTHONFAULTHANDLER": "1",  # a native crash leaves its stack on stderr
    "PYTHONUNBUFFERED": "1",
    "PYTHONDONTWRITEBYTECODE": "1",
    "GGML_NO_BACKTRACE": "1",  # ggml_abort would start gdb and print on fd 1
    "HF_HUB_OFFLINE": "1",  # an engine never fetches a model by itself
    "TQDM_DISABLE": "1",
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime >= 1.29 phones home on import
    "TOKENIZERS_PARALLELISM": "false",
    # Idle OpenMP threads spin by default: three small llama.cpp children on two cores took 16 s for an answer
    # that takes 0.1 s when they sleep.
    "OMP_WAIT_POLICY": "PASSIVE",
}
_KEPT = ("PATH", "LANG", "LC_ALL", "TZ", "SYSTEMROOT")


def main() -> NoReturn:
    """Entry point; never returns."""
    spec: dict[str, Any] = json.loads(sys.argv[1])
    _die_with_parent(spec.get("parent"))
    _limits(spec)
    _become(spec)


def _die_with_parent(parent: int | None) -> None:
    """Ask for SIGKILL when the thread that spawned us ends; the supervisor spawns from its main thread.

    The request outlives exec. It is made after fork, so the parent may have died already: then leave at once.
    """
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent is not None and os.getppid() != parent:
        os._exit(0)


def _limits(spec: dict[str, Any]) -> None:
    """No core files: writing one would hold GPU memory for as long as the disk takes."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for name, value in spec.get("rlimits", {}).items():
        which = getattr(resource, f"RLIMIT_{name}")
        ceiling = resource.getrlimit(which)[1]
        wanted = value if ceiling == resource.RLIM_INFINITY else min(value, ceiling)
        resource.setrlimit(which, (wanted, ceiling))
    try:  # when memory runs out, the engine goes first, never the supervisor
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("500")
    except OSError:
        pass  # not Linux, or not allowed: the kernel's own choice stands


def _become(spec: dict[str, Any]) -> NoReturn:
    """Close what is not ours, set the environment, exec the engine's interpreter."""
    os.closerange(3, 65536)
    kept = [*_KEPT, *spec.get("keep", [])]  # `keep`: names granted by the operator; values never travel in argv
    environment = {name: os.environ[name] for name in kept if name in os.environ}
    environment = ENVIRONMENT | environment | spec.get("env", {})
    if "scratch" in spec:
        environment |= {"HOME": spec["scratch"], "TMPDIR": spec["scratch"]}
        os.chdir(spec["scratch"])
    boot = os.path.join(spec["root"], "engines", "runtime", "boot.py")
    argv = [spec["python"], "-I", boot, spec["root"], spec["module"], *spec.get("args", [])]
    os.execve(spec["python"], argv, environment)


if __name__ == "__main__":
    main()
