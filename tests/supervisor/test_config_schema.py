"""The schema is one that an editor can help with, and it agrees with the checks."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from supervisor.config_schema import attributes, schema, summary
from supervisor.reload_plan import Apply
from supervisor.settings import LimitsTable, ModelTable, Settings
from supervisor.worker_toml import FRESH

ROOT = Path(__file__).parents[2]
SCHEMA = schema()


def fields() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for table, definition in SCHEMA["$defs"].items():
        for field, property_ in definition["properties"].items():
            yield table, field, property_


def mistakes(value: Any, node: dict[str, Any], at: str = "") -> Iterator[str]:
    """A validator of the keywords that our schema uses; an unknown keyword fails the test below."""
    if "$ref" in node:
        yield from mistakes(value, SCHEMA["$defs"][node["$ref"].removeprefix("#/$defs/")], at)
    types = {"string": str, "number": (int, float), "integer": int, "boolean": bool, "array": list, "object": dict}
    if "type" in node and (
        not isinstance(value, types[node["type"]]) or (isinstance(value, bool) and node["type"] != "boolean")
    ):
        yield f"{at}: type"
        return
    if "enum" in node and value not in node["enum"]:
        yield f"{at}: enum"
    if isinstance(value, (int, float)):
        low, high, above = (node.get(key) for key in ("minimum", "maximum", "exclusiveMinimum"))
        if (
            (low is not None and value < low)
            or (high is not None and value > high)
            or (above is not None and value <= above)
        ):
            yield f"{at}: range"
    if isinstance(value, str):
        if "pattern" in node and not re.search(node["pattern"], value):
            yield f"{at}: pattern"
        if not node.get("minLength", 0) <= len(value) <= node.get("maxLength", 1e9):
            yield f"{at}: length"
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from mistakes(item, node.get("items", {}), f"{at}[{number}]")
    for rule in node.get("allOf", []):
        if not list(mistakes(value, rule["if"])):
            yield from mistakes(value, rule["then"], at)
    if "anyOf" in node and all(list(mistakes(value, choice)) for choice in node["anyOf"]):
        yield f"{at}: none of the types"
    if isinstance(value, list) and len(value) > node.get("maxItems", len(value)):
        yield f"{at}: too many"
    if "const" in node and value != node["const"]:
        yield f"{at}: const"
    if isinstance(value, dict):
        yield from (f"{at}: {key} is missing" for key in node.get("required", []) if key not in value)
        for key, item in value.items():
            inner = node.get("properties", {}).get(key, node.get("additionalProperties", {}))
            if inner is False:
                yield f"{at}.{key}: unknown"
            else:
                yield from mistakes(item, inner, f"{at}.{key}")


def test_every_field_and_every_table_is_described():
    assert [f"{table}.{field}" for table, field, property_ in fields() if not property_["description"]] == []
    assert [name for name, definition in SCHEMA["$defs"].items() if not definition["description"]] == []


def test_no_docstring_describes_what_is_not_there():
    for name, definition in SCHEMA["$defs"].items():
        assert "Attributes:" not in definition["description"], name
    for table in (Settings, ModelTable, LimitsTable):
        assert set(attributes(table)) <= set(table.__struct_fields__)


def test_descriptions_are_the_docstrings():
    model = SCHEMA["$defs"]["ModelTable"]["properties"]
    assert model["name"]["description"] == "Public name that clients ask for."
    assert model["stall_s"]["description"].endswith("for it only the job's deadline counts, unless this is set.")
    coordinator = SCHEMA["$defs"]["CoordinatorTable"]["properties"]
    assert coordinator["tls_cert"]["description"] == coordinator["tls_key"]["description"]
    assert summary(LimitsTable).startswith("Bounds on every wait.")


def test_choices_ranges_defaults_and_costs():
    level = SCHEMA["$defs"]["LogTable"]["properties"]["level"]
    assert (set(level["enum"]), level["default"]) == ({"debug", "info", "warning", "error"}, "info")
    drain = SCHEMA["$defs"]["LimitsTable"]["properties"]["drain_s"]
    assert (drain["exclusiveMinimum"], drain["maximum"], drain["default"]) == (0, 604800, 60.0)
    keep = SCHEMA["$defs"]["ModelTable"]["properties"]["keep_alive_s"]
    assert (keep["type"], keep["minimum"]) == ("number", 0)
    assert "llm" in SCHEMA["$defs"]["ModelTable"]["properties"]["engine"]["examples"]
    assert {property_["x-apply"] for _, _, property_ in fields()} == {str(apply) for apply in Apply}
    assert SCHEMA["$defs"]["CoordinatorTable"]["properties"]["tls_ca"]["x-apply"] == "restart"
    assert SCHEMA["$defs"]["ModelTable"]["properties"]["options"]["x-apply"] == "live"
    assert SCHEMA["$defs"]["ModelTable"]["properties"]["stall_s"]["x-apply"] == "live"


def test_only_keywords_that_the_validator_of_this_test_knows():
    known = {
        "$ref", "type", "enum", "minimum", "maximum", "exclusiveMinimum", "pattern", "minLength", "maxLength", "items",
        "anyOf", "maxItems",
        "required", "properties", "additionalProperties", "description", "default", "examples", "title", "x-apply",
    }  # fmt: skip

    def keywords(node: dict[str, Any]) -> Iterator[str]:
        yield from node
        for inner in (node.get("items"), node.get("additionalProperties")):
            if isinstance(inner, dict):
                yield from keywords(inner)

    used = {word for _, _, property_ in fields() for word in keywords(property_)}
    assert used <= known


def test_defaults_pass():
    for table, field, property_ in fields():
        if "default" in property_:
            assert list(mistakes(property_["default"], property_, f"{table}.{field}")) == []


def test_real_files_pass():
    readme = (ROOT / "README.md").read_text()
    (example,) = re.findall(r"## worker.toml\n\n```toml\n(.*?)```", readme, re.DOTALL)
    for text in (FRESH, example.replace("…", "0" * 64)):
        assert list(mistakes(tomllib.loads(text), SCHEMA)) == []


@pytest.mark.parametrize(
    ("text", "mistake"),
    [
        ("nonsense = 1", ".nonsense: unknown"),
        ("[log]\nlevel = 'inf'", ".log.level: enum"),
        ("[limits]\ndrain_s = -1", ".limits.drain_s: range"),
        ("[limits]\ndrain_s = 'x'", ".limits.drain_s: type"),
        ("[limits.restart]\nquarantine_after = 1", ".limits.restart.quarantine_after: range"),
        ("[[models]]\nname = 'a'", ".models[0]: engine is missing"),
        ("[[models]]\nname = ''\nengine = 'llm'", ".models[0].name: length"),
        ("[[models]]\nname = 'a'\nengine = 'llm'\nsha256 = { model = 'x' }", ".models[0].sha256.model: pattern"),
        ("[engines.llm]\ndevices = 1", ".engines.llm.devices: unknown"),
        ("[[models]]\nname = 'a'\nengine = 'llm'\noptions = { n_ctxx = 1 }", ".models[0].options.n_ctxx: unknown"),
        ("[[models]]\nname = 'a'\nengine = 'llm'\noptions = { n_ctx = 1 }", ".models[0].options.n_ctx: range"),
        (
            "[[models]]\nname = 'a'\nengine = 'llm'\noptions = { cache_type = 'x' }",
            ".models[0].options.cache_type: enum",
        ),
        (
            "[[models]]\nname = 'a'\nengine = 'llm'\nbackend = 'llama-cpp-python'\noptions = { slots = 2 }",
            ".models[0].options.slots: range",
        ),
        ("[[models]]\nname = 'a'\nengine = 'embed'\noptions = { slots = 2 }", ".models[0].options.slots: unknown"),
        (
            "[[models]]\nname = 'a'\nengine = 'server'\n[models.options.gradio]\nfn = 2",
            ".models[0].options.gradio.fn: unknown",
        ),
    ],
)
def test_mistakes_are_found(text, mistake):
    assert list(mistakes(tomllib.loads(text), SCHEMA)) == [mistake]


@pytest.mark.parametrize(
    "text",
    [
        "[[models]]\nname = 'a'\nengine = 'mine'\noptions = { n_ctxx = 1 }",
        "[[models]]\nname = 'a'\nengine = 'llm'\noptions = { n_ctx = 4096, slots = 2 }",
        "[[models]]\nname = 'a'\nengine = 'embed'\nbackend = 'gguf'\noptions = { slots = 2 }",
        "[[models]]\nname = 'a'\nengine = 'command'\noptions = { slots = 2 }",
    ],
)
def test_options_that_fit_or_that_nobody_here_knows(text):
    assert list(mistakes(tomllib.loads(text), SCHEMA)) == []


def test_a_real_validator_agrees():
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    validator = jsonschema.Draft202012Validator(SCHEMA)
    assert list(validator.iter_errors(tomllib.loads(FRESH))) == []
    assert len(list(validator.iter_errors({"nonsense": 1, "log": {"level": "inf"}}))) == 2
    model = {"name": "a", "engine": "llm", "options": {"n_ctx": 1, "n_ctxx": 2}}
    assert len(list(validator.iter_errors({"models": [model]}))) == 2
    assert list(validator.iter_errors({"models": [model | {"engine": "mine"}]})) == []
