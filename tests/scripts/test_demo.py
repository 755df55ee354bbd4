"""What scripts/demo says before it installs: only what is so. Its Python is a stand-in."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="a sh script")
PYTHON = """#!/bin/sh
case "$*" in
*"cache info"*) echo "Package index page cache size: ${CACHE:-0 bytes}" ;;
*demo_road.py*) echo "road $*" ;;
*"pip install"*) echo "$*" >>installed ;;
esac
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    for name in ("demo", "_venv.sh"):
        shutil.copy(ROOT / "scripts" / name, tmp_path / "scripts" / name)
    (tmp_path / "pyproject.toml").write_text("")
    python = tmp_path / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    (tmp_path / ".venv/.bulkhead-venv").touch()
    return tmp_path


def run(checkout: Path, **env: str) -> subprocess.CompletedProcess[str]:
    command = ["sh", str(checkout / "scripts/demo"), "--out", "x"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, **env}, check=True)
    assert done.stdout == "road scripts/demo_road.py --out x\n"
    return done


def test_a_download_is_announced_before_the_first_install_only(checkout: Path) -> None:
    first = run(checkout)
    assert "about 220 MB to download" in first.stderr
    assert (checkout / "installed").read_text().count("pip install") == 2
    again = run(checkout)
    assert "download" not in again.stderr
    assert "Everything is installed" in again.stderr
    assert (checkout / "installed").read_text().count("pip install") == 2


def test_a_cache_is_said_to_be_used(checkout: Path) -> None:
    said = run(checkout, CACHE="312.5 MB").stderr
    assert "from its cache (312.5 MB)" in said
    assert "220 MB" not in said


def test_a_newer_pyproject_installs_what_is_new(checkout: Path) -> None:
    run(checkout)
    stamps = [*checkout.glob(".venv/.bulkhead-[ad]*")]
    assert len(stamps) == 2
    for stamp in stamps:
        os.utime(stamp, (1, 1))
    said = run(checkout).stderr
    assert "has changed" in said
    assert "220 MB" not in said
    assert (checkout / "installed").read_text().count("pip install") == 4
