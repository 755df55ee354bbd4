"""What a change of the configuration costs in a running supervisor. Pure.

`APPLY` says it as data, for the longest key that matches:

- live: takes effect at once, nothing is interrupted;
- engine: the instances that it concerns are replaced, each after its running jobs;
- reconnect: the session with the coordinator is opened anew; running jobs go on;
- restart: only `supervisor drain --restart` brings it into force.

It is what the running program can do at best: whatever nobody takes up there (reload.py) is owed a restart, too.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec

from supervisor.config import MASK, build_models, is_secret
from supervisor.config_keys import parse_key, written
from supervisor.settings import Settings


class Apply(enum.StrEnum):
    """What it takes until a changed value is in force."""

    LIVE = "live"
    ENGINE = "engine"
    RECONNECT = "reconnect"
    RESTART = "restart"


APPLY: Mapping[str, Apply] = {
    "config_version": Apply.LIVE,  # it says how the file is written, and nothing about the worker
    "coordinator": Apply.RESTART,  # the embedded one is a child whose end would end its callers' requests
    "coordinator.url": Apply.RECONNECT,  # from or to "embedded" it is a restart, see `plan`
    "coordinator.dialect": Apply.RECONNECT,
    "coordinator.token_file": Apply.RECONNECT,
    "coordinator.tls_ca": Apply.RECONNECT,
    "coordinator.connect_s": Apply.RECONNECT,
    "worker": Apply.RESTART,  # name and folder are the identity of the process
    "worker.labels": Apply.LIVE,
    "engines": Apply.ENGINE,
    "models": Apply.ENGINE,
    "limits": Apply.LIVE,
    "limits.keep_alive_s": Apply.ENGINE,  # these three are given to an instance at its start
    "limits.memory_gb": Apply.ENGINE,
    "limits.scratch_gb": Apply.ENGINE,
    "control": Apply.RESTART,
    "holds": Apply.LIVE,
    "log": Apply.LIVE,
    "log.sentry_dsn_file": Apply.RESTART,  # the SDKs are set up once a process
    "page": Apply.RESTART,
    "otel": Apply.RESTART,
}


@dataclass(frozen=True)
class Change:
    """One changed value.

    Attributes:
        path: the parts of its key; a model goes by its name.
        old, new: plain values, None where the key is absent. They may be secrets: show `shown()`.
        apply: what it takes until it is in force.
    """

    path: tuple[str, ...]
    old: Any
    new: Any
    apply: Apply

    @property
    def key(self) -> str:
        """The dotted key, as `supervisor config get` takes it."""
        return written(self.path)

    def shown(self) -> dict[str, Any]:
        """For people and programs, with what looks like a secret blotted out."""
        old, new = (_blotted(value, self.path) for value in (self.old, self.new))
        return {"key": self.key, "old": old, "new": new, "apply": str(self.apply)}


@dataclass(frozen=True)
class Plan:
    """All changes, by what they take.

    Attributes:
        models: names of models that come, go, or need new instances.
    """

    live: tuple[Change, ...] = ()
    engines: tuple[Change, ...] = ()
    reconnect: tuple[Change, ...] = ()
    restart: tuple[Change, ...] = ()
    models: tuple[str, ...] = ()

    @property
    def changes(self) -> tuple[Change, ...]:
        """All of them."""
        return self.live + self.engines + self.reconnect + self.restart


def apply_of(key: str) -> Apply:
    """What a change of `key` takes; a key that nobody named takes a restart, which is always right."""
    return _apply_of(parse_key(key.replace("*", "_")))


def _apply_of(path: tuple[str, ...]) -> Apply:
    for end in range(len(path), 0, -1):
        found = APPLY.get(".".join(path[:end]))
        if found is not None:
            return found
    return Apply.RESTART


def plan(old: Settings, new: Settings) -> Plan:
    """Compare two checked settings."""
    found: dict[Apply, list[Change]] = {apply: [] for apply in Apply}
    for path, before, after in _differences(_plain(old), _plain(new), ()):
        apply = _apply_of(path)
        if path == ("coordinator", "url") and "embedded" in (before, after):
            apply = Apply.RESTART
        found[apply].append(Change(path, before, after, apply))
    return Plan(
        live=tuple(found[Apply.LIVE]),
        engines=tuple(found[Apply.ENGINE]),
        reconnect=tuple(found[Apply.RECONNECT]),
        restart=tuple(found[Apply.RESTART]),
        models=_touched(old, new),
    )


def _touched(old: Settings, new: Settings) -> tuple[str, ...]:
    """Models whose specification differs: that is exact where the list of changed keys is not.

    A default of `[limits]` concerns the models that do not set their own value, for example.
    """
    before = {spec.name: spec for spec in build_models(old)}
    after = {spec.name: spec for spec in build_models(new)}
    scratch = old.limits.scratch_gb != new.limits.scratch_gb
    names = {**before, **after}
    return tuple(name for name in names if scratch or before.get(name) != after.get(name))


def _plain(settings: Settings) -> dict[str, Any]:
    plain: dict[str, Any] = msgspec.to_builtins(settings)
    plain["models"] = {model["name"]: model for model in plain["models"]}
    return plain


def _differences(
    old: Mapping[str, Any], new: Mapping[str, Any], at: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], Any, Any]]:
    for key in {**old, **new}:
        before, after = old.get(key), new.get(key)
        if before == after:
            continue
        if isinstance(before, dict) and isinstance(after, dict):
            yield from _differences(before, after, (*at, key))
        else:
            yield (*at, key), before, after


def _blotted(value: Any, path: tuple[str, ...]) -> Any:
    if isinstance(value, dict):
        return {key: _blotted(inner, (*path, key)) for key, inner in value.items()}
    return MASK if value is not None and "env" in path[:-1] and is_secret(path[-1]) else value
