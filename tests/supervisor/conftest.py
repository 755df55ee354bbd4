"""Shared by the supervisor's tests.

`wordy` is an engine of somebody else's in an interpreter of its own: a bare venv that sees msgspec and the test's
engines. `site` is a server on the loopback that stands in for a Hugging Face hub and for plain file servers.
`models_box` is a home with `supervisor models` in it.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import trio

from supervisor import config, pull
from supervisor.config import build_models, load
from supervisor.host.work import EngineSpec
from supervisor.machine.weights import verify

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


class ModelsBox:
    """A home of its own: `run` is `supervisor models …`."""

    def __init__(self, folder: Path, capsys: Any) -> None:
        self.folder = folder
        self.toml = folder / "config" / "bulkhead" / "worker.toml"
        self.models = folder / "state" / "bulkhead" / "models"
        self._capsys = capsys
        self.out = self.err = ""

    def run(self, *argv: str) -> int:
        parser = argparse.ArgumentParser()
        pull.add_arguments(parser)
        self._capsys.readouterr()
        code = pull.main(parser.parse_args([str(word) for word in argv]))
        self.out, self.err = self._capsys.readouterr()
        return code

    def entries(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = tomllib.loads(self.toml.read_text())["models"]
        return found

    def check(self) -> None:
        """Every model of the file passes the check that the supervisor makes before a load."""
        for spec in build_models(load(self.toml)):
            trio.run(verify, spec)


@pytest.fixture
def models_box(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> ModelsBox:
    home = tmp_path / "home"
    (home / "work").mkdir(parents=True)
    monkeypatch.chdir(home / "work")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_STATE_HOME", str(home / "state"))
    for name in ("BULKHEAD_CONFIG", "STATE_DIRECTORY", "HF_TOKEN", "HF_TOKEN_PATH", "HF_ENDPOINT", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    # What lies in /etc of the machine that tests is none of their business.
    monkeypatch.setattr(config, "SEARCH", tuple(place for place in config.SEARCH if not place.startswith("/etc")))
    box = ModelsBox(home, capsys)
    box.toml = home / ".config" / "bulkhead" / "worker.toml"
    return box
