"""A real supervisor with a real engine: what its metrics, its log file and its stderr say of two jobs, and what not."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from supervisor.observe.metrics_table import BY_NAME

PATIENCE_S = 120.0
WORDS = "my secret diary says"
CONFIG = """\
[coordinator]
listen = "127.0.0.1:0"
[worker]
name = "box"
state_dir = "state"
[log]
level = "debug"
file = "worker.log"
[[models]]
name = "synthetic"
engine = "synthetic"
"""
SAMPLE = re.compile(r'bulkhead_[a-z_]+(\{[a-z_]+="(\\.|[^"\\])*"(,[a-z_]+="(\\.|[^"\\])*")*\})? \S+')


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """Of a running supervisor; a parameter is another place for its log file."""
    place = getattr(request, "param", "worker.log")
    (tmp_path / "worker.toml").write_text(CONFIG.replace("worker.log", place))
    (tmp_path / "blocked").write_text("a file where the folder should be")
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


def scrape(folder: Path, *wanted: str) -> list[str]:
    """The metrics, once they have these lines: a caller has its answer before everything about its job is counted."""
    transport = httpx.HTTPTransport(uds=str(folder / "state" / "control.sock"))
    until = time.monotonic() + PATIENCE_S
    with httpx.Client(transport=transport, base_url="http://control", timeout=PATIENCE_S) as client:
        while True:
            lines = client.get("/v1/metrics").raise_for_status().text.splitlines()
            if set(wanted) <= set(lines):
                return lines
            assert time.monotonic() < until, sorted(set(wanted) - set(lines))
            time.sleep(0.02)


def whole_lines(path: Path) -> str:
    """What a log file has; its last line may just be written."""
    text = path.read_text() if path.exists() else ""
    return text[: text.rfind("\n") + 1]


def client(folder: Path) -> httpx.Client:
    """Of the coordinator, when it offers the model."""
    until = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(OSError, httpx.HTTPError, KeyError):
            told = json.loads((folder / "state" / "endpoint.json").read_text())
            key = Path(told["client_key_file"]).read_text().strip()
            made = httpx.Client(base_url=told["url"], headers={"authorization": f"Bearer {key}"}, timeout=PATIENCE_S)
            if made.get("/v1/models").json()["data"]:
                return made
            made.close()
        assert time.monotonic() < until, (folder / "stderr").read_text()
        time.sleep(0.02)


def test_two_jobs_are_counted_and_logged_without_their_words(folder: Path) -> None:
    with contextlib.closing(client(folder)) as http:
        body = {"model": "synthetic", "messages": [{"role": "user", "content": WORDS}]}
        assert http.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"] == WORDS
        assert WORDS.split()[-1] in http.post("/v1/chat/completions", json={**body, "stream": True}).text
        key = http.headers["authorization"].removeprefix("Bearer ")
    lines = scrape(
        folder,
        'bulkhead_jobs_total{kind="llm",model="synthetic",outcome="succeeded"} 2',
        *(
            f'bulkhead_job_duration_seconds_count{{kind="llm",phase="{phase}"}} 2'
            for phase in ("accept", "fetch", "queue", "run", "upload")
        ),
        'bulkhead_time_to_first_token_seconds_count{kind="llm",model="synthetic"} 1',  # one was streamed
    )
    assert [line for line in lines if not line.startswith("#") and not SAMPLE.fullmatch(line)] == []
    declared = [line.split()[2] for line in lines if line.startswith("# TYPE")]
    ours = {name.removeprefix("bulkhead_") for name in declared if not name.startswith("bulkhead_gpu_")}
    assert ours <= set(BY_NAME), "not in the table, so on no dashboard"
    assert len(declared) == len(set(declared)), "a family is declared twice"
    assert "bulkhead_up 1" in lines
    for name in ("tokens_total", "disk_free_bytes", "rss_bytes", "heartbeat_age_seconds", "log_lines_total"):
        assert any(line.startswith(f"bulkhead_{name}") for line in lines), name

    until = time.monotonic() + PATIENCE_S
    while (text := whole_lines(folder / "worker.log")).count("llm job done in") < 2:
        assert time.monotonic() < until, text
        time.sleep(0.02)
    told = [json.loads(line) for line in text.splitlines()]
    ended = [found for found in told if re.fullmatch(r"llm job done in [0-9.]+ s", found["message"])]
    assert len({found["job"] for found in ended}) == 2
    assert {(found["attempt"], found["model"]) for found in ended} == {(1, "synthetic")}
    for told in (text, (folder / "stderr").read_text(), "\n".join(lines)):
        assert WORDS not in told
        assert key not in told


def test_files_that_travel_are_counted(folder: Path) -> None:
    with contextlib.closing(client(folder)) as http:
        body = {"model": "synthetic", "input": "one two three", "voice": "default", "response_format": "wav"}
        speech = http.post("/v1/audio/speech", json=body).raise_for_status().content
        files = {"file": ("a.wav", speech, "audio/wav")}
        http.post("/v1/audio/transcriptions", data={"model": "synthetic"}, files=files).raise_for_status()
    scrape(
        folder,
        f'bulkhead_transfer_bytes_total{{direction="out"}} {len(speech)}',
        f'bulkhead_transfer_bytes_total{{direction="in"}} {len(speech)}',
    )


@pytest.mark.parametrize("folder", ["blocked/worker.log"], indirect=True)
def test_a_log_file_that_cannot_be_written_or_is_taken_away_stops_nobody(folder: Path) -> None:
    def chat(http: httpx.Client) -> None:
        body = {"model": "synthetic", "messages": [{"role": "user", "content": WORDS}]}
        http.post("/v1/chat/completions", json=body).raise_for_status()

    def lines_of_jobs(least: int) -> None:
        until = time.monotonic() + PATIENCE_S
        path = folder / "blocked" / "worker.log"
        while whole_lines(path).count("llm job done in") < least:
            assert time.monotonic() < until, (folder / "stderr").read_text()
            time.sleep(0.02)

    with contextlib.closing(client(folder)) as http:
        chat(http)
        chat(http)
        until = time.monotonic() + PATIENCE_S
        while (complaints := (folder / "stderr").read_text().count("cannot be written")) == 0:
            assert time.monotonic() < until
            time.sleep(0.02)
        assert complaints == 1
        (folder / "blocked").unlink()
        lines_of_jobs(2)  # what waited in memory
        (folder / "blocked" / "worker.log").unlink()
        chat(http)
        lines_of_jobs(1)
    assert 'bulkhead_log_dropped_total{sink="file"} 0' in scrape(folder)
