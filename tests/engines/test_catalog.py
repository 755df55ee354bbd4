"""The catalogue tells the truth about the engines that ship."""

from __future__ import annotations

import importlib
import tomllib
from pathlib import Path

import pytest

from engines.catalog import CATALOG
from engines.runtime.contract import Engine
from protocol.work import PARAMS

ROOT = Path(__file__).parents[2]
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def _engine(name) -> type[Engine]:
    return importlib.import_module(CATALOG[name].module).ENGINE


@pytest.mark.parametrize("name", CATALOG)
def test_the_row_agrees_with_the_engine(name):
    engine, row = _engine(name), CATALOG[name]
    assert issubclass(engine, Engine)
    assert engine.name == name
    assert set(engine.kinds) == set(row.kinds)
    assert engine.backends == row.backends
    assert set(row.kinds) <= set(PARAMS)


@pytest.mark.parametrize("name", CATALOG)
def test_every_backend_names_an_extra_that_exists(name):
    for backend, extra in CATALOG[name].extra.items():
        assert backend in CATALOG[name].backends
        assert extra in EXTRAS


def test_every_kind_has_an_engine_that_is_real():
    served = {kind for name, row in CATALOG.items() if name != "synthetic" for kind in row.kinds}
    assert served == set(PARAMS)


@pytest.mark.parametrize("name", CATALOG)
def test_importing_an_engine_loads_no_heavy_library(name):
    """The greeting comes before any heavy import, so the module alone must not cause one."""
    import subprocess
    import sys

    heavy = {"numpy", "onnxruntime", "ctranslate2", "faster_whisper", "piper", "xllamacpp", "llama_cpp", "av", "PIL"}
    code = f"import sys, {CATALOG[name].module}; print(*sorted({heavy!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []
