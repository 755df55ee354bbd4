"""Which files the commands on models work with."""

from __future__ import annotations

from pathlib import Path

import pytest

from supervisor import config
from supervisor.model_places import config_path, models_dir


def test_a_newcomers_file_lies_in_his_home_also_for_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("BULKHEAD_CONFIG", raising=False)
    monkeypatch.setattr(config, "SEARCH", ("./worker.toml", f"{tmp_path}/etc/worker.toml"))
    assert config_path(None) == tmp_path / ".config" / "bulkhead" / "worker.toml"
    monkeypatch.setenv("BULKHEAD_CONFIG", str(tmp_path / "named.toml"))
    assert config_path(None) == tmp_path / "named.toml"
    assert config_path("~/x.toml") == tmp_path / "x.toml"


def test_the_models_lie_in_the_state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    toml = tmp_path / "worker.toml"
    toml.write_text('[worker]\nstate_dir = "here"\n')
    assert models_dir(None, toml) == tmp_path / "here" / "models"
    monkeypatch.chdir(tmp_path)
    assert models_dir("elsewhere", toml) == tmp_path / "elsewhere"


def test_a_file_with_mistakes_still_says_where_the_models_lie(tmp_path: Path):
    toml = tmp_path / "worker.toml"
    toml.write_text('[worker]\nstate_dir = "here"\n[[models]]\nname = "m"\nengine = "llm"\npath = "/gone.gguf"\n')
    assert models_dir(None, toml) == tmp_path / "here" / "models"
