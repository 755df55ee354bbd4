"""`supervisor run` in the studio dialect works for our own coordinator: real engines, all five kinds, one approval."""

from __future__ import annotations

import contextlib
import hashlib
import http.server
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

from coordinator.studio.claims import Source, SourceFile
from coordinator.studio.session import StudioSettings
from coordinator.testing import Running, running
from supervisor.errors import ExitCode

PATIENCE_S = 120.0
WEIGHTS = b"weights" * 1000
FETCHING = """
[coordinator]
url = "{url}"
dialect = "studio"
[coordinator.studio]
models = "download"
kinds = ["llm"]
hosts = ["127.0.0.1"]
[worker]
name = "box"
state_dir = "state"
[limits]
drain_s = 10
"""
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


class Hub(http.server.BaseHTTPRequestHandler):
    """Where a model's one file is."""

    def do_GET(self) -> None:
        """All of it: so small a file needs no resuming."""
        self.send_response(200 if self.path == "/m.bin" else 404)
        self.send_header("content-length", str(len(WEIGHTS) if self.path == "/m.bin" else 0))
        self.end_headers()
        if self.path == "/m.bin":
            self.wfile.write(WEIGHTS)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing."""


@pytest.fixture
def hub() -> Iterator[str]:
    """The address of a stand-in for a hub."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


@contextlib.contextmanager
def supervisor(folder: Path, url: str, words: str = CONFIG) -> Iterator[subprocess.Popen[bytes]]:
    """`supervisor run`; killed when the block is left, if it still lives."""
    config = folder / "worker.toml"
    config.write_text(words.format(url=url))
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
def test_a_model_that_nobody_has_is_fetched_for_its_first_job(tmp_path: Path, hub: str) -> None:
    """The coordinator knows where its files are, and the worker that it may fetch them."""
    sha256 = hashlib.sha256(WEIGHTS).hexdigest()
    file = SourceFile(role="model", url=f"{hub}/m.bin", filename="m.bin", approx_bytes=len(WEIGHTS), sha256=sha256)
    sources = {"synthetic-far": Source(engine="synthetic", kinds=["llm"], files=[file])}
    with contextlib.ExitStack() as stack:
        there = stack.enter_context(
            running(tmp_path / "coordinator", studio=StudioSettings(asked=100), studio_models=sources)
        )
        key = there.coordinator.keys.create("admin")
        headers = {"authorization": f"Bearer {key}"}
        admin = stack.enter_context(httpx.Client(base_url=there.url, headers=headers, timeout=PATIENCE_S))
        assert admin.get("/v1/models").json()["data"] == []
        process = stack.enter_context(supervisor(tmp_path, there.url, FETCHING))
        served(there, process, admin)
        assert [one["id"] for one in admin.get("/v1/models").json()["data"]] == ["synthetic-far"]
        said = {"model": "synthetic-far", "messages": [{"role": "user", "content": "from afar"}]}
        answer = admin.post("/v1/chat/completions", json=said)
        assert answer.status_code == 200, (answer.text, (tmp_path / "log").read_text())
        assert answer.json()["choices"][0]["message"]["content"]
        assert (tmp_path / "state" / "studio" / "models" / "synthetic-far" / "m.bin").read_bytes() == WEIGHTS
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == ExitCode.STOPPED, (tmp_path / "log").read_text()


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
