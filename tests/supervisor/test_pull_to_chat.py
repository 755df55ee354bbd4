"""From nothing to an own GGUF chat in two commands, as a newcomer types them."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import httpx
import pytest

CHAT = Path(__file__).parents[2] / "engines" / "llm" / "fixture" / "chat-q8_0.gguf"
PATIENCE_S = 90.0


@pytest.mark.engine
@pytest.mark.slow
def test_two_commands_to_a_chat(tmp_path: Path):
    pytest.importorskip("xllamacpp", reason="the llm extra is not installed")
    pytest.importorskip("uvicorn", reason="the coordinator extra is not installed")
    shutil.copy(CHAT, tmp_path / "my.gguf")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "BULKHEAD_CONFIG": str(tmp_path / "worker.toml"),  # a test machine may have one in /etc
        "BULKHEAD__COORDINATOR__LISTEN": "127.0.0.1:0",  # the default port may be taken on a test machine
    }
    command = [sys.executable, "-m", "supervisor"]
    subprocess.run(
        [*command, "models", "pull", "./my.gguf"], cwd=tmp_path, env=environment, check=True, timeout=PATIENCE_S
    )
    with subprocess.Popen(
        [*command, "run"], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        watchdog = threading.Timer(PATIENCE_S, process.kill)
        watchdog.start()
        try:
            said = _read_until_key(process)
            assert _ask(said) == "1 2 3 4 5"
        finally:
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=PATIENCE_S)
            watchdog.cancel()
    assert process.returncode == 0


def _read_until_key(process: subprocess.Popen[str]) -> dict[str, str]:
    """Base URL and key, from what `supervisor run` prints for people."""
    assert process.stdout is not None
    found: dict[str, str] = {}
    for line in process.stdout:
        if match := re.match(r"Base URL\s+(\S+)", line):
            found["url"] = match[1]
        if match := re.match(r"Client key\s+in (\S+)", line):
            found["key"] = Path(match[1]).read_text().strip()
        if len(found) == 2:
            return found
    raise AssertionError("supervisor run ended without a base URL")


def _ask(where: dict[str, str]) -> str:
    """Ask until the model is announced: engines are proven in the background after the start."""
    question = {"model": "my", "messages": [{"role": "user", "content": "count to 5"}], "temperature": 0}
    headers = {"Authorization": f"Bearer {where['key']}"}
    with httpx.Client(base_url=where["url"], headers=headers, timeout=PATIENCE_S) as http:
        while True:  # bounded by the watchdog, which ends the server
            models = http.get("/models").json()["data"]
            if any(model["id"] == "my" for model in models):
                break
        answer = http.post("/chat/completions", json=question)
        answer.raise_for_status()
        return str(answer.json()["choices"][0]["message"]["content"]).strip()
