"""Coordinators that serve from PostgreSQL, as processes: two over one database, and a database that goes away."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import httpx
import pytest

from coordinator.cli.main import main
from coordinator.store import SqliteStore
from coordinator.testing import FakeWorker, OfferedJob, Running
from protocol.link_wire import ModelOffer
from protocol.work import CommandResult

pytest.importorskip("psycopg", reason="psycopg is not installed (extra: postgres)")

from coordinator.testing_postgres import postgres_server, why_not

if TYPE_CHECKING:
    from coordinator.testing_postgres import PostgresServer

WAIT_S = 120.0
BODY = {"kind": "command", "model": "m", "wait_for_worker": True}
OFFER = (ModelOffer(name="m", kinds=("command",), engine="fake", slots=2),)


@contextlib.contextmanager
def serving(state: Path, url: str) -> Iterator[Running]:
    """`coordinator serve --store URL` over the folder, until it answers."""
    command = [sys.executable, "-m", "coordinator", "serve", "--listen", "127.0.0.1:0", "--state", str(state)]
    child = subprocess.Popen([*command, "--store", url], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        assert child.stdout
        line = child.stdout.readline().decode()
        assert line.startswith("Serving "), child.wait(WAIT_S)
        key, token = ((state / name).read_text().strip() for name in ("client.key", "worker.token"))
        address = line.split()[1].removesuffix("/v1")
        yield Running(address, key, token, *[cast("Any", None)] * (len(Running.__struct_fields__) - 3))
    finally:
        child.kill()
        child.wait(WAIT_S)
        assert child.stdout
        child.stdout.close()


def until(look: Callable[[], Any]) -> Any:
    """What `look` says once it says something."""
    end = time.monotonic() + WAIT_S
    while not (found := look()):
        assert time.monotonic() < end
    return found


def ended(at: Running, job: str) -> Any:
    answer = httpx.get(f"{at.url}/v1/jobs/{job}", headers=at.headers).json()
    return answer if answer.get("state") in ("succeeded", "failed", "cancelled") else None


def done(job: OfferedJob) -> None:
    job.complete(CommandResult(exit_code=0))


def test_what_one_takes_another_one_works_off(space: str, tmp_path: Path) -> None:
    with serving(tmp_path, space) as first, serving(tmp_path, space) as second, FakeWorker(second, OFFER, done):
        jobs = [httpx.post(f"{first.url}/v1/jobs", json=BODY, headers=first.headers).json()["id"] for _ in range(10)]
        for job in jobs:
            assert until(lambda job=job: ended(first, job))["state"] == "succeeded"
    assert not list(tmp_path.glob("*.sqlite-journal"))
    assert not (tmp_path / "coordinator.sqlite").exists()  # jobs lie in the database alone


@pytest.fixture
def own_server() -> Iterator[PostgresServer]:
    if reason := why_not():
        pytest.skip(reason)
    with postgres_server() as server:
        yield server


def test_a_database_that_was_away_costs_no_job(own_server: PostgresServer, tmp_path: Path) -> None:
    with serving(tmp_path, own_server.url) as it, httpx.Client(headers=it.headers, timeout=WAIT_S) as http:
        before = http.post(f"{it.url}/v1/jobs", json=BODY).json()["id"]
        own_server.stop()
        refused = http.post(f"{it.url}/v1/jobs", json=BODY)
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) > 0
        assert refused.json()["error"]["code"] == "overloaded"
        assert http.get(f"{it.url}/healthz").status_code == 200
        own_server.start()
        after = until(lambda: http.post(f"{it.url}/v1/jobs", json=BODY).json().get("id"))
        with FakeWorker(it, OFFER, done):
            for job in (before, after):
                assert until(lambda job=job: ended(it, job))["state"] == "succeeded"


def test_a_store_is_copied_by_the_command(space: str, tmp_path: Path) -> None:
    path = tmp_path / "coordinator.sqlite"
    SqliteStore(path).close()
    command = [sys.executable, "-m", "coordinator", "migrate", "--from", f"sqlite:{path}", "--to", space]
    said = subprocess.run(command, capture_output=True, text=True, timeout=WAIT_S, check=False)
    assert (said.returncode, said.stderr) == (0, "")
    assert said.stdout.startswith("0 jobs, ")
    assert "Files of jobs" not in said.stdout
    for arguments, words in (
        (["--from", str(path), "--to", space], "sqlite:PATH"),
        (["--from", f"sqlite:{path}", "--to", "mysql://x"], "postgres://"),
    ):
        refused = subprocess.run(
            [*command[:4], *arguments], capture_output=True, text=True, timeout=WAIT_S, check=False
        )
        assert refused.returncode == 78
        assert words in refused.stderr


@pytest.mark.parametrize("below", ["", "coordinator"])
def test_a_state_folder_is_enough_to_copy_from(space: str, tmp_path: Path, below: str, capsys: Any) -> None:
    state = tmp_path / below
    (state / "blobs").mkdir(parents=True)
    SqliteStore(state / "coordinator.sqlite").close()
    assert main(["migrate", "--from", str(tmp_path), "--to", space]) == 0
    said = capsys.readouterr().out
    assert said.startswith("0 jobs, ")
    assert f"Files of jobs stay in {state / 'blobs'}" in said


def test_a_folder_without_a_store_is_refused(tmp_path: Path, capsys: Any) -> None:
    assert main(["migrate", "--from", str(tmp_path), "--to", "postgres://x/y"]) == 78
    assert f"--from: {tmp_path}: Expected a state folder" in capsys.readouterr().err
