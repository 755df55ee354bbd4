"""The launcher: in which order the layers are put on, and why, is told in engines/launch.py."""

from __future__ import annotations

import errno
import os
import sys

# Every import here is paid for at every start of an engine. `typing`, `json` and `signal` (for `enum`) together cost as
# much as all the layers do, and their C halves are enough. A type checker knows the name TYPE_CHECKING.
TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Iterable
    from typing import Any, NoReturn
else:
    import _signal as signal
if sys.platform != "win32":
    import resource

# Exit code when the mode is "require" and a layer is not verified; the last line of stderr names it.
EXIT_NOT_CONFINED = 71
# An engine that starts or computes on every core must not keep the supervisor, the coordinator and the owner's own
# programs waiting: 5 is a third of their share when both want the same core, and everything when nobody does.
NICE = 5
LAYERS = ("uid", "namespaces", "privileges", "landlock", "seccomp")
# What "require" requires. The rest (user, ipc, warden) cannot be tried from inside without another namespace; and not
# the uid, since these together hold a root without capabilities just as well (tests/engines/lockdown/matrix.txt).
REQUIRED = ("pid", "proc", "net", "privileges", "landlock", "seccomp")
VERDICTS = "BULKHEAD_SANDBOX"  # how the verdicts reach the engine's runtime

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
    """Lock down and become the engine, as argv says; see engines/launch.py."""
    spec: dict[str, Any] = _decoded(sys.argv[1])
    lifeline = int(sys.argv[2]) if len(sys.argv) > 2 else None
    _ignore_early_dumps()
    if "sandbox" not in spec:
        _die_with_parent(spec.get("parent"))
        _limits(spec)
        _become(spec)
    elif sys.platform == "linux":
        verdicts, kept = _lock_down(spec, lifeline)
        _become(spec, verdicts, kept)
    elif sys.platform == "darwin":
        _limits(spec)
        _confine(spec, lifeline)
    else:
        _limits(spec)
        _become(spec, _no_layers(spec["sandbox"]))


def _ignore_early_dumps() -> None:
    """Ignore SIGUSR2, which asks for the stacks, until the engine's runtime catches it: its default would kill.

    That outlives exec. Modes of the runtime that never catch it (probe, describe, check) go on ignoring it. Programs
    that an engine starts have the default again: a caught signal falls back to it at exec, and what was ignored is
    set back by lockdown/leash.py.
    """
    if hasattr(signal, "SIGUSR2"):
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)


def _lock_down(spec: dict[str, Any], lifeline: int | None) -> tuple[dict[str, str], list[int]]:
    """Put on every layer of the policy; returns the verdicts and the descriptors that must stay open.

    The policy, `spec["sandbox"]`: `mode`, `layers` (default: all), `network` (see lockdown/seccomp.py), and paths to
    `read`, `execute`, `write` and, as `devices`, to open and control; `names_threads` as CUDA needs it; `user` to
    become when we are root (lockdown/user.py), or `no_user`, why there is none; `processes`, how many of them and of
    threads there may be. `spec["cgroup"]` is a folder of cgroups to join, whatever the mode.
    """
    from engines.lockdown import canary, kernel, landlock, limits, privileges, seccomp, user, warden

    policy: dict[str, Any] = spec["sandbox"]
    off = policy.get("mode") == "off"
    layers = set() if off else set(policy.get("layers", LAYERS))
    network = policy.get("network", "none")
    verdicts: dict[str, str] = {}
    if "cgroup" in spec:
        verdicts["cgroup"] = limits.join(spec["cgroup"])
    _limits(spec)
    verdicts["uid"] = f"unavailable({policy['no_user']})" if "uid" in layers and "no_user" in policy else "off"
    if "uid" in layers and "user" in policy and _is_root():
        verdicts["uid"] = _attempt(lambda: user.drop(policy["user"], policy.get("devices", [])))
    if lifeline is None:  # else the lifeline tells of the parent's end, and the warden must live to clean up
        _die_with_parent(spec.get("parent"))

    def unprivileged() -> str:
        privileges.drop()
        return canary.privileges()

    private = warden.fork(lifeline, layers, policy, verdicts)
    if verdicts["uid"] == "claimed":
        verdicts["uid"] = user.judge()
    canary.namespaces(verdicts, spec.get("parent", 0))
    policy = policy | {"private_proc": verdicts["proc"] == "verified", "write": [*policy.get("write", ()), *private]}
    if "processes" in policy and not off:
        spaces = verdicts["user"] == "claimed"
        own = {"own_namespace": spaces, "own_user": verdicts["uid"] == "verified"}
        verdicts["processes"] = _attempt(lambda: limits.processes(policy["processes"], **own))
        if verdicts["processes"] != "verified" and verdicts.get("cgroup") == "verified":
            if limits.counted(spec["cgroup"]):
                verdicts["processes"] = "claimed"  # by the cgroup; who is not root cannot try it for a moment
    if "privileges" in layers:
        verdicts["privileges"] = _attempt(unprivileged)
    elif layers & {"landlock", "seccomp"}:  # they may be put on by anybody who cannot gain privileges
        kernel.prctl(kernel.PR_SET_NO_NEW_PRIVS, 1)
    if "landlock" in layers:
        verdicts["landlock"] = _attempt(lambda: canary.landlock(policy, landlock.restrict(policy)))
    if "seccomp" in layers:
        exposed = verdicts["pid"] != "verified" and not policy.get("spawns")  # programs have numbers of their own
        alone = exposed and verdicts.get("landlock") != "verified"

        def filtered() -> str:
            seccomp.install(network=network, own_signals_only=alone, own_schedule_only=exposed)
            return canary.seccomp()

        verdicts["seccomp"] = _attempt(filtered)
    for name in ("privileges", "landlock", "seccomp"):
        verdicts.setdefault(name, "off")
    if policy.get("mode") == "require":
        _insist(verdicts, network)
    return verdicts, landlock.pinned


def _is_root() -> bool:
    return sys.platform != "win32" and os.geteuid() == 0


def _confine(spec: dict[str, Any], lifeline: int | None) -> NoReturn:
    """macOS: become the warden of an engine under the profile `spec["seatbelt"]`."""
    from engines.lockdown import seatbelt

    _close_but(() if lifeline is None else (lifeline,))
    argv, environment = _image(spec)
    seatbelt.confine(spec.get("seatbelt", ""), spec["sandbox"], lifeline, argv, environment)


def _no_layers(policy: dict[str, Any]) -> dict[str, str]:
    """The verdicts on a system for which there are no layers."""
    word = "off" if policy.get("mode") == "off" else f"unavailable({sys.platform})"
    verdicts = dict.fromkeys(REQUIRED, word)
    if policy.get("mode") == "require":
        _insist(verdicts, policy.get("network", "none"))
    return verdicts


def _attempt(layer: Any) -> str:
    try:
        return str(layer())
    except OSError as error:
        return f"unavailable({errno.errorcode.get(error.errno or 0, '?')})"


def _insist(verdicts: dict[str, str], network: str) -> None:
    missing = [name for name in REQUIRED if verdicts[name] != "verified" and not (name == "net" and network == "host")]
    if missing:
        told = ", ".join(f"{name} is {verdicts[name]}" for name in missing)
        os.write(2, f'sandbox = "require": {told}\n'.encode())
        os._exit(EXIT_NOT_CONFINED)


def _die_with_parent(parent: int | None) -> None:
    """Ask for SIGKILL when the thread that spawned us ends; the supervisor spawns from its main thread.

    The request outlives exec. It is made after fork, so the parent may have died already: then leave at once.
    """
    if sys.platform == "linux":
        from engines.lockdown import family

        family.die_with_parent()
        if parent is not None and os.getppid() != parent:
            os._exit(0)


def _limits(spec: dict[str, Any]) -> None:
    """No core files: writing one would hold GPU memory for as long as the disk takes."""
    if sys.platform != "win32":
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for name, value in spec.get("rlimits", {}).items():
            which = getattr(resource, f"RLIMIT_{name}")
            ceiling = resource.getrlimit(which)[1]
            wanted = value if ceiling == resource.RLIM_INFINITY else min(value, ceiling)
            resource.setrlimit(which, (wanted, ceiling))
        os.nice(NICE)
    try:  # when memory runs out, the engine goes first, never the supervisor
        with open("/proc/self/oom_score_adj", "w") as file:
            file.write("500")
    except OSError:
        pass  # not Linux, or not allowed: the kernel's own choice stands


def _become(spec: dict[str, Any], verdicts: dict[str, str] | None = None, kept: list[int] | None = None) -> NoReturn:
    """Close what is not ours, set the environment, exec the engine's interpreter."""
    _close_but(kept or ())
    argv, environment = _image(spec)
    if verdicts is not None:
        environment[VERDICTS] = _encoded(verdicts)
    if sys.platform == "win32":
        from engines.lockdown import windows

        windows.become(argv, environment | windows.folders(environment))
    else:
        os.execve(argv[0], argv, environment)


def _close_but(kept: Iterable[int]) -> None:
    low = 3
    for fd in sorted(kept):
        os.closerange(low, fd)
        low = fd + 1
    os.closerange(low, 65536)


def _image(spec: dict[str, Any]) -> tuple[list[str], dict[str, str]]:
    """The engine's argv and whole environment; changes to its scratch folder."""
    names = [*_KEPT, *spec.get("keep", [])]  # `keep`: names granted by the operator; values never travel in argv
    environment = {name: os.environ[name] for name in names if name in os.environ}
    environment = ENVIRONMENT | environment | spec.get("env", {})
    if "scratch" in spec:
        environment |= {"HOME": spec["scratch"], "TMPDIR": spec["scratch"]}
        os.chdir(spec["scratch"])
    boot = os.path.join(spec["root"], "engines", "runtime", "boot.py")
    return [spec["python"], "-I", boot, spec["root"], spec["module"], *spec.get("args", [])], environment


class _Plain:
    """How json's scanner makes values: of the builtin types."""

    strict, memo = True, None
    object_hook = object_pairs_hook = None
    parse_float, parse_int, parse_constant = float, int, float


def _decoded(text: str) -> Any:
    try:
        from _json import make_scanner
    except ImportError:  # an interpreter without the C half
        import json

        return json.loads(text)
    return make_scanner(_Plain())(text, 0)[0]  # type: ignore[arg-type]


def _encoded(words: dict[str, str]) -> str:
    """As JSON. The words are ours and those of paths."""
    try:
        from _json import encode_basestring_ascii
    except ImportError:
        import json

        return json.dumps(words)
    return f"{{{', '.join(f'{encode_basestring_ascii(k)}: {encode_basestring_ascii(v)}' for k, v in words.items())}}}"
