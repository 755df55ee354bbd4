"""A whole supervisor on GPUs that are simulated: who fits, who waits and why, and what a lost GPU costs.

The GPU reader is engines/telemetry/simulated.py, told what to say by a file; everything else is real.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

GIB = 2**30
GPU = "GPU-sim-0"
MODELS = f"""
[[models]]
name = "synthetic"
engine = "synthetic"
device = "cpu"
[[models]]
name = "synthetic-a"
engine = "synthetic"
device = "auto"
gpus = ["{GPU}"]
vram_gb = 5
options = {{ gpu = "{GPU}", vram_bytes = {5 * GIB}, slots = 2, tokens = 800, delay_ms = 10 }}
[[models]]
name = "synthetic-b"
engine = "synthetic"
device = "auto"
gpus = ["{GPU}"]
vram_gb = 5
options = {{ gpu = "{GPU}", vram_bytes = {5 * GIB} }}
"""
NAMES = frozenset({"synthetic", "synthetic-a", "synthetic-b"})


class Gpus:
    """The script of the simulated reader."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.write()

    def write(self, others_gib: float = 0.0, events: list[dict[str, Any]] | None = None) -> None:
        """Replace it: one GPU of 8 GiB, of which others hold so much."""
        gpu = {"uuid": GPU, "memory_total_bytes": 8 * GIB, "memory_used_bytes": int(others_gib * GIB)}
        partial = self.path.with_suffix(".new")
        partial.write_text(json.dumps({"gpus": [gpu], "events": events or []}))
        partial.replace(self.path)


@pytest.fixture(scope="module")
def gpus(tmp_path_factory) -> Gpus:
    """One GPU of 8 GiB."""
    return Gpus(tmp_path_factory.mktemp("gpus") / "gpus.json")


@pytest.fixture(scope="module")
def only_rig(rigs, tmp_path_factory, verdicts, gpus) -> Iterator[Any]:
    """One supervisor for all of these."""
    env = {"BULKHEAD_SIMULATED_GPUS": str(gpus.path)}
    rig = rigs.Rig(tmp_path_factory.mktemp("box"), models=MODELS, want=NAMES, verdicts=verdicts, env=env)
    rig.ready()
    yield rig
    rig.sweep()


@pytest.fixture
def rig(only_rig, rigs, gpus) -> Iterator[Any]:
    """The supervisor with an idle, healthy GPU."""
    gpus.write()
    only_rig.ready()
    yield only_rig
    assert "Traceback" not in only_rig.words(), only_rig.words()[-3000:]


def say(client: httpx.Client, rigs: Any, text: str, model: str, **more: Any) -> httpx.Response:
    answer: httpx.Response = client.post("/v1/chat/completions", json=rigs.chat(text, model, **more))
    return answer


def free_gib(rig: Any) -> float:
    """Free memory of the GPU, as the status shows it."""
    return float(rig.gpu(GPU)["free_bytes"] or 0) / GIB


def status(rig: Any) -> dict[str, Any]:
    """What the command prints for programs."""
    done = rig.order("status", "--json")
    assert done.returncode == 0, done
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_two_models_that_do_not_fit_together_take_turns(rig, rigs):
    client = rig.ready()
    for turn in range(2):
        for mine, other in (("synthetic-a", "synthetic-b"), ("synthetic-b", "synthetic-a")):
            answer = say(client, rigs, f"turn {turn}", mine, max_tokens=2)
            assert answer.status_code == 200, answer.text
            assert rig.model(other)["state"] == "cold"
            rigs.until(lambda mine=mine: rig.model(mine)["state"] == "ready", f"{mine} is loaded, and done")
            rigs.until(lambda: free_gib(rig) == 3, f"the GPU shows that {mine} is there")
            rigs.until(lambda mine=mine: rig.model(mine)["held"] == {GPU: 5 * GIB}, f"it knows that {mine} holds it")
    assert rig.status()["incidents"] == []
    assert rig.gpu(GPU)["tainted"] == ""


def test_who_waits_for_a_working_model_is_told_why_and_is_next(rig, rigs):
    client = rig.ready()
    first = rigs.submit(client, rigs.job("a b", 600, "synthetic-a"))
    rigs.until(lambda: rig.model("synthetic-a")["running"] == 1, "the first works")
    second = rigs.submit(client, rigs.job("c d", 2, "synthetic-b"))
    rigs.until(lambda: rig.model("synthetic-b")["waits"], "the other waits")
    (waiting,) = [model for model in status(rig)["models"] if model["name"] == "synthetic-b"]
    assert "synthetic-a is working" in waiting["waits"], waiting
    assert "synthetic-a is working" in ordered(rig, "status")
    assert say(client, rigs, "beside them", "synthetic").status_code == 200
    for id_ in (first, second):
        found = rigs.ended(client, id_)
        assert (found["state"], found["tries"]) == ("succeeded", 1), found
    rigs.until(lambda: rig.model("synthetic-a")["state"] == "cold", "it has made room")


def ordered(rig: Any, *words: str) -> str:
    """What the command says when it worked."""
    done = rig.order(*words)
    assert done.returncode == 0, done
    said: str = done.stdout
    return said


def test_memory_of_other_programs_counts_as_taken_and_is_named(rig, rigs, gpus):
    client = rig.ready()
    ordered(rig, "pause", "--free-vram")
    rigs.until(lambda: free_gib(rig) == 8, "our own models are gone")
    gpus.write(others_gib=6)
    rigs.until(lambda: free_gib(rig) == 2, "somebody took it")
    ordered(rig, "resume")
    id_ = rigs.submit(client, rigs.job("a b", 2, "synthetic-a"))
    rigs.until(lambda: "other programs hold 6.0 GiB" in rig.model("synthetic-a")["waits"], "it waits for others")
    assert "other programs" in rig.gpu(GPU)["why"]
    gpus.write()
    assert rigs.ended(client, id_)["state"] == "succeeded"


def test_a_pause_frees_the_gpu_once_what_runs_is_done_and_resume_brings_it_back(rig, rigs):
    client = rig.ready()
    id_ = rigs.submit(client, rigs.job("a b", 400, "synthetic-a"))
    rigs.until(lambda: rig.model("synthetic-a")["running"] == 1, "it works")
    said = ordered(rig, "pause", "--free-vram", "--reason", "a game")
    assert "as soon as they are idle" in said
    assert rig.model("synthetic-a")["state"] in ("busy", "draining"), "a running job was ended"
    assert rigs.ended(client, id_)["state"] == "succeeded"
    rigs.until(lambda: free_gib(rig) == 8, "the GPU is free")
    rigs.until(lambda: rig.model("synthetic-a")["state"] == "cold", "its model is gone")
    assert "Paused by the operator (a game)" in rig.gpu(GPU)["why"]
    ordered(rig, "resume")
    # Whichever: the other one may have been on its way when the hold before this one began.
    warm = ("synthetic-a", "synthetic-b")
    rigs.until(lambda: any(rig.model(name)["state"] == "ready" for name in warm), "it is warm, unasked")
    assert say(client, rigs, "again", "synthetic-a", max_tokens=1).status_code == 200


@pytest.mark.parametrize("victim", ["engine", "supervisor"])
def test_memory_of_what_was_killed_comes_back_and_the_other_model_gets_it(rig, rigs, victim: str):
    client = rig.ready()
    assert say(client, rigs, "warm", "synthetic-a", max_tokens=1).status_code == 200
    lines: list[str] = []
    thread = threading.Thread(target=_read, args=(rig.client(), rigs.chat("a b", "synthetic-a"), lines), daemon=True)
    thread.start()
    rigs.until(lambda: len(lines) > 3, "it streams")
    if victim == "engine":
        psutil.Process(rig.model("synthetic-a")["pid"]).kill()
    else:
        rig.kill()
        client = rig.ready()
    answer = say(client, rigs, "mine now", "synthetic-b")
    assert answer.status_code == 200, answer.text
    thread.join(rigs.PATIENCE_S)
    rigs.until(lambda: rig.model("synthetic-b")["held"] == {GPU: 5 * GIB}, "it holds the memory")
    assert rig.gpu(GPU)["tainted"] == ""


def _read(client: httpx.Client, body: dict[str, Any], lines: list[str]) -> None:
    try:
        with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as answer:
            lines.extend(answer.iter_lines())
    except httpx.HTTPError as error:
        lines.append(repr(error))


def test_a_gpu_that_fell_off_the_bus_takes_its_models_out_of_service_and_nothing_else(rig, rigs, gpus):
    """The last of this file: a simulated GPU passes no trial, so it stays away. A restart knows it, too."""
    client = rig.ready()
    gpus.write(events=[{"kind": "xid", "uuid": GPU, "xid": 79}])
    rigs.until(lambda: rig.gpu(GPU)["fault"], "it is seen")
    rigs.until(lambda: _listed(client) == {"synthetic"}, "its models are not announced any more")
    assert "79" in rig.gpu(GPU)["why"], rig.gpu(GPU)
    assert say(client, rigs, "on the CPU", "synthetic").status_code == 200
    answer = say(client, rigs, "x", "synthetic-a")
    assert answer.status_code in (404, 503), answer.text
    rig.kill()
    gpus.write()
    rig.want = frozenset({"synthetic"})
    client = rig.ready()
    rigs.until(lambda: rig.status()["gpus"], "the GPU is read")
    assert rig.gpu(GPU)["fault"], "a restart trusts a GPU that had fallen off the bus"
    assert _listed(client) == {"synthetic"}


def _listed(client: httpx.Client) -> set[str]:
    return {model["id"] for model in client.get("/v1/models").json()["data"]}
