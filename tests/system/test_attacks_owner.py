"""The owner's orders while engines work and after a SIGKILL, and models that are out of service."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from protocol.faults import CODES
from supervisor.errors import SupervisorError

MODELS = """
[engines.odd]
module = "engines.synthetic.misbehave"
[[models]]
name = "synthetic"
engine = "synthetic"
[[models]]
name = "synthetic-slow"
engine = "synthetic"
options = {{ slots = 4, tokens = 4000, delay_ms = 25 }}
[[models]]
name = "synthetic-broken"
engine = "odd"
kinds = ["llm"]
options = {{ load = "crash:SIGSEGV", switch = "{switch}" }}
"""
NAMES = frozenset({"synthetic", "synthetic-slow", "synthetic-broken"})
REPROBE_S = 600.0  # longer than any test; one that waits for the end of a quarantine sets it forward
LIMITS = f"""drain_s = 30
[limits.restart]
first_pause_s = 0.2
longest_pause_s = 0.5
quarantine_after = 3
reprobe_s = {REPROBE_S}
"""


@pytest.fixture
def rig(new_rig, tmp_path) -> Any:
    """A supervisor with a model that can be broken and mended by the file `switch`."""
    switch = tmp_path / "switch"
    switch.write_text("off")
    return new_rig(models=MODELS.format(switch=switch), want=NAMES, limits=LIMITS)


def say(client: httpx.Client, rigs: Any, text: str, model: str = "synthetic") -> httpx.Response:
    answer: httpx.Response = client.post("/v1/chat/completions", json=rigs.chat(text, model))
    return answer


def refused(answer: httpx.Response) -> str:
    """The code of a typed refusal."""
    code: str = answer.json()["error"]["code"]
    assert answer.status_code in (404, 503), answer.text
    assert code in CODES
    return code


def ordered(rig: Any, *words: str) -> str:
    """What the command says when it worked."""
    done = rig.order(*words)
    assert done.returncode == 0, done
    said: str = done.stdout
    return said


def running(rig: Any, rigs: Any, client: httpx.Client, tokens: int, count: int = 3) -> list[str]:
    """So many jobs, all of which run."""
    ids = [rigs.submit(client, rigs.job(f"number {n}", tokens)) for n in range(count)]
    rigs.until(lambda: all(rigs.state_of(client, id_) == "running" for id_ in ids), "all jobs run")
    return ids


def assert_done(rigs: Any, client: httpx.Client, ids: list[str]) -> None:
    """Each of them succeeded at the first try."""
    for id_ in ids:
        found = rigs.ended(client, id_)
        assert (found["state"], found["tries"]) == ("succeeded", 1), found


# ---- pause, resume, drain


def test_a_pause_lets_what_runs_finish_and_outlives_a_kill_until_it_is_lifted(rig, rigs):
    """What is asked meanwhile waits, and is done after `resume`."""
    client = rig.ready()
    ids = running(rig, rigs, client, 240)
    assert "3 jobs are still running" in ordered(rig, "pause", "--reason", "a game")
    assert rig.status()["state"] == "paused"
    waiting = [rigs.submit(client, rigs.job(f"later {n}", 2)) for n in range(2)]
    assert_done(rigs, client, ids)
    assert "Paused by the operator (a game) until `supervisor resume`" in ordered(rig, "status")

    rig.kill()
    rig.start()
    status = rigs.until(lambda: _status(rig), "the control socket answers")
    assert [hold["reason"] for hold in status["holds"]] == ["a game"], "a restart forgot the pause"
    rigs.until(lambda: _status(rig)["link"]["connected"], "it works for its coordinator again")
    client = rig.client()
    waiting.append(rigs.submit(client, rigs.job("even later", 2)))
    assert {rigs.state_of(client, id_) for id_ in waiting} == {"queued"}
    assert rig.status()["jobs"] == 0

    assert "Resumed" in ordered(rig, "resume")
    assert_done(rigs, client, waiting)
    assert say(client, rigs, "now").status_code == 200
    rig.kill()
    assert say(rig.ready(), rigs, "still").status_code == 200, "a lifted pause came back"


def _status(rig: Any) -> dict[str, Any] | None:
    """The status, once the control socket is there."""
    with contextlib.suppress(SupervisorError):
        found: dict[str, Any] = rig.status()
        return found
    return None


def test_a_pause_for_a_while_ends_by_itself(rig, rigs):
    client = rig.ready()
    began = time.monotonic()
    assert rig.ask("POST", "/v1/pause", {"for_s": 2})["state"] == "paused"
    assert say(client, rigs, "when it is over").status_code == 200
    assert time.monotonic() - began > 1.9
    assert rig.status()["holds"] == []
    ordered(rig, "pause", "--for", "1h")
    (hold,) = rig.status()["holds"]
    assert 3600 - rigs.PATIENCE_S < hold["until"] - time.time() < 3601


def test_pauses_and_resumes_in_a_row_while_callers_work(rig, rigs):
    """Whoever calls gets an answer; in the end everything works."""
    rig.ready()
    over = threading.Event()
    wrong: list[str] = []
    right = [0]

    def caller(number: int) -> None:
        client = rig.client()
        while not over.is_set():
            try:
                answer = say(client, rigs, f"caller {number}")
                if answer.status_code == 200:
                    right[0] += 1
                    assert answer.json()["choices"][0]["message"]["content"] == f"caller {number}", answer.text
                else:
                    refused(answer)
            except (httpx.HTTPError, AssertionError) as error:
                wrong.append(repr(error))

    threads = [threading.Thread(target=caller, args=(number,), daemon=True) for number in range(6)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        seen = right[0]
        rigs.until(lambda seen=seen: right[0] > seen + 6, "callers are served")
        assert rig.ask("POST", "/v1/pause", {})["state"] == "paused"
        assert rig.ask("POST", "/v1/resume", {})["lifted"]
    over.set()
    for thread in threads:
        thread.join(rigs.PATIENCE_S)
    assert not wrong, wrong[:3]
    assert say(rig.client(), rigs, "calm").status_code == 200


def test_a_drain_over_the_socket_finishes_what_runs_and_ends_with_nothing_left(rig, rigs):
    client = rig.ready()
    ids = running(rig, rigs, client, 240)
    said = ordered(rig, "drain", "--reason", "moving house")
    assert "3 jobs are running" in said
    assert rig.status()["draining"] == "moving house"
    refused(say(client, rigs, "too late"))
    assert rig.process.wait(rigs.PATIENCE_S) == 0, rig.words()[-2000:]
    assert rig.words().count("llm job done in") == len(ids)
    assert rig.scratch() == []
    assert not rigs.processes_of(rig.folder)
    done = rig.order("status")
    assert done.returncode == 3, done
    assert_done(rigs, rig.ready(), ids)


# ---- quarantine


@pytest.fixture
def broken(rig, rigs, tmp_path) -> Iterator[httpx.Client]:
    """A supervisor whose broken model was asked until it was out of service."""
    client = rig.ready()
    (tmp_path / "switch").write_text("on")

    def out() -> bool:
        refused_or_crashed(say(client, rigs, "x", "synthetic-broken"))
        return bool(rig.model("synthetic-broken")["state"] == "quarantined")

    rigs.until(out, "it is in quarantine")
    yield client
    assert "Traceback" not in rig.words()


def refused_or_crashed(answer: httpx.Response) -> None:
    """Typed, either way. The model may be withdrawn before the status tells of its quarantine."""
    codes = {"engine_crashed", "quarantined", "model_not_found", "no_worker", "overloaded"}
    assert answer.status_code >= 400, answer.text
    assert answer.json()["error"]["code"] in codes, answer.text


def test_a_model_that_always_crashes_is_out_of_service_until_it_is_mended_across_restarts(rig, rigs, broken, tmp_path):
    found = rig.model("synthetic-broken")
    assert "SIGSEGV" in found["reason"], found
    rigs.until(lambda: "synthetic-broken" not in listed(broken), "it is not announced any more")
    began = time.monotonic()
    refused(say(broken, rigs, "x", "synthetic-broken"))
    assert time.monotonic() - began < REPROBE_S / 10, "a caller waits for a model that is out of service"
    assert say(broken, rigs, "beside it").status_code == 200
    assert "synthetic-broken" in ordered(rig, "status")

    kept = json.loads((rig.state / "quarantines.json").read_text())["synthetic-broken"]
    rig.kill()
    rig.start()
    after = rigs.until(lambda: _status(rig), "the control socket answers")
    (model,) = [model for model in after["models"] if model["name"] == "synthetic-broken"]
    assert model["state"] == "quarantined", "a restart gave it a fresh chance"
    assert "SIGSEGV" in model["reason"]

    (tmp_path / "switch").write_text("off")
    rig.kill()
    quarantines = rig.state / "quarantines.json"
    assert json.loads(quarantines.read_text())["synthetic-broken"]["until"] == kept["until"], "it began anew"
    quarantines.write_text(json.dumps({"synthetic-broken": kept | {"until": time.time() + 1}}))
    rig.start()
    client = rigs.until(lambda: _client(rig), "the coordinator answers")
    rigs.until(lambda: "synthetic-broken" in listed(client), "it is announced again")
    answer = say(client, rigs, "mended", "synthetic-broken")
    assert answer.status_code == 200, answer.text
    rigs.until(lambda: "synthetic-broken" not in json.loads(quarantines.read_text()), "it is forgiven")


def test_two_poisoned_jobs_do_not_take_a_healthy_model_from_everybody_else(rig, rigs):
    """Each is tried twice: four crashes in a row, but of two jobs, and three different ones would be suspicious."""
    client = rig.ready()
    for _ in range(2):
        answer = say(client, rigs, "crash:SIGSEGV", "synthetic-broken")
        assert answer.json()["error"]["code"] == "job_poisoned", answer.text
    assert rig.model("synthetic-broken")["state"] != "quarantined"
    assert say(client, rigs, "well", "synthetic-broken").status_code == 200


def _client(rig: Any) -> httpx.Client | None:
    with contextlib.suppress(OSError, ValueError, httpx.HTTPError):
        client: httpx.Client = rig.client()
        if rig.endpoint()["pid"] == rig.process.pid and client.get("/v1/models").status_code == 200:
            return client
    return None


def listed(client: httpx.Client) -> set[str]:
    """Models that are served."""
    return {model["id"] for model in client.get("/v1/models").json()["data"]}
