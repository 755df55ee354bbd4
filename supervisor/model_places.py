"""Where the commands on models find worker.toml and the models folder."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from supervisor.config import find_config, load, state_dir
from supervisor.config_layers import read_layers
from supervisor.errors import ConfigError
from supervisor.settings import Settings, WorkerTable
from supervisor.worker_toml import WorkerToml

FRESH = "~/.config/bulkhead/worker.toml"  # found from every working folder; /etc is for who writes there on purpose


def config_path(given: str | None) -> Path:
    """The worker.toml to edit: the given one, else the one `supervisor run` finds, else where it will look."""
    if given:
        return Path(given).expanduser()
    try:
        return find_config(None)
    except ConfigError:
        # A named but missing file is the user's wish.
        return Path(os.environ.get("BULKHEAD_CONFIG") or FRESH).expanduser()


def models_dir(given: str | None, config: Path) -> Path:
    """The models folder: the given one, else `models` in the state folder that worker.toml names.

    Of a worker.toml with mistakes only that one key is read: a model whose files are gone is such a mistake, and
    pulling it again must be able to mend it.
    """
    if given:
        return Path(given).expanduser().absolute()
    try:
        settings = load(config) if config.exists() else Settings()
    except ConfigError:
        worker = read_layers(config, os.environ).raw.get("worker", {})
        text = worker.get("state_dir", "") if isinstance(worker, dict) else ""
        folder = str(config.resolve().parent / Path(str(text)).expanduser()) if text else ""
        settings = Settings(worker=WorkerTable(state_dir=folder))
    return state_dir(settings) / "models"


def load_engines(toml: WorkerToml) -> Mapping[str, Any]:
    """[engines] of worker.toml; empty when the file does not exist yet."""
    return load(toml.path).engines if toml.path.exists() else {}
