"""The checks of `[[models]]` and of `[engines.NAME] options`: engine, backend, kinds, files and load options.

A file that is missing or cannot be read is that model's own fault and no reason to serve none: it is a warning here,
and the running supervisor does not announce that model until the file is there (proving.py, model_uses.py).
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from typing import Any

from engines.catalog import CATALOG, Entry
from engines.catalog_options import options_of
from protocol.work import Kind, is_kind
from supervisor.config_walk import BAD, build, did_you_mean
from supervisor.settings import EngineTable, ModelTable
from supervisor.toml_lines import Path as KeyPath

Finding = tuple[KeyPath, str]

# Engines whose models can lie on several GPUs.
SPLITTERS = frozenset({"llm"})
# A model named by these engines makes up its answers; the name must say so.
_MADE_UP = "synthetic"
_MISSING = "is missing"  # as `build` says it
_SAFE_NAME = re.compile(r"[^\x00-\x1f\x7f]+\Z")


def check_models(models: list[ModelTable], engines: Mapping[str, EngineTable]) -> Iterator[Finding]:
    """Everything that is wrong with `[[models]]`."""
    seen: dict[str, int] = {}
    for number, model in enumerate(models):
        if model is BAD:
            continue
        if model.name in seen:
            yield ("models", number, "name"), f'models[{seen[model.name]}] is named "{model.name}" already'
        seen.setdefault(model.name, number)
        for path, sentence in _check_model(model, engines):
            yield ("models", number, *path), sentence


def warn_models(models: list[ModelTable]) -> Iterator[Finding]:
    """What keeps single models from being served, and is not a mistake of the configuration."""
    for number, model in enumerate(models):
        if model is not BAD:
            for path, sentence in _missing_files(model):
                yield ("models", number, *path), sentence


def check_engine_options(name: str, table: EngineTable) -> Iterator[Finding]:
    """What is wrong with the options that an engine's models share."""
    if _is_ours(name, table):
        for path, sentence in _check_options(name, "", table.options):
            if sentence != _MISSING:  # the models may give it
                yield path, sentence


def _is_ours(engine: str, table: EngineTable | None) -> bool:
    """Whether the catalogue knows the program behind an engine's name."""
    return engine in CATALOG and (table is None or table is BAD or not table.module)


def _check_model(model: ModelTable, engines: Mapping[str, EngineTable]) -> Iterator[Finding]:
    entry = CATALOG.get(model.engine)
    table = engines.get(model.engine)
    if not _SAFE_NAME.match(model.name):
        yield ("name",), "holds a control character"
    if entry is None and table is None:
        yield ("engine",), f'there is no engine "{model.engine}"{did_you_mean(model.engine, {*CATALOG, *engines})}'
        return
    ours = entry if _is_ours(model.engine, table) else None
    if ours is not None:
        yield from _check_ours(model, ours, {} if table is None or table is BAD else table.options)
    yield from _check_kinds(model, ours.kinds if ours is not None else None)
    yield from _check_files(model)


def _check_ours(model: ModelTable, entry: Entry, shared: Mapping[str, Any]) -> Iterator[Finding]:
    """What only an engine of the catalogue can be asked."""
    if model.backend and model.backend not in entry.backends:
        known = [name for name in entry.backends if name]
        hint = did_you_mean(model.backend, known) if known else "; leave it out"
        yield ("backend",), f'engine "{model.engine}" has no backend "{model.backend}"{hint}'
    else:
        for path, sentence in _check_options(model.engine, model.backend or entry.backends[0], model.options):
            if sentence != _MISSING or path[1] not in shared:
                yield path, sentence
    if model.split and model.engine not in SPLITTERS:
        yield ("split",), f'engine "{model.engine}" cannot spread a model over several GPUs; leave it out'
    if entry.needs_model and not model.path and not model.files:
        yield ("path",), f'is missing: engine "{model.engine}" needs the file or folder of a model'
    if model.engine == _MADE_UP and not model.name.startswith(_MADE_UP):
        yield ("name",), f'a model of the engine "{_MADE_UP}" must be named {_MADE_UP}…: its answers are made up'


def _check_options(engine: str, backend: str, options: Mapping[str, Any]) -> list[Finding]:
    """Names and types of load options; a `backend` of "" asks for what any of the engine's backends takes."""
    found: list[Finding] = []

    def report(path: KeyPath, sentence: str) -> None:
        found.append((path, sentence.replace("unknown key", f'engine "{engine}" has no such load option', 1)))

    build(dict(options), options_of(engine, backend), ("options",), report)
    return found


def _check_kinds(model: ModelTable, known: tuple[str, ...] | None) -> Iterator[Finding]:
    if known is None and not model.kinds:
        yield ("kinds",), f'is missing: engine "{model.engine}" is not in the catalogue, so name its task kinds'
    for number, kind in enumerate(model.kinds):
        if kind is BAD:
            continue
        if known is not None and kind not in known:
            hint = did_you_mean(kind, known)
            yield ("kinds", number), f'engine "{model.engine}" does not serve "{kind}"{hint}'
        elif known is None and not is_kind(kind):
            yield ("kinds", number), f'there is no task kind "{kind}"{did_you_mean(kind, [str(k) for k in Kind])}'


def _check_files(model: ModelTable) -> Iterator[Finding]:
    if model.path and "model" in model.files:
        yield ("files", "model"), "the role model is given by `path` already"
    roles = set(model.files) | ({"model"} if model.path else set())
    for role in model.sha256:
        if role not in roles:
            yield ("sha256", role), f'no file has the role "{role}"{did_you_mean(role, roles)}'


def _missing_files(model: ModelTable) -> Iterator[Finding]:
    for path, text in _named_files(model):
        if not text:
            continue
        if not os.path.exists(text):
            yield path, f'there is no file or folder {text}; the model "{model.name}" is not served until there is'
        elif not os.access(text, os.R_OK | os.X_OK if os.path.isdir(text) else os.R_OK):
            yield path, f'{text} cannot be read by this user; the model "{model.name}" is not served until it can'


def _named_files(model: ModelTable) -> list[tuple[KeyPath, str]]:
    named = [(("path",), model.path), *((("files", role), path) for role, path in model.files.items())]
    return [(path, text) for path, text in named if isinstance(text, str)]
