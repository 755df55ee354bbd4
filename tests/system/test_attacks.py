"""Attacks on processes: SIGKILL and SIGSTOP of every part, in every phase. What a client was promised must hold.

`scripts/soak` runs these with more seeds: a tenth of BULKHEAD_ATTACK_SEEDS, for each has six lives;
BULKHEAD_ATTACK_SEED is the first.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from protocol.faults import CODES

FIRST_SEED = int(os.environ.get("BULKHEAD_ATTACK_SEED", "1"))
SEEDS = range(FIRST_SEED, FIRST_SEED + max(1, int(os.environ.get("BULKHEAD_ATTACK_SEEDS", "1")) // 10))
MOMENTS = ("start", "load", "run", "stream", "drain", "idle")


class Background:
    """A call in a thread; `outcome` is its value or its error once it is over."""

    def __init__(self, call: Callable[[], Any]) -> None:
        self.outcome: Any = None
        self._thread = threading.Thread(target=self._run, args=(call,), daemon=True)
        self._thread.start()

    def _run(self, call: Callable[[], Any]) -> None:
        try:
            self.outcome = call()
        except Exception as error:  # whatever it is, the test judges it
            self.outcome = error

    def join(self, patience_s: float) -> Any:
        """The outcome. AssertionError when it still hangs after `patience_s`."""
        self._thread.join(patience_s)
        assert not self._thread.is_alive(), f"the call hangs, {patience_s:g} s after it should have ended"
        return self.outcome


def read_stream(client: httpx.Client, body: dict[str, Any], lines: list[str]) -> None:
    """Read a chat stream to its end; `lines` grows as it comes."""
    with client.stream("POST", "/v1/chat/completions", json=body | {"stream": True}) as answer:
        lines.append(f"HTTP {answer.status_code}")
        lines.extend(line for line in answer.iter_lines() if line)


def assert_typed(answer: Any) -> None:
    """An answer is complete, or an error of our shape with a code that we know."""
    if isinstance(answer, httpx.Response):
        if answer.status_code != 200:
            assert answer.json()["error"]["code"] in CODES, answer.text
    else:
        assert isinstance(answer, httpx.TransportError), answer


def assert_job_settled(found: dict[str, Any]) -> None:
    """A job ended well, or with a typed fault."""
    assert found["state"] in ("succeeded", "failed"), found
    if found["state"] == "failed":
        assert found["fault"]["code"] in CODES, found
        assert found["fault"]["message"], found


# ---- the supervisor is killed


def bring_to(rig: Any, rigs: Any, moment: str, chance: random.Random, ids: list[str]) -> list[Background]:
    """Start the supervisor and let it come to the moment at which it is killed."""
    if moment == "start":
        assert rig.process is None or rig.end() == 0, rig.words()
        rig.start()
        time.sleep(chance.uniform(0.02, 0.9))
        return []
    client = rig.ready()
    calls: list[Background] = []
    ids += [rigs.submit(client, rigs.job(f"{moment} {n}", 20)) for n in range(4)]
    if moment == "load":
        calls.append(Background(lambda: client.post("/v1/chat/completions", json=rigs.chat("x", "synthetic-late"))))
        rigs.until(lambda: rig.children("engines.synthetic"), "an engine starts")
        time.sleep(chance.uniform(0, 0.9))
    elif moment == "run":
        calls.append(Background(lambda: client.post("/v1/chat/completions", json=rigs.chat("x", "synthetic-slow"))))
        rigs.until(lambda: rigs.state_of(client, ids[-4]) != "queued", "a job runs")
        time.sleep(chance.uniform(0, 0.5))
    elif moment in ("stream", "drain"):
        lines: list[str] = []
        calls.append(Background(lambda: read_stream(client, rigs.chat("a b", "synthetic-slow"), lines)))
        rigs.until(lambda: len(lines) > 3, "the stream has begun")
        if moment == "drain":
            rig.process.send_signal(signal.SIGTERM)
            time.sleep(chance.uniform(0, 0.5))
    return calls


@pytest.mark.parametrize("seed", SEEDS)
def test_a_killed_supervisor_leaves_no_process_and_loses_no_job(new_rig, rigs, seed: int):
    """Six lives on one state folder and one port, each killed at another moment, the next one started at once."""
    print(f"seed {seed}")  # noqa: T201  pytest shows it with a failure
    chance = random.Random(seed)
    rig = new_rig(port=rigs.free_port())
    moments = list(MOMENTS)
    chance.shuffle(moments)
    ids: list[str] = []
    for moment in moments:
        calls = bring_to(rig, rigs, moment, chance, ids)
        family = rigs.processes_of(rig.folder)
        rig.kill()
        killed = time.monotonic()
        rig.start()
        rigs.until(lambda family=family: not rigs.alive(family), f"{moment}: {family} are gone", rigs.GONE_S)
        for call in calls:
            assert isinstance(call.join(rigs.GONE_S), httpx.TransportError | httpx.Response | None), moment
        assert rig.process.poll() is None, f"{moment}: the next start was refused\n{rig.words()[-2000:]}"
        client = rig.ready()
        assert time.monotonic() - killed < rigs.SERVES_S, f"{moment}: the next start took too long"
        assert all(rigs.state_of(client, id_) for id_ in ids), "a job is forgotten"
    for id_ in ids:
        assert_job_settled(rigs.ended(client, id_))
    assert rig.end() == 0
    assert rig.scratch() == []
    assert not rigs.processes_of(rig.folder)
    assert "Traceback" not in rig.words()


def test_jobs_that_waited_or_ran_are_finished_by_the_next_life(new_rig, rigs):
    rig = new_rig()
    client = rig.ready()
    ids = [rigs.submit(client, rigs.job(f"number {n}", 40)) for n in range(6)]
    rigs.until(lambda: rigs.state_of(client, ids[0]) != "queued", "the first runs")
    key = rig.key()
    rig.kill()
    client = rig.ready()
    for id_ in ids:
        found = rigs.ended(client, id_)
        assert found["state"] == "succeeded", found
        assert found["tries"] <= 2
    assert rig.key() == key


# ---- the coordinator is killed or stands still


def test_a_killed_coordinator_costs_no_running_job(new_rig, rigs):
    """The result of what ran meanwhile is delivered; clients get an error at once; port and key stay."""
    rig = new_rig()
    client = rig.ready()
    port, key = rig.port, (rig.state / "coordinator" / "client.key").read_bytes()
    body = rigs.job("x", 100)
    ids = [rigs.submit(client, body) for _ in range(4)]
    rigs.until(lambda: rigs.state_of(client, ids[0]) != "queued", "a job runs")
    waiting = Background(lambda: client.post("/v1/chat/completions", json=rigs.chat("x", "synthetic-slow")))
    rigs.until(lambda: len(client.get("/v1/jobs").json()["data"]) == len(ids) + 1, "the chat waits")
    old = rig.coordinator()
    old.kill()
    assert isinstance(waiting.join(rigs.PATIENCE_S), httpx.TransportError)
    rigs.until(lambda: rig.coordinator().pid != old.pid, "the coordinator comes back")
    for id_ in ids:
        found = rigs.ended(client, id_)
        assert found["state"] == "succeeded", found
    assert rigs.ended(client, ids[0])["tries"] == 1, "a job that went on running was run again"
    assert (rig.port, (rig.state / "coordinator" / "client.key").read_bytes()) == (port, key)
    assert rig.end() == 0
    assert rig.scratch() == []


def test_a_chat_whose_client_hung_on_a_killed_coordinator_is_not_run_for_nobody(new_rig, rigs):
    rig = new_rig()
    client = rig.ready()
    waiting = Background(lambda: client.post("/v1/chat/completions", json=rigs.chat("x", "synthetic-slow")))
    [id_] = rigs.until(
        lambda: [job["id"] for job in client.get("/v1/jobs").json()["data"] if job["state"] == "running"],
        "the chat runs",
    )
    rig.coordinator().kill()
    assert isinstance(waiting.join(rigs.PATIENCE_S), httpx.TransportError)
    assert rigs.ended(client, id_)["state"] == "cancelled"
    ended = re.compile(rf"llm job cancelled after \S+ s job={id_}")
    rigs.until(lambda: ended.search(rig.words()), "the engine stopped it")


def test_a_coordinator_killed_again_and_again_does_not_take_the_supervisor_along(new_rig, rigs):
    rig = new_rig(want=frozenset({"synthetic"}))
    client = rig.ready()
    for _ in range(3):
        old = rig.coordinator()
        old.kill()
        rigs.until(lambda old=old: [p for p in rig.children("-m coordinator") if p.pid != old.pid], "it comes back")

    def answered() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return client.post("/v1/chat/completions", json=rigs.chat("still here")).status_code == 200
        return False

    rigs.until(answered, "a chat is answered")
    assert rig.end() == 0


def test_a_coordinator_that_stands_still_for_five_seconds_loses_nothing(new_rig, rigs):
    rig = new_rig()
    client = rig.ready()
    id_ = rigs.submit(client, rigs.job("x", 250))
    lines: list[str] = []
    body = rigs.chat("a b", "synthetic-slow", max_tokens=250)
    reading = Background(lambda: read_stream(rig.client(), body, lines))
    rigs.until(lambda: len(lines) > 3, "the stream has begun")
    coordinator = rig.coordinator()
    coordinator.send_signal(signal.SIGSTOP)
    time.sleep(5)  # the attack itself: nothing can be waited for
    coordinator.send_signal(signal.SIGCONT)
    assert reading.join(rigs.PATIENCE_S) is None
    assert lines[-1] == "data: [DONE]", lines[-3:]
    assert sum('"content":""' not in line and '"content"' in line for line in lines) == 250
    found = rigs.ended(client, id_)
    assert (found["state"], found["tries"]) == ("succeeded", 1)
    assert rig.coordinator().pid == coordinator.pid


# ---- an engine is killed or stands still


def test_an_engine_killed_in_mid_stream_ends_the_stream_typed_and_the_queue_goes_on(new_rig, rigs):
    rig = new_rig()
    client = rig.ready()
    lines: list[str] = []
    reading = Background(lambda: read_stream(rig.client(), rigs.chat("a b", "synthetic-slow"), lines))
    rigs.until(lambda: len(lines) > 3, "the stream has begun")
    ids = [rigs.submit(client, rigs.job(f"n{n}", 10 if n else 80)) for n in range(5)]
    rigs.until(lambda: rigs.state_of(client, ids[0]) != "queued", "one runs beside it")
    rig.engine("synthetic").kill()
    assert reading.join(rigs.PATIENCE_S) is None
    error = json.loads(lines[-1].removeprefix("data: "))["error"]
    assert error["code"] == "engine_crashed"
    assert "SIGKILL" in error["message"]
    assert "data: [DONE]" not in lines
    for id_ in ids:
        found = rigs.ended(client, id_)
        assert found["state"] == "succeeded", found
    assert rig.end() == 0
    assert rig.scratch() == []


def test_an_engine_that_stands_still_is_ended_and_the_next_one_answers(new_rig, rigs):
    """Its job fails typed within the bounds, the waiting one is served by a new instance."""
    limits = "drain_s = 5\nfirst_output_s = 20\nstall_s = 4\ncancel_grace_s = 1\nterm_grace_s = 0.5"
    rig = new_rig(limits=limits)
    client = rig.ready()
    lines: list[str] = []
    reading = Background(lambda: read_stream(rig.client(), rigs.chat("a b", "synthetic-slow"), lines))
    rigs.until(lambda: len(lines) > 3, "the stream has begun")
    engine = rig.engine("synthetic")
    engine.send_signal(signal.SIGSTOP)
    began = time.monotonic()
    answer = client.post("/v1/chat/completions", json=rigs.chat("next", "synthetic-slow", max_tokens=3))
    assert answer.status_code == 200, answer.text
    assert time.monotonic() - began < 60, "the caller waited for what stood still"
    reading.join(rigs.PATIENCE_S)
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "engine_hung"
    rigs.until(lambda: not rigs.alive([engine]), "the engine is gone")


def test_an_engine_killed_while_it_loads_is_a_typed_answer(new_rig, rigs):
    rig = new_rig()
    client = rig.ready()
    call = Background(lambda: client.post("/v1/chat/completions", json=rigs.chat("x", "synthetic-late")))
    rig.engine("synthetic").kill()
    answer = call.join(rigs.PATIENCE_S)
    assert_typed(answer)
    until_served = rigs.until(
        lambda: client.post("/v1/chat/completions", json=rigs.chat("again", "synthetic-late")).status_code == 200,
        "the model is served after all",
    )
    assert until_served


def test_a_real_llm_killed_in_mid_stream_comes_back(new_rig, rigs):
    pytest.importorskip("xllamacpp", reason="the llm engine's library is not installed")
    rig = new_rig(want=frozenset({"chat"}))
    client = rig.ready()
    lines: list[str] = []
    reading = Background(lambda: read_stream(rig.client(), rigs.chat("count to 50", "chat"), lines))
    rigs.until(lambda: len(lines) > 3, "the stream has begun")
    rig.engine("llm").kill()
    reading.join(rigs.PATIENCE_S)
    assert "data: [DONE]" in lines or "engine_crashed" in lines[-1], lines[-1]
    answer = client.post("/v1/chat/completions", json=rigs.chat("count to 5", "chat", temperature=0))
    assert answer.json()["choices"][0]["message"]["content"].split() == ["1", "2", "3", "4", "5"]


# ---- starts that cannot succeed


def run_to_end(rig: Any, patience_s: float = 120) -> tuple[int, str]:
    """Start it, wait for its end by itself; exit code and what it said."""
    process = rig.start()
    return process.wait(patience_s), rig.words()


def test_a_second_supervisor_on_the_same_state_ends_with_73_and_harms_nobody(new_rig, rigs):
    rig = new_rig(want=frozenset({"synthetic"}))
    client = rig.ready()
    first = rig.process
    code, words = run_to_end(rig)
    assert code == 73
    assert f"pid {first.pid}" in words
    rig.process = first
    assert client.post("/v1/chat/completions", json=rigs.chat("still here")).status_code == 200
    assert rig.end() == 0


def test_a_port_of_somebody_else_is_told_with_the_cure(new_rig):
    with socket.create_server(("127.0.0.1", 0)) as other:
        rig = new_rig(port=other.getsockname()[1])
        code, words = run_to_end(rig)
    assert code == 70
    assert "end the other program or choose another port" in words
    assert "Traceback" not in words


def test_mistakes_of_the_configuration_are_told_all_at_once(new_rig):
    rig = new_rig()
    rig.config.write_text('[coordinator]\nlissen = "x"\n[limits]\ndrain_s = -1\n[[models]]\nname = "a"\nengine = "b"\n')
    code, words = run_to_end(rig)
    assert code == 78
    assert len(words.splitlines()) == 3, words
    assert "listen" in words, "did you mean"


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[[[", None])
def test_a_configuration_that_cannot_be_read(new_rig, content: bytes | None):
    rig = new_rig()
    rig.config.unlink()
    if content is None:
        rig.config.mkdir()
    else:
        rig.config.write_bytes(content)
    code, words = run_to_end(rig)
    assert code == 78, words
    assert "worker.toml" in words
    assert "Traceback" not in words


@pytest.mark.parametrize("obstacle", ["file", "parent is a file", "nothing may be written"])
def test_a_state_folder_that_cannot_be_used_is_77(new_rig, rigs, tmp_path, obstacle: str):
    rig = new_rig(verdicts=None)
    state = {"file": "worker.toml", "parent is a file": "worker.toml/state", "nothing may be written": "ro/state"}
    with contextlib.ExitStack() as stack:
        if obstacle == "nothing may be written":
            try:
                stack.enter_context(rigs.tiny_disk(rig.folder / "ro", "1m", "ro"))
            except PermissionError as error:
                pytest.skip(f"no file system can be mounted here: {error}")
        text = rig.config.read_text()
        rig.config.write_text(text.replace('state_dir = "state"', f'state_dir = "{state[obstacle]}"'))
        code, words = run_to_end(rig)
    assert code == 77, words
    assert "[worker] state_dir" in words


@pytest.mark.parametrize("token", ["bhw_" + "x" * 43, "no-token-at-all"])
def test_a_wrong_worker_token_ends_with_69(new_rig, rigs, token: str):
    rig = new_rig(want=frozenset({"synthetic"}))
    rig.ready()
    other = new_rig("other")
    (other.folder / "token").write_text(token + "\n")
    (other.folder / "token").chmod(0o600)
    text = other.config.read_text().replace(
        'listen = "127.0.0.1:0"', f'url = "ws://127.0.0.1:{rig.port}"\ntoken_file = "token"'
    )
    other.config.write_text(text)
    code, words = run_to_end(other)
    assert code == 69, words
    assert "check coordinator.token_file" in words
    assert rig.end() == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_at_any_time_of_the_start_ends_it_in_order(new_rig, rigs, number: int):
    """Before its handlers are there the signal's own default applies; after that the end is an orderly 0."""
    rig = new_rig()
    for delay_s in (0.0, 0.1, 0.2, 0.4, 0.8):
        before = len(rig.words())
        process = rig.start()
        time.sleep(delay_s)  # the attack itself
        process.send_signal(number)
        rigs.until(
            lambda process=process, before=before: process.poll() is not None or swallowed(rig.words()[before:]),
            "it ends",
        )
        if process.poll() is None:
            process.send_signal(number)
        code = process.wait(rigs.PATIENCE_S)
        words = rig.words()[before:]
        interrupted = "KeyboardInterrupt" in words  # the interpreter's own way, before ours
        assert code in (0, 130, -number) or interrupted, f"{code} after {delay_s} s\n{words}"
        assert interrupted or "Traceback" not in words, words
        rigs.until(lambda: not rigs.processes_of(rig.folder), f"nothing is left after {delay_s} s", rigs.PATIENCE_S)


def swallowed(words: str) -> bool:
    """Whether the signal came in a callback of the interpreter's own: there it forgets a KeyboardInterrupt."""
    return "Exception ignored in" in words and "KeyboardInterrupt" in words
