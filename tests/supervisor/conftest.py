"""Shared by the supervisor's tests.

`wordy` is an engine of somebody else's in an interpreter of its own: a bare venv that sees msgspec and the test's
engines. `site` is a server on the loopback that stands in for a Hugging Face hub and for plain file servers.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

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
    example = HERE.parents[1] / "examples" / "wordcount_engine"
    (site / "foreign.pth").write_text(f"{HERE}\n{example}\n{libraries}\n")
    return str(folder / "bin" / "python")


@pytest.fixture
def wordy(foreign_python: str) -> Callable[[str], EngineSpec]:
    """Make the spec of the foreign engine with one misbehaviour ("" for none)."""

    def make(wrong: str = "") -> EngineSpec:
        return EngineSpec(
            name="wordy", module="wordy_engine", python=foreign_python, env={"WORDY": wrong} if wrong else {}
        )

    return make


@pytest.fixture
def site() -> Iterator[Any]:
    """A `stand_in_hub.Site`, served; loaded by path because test folders are no packages."""
    spec = importlib.util.spec_from_file_location("stand_in_hub", HERE / "stand_in_hub.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with module.serving(module.Site()) as served:
        yield served
