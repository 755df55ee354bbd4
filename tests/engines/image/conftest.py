"""The model that hangs, from the makers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="session")
def hanging(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose unet never returns for pictures higher than 128 pixels."""
    pytest.importorskip("onnx", reason="onnx (dev group) is not installed")
    out = tmp_path_factory.mktemp("made")
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "scripts")}
    subprocess.run([sys.executable, "-P", "-m", "make_fixtures", out, "image-hang"], env=environment, check=True)
    return out / "tiny-sd-hang"
