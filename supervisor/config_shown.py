"""The configuration as people and programs are shown it: every value with its place, secrets blotted out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from supervisor.config import Loaded, masked, read
from supervisor.config_keys import leaves, written
from supervisor.reload_plan import apply_of
from supervisor.toml_lines import Path as KeyPath


def shown(path: Path, environ: Mapping[str, str] = os.environ) -> tuple[dict[str, Any], str]:
    """What the files and the environment say now, and its etag for `config_edit.patch`.

    The first has `settings` (masked, defaults included), `origins` (see there), `files` (the weakest first) and
    `notes` (what should be mended). What of it a running supervisor waits for a restart with is `Reloader.restart`.

    Raises:
        ConfigError: with every problem that was found.
    """
    loaded = read(path, environ)
    plain = masked(loaded.settings)
    files = [str(file) for file in loaded.layers.files]
    told = {"settings": plain, "origins": origins(loaded, plain), "files": files, "notes": list(loaded.notes)}
    return told, loaded.layers.etag


def origins(loaded: Loaded, plain: dict[str, Any]) -> list[dict[str, Any]]:
    """Each value with its key, its source, and `apply`: whether a change of it is "live" or takes a "restart".

    The source is "default", "file" or "env"; the latter two have a `place`, FILE:LINE or the variable.
    """
    found = []
    for path, value in leaves(plain):
        source = loaded.layers.origin(path)
        key = written(_named(path, plain))
        row = {"key": key, "value": value, "source": "default", "apply": str(apply_of(key))}
        if source is not None:
            row |= {"source": source.kind, "place": str(source)}
        found.append(row)
    return found


def _named(path: KeyPath, plain: dict[str, Any]) -> KeyPath:
    """The path with a model's name instead of its index."""
    if len(path) > 1 and path[0] == "models" and isinstance(path[1], int):
        return ("models", plain["models"][path[1]]["name"], *path[2:])
    return path
