"""What a change costs: a table, and the comparison that reads it."""

from __future__ import annotations

import tomllib
from typing import Any

import msgspec
import pytest

from supervisor.reload_plan import APPLY, Apply, Plan, apply_of, plan
from supervisor.settings import Settings

MODELS = '[[models]]\nname = "a.b"\nengine = "synthetic"\n[[models]]\nname = "c"\nengine = "llm"\n'


def settings(text: str) -> Settings:
    return msgspec.convert(tomllib.loads(text), Settings)


def keys(found: Plan) -> dict[str, list[str]]:
    lists = {name: getattr(found, name) for name in ("live", "engines", "reconnect", "restart")}
    return {name: [change.key for change in part] for name, part in lists.items() if part}


@pytest.mark.parametrize(
    ("old", "new", "expected", "models"),
    [
        ("", "", {}, ()),
        ("", "log.level = 'debug'", {"live": ["log.level"]}, ()),
        ("", "holds.presence.mode = 'stop'", {"live": ["holds.presence.mode"]}, ()),
        ("worker.labels.a = '1'", "worker.labels.b = '1'", {"live": ["worker.labels.a", "worker.labels.b"]}, ()),
        ("", "worker.name = 'x'", {"restart": ["worker.name"]}, ()),
        ("", "coordinator.listen = '127.0.0.1:1'", {"restart": ["coordinator.listen"]}, ()),
        ("", "coordinator.url = 'ws://a'", {"restart": ["coordinator.url"]}, ()),
        ("coordinator.url = 'ws://a'", "coordinator.url = 'ws://b'", {"reconnect": ["coordinator.url"]}, ()),
        ("", "coordinator.token_file = 'x'", {"reconnect": ["coordinator.token_file"]}, ()),
        (MODELS, MODELS + "vram_gb = 2", {"engines": ["models.c.vram_gb"]}, ("c",)),
        (MODELS, MODELS + "[engines.llm]\ndevice = 'cpu'", {"engines": ["engines.llm"]}, ("c",)),
        (MODELS, MODELS + "[engines.piper]\ndevice = 'cpu'", {"engines": ["engines.piper"]}, ()),
        (MODELS, MODELS + "[limits]\nmemory_gb = 4", {"engines": ["limits.memory_gb"]}, ("a.b", "c")),
        (MODELS, MODELS + "memory_gb = 3\n[limits]\nmemory_gb = 4",
         {"engines": ["models.c.memory_gb", "limits.memory_gb"]}, ("a.b", "c")),
        (MODELS + "memory_gb = 3", MODELS + "memory_gb = 3\n[limits]\nmemory_gb = 4",
         {"engines": ["limits.memory_gb"]}, ("a.b",)),
        (MODELS, "", {"engines": ['models."a.b"', "models.c"]}, ("a.b", "c")),
        ("", MODELS, {"engines": ['models."a.b"', "models.c"]}, ("a.b", "c")),
    ],
)  # fmt: skip
def test_plans(old, new, expected, models):
    found = plan(settings(old), settings(new))
    assert keys(found) == expected
    assert set(found.models) == set(models)


def test_the_order_of_models_is_no_change():
    first, second = MODELS.split("[[models]]")[1:]
    assert plan(settings(MODELS), settings(f"[[models]]{second}[[models]]{first}")) == Plan()


def test_a_change_has_both_values():
    (change,) = plan(settings("limits.stall_s = 3"), settings("limits.stall_s = 4")).live
    assert (change.old, change.new, change.apply) == (3, 4, Apply.LIVE)


def test_secrets_are_blotted_out_when_shown():
    found = plan(
        settings("[engines.llm.env]\nHF_TOKEN = 'a'\nLANG = 'C'"),
        settings("[engines.llm.env]\nHF_TOKEN = 'b'\nLANG = 'D'\n[engines.piper.env]\nAPI_KEY = 'c'"),
    )
    shown = {row["key"]: row for row in (change.shown() for change in found.changes)}
    assert (shown["engines.llm.env.HF_TOKEN"]["old"], shown["engines.llm.env.HF_TOKEN"]["new"]) == ("****", "****")
    assert (shown["engines.llm.env.LANG"]["old"], shown["engines.llm.env.LANG"]["new"]) == ("C", "D")
    assert shown["engines.piper"]["new"]["env"] == {"API_KEY": "****"}


def test_the_table_names_every_table_and_nothing_else():
    def known(type_: Any, parts: list[str]) -> bool:
        fields = {field.encode_name: field.type for field in msgspec.structs.fields(type_)}
        return parts[0] in fields and (len(parts) == 1 or known(fields[parts[0]], parts[1:]))

    assert {field.encode_name for field in msgspec.structs.fields(Settings)} <= set(APPLY)
    assert [key for key in APPLY if not known(Settings, key.split("."))] == []


def test_what_nobody_named_takes_a_restart():
    assert apply_of("nonsense.key") is Apply.RESTART
    assert apply_of("models.*.vram_gb") is Apply.ENGINE
