"""`status`, `jobs`, `engines`, `gpus`, `holds` as a person types them, against a served socket."""

from __future__ import annotations

import functools
import json
import re
import subprocess
import sys
import textwrap
from typing import Any

import pytest
import trio

from supervisor.cli import main
from supervisor.control.commands.layout import Paper
from supervisor.control.commands.looking import jobs, one_job
from supervisor.control.jobs_seen import JobBook
from supervisor.control.server import open_control
from supervisor.control.snapshot import GpuView, IncidentView, Link, ModelView, Snapshot
from supervisor.intake.holds import Coming, Hold, Sight, Source

GIB = 2**30


FULL = Snapshot(
    version="1.2",
    worker="box",
    pid=7,
    uptime_s=4000,
    jobs=1,
    link=Link(url="ws://c", connected=True),
    holds=(Hold(source=Source.OPERATOR, reason="a game", since=1000.0),),
    models=(
        ModelView(
            name="chat", engine="llm", state="busy", device="cuda:0", running=1, slots=4, queued=2, vram_bytes=5 * GIB
        ),
        ModelView(name="draw", engine="image", state="starting", waits="waits for 3.1 GiB on GPU-1: chat is working"),
        ModelView(name="say", engine="piper", state="ready", device="cpu", idle_s=70.0, rss_bytes=GIB),
    ),
    gpus=(GpuView(uuid="GPU-1", name="H200", total_bytes=24 * GIB, free_bytes=GIB, ours_bytes=5 * GIB, busy=0.5),),
    incidents=(
        IncidentView(time="2026-11-21T13:00:00.123+00:00", model="chat", code="engine_crashed", message="Died."),
    ),
)


async def test_status_as_a_page(box, types, capsys):
    box.shown = FULL
    assert await types("status") == 0
    out = capsys.readouterr().out
    lines = out.splitlines()
    until = "until `supervisor resume`"
    assert lines[0] == f"box of ws://c: paused. Paused by the operator (a game) {until}. 1 job is still running."
    assert lines[1] == "supervisor 1.2 · pid 7 · up 1h 06m · 1 job"
    heads = [line.split()[0] for line in lines if line.split()[:1] in (["HOLD"], ["MODEL"], ["GPU"], ["LAST"])]
    assert heads == ["HOLD", "MODEL", "GPU", "LAST"]
    assert re.search(r"operator  everything  stop accepting  .* ago  resume  a game", out)
    assert "1/4 +2" in out
    assert "waits for 3.1 GiB on GPU-1: chat is working" in out
    assert "ready 1m 10s" in out
    assert "2026-11-21T13:00:00  chat   engine_crashed  Died." in out
    assert "?" in out  # what others hold is not known, and not invented


async def test_status_for_programs(box, types, capsys):
    box.shown = FULL
    assert await types("status", "--json") == 0
    seen = json.loads(capsys.readouterr().out)
    assert seen["models"][1]["waits"].startswith("waits for")
    assert seen["gpus"][0]["foreign_bytes"] is None


async def test_status_without_models_and_gpus(box, types, capsys):
    box.shown = Snapshot(version="1", gpu_reason="There is no GPU: none is listed.")
    assert await types("status") == 0
    out = capsys.readouterr().out
    assert "No model is configured." in out
    assert "There is no GPU: none is listed." in out


def test_nobody_to_ask(tmp_path, capsys):
    path = tmp_path / "worker.toml"
    path.write_text(f'config_version = 1\n[worker]\nstate_dir = "{tmp_path}"\n')
    assert main(["status", "--config", str(path)]) == 3
    err = capsys.readouterr().err
    assert f"{tmp_path}/control.sock" in err
    assert "supervisor run" in err


async def test_each_part_is_a_page_of_its_own(box, types, capsys):
    box.shown = FULL
    assert await types("engines") == 0
    assert "waits for 3.1 GiB on GPU-1: chat is working" in capsys.readouterr().out
    assert await types("gpus") == 0
    assert capsys.readouterr().out.startswith("GPU")
    assert await types("gpus", "--json") == 0
    assert json.loads(capsys.readouterr().out)["gpus"][0]["uuid"] == "GPU-1"


async def test_holds_say_what_is_coming_and_what_cannot_be_told(box, types, capsys):
    assert await types("holds") == 0
    assert capsys.readouterr().out == "Nothing holds this worker.\n"
    box.shown = Snapshot(
        version="1",
        holds=(Hold(source=Source.SCHEDULE, reason="quiet hours", since=1.0, until=2e10, gpu="GPU-1", kind="llm"),),
        sights=(Sight(source=Source.PRESENCE, text="whether somebody is there cannot be told", unknown=True),),
        coming=(Coming(source=Source.SCHEDULE, text="quiet hours begin", at=2e10),),
    )
    assert await types("holds") == 0
    out = capsys.readouterr().out
    assert "schedule  llm · GPU-1  stop accepting" in out
    assert "quiet hours begin." in out
    assert "Not known: whether somebody is there cannot be told." in out


# ---- jobs


def booked() -> JobBook:
    clock = iter(range(1000, 2000, 10))
    book = JobBook(now=lambda: float(next(clock)))
    book.began("j-done", 1, "llm", "chat")
    book.entered("j-done", 1, "run")
    book.ended("j-done", 1, "succeeded", "", {"completion_tokens": 42.0})
    book.began("j-bad", 2, "image", "draw")
    book.ended("j-bad", 2, "failed", "out_of_vram", {})
    book.began("j-runs", 1, "image", "draw")
    book.entered("j-runs", 1, "run")
    book.progressed("j-runs", 1, 7, 30)
    book.began("j-waits", 1, "llm", "chat")
    return book


async def test_jobs(box, tmp_path, capsys):
    (tmp_path / "worker.toml").write_text('[control]\nsocket = "jobs.sock"\n')

    async def types(*words: str) -> int:
        argv = [*words, "--config", str(tmp_path / "worker.toml")]
        return await trio.to_thread.run_sync(functools.partial(main, argv))

    async with open_control(tmp_path / "jobs.sock", box.surface._replace(jobs=booked())):
        assert await types("jobs") == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines[1:]] == ["j-runs", "j-waits", "j-bad", "j-done"]
        assert "7/30" in lines[1]
        assert re.search(r" waiting  .* It is being checked\.", lines[2])
        assert "out_of_vram: the " in lines[3]
        assert await types("jobs", "--state", "failed", "--json") == 0
        assert [job["job"] for job in json.loads(capsys.readouterr().out)["jobs"]] == ["j-bad"]
        assert await types("jobs", "--model", "nothing") == 0
        assert capsys.readouterr().out == "There are no jobs.\n"
        assert await types("jobs", "j-done") == 0
        out = capsys.readouterr().out
        assert out.startswith("j-done: llm on chat\n\nattempt 1: succeeded")
        assert "completion_tokens 42" in out
        assert await types("jobs", "j-none") == 1
        assert "No job 'j-none'" in capsys.readouterr().err


async def test_jobs_cancel(box, types, capsys):
    assert await types("jobs", "cancel", "j-1", "--reason", "a typo") == 0
    assert box.acts.asked == [("cancel_job", "j-1", "a typo")]
    assert capsys.readouterr().out == "j-1: 1 attempt cancelled.\n"


@pytest.mark.parametrize("words", [["cancel"], ["a", "b"], ["cancel", "a", "b"]])
def test_jobs_of_a_wrong_command_line(words, capsys):
    assert main(["jobs", *words]) == 64
    assert "takes nothing, one job" in capsys.readouterr().err


def test_a_job_of_hostile_names_stays_in_its_line():
    view: dict[str, Any] = {
        "job": "j\x1b[2J",
        "attempt": 1,
        "kind": "llm",
        "model": "a\nb",
        "state": "waiting",
        "phase": "queue",
        "outcome": "",
        "fault": "",
        "owner": "",
        "done": None,
        "total": None,
        "chunks": 0,
        "usage": {"x\x07": 1.0},
        "accepted": 1.0,
        "started": None,
        "ended": None,
    }
    for text in (
        jobs({"jobs": [view], "now": 5.0}, Paper(80)),
        one_job({"job": view["job"], "attempts": [view], "now": 5.0}, Paper(80)),
    ):
        assert not [char for char in text if char != "\n" and not char.isprintable()]


async def test_what_ended_a_model_is_told_only_while_it_does_not_live(box, types, capsys):
    past = "unloaded (the operator asked for it)"
    for pid, told in ((0, True), (7, False)):
        box.shown = Snapshot(version="1", models=(ModelView(name="m", engine="e", state="x", pid=pid, last_end=past),))
        assert await types("status") == 0
        assert (past in capsys.readouterr().out) == told


def test_what_a_long_job_used_is_told_to_the_last_digit():
    view = {"job": "j", "attempt": 1, "kind": "video", "model": "m", "state": "ended", "phase": "run"}
    view |= {"outcome": "succeeded", "fault": "", "owner": "", "done": None, "total": None, "chunks": 0}
    view |= {"usage": {"compute_ms": 1234567.8}, "accepted": 1.0, "started": 2.0, "ended": 3.0}
    assert "compute_ms 1234567.8" in one_job({"job": "j", "attempts": [view], "now": 5.0}, Paper(80))


def test_a_cancelled_job_is_nobodys_fault():
    attempt = {"job": "j", "attempt": 1, "kind": "llm", "model": "m", "state": "ended", "phase": "run"}
    times = {"done": None, "total": None, "chunks": 0, "usage": {}, "accepted": 1.0, "started": 2.0, "ended": 3.0}
    for code, owner, told in (("cancelled", "caller", False), ("engine_hung", "engine", True)):
        view = {**attempt, **times, "outcome": code, "fault": code, "owner": owner}
        assert ("fault" in one_job({"job": "j", "attempts": [view], "now": 5.0}, Paper(80))) == told


async def test_what_an_engine_wrote_cannot_paint_the_terminal(box, types, capsys):
    evil = "\x1b[2J\x1b]0;owned\x07\nsecond line " + "x" * 5000
    model = ModelView(name="m", engine="e", state="quarantined", reason=evil)
    incident = IncidentView(time="t", model="m", message=evil)
    hold = Hold(source=Source.OPERATOR, since=0, reason=evil)
    box.shown = Snapshot(version="1", models=(model,), incidents=(incident,), holds=(hold,), gpu_reason="none")
    assert await types("status") == 0
    out = capsys.readouterr().out
    assert not [char for char in out if char != "\n" and not char.isprintable()]
    assert max(map(len, out.splitlines())) < 300
    assert not [line for line in out.splitlines() if line.startswith("second")]


async def test_status_is_cheap(box, config):
    """Nothing but the standard library in the command, and little of that: it is meant for status bars."""
    script = textwrap.dedent(f"""
        import sys
        from supervisor.cli import main
        assert main(["status", "--config", {config!r}]) == 0
        heavy = {{"trio", "httpx", "asyncio", "tomlkit", "h11", "psutil", "msgspec", "tempfile", "supervisor.config"}}
        heavy &= set(sys.modules)
        assert not heavy, heavy
    """)
    argv = [sys.executable, "-c", script]
    ended = await trio.to_thread.run_sync(
        functools.partial(subprocess.run, argv, capture_output=True, text=True, timeout=60, check=False)
    )
    assert ended.returncode == 0, ended.stderr
