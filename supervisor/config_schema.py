"""The JSON Schema of worker.toml, for editors (taplo, Even Better TOML) and for the control page.

Types, ranges, choices and defaults come from the structs of settings.py; the description of each key from the
"Attributes:" section of its table's docstring, so there is one text for people who read the code and people who edit
the file. `x-apply` says what a change of the key costs in a running supervisor (reload.py).
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import msgspec

from engines import catalog_options
from engines.catalog import CATALOG
from engines.catalog_options import OPTIONS
from protocol.work import Kind
from supervisor.reload_plan import apply_of
from supervisor.settings import Settings

# What editors offer; any other text is allowed by the type, since an engine may be anybody's.
_EXAMPLES = {
    ("ModelTable", "engine"): sorted(CATALOG),
    ("ModelTable", "kinds"): [[str(kind)] for kind in Kind],
    ("CoordinatorTable", "url"): ["embedded", "wss://coordinator.example.org/v1/worker"],
}
# The same in every table of [holds], so said once.
_IN_HOLDS = {
    "mode": '"stop" takes no more jobs; "unload" also ends idle models; "abort" also ends jobs; "off" never holds.',
    "enter_s": "Seconds for which it has to be so before work stops.",
    "leave_s": "Seconds for which it has to be over before work goes on.",
}


def schema() -> dict[str, Any]:
    """Return the schema as plain values."""
    made: dict[str, Any] = msgspec.json.schema(Settings)
    tables = {table.__name__: (table, key) for table, key in _tables(Settings, "")}
    for name, definition in made["$defs"].items():
        table, key = tables[name]
        definition["description"] = summary(table)
        texts = attributes(table)
        for field, property_ in definition["properties"].items():
            _drop_null(property_)
            inner = property_.get("$ref", "").rpartition("/")[2]
            text = texts.get(field) or (summary(tables[inner][0]) if inner else "")
            if not text and key.startswith("holds."):
                text = _IN_HOLDS.get(field, "")
            property_["description"] = text
            if (name, field) in _EXAMPLES:
                property_["examples"] = _EXAMPLES[name, field]
            property_["x-apply"] = str(apply_of(f"{key}.{field}".removeprefix(".")))
    _add_options(made["$defs"])
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", "title": "Bulkhead worker.toml", **made}


def _add_options(definitions: dict[str, Any]) -> None:
    """The load options of the engines that ship. What an engine of one's own takes, only that engine knows."""
    tables = [table for each in OPTIONS.values() for table in each]
    (_, found) = msgspec.json.schema_components(tables)
    for name, definition in found.items():
        table = getattr(catalog_options, name)
        texts = {name: text for base in reversed(table.__mro__[:-1]) for name, text in attributes(base).items()}
        definition["description"] = summary(table)
        for field, property_ in definition["properties"].items():
            property_["description"] = texts.get(field) or summary(catalog_options.Gradio)
            property_["x-apply"] = str(apply_of("models.*.options"))
        definitions[f"{name}Options"] = _renamed(definition)
    conditions = []
    for engine, each in OPTIONS.items():
        named = {"engine": {"const": engine}}
        for backend, table in zip(CATALOG[engine].backends, each, strict=True):
            first = backend == CATALOG[engine].backends[0]
            asked = {"backend": {"enum": [backend, ""]} if first else {"const": backend}} if len(each) > 1 else {}
            condition = {"properties": named | asked, "required": ["engine", *([] if first else asked)]}
            # Its required options may stand in [engines.NAME].
            then = {"properties": {"options": {"$ref": f"#/$defs/{table.__name__}Options"}}}
            conditions.append({"if": condition, "then": then})
        definitions[f"{each[0].__name__}Options"].pop("required", None)
    definitions["ModelTable"]["allOf"] = conditions


def _renamed(node: Any) -> Any:
    """With references to where the definitions of options stand in our schema."""
    if isinstance(node, dict):
        return {
            key: f"{value}Options" if key == "$ref" and isinstance(value, str) else _renamed(value)
            for key, value in node.items()
        }
    return [_renamed(item) for item in node] if isinstance(node, list) else node


def _drop_null(property_: dict[str, Any]) -> None:
    """TOML has no null: a value that may be absent is its own type, without a default."""
    choices = [choice for choice in property_.get("anyOf", []) if choice != {"type": "null"}]
    if len(choices) == 1:
        del property_["anyOf"], property_["default"]
        property_ |= choices[0]


def summary(table: type[msgspec.Struct]) -> str:
    """The docstring without its sections, as one paragraph."""
    text = inspect.cleandoc(table.__doc__ or "").split("\n\nAttributes:")[0]
    return " ".join(text.split())


def attributes(table: type[msgspec.Struct]) -> dict[str, str]:
    """Field -> its text in the docstring; `a, b: text` describes both."""
    _, _, section = inspect.cleandoc(table.__doc__ or "").partition("Attributes:\n")
    found: dict[str, str] = {}
    names: list[str] = []
    for line in section.splitlines():
        start = re.match(r" {4}(\w+(?:, \w+)*): (.*)", line)
        if start:
            names = start[1].split(", ")
            found |= dict.fromkeys(names, start[2].strip())
        elif line.strip():
            for name in names:
                found[name] += f" {line.strip()}"
    return {name: text[:1].upper() + text[1:] for name, text in found.items()}


def _tables(type_: Any, key: str) -> list[tuple[type[msgspec.Struct], str]]:
    """Every struct below a type, with the key that it has: `limits.restart`, `models.*`."""
    if isinstance(type_, type) and issubclass(type_, msgspec.Struct):
        found = [(type_, key)]
        for field in msgspec.structs.fields(type_):
            found += _tables(field.type, f"{key}.{field.encode_name}".removeprefix("."))
        return found
    arguments = getattr(type_, "__args__", ())
    return [item for inner in arguments for item in _tables(inner, f"{key}.*")]
