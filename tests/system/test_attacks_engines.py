"""Engines that are killed, crash, hang or stand still under a working supervisor: who notices, what, and how soon.

Bounds are generous: the machine is shared with others, and may stand still for seconds. What was measured is printed.
Nothing but what is tested would bring the same about within them: the limits of a run are minutes.
"""

from __future__ import annotations

import contextlib
import json
import random
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest

from protocol.faults import CODES

AT_ONCE_S = 30.0  # from an engine's end to its client's fault; alone it is a few milliseconds
BACK_S = 30.0  # from the fault to the next answer; alone 0.2 s
HANG_MARGIN_S = 0.5  # the bar of the project, over the deadline
MARGIN_S = 20.0  # and what a loaded box may add
ROUNDS = 5
POSES = ("hang", "hang-gil", "spin", "deadlock", "stop", "ignore-term", "deaf")
LOOP_S = 6.0
LEAST_ASKED = 3
LEAST_TURNS = 4  # of each caller, however slow the machine is: the third one of some is a crash

# Pauses that a test can wait for; quarantines have tests of their own (test_attacks_owner.py).
LIMITS = """drain_s = 5
cancel_grace_s = 4
term_grace_s = 0.5
[limits.restart]
first_pause_s = 0.1
longest_pause_s = 0.2
quarantine_after = 1000
"""

MODELS = """
[engines.odd]
module = "engines.synthetic.misbehave"
[[models]]
name = "synthetic"
engine = "synthetic"
[[models]]
name = "synthetic-slow"
engine = "synthetic"
options = { slots = 4, tokens = 400, delay_ms = 25 }
"""
ODD = ("odd", "other", *POSES)
for name in ODD:
    MODELS += f'[[models]]\nname = "synthetic-{name}"\nengine = "odd"\nkinds = ["llm"]\noptions = {{ slots = 4 }}\n'
NAMES = frozenset({"synthetic", "synthetic-slow", *(f"synthetic-{name}" for name in ODD)})


@pytest.fixture(scope="module")
def only_rig(rigs, tmp_path_factory, verdicts) -> Iterator[Any]:
    """A supervisor with two well-behaved models and two of the misbehaviour kit."""
    rig = rigs.Rig(tmp_path_factory.mktemp("engines"), models=MODELS, want=NAMES, limits=LIMITS, verdicts=verdicts)
    rig.ready()
    yield rig
    rig.sweep()


@pytest.fixture
def rig(only_rig) -> Iterator[Any]:
    """The module's supervisor, which must come out of each test as the same two processes."""
    before = (only_rig.process.pid, only_rig.coordinator().pid)
    yield only_rig
    assert (only_rig.process.pid, only_rig.coordinator().pid) == before
    assert "Traceback" not in only_rig.words(), only_rig.words()[-3000:]


class Reading:
    """A chat stream that is read in a thread. `lines` grows as it comes, `ended_at` is when it was over."""

    def __init__(self, client: httpx.Client, body: dict[str, Any]) -> None:
        self.lines: list[str] = []
        self.ended_at = 0.0
        self._thread = threading.Thread(target=self._run, args=(client, body | {"stream": True}), daemon=True)
        self._thread.start()

    def _run(self, client: httpx.Client, body: dict[str, Any]) -> None:
        with contextlib.suppress(httpx.HTTPError):
            with client.stream("POST", "/v1/chat/completions", json=body) as answer:
                self.lines.extend(line for line in answer.iter_lines() if line)
        self.ended_at = time.monotonic()

    def begun(self) -> bool:
        """Whether a word has come."""
        return len(self.lines) > 2

    def error(self, patience_s: float) -> dict[str, Any]:
        """The error that it ended with."""
        self._thread.join(patience_s)
        assert self.ended_at, f"the stream still hangs after {patience_s:g} s"
        assert self.lines, "it ended without a word"
        found: dict[str, Any] = json.loads(self.lines[-1].removeprefix("data: "))["error"]
        return found

    def whole(self, patience_s: float) -> str:
        """Its text, when it ended as a stream should."""
        self._thread.join(patience_s)
        assert self.lines[-1:] == ["data: [DONE]"], self.lines[-3:]
        events = [json.loads(line.removeprefix("data: ")) for line in self.lines[:-1]]
        return "".join(event["choices"][0]["delta"].get("content") or "" for event in events if event["choices"])


def say(rig: Any, rigs: Any, client: httpx.Client, text: str, model: str) -> httpx.Response:
    answer: httpx.Response = client.post("/v1/chat/completions", json=rigs.chat(text, model))
    return answer


def content(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    found: str = answer.json()["choices"][0]["message"]["content"]
    return found


class Neighbour:
    """Asks a well-behaved model again and again; nothing may go wrong for it."""

    def __init__(self, rig: Any, rigs: Any) -> None:
        self._rig, self._rigs = rig, rigs
        self._over = threading.Event()
        self.seconds: list[float] = []
        self.wrong: list[str] = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        while len(self.seconds) < LEAST_ASKED and self._thread.is_alive():
            self._over.wait(0.05)
        self._over.set()
        self._thread.join(120)

    def _run(self) -> None:
        client = self._rig.client()
        while not self._over.is_set():
            began = time.monotonic()
            try:
                answer = say(self._rig, self._rigs, client, f"number {len(self.seconds)}", "synthetic")
                if content(answer) != f"number {len(self.seconds)}":
                    self.wrong.append(answer.text)
            except (httpx.HTTPError, AssertionError) as error:
                self.wrong.append(repr(error))
            self.seconds.append(time.monotonic() - began)

    def assert_undisturbed(self) -> None:
        """No fault, and nobody waited for anything."""
        assert not self.wrong, self.wrong[:3]
        assert len(self.seconds) >= LEAST_ASKED  # alone it is a hundred
        assert max(self.seconds) < AT_ONCE_S, sorted(self.seconds)[-5:]


# ---- killed and crashed


def test_an_engine_killed_in_mid_call_is_told_at_once_and_back_at_once_and_its_neighbour_sees_nothing(rig, rigs):
    client = rig.ready()
    told, back = [], []
    with Neighbour(rig, rigs) as neighbour:
        for _ in range(ROUNDS):
            reading = Reading(rig.client(), rigs.chat("a b", "synthetic-slow"))
            rigs.until(reading.begun, "the stream has begun")
            pid = rig.model("synthetic-slow")["pid"]
            engine = next(each for each in reversed(rig.descendants()) if pid in {p.pid for p in each.parents()})
            engine.kill()
            killed = time.monotonic()
            error = reading.error(rigs.PATIENCE_S)
            assert (error["code"], "SIGKILL" in error["message"]) == ("engine_crashed", True), error
            told.append(reading.ended_at - killed)
            answer = client.post("/v1/chat/completions", json=rigs.chat("next", "synthetic-slow", max_tokens=1))
            assert content(answer).strip() == "next"
            back.append(time.monotonic() - reading.ended_at)
    neighbour.assert_undisturbed()
    print(f"told after {max(told):.3f} s, back after {max(back):.3f} s")  # noqa: T201
    assert max(told) < AT_ONCE_S, told
    assert max(back) < BACK_S, back


CRASHES = {
    "crash-after:3": "SIGSEGV",
    "crash:SIGABRT": "SIGABRT",
    "exit:0": "exit code 0",
    "daemon:exit": "exit code 9",
}


def test_a_crash_is_answered_with_its_cause_and_the_next_call_on_that_model_works(rig, rigs):
    """A crash before the first chunk is tried once more, and then blamed on its job."""
    client = rig.ready()
    with Neighbour(rig, rigs) as neighbour:
        for prompt, cause in CRASHES.items():
            began = time.monotonic()
            reading = Reading(rig.client(), rigs.chat(prompt, "synthetic-odd"))
            error = reading.error(rigs.PATIENCE_S)
            streamed = prompt.startswith("crash-after")
            assert error["code"] == ("engine_crashed" if streamed else "job_poisoned"), error
            assert cause in error["message"], error
            answer = say(rig, rigs, client, "still here", "synthetic-odd")
            assert content(answer) == "still here"
            print(f"{prompt}: told and back after {time.monotonic() - began:.2f} s")  # noqa: T201
    neighbour.assert_undisturbed()
    rigs.until(lambda: not zombies(rig), "every one that ended was asked for its exit code")


def zombies(rig: Any) -> list[psutil.Process]:
    """Processes of the tree that have ended and whose parent has not noticed."""
    found = []
    for each in rig.descendants():
        with contextlib.suppress(psutil.NoSuchProcess):
            if each.status() == psutil.STATUS_ZOMBIE:
                found.append(each)
    return found


# ---- hanging


def test_what_hangs_is_answered_at_its_deadline(rig, rigs):
    """However deaf the engine is; ending it is not the caller's time. All of them at once, each in its own engine."""
    client = rig.ready()
    for pose in POSES:
        assert content(say(rig, rigs, client, "warm", f"synthetic-{pose}")) == "warm"
    deadline_s = 1.5
    late: dict[str, float] = {}

    def ask(pose: str) -> None:
        client = rig.client()
        body = {"kind": "llm", "model": f"synthetic-{pose}", "params": {"prompt": pose}}
        began = time.monotonic()
        id_ = rigs.submit(client, body | {"deadline_ms": int(deadline_s * 1000)})
        found = rigs.ended(client, id_)
        late[pose] = time.monotonic() - began - deadline_s
        assert (found["state"], found["fault"]["code"]) == ("failed", "deadline_exceeded"), found

    with Neighbour(rig, rigs) as neighbour, ThreadPoolExecutor(len(POSES)) as pool:
        list(pool.map(ask, POSES))
    neighbour.assert_undisturbed()
    print({pose: f"{late_s:+.3f} s" for pose, late_s in late.items()})  # noqa: T201
    assert max(late.values()) < HANG_MARGIN_S + MARGIN_S, late
    for pose in POSES:
        assert content(say(rig, rigs, client, "back", f"synthetic-{pose}")) == "back"


# ---- the supervisor stands still


def test_a_supervisor_that_stands_still_for_seconds_kills_nothing(new_rig, rigs):
    """Its clocks jump by more than every limit of the run; the engine went on, and shows it when it is asked."""
    limits = "drain_s = 5\nfirst_output_s = 6\nstall_s = 4\ncancel_grace_s = 1\nterm_grace_s = 0.5"
    rig = new_rig(models=MODELS, want=NAMES, limits=limits)
    client = rig.ready()
    reading = Reading(rig.client(), rigs.chat("a b", "synthetic-slow", max_tokens=360))
    rigs.until(reading.begun, "the stream has begun")
    id_ = rigs.submit(client, {"kind": "llm", "model": "synthetic-odd", "params": {"prompt": "deaf:9"}})
    rigs.until(lambda: rigs.state_of(client, id_) == "running", "the job runs")
    before = {name: rig.model(name)["pid"] for name in ("synthetic-slow", "synthetic-odd")}
    rig.process.send_signal(signal.SIGSTOP)
    time.sleep(7)  # the attack itself: longer than both
    rig.process.send_signal(signal.SIGCONT)
    assert reading.whole(rigs.PATIENCE_S) == "a b " * 179 + "a b"
    found = rigs.ended(client, id_)
    assert (found["state"], found["tries"]) == ("succeeded", 1), found
    assert {name: rig.model(name)["pid"] for name in before} == before, "an engine was replaced"
    assert rig.status()["incidents"] == []


# ---- everything at once


def test_sixteen_callers_while_engines_crash_in_a_loop(rig, rigs):
    """Every answer is right, or a typed error that says what happened; the well-behaved model never errs."""
    rig.ready()
    seed = random.randrange(2**31)
    print(f"seed {seed}")  # noqa: T201
    outcomes: Counter[str] = Counter()
    lock = threading.Lock()
    over = time.monotonic() + LOOP_S

    def caller(number: int) -> None:
        chance = random.Random(seed + number)
        client = rig.client()
        turn = 0
        while turn < LEAST_TURNS or time.monotonic() < over:
            turn += 1
            model = ("synthetic", "synthetic-odd", "synthetic-other")[number % 3]
            text = f"caller {number} turn {turn}"
            if model != "synthetic" and turn % 3 == 0:
                text = chance.choice(["crash:SIGSEGV", "exit:1", "crash-after:2", "frame:garbage", "crash:SIGABRT"])
            outcome = judged(client, rigs, text, model, stream=chance.random() < 0.5)
            with lock:
                outcomes[outcome] += 1

    threads = [threading.Thread(target=caller, args=(number,), daemon=True) for number in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(240)
    print(outcomes)  # noqa: T201
    assert not any(thread.is_alive() for thread in threads), "a caller hangs"
    assert not {name for name in outcomes if not name.startswith("right") and name not in CODES}, outcomes
    assert outcomes["right synthetic"] >= 16, outcomes
    assert outcomes["job_poisoned"] + outcomes["engine_crashed"] + outcomes["engine_protocol"] > 0, outcomes
    for model in ("synthetic", "synthetic-odd", "synthetic-other"):
        rigs.until(lambda model=model: _well(rig, rigs, model), f"{model} answers again")
    rigs.until(lambda: not rig.attempts(), "no attempt has a folder")
    rigs.until(
        lambda: launched(rig, rigs) == {rig.model(name)["pid"] for name in NAMES} - {0},
        "no engine that ended is still there",
    )


def launched(rig: Any, rigs: Any) -> set[int]:
    """What the supervisor itself has started as an engine."""
    found = set()
    for each in rigs.processes_of(rig.folder):
        with contextlib.suppress(psutil.Error):
            if "launch.py" in " ".join(each.cmdline()) and each.ppid() == rig.process.pid:
                found.add(each.pid)
    return found


def judged(client: httpx.Client, rigs: Any, text: str, model: str, *, stream: bool) -> str:
    """ "right MODEL", the code of a typed error, or a sentence about what is wrong."""
    if stream:
        reading = Reading(client, rigs.chat(text, model))
        lines = _whole(reading)
        if lines[-1:] == ["data: [DONE]"]:
            return f"right {model}" if reading.whole(0) == text else f"wrong stream {lines}"
        body = lines[-1] if lines else ""
    else:
        try:
            answer = client.post("/v1/chat/completions", json=rigs.chat(text, model))
        except httpx.HTTPError as error:
            return f"no answer {error!r}"
        if answer.status_code == 200:
            return f"right {model}" if content(answer) == text else f"wrong answer {answer.text}"
        body = answer.text
    try:
        code: str = json.loads(body.removeprefix("data: "))["error"]["code"]
    except (ValueError, KeyError):
        return f"untyped {body!r}"
    return f"fault of the well-behaved: {code}" if model == "synthetic" else code


def _whole(reading: Reading) -> list[str]:
    reading._thread.join(120)
    return reading.lines


def _well(rig: Any, rigs: Any, model: str) -> bool:
    return say(rig, rigs, rig.client(), "well", model).status_code == 200
