"""The rig for tests that attack a whole supervisor."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

HERE = Path(__file__).parent


def _load(name: str) -> ModuleType:
    """Test folders are no packages: what they share is loaded by path."""
    spec = importlib.util.spec_from_file_location(f"tests_system_{name}", HERE / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def rigs() -> ModuleType:
    """The module rig.py."""
    return _load("rig")


@pytest.fixture(scope="session")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Probes that this session has passed; a later state folder begins with them."""
    return tmp_path_factory.mktemp("verdicts") / "verdicts.json"


@pytest.fixture
def new_rig(rigs: ModuleType, tmp_path: Path, verdicts: Path) -> Iterator[Callable[..., Any]]:
    """Makes rigs, one per folder; whatever is left of them is ended with the test."""
    made = []

    def make(name: str = "r", **options: Any) -> Any:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        made.append(rigs.Rig(folder, **{"verdicts": verdicts, **options}))
        return made[-1]

    yield make
    for rig in made:
        rig.sweep()


@pytest.fixture(scope="module")
def shared_rig(rigs: ModuleType, tmp_path_factory: pytest.TempPathFactory, verdicts: Path) -> Iterator[Any]:
    """One rig for all tests of a module that leave it as they found it."""
    rig = rigs.Rig(tmp_path_factory.mktemp("shared"), verdicts=verdicts)
    rig.ready()
    yield rig
    rig.sweep()
