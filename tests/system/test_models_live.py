"""Models come and go in a running `supervisor run`, with real engines: no restart, no job lost."""

from __future__ import annotations

import json
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

MODELS = """
[[models]]
name = "synthetic"
engine = "synthetic"
[[models]]
name = "synthetic-slow"
engine = "synthetic"
options = { tokens = 100, delay_ms = 25 }
"""
MORE = '[[models]]\nname = "synthetic-more"\nengine = "synthetic"\noptions = { tokens = 3 }\n'


@pytest.mark.slow
def test_models_are_added_changed_and_removed_by_a_reload(new_rig: Callable[..., Any], rigs: ModuleType) -> None:
    rig = new_rig(models=MODELS, want=frozenset({"synthetic", "synthetic-slow"}))
    client = rig.ready()
    before = rig.config.read_text()

    def listed() -> set[str]:
        return {model["id"] for model in client.get("/v1/models").raise_for_status().json()["data"]}

    def reload(text: str) -> dict[str, Any]:
        rig.config.write_text(text)
        done = rig.order("reload", "--json")
        assert done.returncode == 0, done.stderr
        told: dict[str, Any] = json.loads(done.stdout)
        assert (told["ok"], told["restart"]) == (True, []), told
        return told

    pid = rig.process.pid
    long = rigs.submit(client, rigs.job("at length", 80))
    rigs.until(lambda: rigs.state_of(client, long) != "queued", "the long job runs")
    told = reload(before + MORE)
    assert [(change["key"], change["apply"]) for change in told["applied"]] == [("models.synthetic-more", "live")]
    rigs.until(lambda: "synthetic-more" in listed(), "the new model is announced")
    answer = client.post("/v1/chat/completions", json=rigs.chat("hello", "synthetic-more"))
    assert answer.status_code == 200, answer.text

    without = before.replace(MODELS, MODELS.split("[[models]]")[1].join(["\n[[models]]", ""]))
    reload(without)
    rigs.until(lambda: listed() == {"synthetic"}, "only one model is announced")
    assert rigs.ended(client, long)["state"] == "succeeded", "a job that runs is finished"

    def served() -> list[dict[str, Any]]:
        models: list[dict[str, Any]] = rig.ask("GET", "/v1/models")["models"]
        return models

    rigs.until(lambda: [model["name"] for model in served()] == ["synthetic"], "the others have gone")
    assert {path.name for path in (rig.state / "instances").iterdir()} <= {"m0"}, "and their folders with them"

    reload(without.replace('engine = "synthetic"', 'engine = "synthetic"\nkinds = ["llm"]'))

    rigs.until(
        lambda: [model["kinds"] for model in served()] == [["llm"]] and listed() == {"synthetic"},
        "the changed model is served",
    )
    assert client.post("/v1/chat/completions", json=rigs.chat("hello")).status_code == 200
    assert (rig.process.pid, rig.process.poll()) == (pid, None)
    assert rig.end() == 0, rig.words()
    assert "a mistake of ours" not in rig.words()
