"""A machine with an NVIDIA GPU, and an interpreter that finds the test's own engine; skips where there is no GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import trio

from supervisor.machine.gpu import Machine, read_machine

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def machine() -> Machine:
    """What the GPU reader tells once."""
    found = trio.run(read_machine)
    if not found.gpus:
        pytest.skip(f"this machine has no NVIDIA GPU: {found.error}")
    return found


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter of its own, with msgspec and this folder's engine."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "cuda_engine.pth").write_text(f"{HERE}\n{Path(msgspec.__file__).parents[1]}\n")
    return str(folder / "bin" / "python")
