"""`supervisor run` in the studio dialect works for our own coordinator: real engines, all five kinds, one approval."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from coordinator.studio.session import StudioSettings
from coordinator.testing import Running, running
from supervisor.errors import ExitCode

PATIENCE_S = 120.0
CONFIG = """
[coordinator]
url = "{url}"
dialect = "studio"
[worker]
name = "box"
state_dir = "state"
[limits]
drain_s = 10
[[models]]
name = "synthetic"
engine = "synthetic"
"""


@pytest.fixture
def there(tmp_path: Path) -> Iterator[Running]:
    with running(tmp_path / "coordinator", studio=StudioSettings(asked=100)) as it:
        yield it


@contextlib.contextmanager
def supervisor(folder: Path, url: str) -> Iterator[subprocess.Popen[bytes]]:
    """`supervisor run`; killed when the block is left, if it still lives."""
    config = folder / "worker.toml"
    config.write_text(CONFIG.format(url=url))
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "supervisor", "run", "--config", str(config)], stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait(PATIENCE_S)


def served(there: Running, process: subprocess.Popen[bytes], admin: httpx.Client) -> None:
    """Approve whoever asks, until the models are served."""
    end = time.monotonic() + PATIENCE_S
    pause = threading.Event()
    while not any(worker["models"] for worker in admin.get("/v1/workers").json()["data"]):
        assert time.monotonic() < end, "no worker came"
        assert process.poll() is None, "the supervisor ended"
        for one in admin.get("/v1/registrations?state=pending").json()["data"]:
            admin.post(f"/v1/registrations/{one['id']}/approve").raise_for_status()
        pause.wait(0.05)


@pytest.mark.slow
def test_all_five_kinds_by_the_openai_client(there: Running, tmp_path: Path) -> None:
    key = there.coordinator.keys.create("admin")
    with (
        supervisor(tmp_path, there.url) as process,
        httpx.Client(base_url=there.url, headers={"authorization": f"Bearer {key}"}, timeout=PATIENCE_S) as admin,
        openai.OpenAI(base_url=f"{there.url}/v1", api_key=there.key, max_retries=0, timeout=PATIENCE_S) as ai,
    ):
        served(there, process, admin)
        (worker,) = admin.get("/v1/workers").json()["data"]
        assert worker["protocol"] == "studio"

        said = [{"role": "user", "content": "from afar"}]
        chat = ai.chat.completions.create(model="synthetic", messages=said)  # type: ignore[arg-type]
        assert chat.choices[0].message.content
        assert chat.usage is not None
        assert chat.usage.completion_tokens > 0
        stream = ai.chat.completions.create(model="synthetic", messages=said, stream=True)  # type: ignore[arg-type]
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert "".join(pieces) == chat.choices[0].message.content

        speech = ai.audio.speech.create(model="synthetic", input="hello", voice="default", response_format="wav")
        assert speech.content.startswith(b"RIFF")
        heard = ai.audio.transcriptions.create(model="synthetic", file=("speech.wav", speech.content))
        assert heard.text

        image = admin.post(
            "/v1/images/generations",
            json={"model": "synthetic", "prompt": "a red square", "size": "64x64", "response_format": "url"},
        ).json()
        picture = httpx.get(image["data"][0]["url"]).content
        assert image["size"] == "64x64"
        assert picture.startswith(b"\x89PNG")

        asked = {"prompt": "a red film", "seconds": 0.5, "width": 64, "height": 64, "format": "mp4"}
        job = {"kind": "video", "model": "synthetic", "params": asked, "wait": PATIENCE_S / 2}
        film = admin.post("/v1/jobs", json=job).raise_for_status().json()
        assert film["state"] == "succeeded", film
        assert admin.get(film["files"][0]["url"]).content[4:8] == b"ftyp"

        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == ExitCode.STOPPED, (tmp_path / "log").read_text()
    end = time.monotonic() + PATIENCE_S
    while there.coordinator.parts.dispatcher.workers():  # the coordinator learns it when the connection ends
        assert time.monotonic() < end, "it is still counted"
        time.sleep(0.02)


@pytest.mark.slow
def test_a_worker_that_is_put_out_ends_with_the_code_that_is_not_restarted(there: Running, tmp_path: Path) -> None:
    key = there.coordinator.keys.create("admin")
    with (
        supervisor(tmp_path, there.url) as process,
        httpx.Client(base_url=there.url, headers={"authorization": f"Bearer {key}"}, timeout=PATIENCE_S) as admin,
    ):
        served(there, process, admin)
        (one,) = admin.get("/v1/registrations").json()["data"]
        admin.post(f"/v1/registrations/{one['id']}/reject", json={"reason": "sold"}).raise_for_status()
        assert process.wait(PATIENCE_S) == ExitCode.REFUSED, (tmp_path / "log").read_text()
