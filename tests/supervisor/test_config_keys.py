"""Keys and values that people type."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from supervisor.config_keys import leaves, locate, parse_key, type_at, value_of, written
from supervisor.errors import ConfigError
from supervisor.settings import Settings

MODELS = [{"name": "llama-3.1"}, {"name": "chat"}]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("limits.stall_s", ("limits", "stall_s")),
        ('models."llama-3.1".device', ("models", "llama-3.1", "device")),
        ("models.'a b'.device", ("models", "a b", "device")),
        ("models[1].device", ("models", "1", "device")),
        ("config_version", ("config_version",)),
    ],
)
def test_keys(text, parts):
    assert parse_key(text) == parts
    assert parse_key(written(parts)) == parts


@pytest.mark.parametrize("text", ["", ".", "a..b", "a b", "a = 1\nb", "a=1", "[a]", 'a."b'])
def test_what_is_no_key(text):
    with pytest.raises(ConfigError, match="is no key"):
        parse_key(text)


def test_models_go_by_name_or_index():
    assert locate(("models", "chat", "device"), MODELS) == ("models", 1, "device")
    assert locate(("models", "0"), MODELS) == ("models", 0)
    assert locate(("models",), MODELS) == ("models",)
    with pytest.raises(ConfigError, match=r'models.chatt: there is no model "chatt" \(did you mean "chat"\?\)'):
        locate(("models", "chatt"), MODELS)
    with pytest.raises(ConfigError, match='there is no model "2"'):
        locate(("models", "2"), MODELS)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("worker.name", "box", "box"),
        ("worker.name", "5", "5"),
        ("worker.name", "true", "true"),
        ("worker.name", '"box"', "box"),
        ("limits.stall_s", "300", 300),
        ("limits.stall_s", "0.5", 0.5),
        ("models.0.preload", "true", True),
        ("models.0.keep_alive_s", "5", 5),
        ("models.0.kinds", '["llm"]', ["llm"]),
        ("engines.llm.options.n_ctx", "8192", 8192),
        ("engines.llm.options.name", "text", "text"),
        ("engines.llm.options.deep.list", "[1, 2]", [1, 2]),
        ("worker.labels", '{ rack = "3" }', {"rack": "3"}),
        ("worker.labels.rack", "3", "3"),
    ],
)
def test_values_take_the_type_of_their_setting(key, text, value):
    found = value_of(locate(parse_key(key), MODELS), text)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "text", "sentence"),
    [
        ("limits.stall_s", "soon", "limits.stall_s: expected float, got str"),
        ("limits.stall_s", "-1", "limits.stall_s: expected float > 0.0"),
        ("log.level", "inf", 'log.level: "inf" is not one of debug, info, warning, error (did you mean "info"?)'),
        ("limits.stal_s", "1", 'limits.stal_s: unknown key (did you mean "stall_s"?)'),
        ("limits", "1", "limits: is a table; set its keys one by one"),
        ("models", "[]", "models: is a table; set its keys one by one"),
        ("worker.name.x", "1", "worker.name.x: worker.name has no keys of its own"),
        ("models.0.kinds", '["llm", 3]', 'models[0].kinds[1]: expected str, got int; write "3" in quotes'),
    ],
)
def test_values_that_do_not_fit(key, text, sentence):
    with pytest.raises(ConfigError) as caught:
        value_of(locate(parse_key(key), MODELS), text)
    assert caught.value.problems == [sentence]


def test_every_default_is_at_its_key():
    plain: dict[str, Any] = msgspec.to_builtins(Settings())
    found = dict(leaves(plain))
    assert found["limits", "restart", "healthy_s"] == 60.0
    assert found["models",] == []
    for path in found:
        type_at(path)
