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
from typing import Any

import httpx
import pytest

from supervisor.errors import ExitCode

PATIENCE_S = 120.0
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
            assert client.post("/v1/jobs", json={**job, "wait": PATIENCE_S / 2}).json()["state"] == "succeeded"
            chat = client.post("/v1/chat/completions", json=CHAT)
            assert chat.json()["choices"][0]["message"]["content"] == "from afar"
            picture = client.post("/v1/images/generations", json={"model": CHAT["model"], "prompt": "a red square"})
            assert picture.json()["data"][0]["b64_json"], "its file did not come back over the network"
            assert ended(supervisor) == ExitCode.STOPPED
        assert ended(coordinator) == 0


ALLOWED = """
allow = ["worker.labels.*", "limits.drain_s"]
"""


class Boss:
    """An admin of the coordinator, and the one worker that he orders about."""

    def __init__(self, client: httpx.Client) -> None:
        self.client = client
        until = time.monotonic() + PATIENCE_S
        while not self.seen():  # the worker may know that it is welcome before anybody else does
            assert time.monotonic() < until
            time.sleep(0.02)
        (self.worker,) = [one["id"] for one in self.seen()]

    def seen(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.client.get("/v1/workers").raise_for_status().json()["data"]
        return found

    def until(self, **wanted: Any) -> None:
        """Wait until the worker is seen so."""
        until = time.monotonic() + PATIENCE_S
        while {name: self.seen()[0][name] for name in wanted} != wanted:
            assert time.monotonic() < until, self.seen()
            time.sleep(0.05)

    def says(self, verb: str, **body: Any) -> None:
        assert self.client.post(f"/v1/workers/{self.worker}/{verb}", json=body).status_code == 202

    def orders(self, verb: str, **arguments: Any) -> tuple[int, dict[str, Any]]:
        order = {"verb": verb, "arguments": arguments}
        answer = self.client.post(f"/v1/workers/{self.worker}/order", json=order)
        return answer.status_code, answer.json()


def test_an_admin_of_the_coordinator_orders_a_worker_about(tmp_path: Path) -> None:
    """Every remote verb from the admin's request to what the supervisor then does, over a real link."""
    desk, far = tmp_path / "desk", tmp_path / "far"
    far.mkdir()
    serve = ["coordinator", "serve", "--listen", "127.0.0.1:0", "--state", str(desk)]
    with program(serve, tmp_path, "coordinator.log") as coordinator:
        url = said(coordinator, tmp_path / "coordinator.log", r"Serving (http://\S+)/v1 with").group(1)
        keys = [sys.executable, "-m", "coordinator", "keys", "create", "--scope", "admin", "--state", str(desk)]
        key = subprocess.run(keys, capture_output=True, text=True, timeout=PATIENCE_S, check=True).stdout.strip()
        config, log = far / "worker.toml", tmp_path / "supervisor.log"
        config.write_text(
            f'[coordinator]\nurl = "{url.replace("http", "ws", 1)}"\ntoken_file = "{desk / "worker.token"}"{ALLOWED}'
            f'[worker]\nname = "far"\nstate_dir = "state"\nlabels = {{ rack = "3" }}\n{MODELS}'
        )
        with (
            program(["supervisor", "run", "--config", str(config)], tmp_path, log.name) as supervisor,
            httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=PATIENCE_S) as client,
        ):
            said(supervisor, log, "connected to")
            boss = Boss(client)
            boss.says("pause", reason="maintenance", for_s=3600)
            boss.until(accepting=False, reason="maintenance")
            boss.says("resume")
            boss.until(accepting=True, models=["synthetic-far"])
            boss.says("drain")
            boss.until(accepting=False)
            boss.says("resume")
            boss.until(accepting=True)

            code, done = boss.orders("log_level", level="debug", for_s=600)
            assert (code, done["ok"]) == (200, True), done
            said(supervisor, log, " debug ")
            code, done = boss.orders("probe", model="synthetic-far")
            assert (code, done["detail"]) == (200, {"synthetic-far": "it works"}), done
            code, done = boss.orders("configure", changes={"worker.labels.rack": "4"})
            assert (code, done["detail"]) == (200, {"worker.labels.rack": "written"}), done
            boss.until(labels={"rack": "4"})
            before = config.read_text()
            code, done = boss.orders("configure", changes={"limits.drain_s": 5, "worker.name": "mine"})
            assert (code, "does not let a coordinator change worker.name" in done["message"]) == (409, True), done
            code, done = boss.orders("dance")
            assert (code, "does not know the order 'dance'" in done["message"]) == (409, True), done
            assert config.read_text() == before, "a push that is refused in part is refused whole"

            boss.says("shutdown", reason="the box is sold")
            assert supervisor.wait(PATIENCE_S) == ExitCode.STOPPED
            assert "the box is sold" in log.read_text()
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
