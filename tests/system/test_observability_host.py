"""A real supervisor with real engines: loads, ends by force and the models folder in its metrics and its log."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from supervisor.intake.pace import ENOUGH

PATIENCE_S = 120.0
CONFIG = """\
[coordinator]
listen = "127.0.0.1:0"
[worker]
name = "box"
state_dir = "state"
[limits]
cancel_grace_s = 0.2
term_grace_s = 0.2
[[models]]
name = "synthetic"
engine = "odd"
kinds = ["llm"]
stall_s = 4.0
[[models]]
name = "synthetic-paced"
engine = "synthetic"
kinds = ["llm"]
options = { tokens = 40, delay_ms = 4 }
[engines.odd]
module = "engines.synthetic.misbehave"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "worker.toml").write_text(CONFIG)
    pulled = tmp_path / "state" / "models" / "chat"
    pulled.mkdir(parents=True)
    (pulled / "weights").write_bytes(b"x" * 12_345)
    with (tmp_path / "stderr").open("wb") as log:
        argv = [sys.executable, "-m", "supervisor", "run", "--config", str(tmp_path / "worker.toml")]
        process = subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            yield tmp_path
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            process.kill()
            process.wait()


def scrape(folder: Path) -> list[str]:
    transport = httpx.HTTPTransport(uds=str(folder / "state" / "control.sock"))
    with httpx.Client(transport=transport, base_url="http://control", timeout=PATIENCE_S) as client:
        return client.get("/v1/metrics").raise_for_status().text.splitlines()


def until(true: Callable[[], bool], folder: Path) -> None:
    end = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(OSError, httpx.HTTPError, KeyError):
            if true():
                return
        assert time.monotonic() < end, (folder / "stderr").read_text()
        time.sleep(0.05)


def client(folder: Path) -> httpx.Client:
    told = json.loads((folder / "state" / "endpoint.json").read_text())
    key = Path(told["client_key_file"]).read_text().strip()
    return httpx.Client(base_url=told["url"], headers={"authorization": f"Bearer {key}"}, timeout=PATIENCE_S)


def served(folder: Path) -> bool:
    with client(folder) as http:
        return len(http.get("/v1/models").json()["data"]) == 2


def test_the_pace_of_a_model_is_learned_shown_and_kept(folder: Path) -> None:
    until(lambda: served(folder), folder)
    body = {"model": "synthetic-paced", "messages": [{"role": "user", "content": "hello"}]}
    with client(folder) as http:
        for number in range(ENOUGH):
            assert not [line for line in scrape(folder) if line.startswith("bulkhead_model_pace_ratio")], number
            usage = http.post("/v1/chat/completions", json=body).raise_for_status().json()["usage"]
            assert usage["completion_tokens"] == 40
    shown = re.compile(r'bulkhead_model_pace_ratio\{model="synthetic-paced"\} [0-9.]+')
    until(lambda: any(shown.fullmatch(line) for line in scrape(folder)), folder)
    # What runs as long as this loaded machine lets it is no collapse unless it is four times slower, three times.
    supervisor = json.loads((folder / "state" / "endpoint.json").read_text())["pid"]
    os.kill(supervisor, signal.SIGTERM)
    until(lambda: (folder / "state" / "paces.json").exists(), folder)
    [kept] = json.loads((folder / "state" / "paces.json").read_text()).values()
    assert len(kept["healthy"]) == ENOUGH


def test_loads_forced_ends_and_the_models_folder_are_counted_and_told(folder: Path) -> None:
    until(lambda: served(folder), folder)
    with client(folder) as http:
        for words, status in (("hello", 200), ("ignore-term", 500), ("hello again", 200)):
            body = {"model": "synthetic", "messages": [{"role": "user", "content": words}]}
            answer = http.post("/v1/chat/completions", json=body)
            assert answer.status_code == status, answer.text
    lines = scrape(folder)
    [count] = [line for line in lines if line.startswith("bulkhead_engine_load_seconds_count")]
    loads = int(count.removeprefix('bulkhead_engine_load_seconds_count{engine="odd"} '))
    assert loads >= 2, "one before the hang, one after it"
    [forced] = [line for line in lines if line.startswith("bulkhead_kill_escalations_total")]
    assert re.fullmatch(r'bulkhead_kill_escalations_total\{engine="odd",signal="SIGKILL"\} [1-9]', forced), forced
    until(lambda: "bulkhead_model_cache_bytes 12345" in scrape(folder), folder)
    told = re.compile(r"synthetic loaded on cpu in [0-9.]+ s, \d+ MiB")
    until(lambda: len(told.findall((folder / "stderr").read_text())) >= loads, folder)
    assert len(told.findall((folder / "stderr").read_text())) == loads
