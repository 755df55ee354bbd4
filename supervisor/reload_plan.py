"""What a change of the configuration costs in a running supervisor. Pure.

`APPLY` says it as data, for the longest key that matches; "*" stands for any model.

- live: takes effect within two seconds of the file's being saved, nothing is interrupted: a model that was taken out or
  changed finishes its jobs first, and what is new is announced when its proof has passed;
- restart: only `supervisor drain --restart` brings it into force.

Who brings the live ones into force is in live_settings.py, and a test holds both to the same keys. What nobody takes
up after all (reload.py) is owed a restart, too.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from supervisor.config import MASK, is_secret
from supervisor.config_keys import parse_key, written
from supervisor.settings import Settings


class Apply(enum.StrEnum):
    """What it takes until a changed value is in force."""

    LIVE = "live"
    RESTART = "restart"


APPLY: Mapping[str, Apply] = {
    "config_version": Apply.LIVE,  # it says how the file is written, and nothing about the worker
    "coordinator": Apply.RESTART,
    "worker": Apply.RESTART,  # name and folder are the identity of the process
    "worker.labels": Apply.LIVE,
    "engines": Apply.LIVE,  # models whose engine has changed go and come again
    "models": Apply.LIVE,
    "models.*.stall_s": Apply.LIVE,  # these two in force at once, the model stays loaded
    "models.*.keep_alive_s": Apply.LIVE,
    "limits": Apply.RESTART,  # those not below are given to an instance, or to a part of ours, at its start
    "limits.drain_s": Apply.LIVE,
    "limits.start_s": Apply.LIVE,
    "limits.load_s": Apply.LIVE,
    "limits.first_output_s": Apply.LIVE,
    "limits.stall_s": Apply.LIVE,
    "limits.cancel_grace_s": Apply.LIVE,
    "limits.job_s": Apply.LIVE,
    "limits.keep_alive_s": Apply.LIVE,
    "limits.vram_threshold_gb": Apply.LIVE,
    "limits.restart": Apply.LIVE,
    "limits.recycle": Apply.LIVE,
    "control": Apply.RESTART,
    "page": Apply.RESTART,
    "holds": Apply.LIVE,
    "log": Apply.LIVE,
    "log.sentry_dsn_file": Apply.RESTART,  # the SDKs are set up once a process
    "otel": Apply.RESTART,
}
RESTARTS = "supervisor drain --restart"


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


def apply_of(key: str) -> Apply:
    """What a change of `key` takes; a key that nobody named takes a restart, which is always right."""
    return _apply_of(parse_key(key.replace("*", "_")))


def _apply_of(path: tuple[str, ...]) -> Apply:
    return next((APPLY[key] for key in beginnings(path) if key in APPLY), Apply.RESTART)


def beginnings(path: Sequence[str]) -> Iterator[str]:
    """The keys that say something about a setting, the longest first; a model's name is "*" in them."""
    if path[0] == "models" and len(path) > 1:
        path = ("models", "*", *path[2:])
    for end in range(len(path), 0, -1):
        yield ".".join(path[:end])


def plan(old: Settings, new: Settings) -> tuple[Change, ...]:
    """Compare two checked settings."""
    found = _differences(_plain(old), _plain(new), ())
    return tuple(Change(path, before, after, _apply_of(path)) for path, before, after in found)


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
