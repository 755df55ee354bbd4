"""The skeleton of a new engine passes its own tests as generated, outside the tree and inside a copy of it."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "scripts" / "new-engine"


def _run(*argv, **options):  # noqa: ANN002, ANN003
    return subprocess.run(argv, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture
def python(tmp_path):
    """An interpreter of its own: this one's libraries and the worker are installed in it, as by pip -e."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    packages = next((tmp_path / "venv" / "lib").glob("python*/site-packages"))
    (packages / "installed.pth").write_text("\n".join([*site.getsitepackages(), str(ROOT), ""]))

    def install(folder: Path) -> str:
        (packages / "engine.pth").write_text(f"{folder}\n")
        return str(tmp_path / "venv" / "bin" / "python")

    return install


@pytest.mark.slow
def test_a_repository_of_its_own(tmp_path, python):
    folder = tmp_path / "repository"
    done = _run("sh", str(SCRIPT), "loud_parrot", str(folder))
    assert done.returncode == 0, done.stderr
    assert sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()) == [
        "README.md",
        "loud_parrot_engine/__init__.py",
        "loud_parrot_engine/engine.py",
        "pyproject.toml",
        "tests/test_engine.py",
    ]
    tested = _run(python(folder), "-m", "pytest", "-q", "-p", "no:cacheprovider", cwd=folder)
    assert tested.returncode == 0, tested.stdout
    assert "passed" in tested.stdout
    assert "skipped" not in tested.stdout


@pytest.mark.slow
def test_inside_the_tree(tmp_path):
    tree = tmp_path / "tree"
    for name in ("engines", "protocol", "supervisor", "scripts"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("fixture", "__pycache__"))
    done = _run("sh", str(tree / "scripts" / "new-engine"), "parrot")
    assert done.returncode == 0, done.stderr
    assert 'Entry(module="engines.parrot.engine", kinds=("x-parrot",)' in done.stdout
    environment = {**os.environ, "PYTHONPATH": str(tree)}
    tests = str(tree / "tests" / "engines" / "parrot")
    tested = _run(
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "--rootdir",
        str(tree),
        tests,
        cwd=tree,
        env=environment,
    )
    assert tested.returncode == 0, tested.stdout


@pytest.mark.slow
def test_the_skeleton_is_clean(tmp_path):
    ruff = shutil.which("ruff", path=str(Path(sys.executable).parent))
    if ruff is None:
        pytest.skip("ruff is not installed")
    _run("sh", str(SCRIPT), "parrot", str(tmp_path))
    for command in (["check", "--config", str(ROOT / "pyproject.toml")], ["format", "--check", "--line-length", "120"]):
        done = _run(ruff, *command, str(tmp_path / "parrot_engine"))
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", ["", "Parrot", "9lives", "a-b", "a b", "a/../b"])
def test_odd_names_are_refused(tmp_path, name):
    done = _run("sh", str(SCRIPT), name, str(tmp_path / "x"))
    assert done.returncode == 64
    assert not (tmp_path / "x").exists()


def test_nothing_is_written_over(tmp_path):
    _run("sh", str(SCRIPT), "parrot", str(tmp_path))
    (tmp_path / "parrot_engine" / "engine.py").write_text("mine")
    done = _run("sh", str(SCRIPT), "parrot", str(tmp_path))
    assert done.returncode == 1
    assert (tmp_path / "parrot_engine" / "engine.py").read_text() == "mine"
