"""Where the supervisor of a configuration listens, found without checking the configuration.

`supervisor config check` reads all of worker.toml, and takes 40 ms for it. A question needs two of its values, and must
be answered also while somebody is in the middle of editing another one. What is found is what `supervisor.config` finds
(the tests hold the two against each other): worker.toml, then conf.d/*.toml, then the environment.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from supervisor.errors import ConfigError

_SEARCH = ("./worker.toml", "~/.config/bulkhead/worker.toml", "/etc/bulkhead/worker.toml")
_VERSION = 1  # of the configurations that are read here; older ones are read by whoever can migrate them
_MOST_BYTES = 100  # of a socket's path, as in supervisor.config
_WANTED = (("control", "socket"), ("worker", "state_dir"))


def socket_path(config: str | None, environ: Mapping[str, str] = os.environ) -> Path:
    """Where the supervisor of this configuration listens.

    Raises:
        ConfigError: there is no configuration, or it cannot be read.
    """
    path = find_config(config, environ)
    found: dict[tuple[str, str], str] = {}
    for file in (path, *sorted((path.parent / "conf.d").glob("*.toml"))):
        if file.name.startswith("."):
            continue
        raw = _read(file)
        if raw.get("config_version", _VERSION) != _VERSION:
            return _as_the_supervisor_does(path)
        found.update(_values(raw, file))
    found.update(_variables(environ))
    folder = path.resolve().parent
    if socket := found.get(("control", "socket")):
        return Path(os.path.join(folder, os.path.expanduser(socket)))
    state = found.get(("worker", "state_dir"), "")
    return _below(Path(os.path.join(folder, os.path.expanduser(state))) if state else _usual_state(environ), environ)


def find_config(given: str | None, environ: Mapping[str, str] = os.environ) -> Path:
    """As `supervisor.config.find_config`."""
    first = given or environ.get("BULKHEAD_CONFIG")
    candidates = [first] if first is not None else list(_SEARCH)
    for candidate in candidates:
        path = Path(candidate).expanduser()
        if path.is_file():
            return path
    searched = ", ".join(("$BULKHEAD_CONFIG", *_SEARCH))
    raise ConfigError([f"{candidates[0]}: no such file; looked at {searched}; name one with --config"])


def _read(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text("utf-8"))
    except OSError as problem:
        raise ConfigError([f"{file}: cannot be read: {problem.strerror}"]) from None
    except UnicodeDecodeError as problem:
        raise ConfigError([f"{file}: is not UTF-8 text (byte {problem.start})"]) from None
    except tomllib.TOMLDecodeError as problem:
        raise ConfigError([f"{file}: {problem}"]) from None


def _values(raw: Mapping[str, Any], file: Path) -> Iterator[tuple[tuple[str, str], str]]:
    for table, key in _WANTED:
        found = raw.get(table, {})
        if isinstance(found, dict) and key in found:
            if not isinstance(found[key], str):
                raise ConfigError([f"{file}: {table}.{key}: expected str"])
            yield (table, key), found[key]


def _variables(environ: Mapping[str, str]) -> Iterator[tuple[tuple[str, str], str]]:
    names = {f"bulkhead__{table}__{key}": (table, key) for table, key in _WANTED}
    for variable, text in environ.items():
        if variable.startswith("BULKHEAD__") and variable.lower() in names:
            yield names[variable.lower()], text


def _usual_state(environ: Mapping[str, str]) -> Path:
    if folders := environ.get("STATE_DIRECTORY"):
        return Path(folders.split(":")[0])
    base = environ.get("XDG_STATE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path.home() / ".local" / "state") / "bulkhead"


def _below(state: Path, environ: Mapping[str, str]) -> Path:
    path = state / "control.sock"
    if len(os.fsencode(path)) <= _MOST_BYTES:
        return path
    import hashlib
    import tempfile

    digest = hashlib.sha256(os.fsencode(state.absolute())).hexdigest()[:16]
    return Path(environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()) / f"bulkhead-{os.getuid()}-{digest}.sock"


def _as_the_supervisor_does(path: Path) -> Path:
    from supervisor.config import control_socket, load

    return control_socket(load(path))
