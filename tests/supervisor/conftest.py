"""An interpreter of its own for engines that are not ours: a bare venv that sees msgspec and the test's engines."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from supervisor.host.work import EngineSpec

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def foreign_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Path of the interpreter."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    libraries = Path(msgspec.__file__).parents[1]
    (site / "foreign.pth").write_text(f"{HERE}\n{libraries}\n")
    return str(folder / "bin" / "python")


@pytest.fixture
def wordy(foreign_python: str) -> Callable[[str], EngineSpec]:
    """Make the spec of the foreign engine with one misbehaviour ("" for none)."""

    def make(wrong: str = "") -> EngineSpec:
        return EngineSpec(
            name="wordy", module="wordy_engine", python=foreign_python, env={"WORDY": wrong} if wrong else {}
        )

    return make
