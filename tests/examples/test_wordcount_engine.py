"""The example engine, in an interpreter that has only msgspec and the example, passes the whole suite."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import msgspec
import pytest

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "wordcount_engine"


@pytest.fixture
def folder(tmp_path):
    """The example's folder with its own .venv, as its README makes it."""
    folder = tmp_path / "wordcount"
    shutil.copytree(EXAMPLE, folder, ignore=shutil.ignore_patterns("__pycache__", ".venv"))
    venv.create(folder / ".venv", with_pip=False, symlinks=True)
    packages = next((folder / ".venv" / "lib").glob("python*/site-packages"))
    (packages / "msgspec").symlink_to(Path(msgspec.__file__).parent)
    (packages / "example.pth").write_text(f"{folder}\n")
    return folder


def _probe(folder, *args):  # noqa: ANN002
    command = [sys.executable, "-m", "supervisor.probe", "--config", str(folder / "worker.toml"), "--json", *args]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_it_passes_the_conformance_suite(folder):
    results = _probe(folder, "--conformance", "wordcount")
    assert {result["status"] for result in results} <= {"ok", "skipped"}
    assert sum(result["status"] == "ok" for result in results) >= 12


def test_the_probe_finds_it_well(folder):
    (probe,) = _probe(folder, "--device", "cpu", "wordcount")
    assert (probe["engine"], probe["verdict"]) == ("wordcount", "ok")
