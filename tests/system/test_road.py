"""The whole road with real processes: client, embedded coordinator, supervisor, engine child, and back."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import openai
import psutil
import pytest

from supervisor.errors import ExitCode

PATIENCE_S = 120.0
CONFIG = """\
[coordinator]
listen = "127.0.0.1:0"
[worker]
name = "box"
state_dir = "state"
[log]
level = "debug"
[limits]
drain_s = {drain_s}
[[models]]
name = "synthetic"
engine = "synthetic"
[engines.odd]
module = "engines.synthetic.misbehave"
[[models]]
name = "synthetic-odd"
engine = "odd"
kinds = ["llm"]
"""


class Box:
    """A running `supervisor run`."""

    def __init__(self, folder: Path, drain_s: float) -> None:
        self.folder = folder
        self.starts = 0
        (folder / "worker.toml").write_text(CONFIG.format(drain_s=drain_s))
        self.process = self.start()

    def start(self) -> subprocess.Popen[bytes]:
        self.starts += 1
        self.log = self.folder / f"log{self.starts}"
        with self.log.open("wb") as log:
            argv = [sys.executable, "-m", "supervisor", "run", "--config", str(self.folder / "worker.toml")]
            return subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL)

    def words(self) -> str:
        return self.log.read_text(errors="replace")

    def wait_for(self, words: str) -> None:
        """Wait until the log says so."""
        until = time.monotonic() + PATIENCE_S
        while words not in self.words():
            assert self.process.poll() is None, self.words()
            assert time.monotonic() < until, f"{words!r} never came\n{self.words()}"
            time.sleep(0.02)

    def endpoint(self) -> dict[str, str]:
        return json.loads((self.folder / "state" / "endpoint.json").read_text())

    def client(self) -> openai.OpenAI:
        told = self.endpoint()
        key = Path(told["client_key_file"]).read_text().strip()
        return openai.OpenAI(base_url=f"{told['url']}/v1", api_key=key, max_retries=0, timeout=PATIENCE_S)

    def ready(self) -> openai.OpenAI:
        """Wait until both models are announced."""
        self.wait_for("the coordinator answers at")
        client, until = self.client(), time.monotonic() + PATIENCE_S
        with client:
            while len(list(client.models.list())) < 2:
                assert time.monotonic() < until, self.words()
                time.sleep(0.02)
        return self.client()

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def coordinator(self) -> psutil.Process:
        found = []
        for child in self.family():
            with contextlib.suppress(psutil.Error):  # others come and go
                if "coordinator" in child.cmdline():
                    found.append(child)
        (one,) = found
        return one

    def attempts(self) -> list[Path]:
        """Folders of attempts, with inputs or outputs."""
        grounds = self.folder / "state" / "instances"
        return [path for part in ("in", "out") for path in grounds.glob(f"*/{part}/*")]

    def end(self) -> int:
        return self.process.wait(PATIENCE_S)


@pytest.fixture
def box(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Box]:
    box = Box(tmp_path, getattr(request, "param", 90.0))
    yield box
    with contextlib.suppress(psutil.NoSuchProcess):
        family = [psutil.Process(box.process.pid), *box.family()]
        for process in family:
            process.kill()
        box.process.wait(PATIENCE_S)


def say(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assert_gone(family: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(family, timeout=PATIENCE_S)
    assert not alive, alive


def test_chat_plain_and_streamed_then_a_drain_leaves_nothing_behind(box: Box):
    with box.ready() as client:
        plain = client.chat.completions.create(model="synthetic", messages=say("the road is open"))
        assert plain.choices[0].message.content == "the road is open"
        assert plain.usage is not None
        assert plain.usage.completion_tokens > 0
        pieces = list(client.chat.completions.create(model="synthetic", messages=say("one two three"), stream=True))
        text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
        assert text == "one two three"
        assert sum(bool(piece.choices and piece.choices[0].delta.content) for piece in pieces) > 1, "it was one lump"
        image = client.images.generate(
            model="synthetic", prompt="a red circle", size="64x64", response_format="b64_json"
        )
        assert image.data
        assert image.data[0].b64_json
    family = box.family()
    assert len(family) >= 2, "a coordinator and an engine"
    began = time.monotonic()
    box.process.send_signal(signal.SIGTERM)
    assert box.end() == ExitCode.STOPPED, box.words()
    assert time.monotonic() - began < 60, "an idle drain took its whole time"
    assert_gone(family)
    assert not (box.folder / "state" / "endpoint.json").exists()
    assert box.attempts() == [], "an attempt's folder was left"
    assert "Traceback" not in box.words()


def test_files_travel_both_ways(box: Box):
    """Inputs are fetched, outputs and long results are uploaded, and each is checked by size and digest."""
    with box.ready() as client:
        speech = client.audio.speech.create(model="synthetic", voice="default", input="hello", response_format="wav")
        sound = speech.read()
        assert sound[:4] == b"RIFF"
        heard = client.audio.transcriptions.create(model="synthetic", file=("a.wav", sound))
        assert heard.text
        long = client.embeddings.create(model="synthetic", input=["word " * 50] * 512)
        assert len(long.data) == 512
        text = "0123456789abcdef" * 8192
        echoed = client.chat.completions.create(model="synthetic", messages=say(text))
        assert echoed.choices[0].message.content == text, "a result of 128 KiB travels as a file"
    box.process.send_signal(signal.SIGTERM)
    assert box.end() == ExitCode.STOPPED, box.words()
    assert box.attempts() == []


def test_a_remote_worker_is_admitted_with_its_token_and_refused_without(box: Box, tmp_path: Path):
    """A second supervisor that works for the first one's coordinator, over the network as it were."""
    with box.ready() as client:
        state = box.folder / "state" / "coordinator"
        made = subprocess.run(
            [sys.executable, "-m", "coordinator", "keys", "create", "--scope", "worker", "--state", str(state)],
            capture_output=True,
            text=True,
            timeout=PATIENCE_S,
        )
        far = tmp_path / "far"
        far.mkdir()
        token = far / "token"
        token.touch(0o600)
        url = box.endpoint()["url"].replace("http", "ws", 1)
        (far / "worker.toml").write_text(
            f'[coordinator]\nurl = "{url}"\ntoken_file = "token"\n[worker]\nstate_dir = "state"\n'
            '[[models]]\nname = "synthetic-far"\nengine = "synthetic"\nkinds = ["llm"]\n'
        )
        argv = [sys.executable, "-m", "supervisor", "run", "--config", str(far / "worker.toml")]
        token.write_text("wrong")
        refused = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE_S)
        assert refused.returncode == ExitCode.REFUSED, refused.stderr
        assert "check coordinator.token_file" in refused.stderr
        token.write_text(made.stdout)
        with (far / "log").open("wb") as log:
            second = subprocess.Popen(argv, stdout=log, stderr=log)
        try:
            until = time.monotonic() + PATIENCE_S
            while "synthetic-far" not in [model.id for model in client.models.list()]:
                assert time.monotonic() < until, (far / "log").read_text()
                time.sleep(0.02)
            answer = client.chat.completions.create(model="synthetic-far", messages=say("from afar"))
            assert answer.choices[0].message.content == "from afar"
            second.send_signal(signal.SIGTERM)
            assert second.wait(PATIENCE_S) == ExitCode.STOPPED
        finally:
            second.kill()
            second.wait(PATIENCE_S)


def begin(client: openai.OpenAI, prompt: str) -> tuple[threading.Thread, list[object]]:
    """Ask the misbehaving engine in the background; the list gets its answer, or its error."""
    answers: list[object] = []

    def ask() -> None:
        try:
            answers.append(client.chat.completions.create(model="synthetic-odd", messages=say(prompt)))
        except openai.APIError as error:
            answers.append(error)

    thread = threading.Thread(target=ask)
    thread.start()
    return thread, answers


def test_a_drain_lets_the_running_job_finish_and_refuses_new_ones(box: Box):
    with box.ready() as client:
        thread, answers = begin(client, "deaf:6")
        box.wait_for("taken job=")
        box.process.send_signal(signal.SIGTERM)
        box.wait_for("draining")
        with pytest.raises(openai.APIStatusError) as refused:
            client.chat.completions.create(model="synthetic", messages=say("too late"))
        assert refused.value.status_code == 503
        assert box.end() == ExitCode.STOPPED, box.words()
        thread.join(PATIENCE_S)
    assert not isinstance(answers[0], Exception), answers


@pytest.mark.parametrize("box", [1.0], indirect=True)
def test_a_job_that_outlasts_the_drain_is_ended_and_told(box: Box):
    with box.ready() as client:
        thread, answers = begin(client, "progress")
        box.wait_for("taken job=")
        family = box.family()
        box.process.send_signal(signal.SIGTERM)
        assert box.end() == ExitCode.STOPPED, box.words()
        thread.join(PATIENCE_S)
    assert isinstance(answers[0], openai.APIError)
    assert re.search(
        r"info link.attempts: llm job failed after \S+ s: worker_stopping, the worker's fault", box.words()
    )
    assert_gone(family)


def test_a_second_signal_stops_at_once(box: Box):
    with box.ready() as client:
        thread, answers = begin(client, "progress")
        box.wait_for("taken job=")
        family = box.family()
        box.process.send_signal(signal.SIGINT)
        box.wait_for("draining")
        began = time.monotonic()
        box.process.send_signal(signal.SIGINT)
        assert box.end() == ExitCode.STOPPED, box.words()
        assert time.monotonic() - began < 60, "the drain took its whole time"
        thread.join(PATIENCE_S)
    assert isinstance(answers[0], openai.APIError)
    assert_gone(family)


def test_an_engine_that_crashes_costs_its_job_and_not_the_next_one(box: Box):
    with box.ready() as client:
        thread, answers = begin(client, "crash:SIGSEGV")
        thread.join(PATIENCE_S)
        assert isinstance(answers[0], openai.InternalServerError)
        assert "SIGSEGV" in str(answers[0])
        thread, answers = begin(client, "still here")
        thread.join(PATIENCE_S)
        assert answers[0].choices[0].message.content == "still here"


def test_a_second_supervisor_of_the_same_state_is_refused(box: Box):
    box.ready().close()
    argv = [sys.executable, "-m", "supervisor", "run", "--config", str(box.folder / "worker.toml")]
    second = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE_S)
    assert second.returncode == ExitCode.IDENTITY_HELD
    assert f"pid {box.process.pid}" in second.stderr
    assert box.process.poll() is None


def test_a_coordinator_that_is_killed_comes_back_on_the_same_port_and_the_worker_with_it(box: Box):
    with box.ready() as client:
        before = box.endpoint()["url"]
        box.coordinator().kill()
        box.wait_for("starting it again")
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                answer = client.chat.completions.create(model="synthetic", messages=say("back"))
                break
            except openai.APIError:
                assert time.monotonic() < until, box.words()
                time.sleep(0.1)
        assert answer.choices[0].message.content == "back"
        assert box.endpoint()["url"] == before
    box.process.send_signal(signal.SIGTERM)
    assert box.end() == ExitCode.STOPPED, box.words()


def test_killing_the_supervisor_leaves_no_process_behind(box: Box):
    with box.ready() as client:
        client.chat.completions.create(model="synthetic", messages=say("hello"))
    family = box.family()
    box.process.kill()
    box.process.wait(PATIENCE_S)
    assert_gone(family)
    box.process = box.start()
    box.ready().close()


def test_ctrl_c_before_anything_is_up_still_ends_it(tmp_path: Path):
    box = Box(tmp_path, 30)
    box.wait_for("the coordinator answers")
    family = box.family()
    box.process.send_signal(signal.SIGINT)
    assert box.end() == ExitCode.STOPPED, box.words()
    assert_gone(family)


def test_a_bad_configuration_ends_with_78_and_every_mistake(tmp_path: Path):
    (tmp_path / "worker.toml").write_text("[limitz]\n[log]\nlevel = 3\n")
    argv = [sys.executable, "-m", "supervisor", "run", "--config", str(tmp_path / "worker.toml")]
    ended = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE_S, env=dict(os.environ))
    assert ended.returncode == ExitCode.BAD_CONFIG
    assert len(ended.stderr.splitlines()) == 2
