"""The first code of an engine's interpreter: the pipes are taken before an import can print, and only two packages come
from the supervisor's installation."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

BOOT = Path(__file__).parents[3] / "engines" / "runtime" / "boot.py"

# Stands in for the runtime: says what it was given, on the wire, after noise of every kind.
_MODES = """
import importlib.util, os, sys
def run(mode, module, args, wire_in, wire_out):
    print("noise of print", flush=True)
    os.system("echo noise of a program")
    os.write(1, b"noise on descriptor 1\\n")
    leaked = importlib.util.find_spec("leak") is not None
    heard = os.read(wire_in, 100)
    inherited = [fd for fd in (wire_in, wire_out) if os.get_inheritable(fd)]
    os.write(wire_out, repr((mode, module, args, leaked, heard, os.read(0, 1), inherited)).encode())
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A site-packages folder: our two packages, and another that must stay out of the engine's interpreter."""
    for name in ("engines/runtime", "protocol", "leak"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("engines", "engines/runtime", "protocol"):
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "leak" / "__init__.py").touch()
    (tmp_path / "engines/runtime/modes.py").write_text("import protocol\nprint('noise at import')\n" + _MODES)
    return tmp_path


def boot(root: Path, *args: str) -> tuple[object, ...]:
    argv = [sys.executable, "-I", str(BOOT), str(root), "their.engine", *args]
    done = subprocess.run(argv, input=b"hello", capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count(b"noise") == 4
    found: tuple[object, ...] = ast.literal_eval(done.stdout.decode())
    return found


def test_noise_goes_to_stderr_and_the_wire_stays_private(root: Path) -> None:
    mode, module, args, leaked, heard, stdin, inherited = boot(root)
    assert (mode, module, args) == ("serve", "their.engine", [])
    assert leaked is False
    assert heard == b"hello"
    assert stdin == b""
    assert inherited == []


@pytest.mark.parametrize(
    ("args", "mode"), [(["probe", "--device", "cpu"], "probe"), (["--json"], "serve"), (["serve", "--json"], "serve")]
)
def test_the_mode_is_the_first_word(root: Path, args: list[str], mode: str) -> None:
    found = boot(root, *args)
    assert (found[0], found[2]) == (mode, args)
