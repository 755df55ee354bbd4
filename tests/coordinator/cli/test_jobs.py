"""`coordinator jobs` against a running coordinator."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest

from coordinator.cli import jobs
from coordinator.cli.main import FAILED, OK, main
from coordinator.testing import OfferedJob, Running
from protocol import link_wire as wire
from protocol.faults import Fault, FaultError

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(served: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """`run("list", …)`: exit code, stdout, stderr."""
    key = tmp_path / "key"
    key.write_text(served.key + "\n")

    def call(verb: str, *words: str, url: str = served.url, **options: Any) -> tuple[int, str, str]:
        code = main(["jobs", verb, *words, "--url", url, "--key-file", str(options.get("key", key))])
        said = capsys.readouterr()
        return code, said.out, said.err

    return call


def fails(job: Any) -> None:
    raise FaultError(Fault("engine_failed", "No\x1b[31m idea."))


def ended(http: httpx.Client, model: str, count: int = 1) -> list[str]:
    """Ids of jobs of the model that have failed by now."""
    body = {"kind": "command", "model": model, "wait": True}
    jobs = [http.post("/v1/jobs", json=body).json() for _ in range(count)]
    assert {job["state"] for job in jobs} == {"failed"}
    return [job["id"] for job in jobs]


def test_jobs_are_listed_and_shown(http: httpx.Client, serve: Any, run: Run) -> None:
    serve(fails, "cli-shows", "command")
    (job,) = ended(http, "cli-shows")
    code, out, _ = run("list", "--dead", "--state-is", "failed", "--limit", "100")
    assert code == OK
    assert out.splitlines()[0].split() == ["ID", "STATE", "KIND", "MODEL", "TRIES", "CREATED", "WORKER", "FAULT"]
    (line,) = [line for line in out.splitlines() if job in line]
    assert "engine_failed: No?[31m idea." in line
    listed = json.loads(run("list", "--limit", "1", "--json")[1])
    assert len(listed["data"]) == 1
    code, out, _ = run("show", job)
    assert code == OK
    assert "failed" in out
    assert "ATTEMPT" in out
    assert "\x1b" not in out
    shown = json.loads(run("show", job, "--json")[1])
    assert [one["outcome"] for one in shown["attempts"]] == ["failed"]


def lines_of(job: OfferedJob) -> tuple[wire.LogLine, ...]:
    return (
        wire.LogLine("2026-11-21T10:00:00Z", "warning", "two\nlines\x1b[31m", job.id),
        wire.LogLine("2026-11-21T10:00:01Z", "info", "last", job.id),
    )


def test_what_workers_told_of_a_job_is_shown_and_what_is_missing(
    served: Running, http: httpx.Client, serve: Any, run: Run, tmp_path: Path
) -> None:
    def talks(job: OfferedJob) -> None:
        worker.send(wire.LogBatch(lines=lines_of(job), dropped=2))
        fails(job)

    worker = serve(talks, "cli-talks", "command")
    (job,) = ended(http, "cli-talks")
    boss = tmp_path / "boss"
    boss.write_text(served.coordinator.keys.create("admin"))
    code, out, err = run("logs", job, key=boss)
    first, second = out.splitlines()
    assert code == OK
    assert first.startswith("2026-11-21T10:00:00Z warning  fake-")
    assert first.endswith(": two?lines?[31m")
    assert second.endswith(": last")
    assert "has lost 2 lines on their way" in err
    code, out, err = run("logs", job, "-n", "1", key=boss)
    assert (len(out.splitlines()), "1 older lines are kept" in err) == (1, True)
    code, out, err = run("logs", job, "--worker", "nobody", key=boss)
    assert (code, out, "No line about this job" in err) == (OK, "", True)
    assert len(json.loads(run("logs", job, "--json", key=boss)[1])["data"]) == 2
    code, _, err = run("logs", job)
    assert (code, "admin key" in err) == (FAILED, True)


def test_what_cannot_be_there_is_said() -> None:
    answer: dict[str, Any] = {"data": [1], "more": 0, "since_ms": 86_400_000, "created_ms": 5, "lost": {}}
    notes = jobs._missing({**answer, "not_asked": ["replica-b\x1b"]}, 200)
    assert notes == [
        "Of what was told before 1970-01-02 00:00:00 (UTC) lines may be missing.",
        "Replica replica-b? did not answer: it may have more lines.",
    ]


@pytest.mark.parametrize(("shown", "asked", "helps"), [(5, 5, True), (4, 5, False), (1000, 1000, False)])
def test_a_larger_number_is_advised_only_where_it_shows_more(shown: int, asked: int, helps: bool) -> None:
    answer: dict[str, Any] = {"data": [1] * shown, "more": 7, "since_ms": 1, "created_ms": 5, "lost": {}}
    (note,) = jobs._missing({**answer, "not_asked": []}, asked)
    assert note.startswith("7 older lines are kept; ")
    assert note.endswith("-n shows more.") == helps


@pytest.mark.parametrize("count", ["0", "1001", "x", "-1", "0000010000", "1" * 5000])
def test_how_many_lines_is_a_number_within_bounds(run: Run, count: str) -> None:
    with pytest.raises(SystemExit) as ended_with:
        run("logs", "job_x", f"-n{count}")
    assert ended_with.value.code == 64


def test_a_failed_job_is_tried_again_and_what_is_refused_is_said(http: httpx.Client, serve: Any, run: Run) -> None:
    worker = serve(fails, "cli-again", "command")
    first, second = ended(http, "cli-again", 2)
    worker.script = lambda job: None
    code, out, err = run("retry", first, "job_unknown", second)
    assert code == FAILED
    assert out.splitlines() == [f"{first}  queued", f"{second}  queued"]
    assert "job_unknown: There is no job" in err
    code, out, _ = run("cancel", first, second, "--json")
    assert code == OK
    assert [job["state"] for job in json.loads(out)] == ["cancelled", "cancelled"]
    code, _, err = run("retry", first)
    assert code == FAILED
    assert "only one that failed" in err


def test_who_cannot_be_asked_is_said(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "--url" in run("list", url="ftp://x")[2]
    assert "does not answer" in run("list", url="http://127.0.0.1:9")[2]
    assert "No such file" in run("list", key=tmp_path / "none")[2]
    wrong = tmp_path / "wrong"
    wrong.write_text("sk-wrong")
    code, _, err = run("list", key=wrong)
    assert (code, "unknown or was revoked" in err) == (FAILED, True)


def test_a_coordinator_with_a_certificate_is_asked_over_tls(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "key").write_text("bhc_x")
    (tmp_path / "coordinator.toml").write_text('listen = "127.0.0.1:9"\ntls_cert = "c.pem"\ntls_key = "k.pem"\n')
    options = ["--config", str(tmp_path / "coordinator.toml"), "--key-file", str(tmp_path / "key")]
    assert main(["jobs", "list", *options]) == FAILED
    assert "https://127.0.0.1:9 does not answer" in capsys.readouterr().err
