"""Which settings of a running supervisor follow its files, and how each change is put into force.

What has no applier here waits for a restart: the log, the outcome of the reload and `supervisor config set` say so
(reload_plan.APPLY says it as data, and a test holds both to the same keys). A key stands here only when its applier
really changes what the supervisor does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from supervisor import notices
from supervisor.config import build_models
from supervisor.host.work import ModelSpec
from supervisor.reload import Applier
from supervisor.reload_plan import Change
from supervisor.settings import HoldsTable, LimitsTable, LogTable, ModelTable, Settings

T = TypeVar("T", bound=msgspec.Struct)

# Read wherever they are used, by the supervisor itself.
OWN_LIMITS = ("drain_s",)
# Read by the host at each wait, or told to the scheduler. What an instance was given at its start waits for a restart.
HOST_LIMITS = (
    "start_s",
    "load_s",
    "first_output_s",
    "stall_s",
    "cancel_grace_s",
    "job_s",
    "keep_alive_s",
    "vram_threshold_gb",
    "restart",
    "recycle",
)
MODEL_KEYS = ("stall_s", "keep_alive_s")
LOG_KEYS = ("format", "file", "max_mb", "keep")


@dataclass(frozen=True)
class Parts:
    """Who goes on with other settings; None: that part of this supervisor cannot, its keys wait for a restart.

    Attributes:
        models: whoever has models come and go as these settings describe them.
        host: the host, with limits and with models that differ from its own in `MODEL_KEYS` alone.
        holds: whoever watches the machine.
        log: the log; raises ConfigError when it cannot be had so.
    """

    models: Callable[[Settings], None] | None = None
    host: Callable[[LimitsTable, Sequence[ModelSpec]], None] | None = None
    holds: Callable[[HoldsTable], None] | None = None
    log: Callable[[LogTable], None] | None = None


def appliers(
    read: Callable[[], Settings], write: Callable[[Settings], None], parts: Parts = Parts()
) -> Mapping[str, Applier]:
    """Key -> applier; "models.*.stall_s" is that key of any model.

    Args:
        read: the settings in force.
        write: puts others into force: whoever reads them next sees them, and what is announced is made anew.
    """

    async def level(new: Settings, _changes: Sequence[Change]) -> None:
        notices.set_level(new.log.level)
        write(msgspec.structs.replace(read(), log=_taken(read().log, new.log, ("level",))))

    async def labels(new: Settings, _changes: Sequence[Change]) -> None:
        write(msgspec.structs.replace(read(), worker=_taken(read().worker, new.worker, ("labels",))))

    async def version(new: Settings, _changes: Sequence[Change]) -> None:
        """It says how the file is written, and nothing about the worker."""
        write(msgspec.structs.replace(read(), config_version=new.config_version))

    found: dict[str, Applier] = {"log.level": level, "worker.labels": labels, "config_version": version}
    found |= {f"limits.{name}": _limit(name, read, write, None) for name in OWN_LIMITS}
    if parts.host is not None:
        found |= {f"limits.{name}": _limit(name, read, write, parts.host) for name in HOST_LIMITS}
        found |= {f"models.*.{name}": _model(name, read, write, parts.host) for name in MODEL_KEYS}
    if parts.models is not None:
        found["models"] = found["engines"] = _models(read, write, parts.models, parts.host)
    if parts.holds is not None:
        found["holds"] = _holds(read, write, parts.holds)
    if parts.log is not None:
        found |= {f"log.{name}": _log(name, read, write, parts.log) for name in LOG_KEYS}
    return found


def _limit(
    name: str,
    read: Callable[[], Settings],
    write: Callable[[Settings], None],
    tell: Callable[[LimitsTable, Sequence[ModelSpec]], None] | None,
) -> Applier:
    async def apply(new: Settings, _changes: Sequence[Change]) -> None:
        settings = msgspec.structs.replace(read(), limits=_taken(read().limits, new.limits, (name,)))
        write(settings)
        if tell is not None:
            tell(settings.limits, build_models(settings))

    return apply


def _model(
    name: str,
    read: Callable[[], Settings],
    write: Callable[[Settings], None],
    tell: Callable[[LimitsTable, Sequence[ModelSpec]], None],
) -> Applier:
    async def apply(new: Settings, changes: Sequence[Change]) -> None:
        theirs = {model.name: model for model in new.models}
        changed = {change.path[1] for change in changes}

        def taken(model: ModelTable) -> ModelTable:
            return _taken(model, theirs[model.name], (name,)) if model.name in changed else model

        settings = msgspec.structs.replace(read(), models=[taken(model) for model in read().models])
        write(settings)
        tell(settings.limits, build_models(settings))

    return apply


def _models(
    read: Callable[[], Settings],
    write: Callable[[Settings], None],
    follow: Callable[[Settings], None],
    tell: Callable[[LimitsTable, Sequence[ModelSpec]], None] | None,
) -> Applier:
    async def apply(new: Settings, _changes: Sequence[Change]) -> None:
        # Both tables at once: a model that comes together with its engine is not proved with another one first.
        settings = msgspec.structs.replace(read(), models=new.models, engines=new.engines)
        write(settings)
        follow(settings)
        if tell is not None:
            tell(settings.limits, build_models(settings))

    return apply


def _holds(
    read: Callable[[], Settings], write: Callable[[Settings], None], tell: Callable[[HoldsTable], None]
) -> Applier:
    async def apply(new: Settings, _changes: Sequence[Change]) -> None:
        tell(new.holds)
        write(msgspec.structs.replace(read(), holds=new.holds))

    return apply


def _log(
    name: str, read: Callable[[], Settings], write: Callable[[Settings], None], tell: Callable[[LogTable], None]
) -> Applier:
    async def apply(new: Settings, _changes: Sequence[Change]) -> None:
        table = _taken(read().log, new.log, (name,))
        tell(table)
        write(msgspec.structs.replace(read(), log=table))

    return apply


def _taken(mine: T, theirs: T, names: Sequence[str]) -> T:
    """Mine, with these fields of theirs."""
    return msgspec.structs.replace(mine, **{name: getattr(theirs, name) for name in names})
