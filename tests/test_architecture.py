"""The invariants of ARCHITECTURE.md, enforced."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisor.host import lifecycle

ROOT = Path(__file__).parents[1]
OURS = ("protocol", "engines", "supervisor", "coordinator")
GPU_LIBRARIES = {"pynvml", "onnxruntime", "ctranslate2", "faster_whisper", "llama_cpp", "xllamacpp", "piper", "torch"}
# Children that the supervisor starts; they live in its package but never in its process.
CHILD_FILES = {"supervisor/pull_child.py"}
MOST_LINES = 60  # of a function
# One straight list of what is opened and in which order; nothing is decided in it.
LONG_FUNCTIONS = {"supervisor/app.py": {"_work"}}


def sources(package: str) -> list[Path]:
    return [path for path in sorted((ROOT / package).rglob("*.py")) if "fixture" not in path.parts]


def imports(path: Path) -> Iterator[tuple[str, bool]]:
    """(dotted name, at module level) of everything a file imports."""
    tree = ast.parse(path.read_text())
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            yield name, id(node) in top


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def offenders(package: str, forbidden) -> list[str]:
    return [
        f"{relative(path)} imports {name}"
        for path in sources(package)
        for name, _top in imports(path)
        if forbidden(path, name)
    ]


def root_of(name: str) -> str:
    return name.split(".")[0]


def test_protocol_imports_nothing_of_ours_and_nothing_that_acts():
    banned = {"trio", "socket", "asyncio", "threading", "time", "subprocess", "os", "random", "secrets"}
    others = {"engines", "supervisor", "coordinator"}
    assert offenders("protocol", lambda _path, name: root_of(name) in banned | others) == []


def test_engines_import_protocol_and_their_own_folder_only():
    shared = {"runtime", "diffusion", "catalog", "launch"}

    def forbidden(path: Path, name: str) -> bool:
        if root_of(name) in ("supervisor", "coordinator", "trio"):
            return True
        if root_of(name) != "engines" or len(name.split(".")) < 2:
            return False
        if relative(path) == "engines/launch.py":
            return not name.startswith("engines.lockdown.")
        own = path.relative_to(ROOT / "engines").parts[0]
        return name.split(".")[1] not in shared | {own}

    # A server engine is tested with llama.cpp's own server on the llm engine's fixture; it names only the file.
    assert offenders("engines", forbidden) == []


def test_engine_runtime_imports_no_engine():
    def forbidden(path: Path, name: str) -> bool:
        inside = relative(path).startswith("engines/runtime/")
        return inside and root_of(name) == "engines" and name.split(".")[1] not in ("runtime", "launch")

    assert offenders("engines", forbidden) == []


def test_coordinator_imports_protocol_only():
    assert offenders("coordinator", lambda _path, name: root_of(name) in ("engines", "supervisor", "trio")) == []


def test_supervisor_never_imports_an_engine_or_a_gpu_library():
    def forbidden(path: Path, name: str) -> bool:
        if root_of(name) == "engines":
            return not name.startswith("engines.catalog")
        if root_of(name) == "coordinator":
            return True
        return root_of(name) in GPU_LIBRARIES and relative(path) not in CHILD_FILES

    assert offenders("supervisor", forbidden) == []


def test_only_the_host_spawns_and_signals():
    calls = re.compile(
        r"\b(subprocess\.|os\.kill\b|os\.killpg\b|os\.fork\b|os\.posix_spawn|trio\.run_process|open_process)"
    )
    found = [
        relative(path)
        for path in sources("supervisor")
        if not relative(path).startswith("supervisor/host/")
        and relative(path) not in CHILD_FILES
        and calls.search(path.read_text())
    ]
    assert found == []


def test_intake_is_pure():
    banned = {"trio", "os", "time", "random", "socket", "subprocess", "psutil", "httpx"}
    found = [
        f"{relative(path)} imports {name}"
        for path in sources("supervisor/intake")
        for name, _top in imports(path)
        if root_of(name) in banned
    ]
    assert found == []


def test_nvml_lives_in_the_telemetry_child_alone():
    def forbidden(path: Path, name: str) -> bool:
        return root_of(name) == "pynvml" and not relative(path).startswith("engines/telemetry/")

    for package in OURS:
        assert offenders(package, forbidden) == []
    asks = [path for package in OURS for path in sources(package) if '"pynvml"' in path.read_text()]
    assert {relative(path).rsplit("/", 1)[0] for path in asks} == {"engines/telemetry"}


def test_the_control_socket_only_looks_and_passes_on():
    acts = ("supervisor.host.host", "supervisor.host.lane", "supervisor.host.child", "supervisor.host.instance")
    banned = (*acts, "supervisor.app", "supervisor.box", "supervisor.pausing", "supervisor.link")
    found = [
        f"{relative(path)} imports {name}"
        for path in sources("supervisor/control")
        for name, _top in imports(path)
        if name.startswith(banned)
    ]
    assert found == []


def test_the_diagram_of_an_instance_is_the_tables_own():
    text = (ROOT / "ARCHITECTURE.md").read_text()
    assert f"```mermaid\n{lifecycle.diagram().strip()}\n```" in text


def test_no_pickle_anywhere():
    banned = {"pickle", "cPickle", "shelve", "marshal", "dill", "cloudpickle"}
    for package in OURS:
        assert offenders(package, lambda _path, name: root_of(name) in banned) == []


def test_heavy_libraries_are_not_imported_by_the_runtime():
    heavy = GPU_LIBRARIES | {"numpy", "av", "PIL", "tokenizers", "soundfile"}
    found = [
        f"{relative(path)} imports {name}"
        for path in [*sources("engines/runtime"), ROOT / "engines/catalog.py", ROOT / "engines/launch.py"]
        for name, top in imports(path)
        if root_of(name) in heavy and top
    ]
    assert found == []


def test_the_launcher_is_standard_library_only():
    files = [ROOT / "engines/launch.py", *sources("engines/lockdown")]
    names = {name for path in files for name, _top in imports(path)}
    ours = {name for name in names if root_of(name) == "engines"}
    assert {root_of(name) for name in names} - {"engines"} <= sys.stdlib_module_names
    assert {".".join(name.split(".")[:2]) for name in ours} == {"engines.lockdown"}
    # Each of these costs milliseconds at every start of an engine.
    assert not {root_of(name) for name in names} & {"socket", "subprocess", "pathlib", "tempfile", "logging", "inspect"}


def test_no_dialect_is_asked_for_outside_its_room():
    found = [
        relative(path)
        for path in sources("supervisor")
        if "link/dialects" not in relative(path) and re.search(r"\bif .*dialect\s*==", path.read_text())
    ]
    assert found == []


@pytest.mark.parametrize("package", OURS)
def test_our_packages_are_not_those_of_the_package_index(package: str):
    """PyPI has packages `supervisor`, `protocol` and `engines`; none of their modules may be ours by name."""
    theirs = {"supervisor": {"supervisord", "supervisorctl", "options", "process", "rpcinterface", "http"}}
    modules = {path.stem for path in (ROOT / package).glob("*.py")}
    assert not modules & theirs.get(package, set())


@pytest.mark.parametrize("package", OURS)
def test_every_module_has_a_docstring_and_stays_readable(package: str):
    problems = []
    for path in sources(package):
        text = path.read_text()
        if text.strip() and ast.get_docstring(ast.parse(text)) is None:
            problems.append(f"{relative(path)} has no docstring")
        if len(text.splitlines()) > 520:
            problems.append(f"{relative(path)} has {len(text.splitlines())} lines")
    assert problems == []


@pytest.mark.parametrize("package", OURS)
def test_functions_stay_readable(package: str):
    """A function fits a screen; an exception has its name and its reason here, and goes when it is not needed."""
    long: dict[str, set[str]] = {}
    for path in sources(package):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                if (node.end_lineno or 0) - node.lineno >= MOST_LINES:
                    long.setdefault(relative(path), set()).add(node.name)
    assert long == {path: names for path, names in LONG_FUNCTIONS.items() if path.startswith(f"{package}/")}
