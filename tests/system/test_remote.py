"""A coordinator of its own and a supervisor that works for it: two programs, one token, nothing shared but a socket."""

from __future__ import annotations

import contextlib
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from supervisor.errors import ExitCode

PATIENCE_S = 60.0
CHAT = {"model": "synthetic-far", "messages": [{"role": "user", "content": "from afar"}]}
MODELS = """
[[models]]
name = "synthetic-far"
engine = "synthetic"
kinds = ["llm", "image"]
"""


@contextlib.contextmanager
def program(argv: list[str], folder: Path, name: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run one of ours, with its output in `folder/name`; it is gone when the block is left."""
    with (folder / name).open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", *argv], stdout=log, stderr=log, cwd=folder)
    try:
        yield process
    finally:
        process.kill()
        process.wait(PATIENCE_S)


def said(process: subprocess.Popen[bytes], file: Path, pattern: str) -> re.Match[str]:
    """Wait until the program has said something. AssertionError when it ends first."""
    until = time.monotonic() + PATIENCE_S
    while not (found := re.search(pattern, file.read_text())):
        assert process.poll() is None, file.read_text()
        assert time.monotonic() < until, file.read_text()
        time.sleep(0.02)
    return found


def ended(process: subprocess.Popen[bytes]) -> int:
    """Stop it in order; returns its exit code."""
    process.send_signal(signal.SIGTERM)
    return process.wait(PATIENCE_S)


@pytest.mark.parametrize("made", ["at the start", "by keys create"])
def test_two_programs_and_a_token(tmp_path: Path, made: str) -> None:
    desk, far = tmp_path / "desk", tmp_path / "far"
    far.mkdir()
    serve = ["coordinator", "serve", "--listen", "127.0.0.1:0", "--state", str(desk)]
    with program(serve, tmp_path, "coordinator.log") as coordinator:
        told = said(coordinator, tmp_path / "coordinator.log", r"Serving (http://\S+)/v1 with the client key in (\S+)")
        url, key_file = told.groups()
        key = Path(key_file)
        assert key.stat().st_mode & 0o777 == 0o600
        token = desk / "worker.token"
        if made == "by keys create":
            argv = [sys.executable, "-m", "coordinator", "keys", "create", "--scope", "worker", "--state", str(desk)]
            answer = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE_S, check=True)
            token = far / "token"
            token.touch(0o600)
            token.write_text(answer.stdout)
        (far / "worker.toml").write_text(
            f'[coordinator]\nurl = "{url.replace("http", "ws", 1)}"\ntoken_file = "{token}"\n'
            f'[worker]\nstate_dir = "state"\n{MODELS}'
        )
        run = ["supervisor", "run", "--config", str(far / "worker.toml")]
        headers = {"Authorization": f"Bearer {key.read_text().strip()}"}
        with (
            program(run, tmp_path, "supervisor.log") as supervisor,
            httpx.Client(base_url=url, headers=headers, timeout=PATIENCE_S) as client,
        ):
            said(supervisor, tmp_path / "supervisor.log", "connected to")
            job = {"kind": "llm", "model": CHAT["model"], "params": {"prompt": "x"}, "wait_for_worker": True}
            assert client.post("/v1/jobs", json={**job, "wait": PATIENCE_S}).json()["state"] == "succeeded"
            chat = client.post("/v1/chat/completions", json=CHAT)
            assert chat.json()["choices"][0]["message"]["content"] == "from afar"
            picture = client.post("/v1/images/generations", json={"model": CHAT["model"], "prompt": "a red square"})
            assert picture.json()["data"][0]["b64_json"], "its file did not come back over the network"
            assert ended(supervisor) == ExitCode.STOPPED
        assert ended(coordinator) == 0


def test_beyond_loopback_needs_tls(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "coordinator", "serve", "--listen", "0.0.0.0:0", "--state", str(tmp_path / "desk")]
    refused = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE_S)
    assert refused.returncode != 0
    assert "--tls-cert and --tls-key, or --behind-proxy" in refused.stderr
    assert not (tmp_path / "desk").exists()
    config = tmp_path / "worker.toml"
    config.write_text(f'[coordinator]\nlisten = "0.0.0.0:0"\n[worker]\nstate_dir = "state"\n{MODELS}')
    argv = [sys.executable, "-m", "supervisor", "run", "--config", str(config)]
    refused = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE_S)
    assert refused.returncode == ExitCode.BAD_CONFIG
    assert "worker.toml:2: coordinator.listen: 0.0.0.0 can be reached" in refused.stderr
    assert "give tls_cert and tls_key" in refused.stderr
