"""`supervisor run` for a studio whose jobs bring the address of their model: fetched, proved, run, kept."""

from __future__ import annotations

import contextlib
import hashlib
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from supervisor.errors import ExitCode
from supervisor.testing_studio import Rules, StudioServer, open_studio_server

PATIENCE_S = 120.0
TASK = {"kind": "llm", "messages": [{"role": "user", "content": "from afar"}]}
DATA = b"weights" * 1000


@contextlib.contextmanager
def program(folder: Path, url: str) -> Iterator[subprocess.Popen[bytes]]:
    """`supervisor run` without a model of its own."""
    config = folder / "worker.toml"
    config.write_text(
        f'[coordinator]\nurl = "{url}"\ndialect = "studio"\n[coordinator.studio]\nmodels = "download"\n'
        f'kinds = ["llm"]\nhosts = ["127.0.0.1"]\n[worker]\nname = "box"\nstate_dir = "state"\n[limits]\ndrain_s = 10\n'
    )
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "supervisor", "run", "--config", str(config)], stdout=log, stderr=log
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait(PATIENCE_S)


def source(server: StudioServer, sha256: str = "") -> dict[str, Any]:
    """Where the model is: at the studio itself."""
    file = {"role": "model", "url": f"{server.url}/goods/m.bin", "filename": "m.bin", "approxBytes": len(DATA)}
    digest = sha256 or hashlib.sha256(DATA).hexdigest()
    return {"engine": "synthetic", "files": [{**file, "sha256": digest}], "cliDefaults": {}}


async def ended(process: subprocess.Popen[bytes], folder: Path) -> None:
    """A proper end."""
    process.send_signal(signal.SIGTERM)
    with trio.fail_after(PATIENCE_S):
        code = await trio.to_thread.run_sync(process.wait)
    words = (folder / "log").read_text()
    assert code == ExitCode.STOPPED, words
    assert "a mistake of ours" not in words


@pytest.mark.slow
async def test_a_model_comes_with_its_job_and_stays(tmp_path: Path) -> None:
    async with open_studio_server(Rules(again_s=0.1, attempts=1)) as server:
        server.approving = True
        server.goods["m.bin"] = DATA
        bad = server.enqueue(TASK, "synthetic-bad", modelSource=source(server, "0" * 64))
        good = server.enqueue(TASK, "synthetic-good", modelSource=source(server))
        with program(tmp_path, server.url) as process:
            for job in (bad, good):
                await server.until(lambda job=job: job.ends or process.poll() is not None, f"{job.id} ends", PATIENCE_S)
                assert process.poll() is None, (tmp_path / "log").read_text()
            assert (bad.state, "sha256" in bad.error) == ("failed", True), bad.error
            assert (good.state, good.error) == ("done", "")
            assert good.result["choices"][0]["message"]["content"]
            assert server.past[0].said("hello")[0]["capabilities"]["taskKinds"] == ["llm"]
            about = f"{good.claim['model']} is fetched: 1 files"
            await server.until(
                lambda: any(about in line["message"] for line in server.logs if line.get("jobId") == good.id),
                "the studio is told how far the model is",
                PATIENCE_S,
            )
            await ended(process, tmp_path)
        folder = tmp_path / "state" / "studio" / "models"
        assert (folder / "synthetic-good" / "m.bin").read_bytes() == DATA
        assert json.loads((folder / ".store" / "named" / "synthetic-good").read_text())["table"]["name"]
        del server.goods["m.bin"]
        with program(tmp_path, server.url) as process:
            await server.until(
                lambda: "synthetic-good" in server.past[-1].capabilities.get("supportedModels", ()),
                "the model of the earlier life is announced",
                PATIENCE_S,
            )
            again = server.enqueue(TASK, "synthetic-good", modelSource=source(server))
            await server.until(lambda: again.ends or process.poll() is not None, "the job ends", PATIENCE_S)
            assert (again.state, again.error) == ("done", "")
            await ended(process, tmp_path)
