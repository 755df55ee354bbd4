"""One edit of worker.toml, for the command line and for the control API: all of its keys or none.

`ETag` of what is shown is `Layers.etag`; an edit that names the one it has seen is refused when any file changed since.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from supervisor.config import MASK, read
from supervisor.config_keys import is_table, locate, parse_key, type_at, written
from supervisor.config_layers import read_layers
from supervisor.errors import ConfigError
from supervisor.toml_lines import Path as KeyPath
from supervisor.worker_toml import ChangedMeanwhile, WorkerToml

TRIES = 100  # each lost one is somebody else's edit that was made


class StaleEdit(ConfigError):
    """The files changed since whoever edits has seen them."""


class NotThere(ConfigError):
    """A key that should be taken out is not in the file."""


@dataclass(frozen=True)
class Edited:
    """What an edit left behind.

    Attributes:
        etag: of the configuration as it is now.
        stronger: edited keys that a drop-in or a variable overrides -> its place; the edit has no effect there.
    """

    etag: str
    stronger: dict[str, str]


def edit(
    path: Path,
    values: Mapping[str, Any],
    *,
    if_match: str = "",
    convert: Callable[[KeyPath, Any], Any] = lambda _path, value: value,
) -> Edited:
    """Set keys of the file at `path`, and take out those whose value is None.

    Args:
        path: a file that does not exist yet begins with defaults.
        values: dotted key -> plain value.
        if_match: the etag that whoever edits has seen; "" edits whatever stands there.
        convert: makes a value of what was typed; gets the setting's path.

    Raises:
        StaleEdit: `if_match` is not what stands there.
        NotThere: a key to take out is not there.
        ConfigError: the result would not be valid, with every problem; the old file stands.
        NoPermission: the file cannot be read or written.
    """
    for _ in range(TRIES):
        toml = WorkerToml(path, whole=False)
        if if_match and if_match != read_layers(toml.path, {}).etag:
            raise StaleEdit([f"{path}: was changed since it was shown; look at it again, then repeat the edit"])
        try:
            return _edited(toml, values, convert)
        except ChangedMeanwhile:
            continue  # with `if_match` the next look refuses it; without, the edit is made in what stands there now
    raise ChangedMeanwhile([f"{path}: others write it without a pause; nothing was written, try again"])


def etag(path: Path) -> str:
    """The etag of the configuration at `path`, drop-ins included.

    Raises:
        ConfigError: the files cannot be read, or are not TOML.
    """
    return read_layers(path.resolve(), {}).etag


def patch(path: Path, changes: Mapping[str, Any], if_match: str = "") -> str:
    """`edit` for programs: dotted key -> plain value, None takes it out. Returns the etag afterwards.

    Raises:
        StaleEdit, NotThere, ConfigError, NoPermission: as `edit`.
    """
    return edit(path, changes, if_match=if_match).etag


def _edited(toml: WorkerToml, values: Mapping[str, Any], convert: Callable[[KeyPath, Any], Any]) -> Edited:
    paths: dict[str, KeyPath] = {}
    for key, value in values.items():
        at = paths[key] = _locate_in(toml, key)
        type_ = type_at(at)
        if value is None:
            try:
                toml.drop(at)
            except KeyError:
                raise NotThere([f"{key} is not in {toml.path}"]) from None
            continue
        if is_table(type_):
            raise ConfigError([f"{key}: is a table; set its keys one by one"])
        if _has_mask(value):
            raise ConfigError([f"{key}: {MASK} only stands for a secret that is not shown; give the secret itself"])
        toml.put(at, convert(at, value))
    toml.save()
    layers = read(toml.path).layers
    stronger = {}
    for key, at in paths.items():
        source = layers.origin(at)
        if source is not None and source.name != str(toml.path):
            stronger[key] = str(source)
    return Edited(layers.etag, stronger)


def _has_mask(value: Any) -> bool:
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    return value == MASK or any(_has_mask(one) for one in inner)


def _locate_in(toml: WorkerToml, key: str) -> KeyPath:
    """Where a key is, or would be, in the file itself: a model of a drop-in is edited there."""
    parts = parse_key(key)
    try:
        return locate(parts, toml.models)
    except ConfigError:
        layers = read_layers(toml.path, {})
        elsewhere = locate(parts, layers.raw.get("models", []))
    place = layers.origin(elsewhere[:2])
    raise ConfigError([f"{written(parts)}: this model is in {place}, which is not edited from here; change it there"])
