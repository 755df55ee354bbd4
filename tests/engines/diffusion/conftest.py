"""Model folders for the tests: a copy of the shipped one to break, and variants from the makers."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
SHIPPED = ROOT / "engines" / "image" / "fixture" / "tiny-sd-onnx"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A private copy of the shipped model."""
    return Path(shutil.copytree(SHIPPED, tmp_path / "model"))


@pytest.fixture(scope="session")
def half(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The float16 variant with 64-bit ids, a scalar time and a fixed batch of one."""
    pytest.importorskip("onnx", reason="onnx (dev group) is not installed")
    out = tmp_path_factory.mktemp("made")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    subprocess.run([sys.executable, "-P", "-m", "make_fixtures", out, "image-half"], env=environment, check=True)
    return out / "tiny-sd-half"
