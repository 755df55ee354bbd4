"""The checks of `[coordinator.goliat]`: it names a model that can run studies, and what that model may be told."""

from __future__ import annotations

from collections.abc import Iterator

from supervisor.config_models import Finding
from supervisor.config_walk import BAD, did_you_mean
from supervisor.settings import EngineTable, Settings

_AT = ("coordinator", "goliat")


def check_goliat(settings: Settings) -> Iterator[Finding]:
    """Everything that is wrong with it, for a worker whose dialect it is."""
    table = settings.coordinator.goliat
    if table.protocol == "shipped" and not table.study:
        yield (
            (*_AT, "study"),
            'is missing: with protocol "shipped" it names the super-study whose assignments are taken',
        )
    models = [(number, model) for number, model in enumerate(settings.models) if model is not BAD]
    found = next(((number, model) for number, model in models if model.name == table.model), None)
    if not table.model:
        yield (*_AT, "model"), "is missing: it names the model of the engine command that runs studies"
    elif found is None:
        hint = did_you_mean(table.model, [model.name for _number, model in models])
        yield (*_AT, "model"), f'there is no model "{table.model}"{hint}'
    elif found[1].engine != "command":
        yield (*_AT, "model"), f'"{table.model}" is a model of the engine {found[1].engine}, and studies need command'
    else:
        number, model = found
        engine = settings.engines.get("command")
        defaults = engine.options if isinstance(engine, EngineTable) else {}
        allowed = {**defaults, **model.options}.get("env_allow", [])
        missing = [name for name in table.env if not isinstance(allowed, list) or name not in allowed]
        if missing:
            yield (
                ("models", number, "options", "env_allow"),
                f"lacks {' and '.join(missing)}, which studies are told: add the name, or take it out of "
                "coordinator.goliat.env",
            )
