"""What one engine child may touch: the policy that the launcher enforces (engines/launch.py, `_lock_down`).

Read off the file system without running anything: the engine's interpreter belongs to whoever set it up, and asking
it would run it unconfined. What we may not read ourselves is left out: Python runs from installations that nobody
may list.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from engines.catalog import CATALOG, Profile
from protocol.engine_wire import Model
from supervisor.host.cgroups import most_processes
from supervisor.host.engine_user import User
from supervisor.host.ground import Ground
from supervisor.host.work import EngineSpec

LAYERS = ("uid", "namespaces", "privileges", "landlock", "seccomp")  # of engines/launch.py
# Where a dynamic linker and the libraries of the system lie.
_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/local/lib")
_READABLE = (
    "/proc",
    "/sys",  # CUDA: without it cuInit fails with 304
    "/etc/ld.so.cache",
    "/etc/localtime",
    "/etc/ssl/openssl.cnf",
    "/usr/share",
    "/usr/local/cuda",
)
_NODES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
# For engines that run programs of the operator: what a program finds on any box, and nothing of /etc that is secret.
_PROGRAMS = ("/usr", "/bin", "/sbin", "/opt")
_PROGRAM_FILES = ("passwd", "group", "nsswitch.conf", "alternatives", "fonts", "mime.types", "ld.so.conf")
_NETWORK_FILES = ("hosts", "resolv.conf", "nsswitch.conf", "gai.conf", "services", "ssl/certs", "pki")
# Opened with ioctl: CUDA (uvm-tools since 570, caps for MIG), ROCm, WSL2.
_GPU_NODES = (
    "/dev/nvidiactl",
    "/dev/nvidia-uvm",
    "/dev/nvidia-uvm-tools",
    "/dev/nvidia-caps/*",
    "/dev/nvidia-nvswitch*",
    "/dev/kfd",
    "/dev/dri/renderD*",
    "/dev/dxg",
)
_GPU_INFORMATION = "/proc/driver/nvidia/gpus/*/information"
_MAX_LINKS = 10_000
# WSL2: the driver of the host, mounted into the guest; its libcuda is a stub that loads the rest from drivers/.
_WSL_NODE, _WSL_LIBRARIES = "/dev/dxg", ("/usr/lib/wsl/lib", "/usr/lib/wsl/drivers")


def policy(
    engine: EngineSpec,
    scratch: Path,
    root: Path,
    model: Model | None,
    device: str = "auto",
    *,
    ground: Ground | None = None,
    user: User | None = None,
) -> dict[str, Any]:
    """The launcher's `sandbox`.

    Args:
        scratch: the instance's own folder.
        root: holds our packages `engines` and `protocol`.
        model: what will be loaded; None when only the engine's fixture is (it lies below `root`).
        device: where it will run when there is no model to tell.
        ground: where the attempts of its jobs have their inputs and outputs.
        user: whom it is to become; None keeps ours.
    """
    asked = engine.sandbox
    entry = CATALOG.get(engine.name)
    profile = entry.profile if entry is not None and entry.module == engine.module else Profile()
    network = profile.network if asked.network == "none" and profile.network == "unix" else asked.network
    network = network or profile.network
    interpreter, added = _interpreter(engine.python), _added_paths(engine.python)
    execute = [*_LIBRARIES, *interpreter, *asked.execute]
    read = [*_READABLE, str(root / "engines"), str(root / "protocol"), *added, *asked.read]
    write = [str(scratch), *asked.write]
    if ground is not None:
        read.append(str(ground.inputs))
        write.append(str(ground.outputs))
    if model is not None:
        read += _model_files(model)
        execute += _own_programs(model) if profile.spawns else []
        write += [cwd for cwd in [model.options.get("cwd")] if profile.spawns and isinstance(cwd, str) and cwd]
    if profile.spawns:
        execute += _PROGRAMS
        read += [f"/etc/{name}" for name in _PROGRAM_FILES]
    if network == "host":
        read += [f"/etc/{name}" for name in _NETWORK_FILES]
    gpu = (model.device if model is not None else device) != "cpu"
    nodes = _gpu_nodes(model.devices if model is not None else ()) if gpu else []
    execute += _WSL_LIBRARIES if _WSL_NODE in nodes else ()
    runs = [engine.python, *interpreter, *added, *asked.execute]
    become = _as_user(user, engine, scratch, root, model, runs, runs_programs=profile.spawns) if user else None
    return {
        **({"user": become} if become is not None else {}),
        "layers": [layer for layer in LAYERS if layer not in asked.without],
        "mode": asked.mode,
        "network": network,
        "spawns": profile.spawns,
        "read": _unique(read),
        "execute": _unique(execute),
        "write": _unique(write),
        "devices": [*_NODES, *nodes],
        "names_threads": bool(nodes),
        "processes": most_processes(),
    }


def _as_user(
    user: User,
    engine: EngineSpec,
    scratch: Path,
    root: Path,
    model: Model | None,
    runs: list[str],
    *,
    runs_programs: bool,
) -> dict[str, Any]:
    """What the engine's user must reach, or the engine stays root: see engines/lockdown/user.py.

    Only what the engine cannot do without: of the folders of the system nobody is kept out.
    """
    asked = engine.sandbox
    reads = [str(root / "engines" / "runtime" / "boot.py"), str(root / "protocol"), *asked.read]
    writes = [str(scratch), *asked.write]
    if model is not None:
        reads += [path for path in model.files.values() if os.path.exists(path)]
        reads += [word for word in _words(model.options) if os.path.isabs(word) and os.path.exists(word)]
        if runs_programs:
            argv, cwd = model.options.get("argv"), model.options.get("cwd")
            if isinstance(argv, list) and argv and os.path.isabs(str(argv[0])):
                runs = [*runs, str(argv[0])]
            writes += [cwd] if isinstance(cwd, str) and cwd else []
    return {
        "uid": user.uid,
        "gid": user.gid,
        "runs": _unique(runs),
        "reads": _unique(reads),
        "writes": _unique(writes),
    }


def _unique(paths: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(path for path in paths if path and path != "/"))


def _interpreter(python: str) -> list[str]:
    """Its environment and its installation; only the file itself where that would be a shared or private folder."""
    given, real = Path(os.path.abspath(python)), Path(os.path.realpath(python))
    found = []
    if os.path.isfile(given.parent.parent / "pyvenv.cfg"):  # os.path: what cannot be read is not there
        found.append(str(given.parent.parent))
    prefix = real.parent.parent
    found.append(str(real if _is_shared(prefix) else prefix))
    return found


def _is_shared(folder: Path) -> bool:
    """Whether a folder holds more than one thing's files: granting it whole would grant strangers'."""
    home = Path(os.path.expanduser("~"))
    return folder in {Path("/"), Path("/usr"), Path("/usr/local"), Path("/opt"), Path("/tmp"), home, home.parent}


def _added_paths(python: str) -> list[str]:
    """Folders that .pth files put on the interpreter's path, as editable installs do, and packages that are links."""
    prefixes = {Path(os.path.abspath(python)).parent.parent, Path(os.path.realpath(python)).parent.parent}
    found: list[str] = []
    for prefix in sorted(prefixes):
        for folder in found_below(prefix, "lib*/python*/site-packages"):
            found += _added_by(folder)
    return found


def _added_by(site_packages: str) -> list[str]:
    """The same for one folder of packages, in one pass: it may hold hundreds."""
    links, files = [], []
    try:
        with os.scandir(site_packages) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_symlink():
                    links.append(os.path.realpath(entry.path))
                if entry.name.endswith(".pth"):
                    files.append(entry.path)
    except OSError:
        return []
    return sorted(links) + [folder for file in sorted(files) for folder in _put_on_path(file)]


def _put_on_path(file: str) -> Iterator[str]:
    """Folders that a .pth file names."""
    try:
        lines = Path(file).read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        folder = os.path.join(os.path.dirname(file), line.strip())
        if line.strip() and not line.startswith(("#", "import ", "import\t")) and os.path.isdir(folder):
            yield folder


def found_below(folder: Path, pattern: str) -> list[str]:
    """What is found there, sorted; `Path.glob` would raise on what we may not read."""
    return sorted(glob.glob(os.path.join(glob.escape(str(folder)), pattern)))


# ---- models


def _model_files(model: Model) -> Iterator[str]:
    for path in model.files.values():
        yield from _with_company(Path(path))
    for word in _words(model.options):
        if os.path.isabs(word) and os.path.exists(word):
            yield word  # the operator named it: an adapter, a voice, a file in a program's arguments


def _with_company(path: Path) -> Iterator[str]:
    """A model and what lies beside it (parts, weights of an ONNX graph, voice settings), and where links lead.

    A download cache holds links to files elsewhere; Landlock looks at where they lead.
    """
    real = Path(os.path.realpath(path))
    if os.path.isdir(real):
        yield str(real)
        yield from _led_to(real)
        return
    yield from (str(path), str(real))
    beside = path.parent
    if not _is_shared(beside):
        yield str(beside)
        yield from _led_to(beside)
        return
    yield from found_below(beside, glob.escape(path.name.split(".")[0].split("-0000")[0]) + "*")


def _led_to(folder: Path) -> Iterator[str]:
    count = 0
    for where, _folders, names in os.walk(folder):
        for name in names:
            count += 1
            if count > _MAX_LINKS:
                return
            if os.path.islink(file := os.path.join(where, name)):
                yield os.path.realpath(file)


def _words(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _words(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _words(each)


def _own_programs(model: Model) -> list[str]:
    """The program that the operator names, and the folder it lies in when it is its own."""
    argv = model.options.get("argv")
    if not isinstance(argv, list) or not argv or not os.path.isabs(str(argv[0])):
        return []
    given, real = Path(str(argv[0])), Path(os.path.realpath(str(argv[0])))
    folders = [str(folder) for folder in (given.parent, real.parent) if not _is_shared(folder)]
    return [str(given), str(real), *folders, *_interpreter(str(given))]


# ---- GPUs


def _gpu_nodes(uuids: Sequence[str]) -> list[str]:
    """Nodes of the device set that exist here; every NVIDIA GPU's when the set is empty or cannot be told apart."""
    found = [node for pattern in _GPU_NODES for node in sorted(glob.glob(pattern))]
    minors = _minors()
    wanted = [minors[uuid] for uuid in uuids if uuid in minors]
    if uuids and len(wanted) == len(uuids):
        return [*found, *(f"/dev/nvidia{minor}" for minor in wanted)]
    return [*found, *sorted(glob.glob("/dev/nvidia[0-9]*"))]


def _minors() -> dict[str, int]:
    """GPU UUID -> minor number of its node, as the driver tells."""
    found = {}
    for path in glob.glob(_GPU_INFORMATION):
        try:
            text = Path(path).read_text()
        except OSError:
            continue
        uuid = re.search(r"^GPU UUID:\s*(\S+)", text, re.MULTILINE)
        minor = re.search(r"^Device Minor:\s*(\d+)", text, re.MULTILINE)
        if uuid and minor:
            found[uuid[1]] = int(minor[1])
    return found
