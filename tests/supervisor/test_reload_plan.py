"""What a change costs: a table, and the comparison that reads it."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from typing import Any

import msgspec
import pytest

from supervisor.reload_plan import APPLY, Apply, Change, apply_of, plan
from supervisor.settings import Settings

MODELS = '[[models]]\nname = "a.b"\nengine = "synthetic"\n[[models]]\nname = "c"\nengine = "llm"\n'


def settings(text: str) -> Settings:
    return msgspec.convert(tomllib.loads(text), Settings)


def keys(found: Sequence[Change]) -> dict[str, list[str]]:
    return {
        str(apply): [change.key for change in found if change.apply is apply]
        for apply in Apply
        if any(change.apply is apply for change in found)
    }


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("", "", {}),
        ("", "log.level = 'debug'", {"live": ["log.level"]}),
        ("", "log.sentry_dsn_file = 'x'", {"restart": ["log.sentry_dsn_file"]}),
        ("", "holds.presence.mode = 'stop'", {"live": ["holds.presence.mode"]}),
        ("worker.labels.a = '1'", "worker.labels.b = '1'", {"live": ["worker.labels.a", "worker.labels.b"]}),
        ("", "worker.name = 'x'", {"restart": ["worker.name"]}),
        ("", "coordinator.url = 'ws://a'", {"restart": ["coordinator.url"]}),
        (
            "",
            "limits.stall_s = 3\nlimits.restart.healthy_s = 3",
            {"live": ["limits.stall_s", "limits.restart.healthy_s"]},
        ),
        ("", "limits.memory_gb = 4\nlimits.term_grace_s = 4", {"restart": ["limits.term_grace_s", "limits.memory_gb"]}),
        (MODELS, MODELS + "vram_gb = 2\nstall_s = 9", {"live": ["models.c.stall_s", "models.c.vram_gb"]}),
        (MODELS.replace('"c"', '"keep_alive_s"'), "", {"live": ['models."a.b"', "models.keep_alive_s"]}),
        (MODELS, MODELS + "[engines.piper]\ndevice = 'cpu'", {"live": ["engines.piper"]}),
        ("", MODELS, {"live": ['models."a.b"', "models.c"]}),
    ],
)
def test_plans(old, new, expected):
    assert keys(plan(settings(old), settings(new))) == expected


def test_the_order_of_models_is_no_change():
    first, second = MODELS.split("[[models]]")[1:]
    assert plan(settings(MODELS), settings(f"[[models]]{second}[[models]]{first}")) == ()


def test_a_change_has_both_values():
    (change,) = plan(settings("limits.stall_s = 3"), settings("limits.stall_s = 4"))
    assert (change.old, change.new, change.apply) == (3, 4, Apply.LIVE)


def test_secrets_are_blotted_out_when_shown():
    found = plan(
        settings("[engines.llm.env]\nHF_TOKEN = 'a'\nLANG = 'C'"),
        settings("[engines.llm.env]\nHF_TOKEN = 'b'\nLANG = 'D'\n[engines.piper.env]\nAPI_KEY = 'c'"),
    )
    shown = {row["key"]: row for row in (change.shown() for change in found)}
    assert (shown["engines.llm.env.HF_TOKEN"]["old"], shown["engines.llm.env.HF_TOKEN"]["new"]) == ("****", "****")
    assert (shown["engines.llm.env.LANG"]["old"], shown["engines.llm.env.LANG"]["new"]) == ("C", "D")
    assert shown["engines.piper"]["new"]["env"] == {"API_KEY": "****"}


def test_the_table_names_every_table_and_nothing_else():
    def known(type_: Any, parts: list[str]) -> bool:
        if parts[0] == "*":
            (type_,), parts = type_.__args__, parts[1:]
        fields = {field.encode_name: field.type for field in msgspec.structs.fields(type_)}
        return parts[0] in fields and (len(parts) == 1 or known(fields[parts[0]], parts[1:]))

    assert {field.encode_name for field in msgspec.structs.fields(Settings)} <= set(APPLY)
    assert [key for key in APPLY if not known(Settings, key.split("."))] == []


def test_what_nobody_named_takes_a_restart():
    assert apply_of("nonsense.key") is Apply.RESTART
    assert apply_of("limits.memory_gb") is Apply.RESTART
    assert apply_of("models.*.stall_s") is Apply.LIVE
