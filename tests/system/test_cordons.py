"""A task kind that the owner holds: nobody is offered it, everything else goes on, and the status says so."""

from __future__ import annotations

import datetime
from typing import Any

from supervisor.machine.schedule import DAYS

MODELS = """
[[models]]
name = "synthetic"
engine = "synthetic"
"""


def test_one_kind_is_held_and_the_others_go_on(new_rig: Any, rigs: Any):
    rig = new_rig("cordon", models=MODELS, want=frozenset({"synthetic"}))
    client = rig.ready()
    embedding = {"model": "synthetic", "input": "a b"}
    assert client.post("/v1/embeddings", json=embedding).status_code == 200
    rig.ask("POST", "/v1/pause", {"kind": "embedding", "reason": "a bad release"})
    seen = rigs.until(lambda: (now := rig.status())["state"] == "idle" and now, "the first job is over")
    assert "No embedding jobs are taken: held by the operator (embedding: a bad release)." in seen["why"]
    (model,) = seen["models"]
    assert list(model["held_kinds"]) == ["embedding"]
    job = client.post("/v1/jobs", json={"kind": "embedding", "model": "synthetic", "params": {"input": ["a b"]}})
    assert client.post("/v1/chat/completions", json=rigs.chat("on we go")).status_code == 200
    if job.is_success:  # it waits for a worker that takes it
        assert rigs.state_of(client, job.json()["id"]) == "queued"
    assert rig.ask("POST", "/v1/resume", {})["lifted"] is False  # that is about the worker as a whole
    assert rig.ask("POST", "/v1/resume", {"kind": "embedding"})["lifted"] is True
    rigs.until(lambda: client.post("/v1/embeddings", json=embedding).status_code == 200, "it is taken again")
    if job.is_success:
        assert rigs.ended(client, job.json()["id"])["state"] == "succeeded"
    rigs.until(lambda: rig.status()["why"] == "There are no jobs.", "nothing is held any more")


def test_the_status_shows_what_the_rules_see_and_when_a_drain_ends(new_rig: Any, rigs: Any, tmp_path):
    day = DAYS[(datetime.datetime.now(datetime.UTC).weekday() + 3) % 7]
    rules = f'[holds.schedule]\nquiet = ["{day} 10:00-11:00"]\ntime_zone = "UTC"\n[holds.presence]\nmode = "stop"\n'
    nobody_knows = {"BULKHEAD_SIMULATED_PRESENCE": str(tmp_path / "there is no such file")}
    want = frozenset({"synthetic-slow"})
    rig = new_rig("sights", models=rigs.MODELS + rules, want=want, env=nobody_knows)
    client = rig.ready()

    def looked() -> Any:
        seen = rig.status()
        return seen if any(sight["unknown"] for sight in seen["sights"]) else None

    seen = rigs.until(looked, "the rules have looked")
    assert {"presence", "schedule", "disk"} <= {sight["source"] for sight in seen["sights"]}
    blind = {sight["source"]: sight["text"] for sight in seen["sights"] if sight["unknown"]}
    assert "there is no such file" in blind["presence"]
    (coming,) = seen["coming"]
    assert (coming["source"], coming["text"]) == ("schedule", f"quiet hours {day} 10:00-11:00")
    assert 86_400 < coming["at"] - seen["now"] < 5 * 86_400
    rigs.submit(client, rigs.job("a b", 4000))
    rigs.until(lambda: rig.model("synthetic-slow")["running"], "it works")
    seen = rig.ask("POST", "/v1/drain", {"reason": "moving house"})
    assert seen["why"].startswith("The worker is draining: moving house. 1 job is still running, and ended at ")
    assert 0 < seen["drain_until"] - seen["now"] <= 20
    assert rig.ask("POST", "/v1/resume", {})["status"]["state"] == "draining"
    rig.ask("POST", "/v1/shutdown", {"reason": "enough"})
    assert rig.process.wait(rigs.PATIENCE_S) == 0
