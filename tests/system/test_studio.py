"""`supervisor run` works for a studio: real engines, all five kinds, and a worker that is killed in the middle."""

from __future__ import annotations

import contextlib
import signal
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio

from supervisor.errors import ExitCode
from supervisor.testing_studio import Rules, StudioServer, open_studio_server
from tests.certificates import self_signed

PATIENCE_S = 120.0
MODELS = """
[limits]
drain_s = 10
[[models]]
name = "synthetic"
engine = "synthetic"
[[models]]
name = "synthetic-slow"
engine = "synthetic"
options = { tokens = 160, delay_ms = 25 }
[[models]]
name = "synthetic-endless"
engine = "synthetic"
options = { tokens = 20000, delay_ms = 25 }
"""
TASKS = {
    "llm": {"kind": "llm", "messages": [{"role": "user", "content": "from afar"}]},
    "audio_stt": {"kind": "audio_stt", "inputUrl": "/goods/speech.wav"},
    "audio_tts": {"kind": "audio_tts", "text": "hello"},
    "image": {"kind": "image", "prompt": "a red square", "ext": "png", "width": 64, "height": 64},
    "video": {"kind": "video", "prompt": "a red film", "seconds": 0.5, "width": 64, "height": 64},
}
SLOW = {"kind": "llm", "messages": [{"role": "user", "content": "at length"}]}


class Program:
    """`supervisor run` in a folder."""

    def __init__(self, folder: Path, url: str, authority: Path | None = None) -> None:
        self.log = folder / "log"
        self._config = folder / "worker.toml"
        trust = f'tls_ca = "{authority}"\n' if authority is not None else ""
        self._config.write_text(
            f'[coordinator]\nurl = "{url}"\ndialect = "studio"\n{trust}'
            f'[worker]\nname = "box"\nstate_dir = "state"\n{MODELS}'
        )

    async def says(self, *words: str) -> str:
        """What `supervisor WORDS` prints beside it."""
        argv = [sys.executable, "-m", "supervisor", *words, "--config", str(self._config)]
        done = await trio.run_process(argv, capture_stdout=True, capture_stderr=True, check=False)
        return (done.stdout + done.stderr).decode()

    @contextlib.contextmanager
    def running(self) -> Iterator[subprocess.Popen[bytes]]:
        """One life of it; killed when the block is left, if it still lives."""
        with self.log.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "supervisor", "run", "--config", str(self._config)], stdout=log, stderr=log
            )
        try:
            yield process
        finally:
            process.kill()
            process.wait(PATIENCE_S)


async def until(server: StudioServer, process: subprocess.Popen[bytes], true: Callable[[], object], what: str) -> None:
    """Wait for what the worker has to do, as long as it lives."""
    await server.until(lambda: true() or process.poll() is not None, what, PATIENCE_S)
    assert process.poll() is None, f"it ended with {process.returncode} before {what}"


def told(server: StudioServer) -> str:
    """What its log said of jobs."""
    return "\n".join(
        f"{line['message'].partition(' in ')[0]} of {line['jobId']}" for line in server.logs if "jobId" in line
    )


async def gone(process: subprocess.Popen[bytes]) -> int:
    """Its exit code."""
    with trio.fail_after(PATIENCE_S):
        return await trio.to_thread.run_sync(process.wait)


@pytest.fixture
async def server():
    async with open_studio_server(Rules(again_s=0.1)) as server:
        server.approving = True
        yield server


@pytest.mark.slow
async def test_all_five_kinds_and_a_proper_end(server: StudioServer, tmp_path: Path) -> None:
    program = Program(tmp_path, server.url)
    with program.running() as process:
        jobs = {}
        for kind, task in TASKS.items():
            if kind != "audio_stt":
                jobs[kind] = server.enqueue(task, "synthetic")
        await until(server, process, lambda: all(job.ends for job in jobs.values()), "four jobs")
        assert jobs["audio_tts"].file is not None
        server.goods["speech.wav"] = jobs["audio_tts"].file  # what was spoken is what is heard
        jobs["audio_stt"] = server.enqueue(TASKS["audio_stt"], "synthetic")
        await until(server, process, lambda: jobs["audio_stt"].ends, "the fifth")
        heard = f"image job done of {jobs['image'].id}"
        await until(server, process, lambda: heard in told(server), "the lines of its log")
        process.send_signal(signal.SIGTERM)
        assert await gone(process) == ExitCode.STOPPED, program.log.read_text()
    ends = {kind: (job.state, job.ends, job.error, job.attempts) for kind, job in jobs.items()}
    assert ends == {kind: ("done", 1, "", 0) for kind in TASKS}, program.log.read_text()
    assert jobs["llm"].result["choices"][0]["message"]["content"]
    assert jobs["image"].file is not None
    assert jobs["image"].file.startswith(b"\x89PNG")
    assert jobs["audio_tts"].file.startswith(b"RIFF")
    assert jobs["video"].file is not None
    assert jobs["video"].file[4:8] == b"ftyp"
    assert jobs["audio_stt"].result["duration"] > 0
    state = tmp_path / "state" / "studio" / "credentials.json"
    assert state.stat().st_mode & 0o777 == 0o600


@pytest.mark.slow
async def test_a_worker_that_is_killed_in_the_middle_ends_its_job_once(server: StudioServer, tmp_path: Path) -> None:
    program = Program(tmp_path, server.url)
    with program.running() as process:
        job = server.enqueue(SLOW, "synthetic-slow")
        await until(server, process, lambda: server.past and server.past[-1].accepted, "accept")
        process.kill()
        await gone(process)
    await server.until(lambda: job.state == "queued", "the job comes back")
    with program.running() as process:
        await until(server, process, lambda: job.ends, "its end")
        process.send_signal(signal.SIGTERM)
        assert await gone(process) == ExitCode.STOPPED, program.log.read_text()
    assert (job.state, job.ends, job.attempts) == ("done", 1, 1)
    assert server.minted == 1
    assert len(server.past) == 2


@pytest.mark.slow
async def test_a_rejected_worker_ends_with_the_code_that_is_not_restarted(server: StudioServer, tmp_path: Path) -> None:
    server.approving = False
    program = Program(tmp_path, server.url)
    with program.running() as process:
        await until(server, process, lambda: server.requests, "a request")
        server.reject(next(iter(server.requests)), "not one of ours")
        assert await gone(process) == ExitCode.REFUSED
    assert "not one of ours" in program.log.read_text()
    assert "remove" in program.log.read_text()


@pytest.mark.slow
async def test_over_tls_its_owner_is_told_what_it_waits_for_and_may_send_a_job_elsewhere(tmp_path: Path) -> None:
    pem, key = self_signed(tmp_path)
    served = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    served.load_cert_chain(pem, key)
    async with open_studio_server(Rules(again_s=0.1), tls=served) as server:
        program = Program(tmp_path, server.url, pem)
        with program.running() as process:
            await until(server, process, lambda: server.requests, "a request to be let in")
            said = ""
            with trio.fail_after(PATIENCE_S):
                while "waiting for approval: ask the studio's admin" not in said:
                    said = await program.says("status")
            server.approve(next(iter(server.requests)))
            painted = server.enqueue(TASKS["image"], "synthetic")
            await until(server, process, lambda: painted.ends, "a picture")
            long = server.enqueue(SLOW, "synthetic-endless")
            session = server.past[0]
            await until(server, process, lambda: session.accepted, "the long job")
            said = await program.says("jobs", "cancel", long.id, "--reason", "a game")
            await until(server, process, lambda: long.refused_by, "the job is declined when it comes again")
            assert (long.state, long.attempts) == ("queued", 1), said
            assert "a game" in session.said("fail")[0]["error"]
            process.send_signal(signal.SIGTERM)
            assert await gone(process) == ExitCode.STOPPED, program.log.read_text()
