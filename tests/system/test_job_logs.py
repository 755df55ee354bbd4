"""A real supervisor with a real engine: what its coordinator can tell of one job afterwards, and what it never knew."""

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
from typing import Any

import httpx
import pytest

from coordinator.cli.main import OK, main

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
[[models]]
name = "synthetic"
engine = "synthetic"
"""


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """Of a running supervisor."""
    (tmp_path / "worker.toml").write_text(CONFIG)
    with (tmp_path / "stderr").open("wb") as log:
        argv = [sys.executable, "-m", "supervisor", "run", "--config", str(tmp_path / "worker.toml")]
        process = subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        try:
            yield tmp_path
        finally:
            process.send_signal(signal.SIGTERM)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(60)
            process.kill()
            process.wait()


def until(found: Any, folder: Path) -> Any:
    """What `found()` returns, once it is something."""
    end = time.monotonic() + PATIENCE_S
    while True:
        with contextlib.suppress(OSError, httpx.HTTPError, KeyError):
            if it := found():
                return it
        assert time.monotonic() < end, (folder / "stderr").read_text()
        time.sleep(0.05)


def test_the_log_and_the_use_of_a_job_are_known_and_its_words_are_not(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = until(lambda: json.loads((folder / "state" / "endpoint.json").read_text()), folder)
    headers = {"authorization": f"Bearer {Path(told['client_key_file']).read_text().strip()}"}
    with httpx.Client(base_url=told["url"], headers=headers, timeout=PATIENCE_S) as http:
        until(lambda: http.get("/v1/models").json()["data"], folder)
        body = {"kind": "llm", "model": "synthetic", "params": {"prompt": WORDS}, "wait": True}
        job = http.post("/v1/jobs", json=body).raise_for_status().json()
        assert job["state"] == "succeeded"
        assert job["usage"]["compute_ms"] > 0
        held_ms = job["finished_ms"] - job["started_ms"]
        assert job["usage"]["compute_ms"] <= held_ms + 1000  # the coordinator's clock is another one
    state = str(folder / "state" / "coordinator")
    assert main(["keys", "create", "--scope", "admin", "--state", state]) == OK
    key = folder / "boss"
    key.write_text(capsys.readouterr().out.split()[0])
    asked = ["jobs", "logs", job["id"], "--url", told["url"], "--key-file", str(key)]

    def lines() -> str:
        assert main(asked) in (OK, 1)  # the key may not be known to the server yet
        said = capsys.readouterr().out
        return said if "llm job done in" in said else ""

    said = until(lines, folder)
    assert re.search(r"^\S+Z info +box: \S+: llm job done in [0-9.]+ s$", said, re.MULTILINE)
    assert WORDS.split()[1] not in said
    assert main([*asked, "--json"]) == OK
    found = json.loads(capsys.readouterr().out)
    assert {line["worker"] for line in found["data"]} == {"box"}
    assert {line["job"] for line in found["data"]} == {job["id"]}
    assert WORDS not in json.dumps(found)
