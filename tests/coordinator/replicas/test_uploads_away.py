"""Uploads of studio workers whose replica is away, or goes away, or that end on their way through another one."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
from anyio.to_thread import run_sync
from starlette.responses import Response

from coordinator.replicas import frames, uploads
from coordinator.replicas.opening import ReplicaTable, open_doorway
from coordinator.store.base import SILENT_MS
from coordinator.testing import running
from tests.coordinator.replicas.rig import LONG_MS, PATIENCE_S, SECRET, Start, until
from tests.coordinator.replicas.uploads_rig import Slow, content, held, replicas, session
from tests.coordinator.studio.test_uploads import PICTURE, png
from tests.coordinator.studio_rig import FAST, House, opened

# ---- the other replica is away ------------------------------------------------------------------------------


def assert_comes_again(answer: httpx.Response) -> None:
    """The contract lets a worker try again after a 5xx alone."""
    assert answer.status_code == 503, answer.text
    assert int(answer.headers["retry-after"]) >= 1
    assert answer.headers["x-should-retry"] == "true"


@contextlib.contextmanager
def unknown(house: House, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A replica knows of no other one."""
    mine = replicas(house)
    with monkeypatch.context() as patched:
        patched.setattr(mine._directory, "peers", list)
        until(lambda: not mine.peers)
        yield
    until(lambda: mine.peers)


def test_while_the_other_replica_is_not_known_the_worker_shall_come_again(
    here: House, there: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = here.submit("image", PICTURE)
    with session(here, there.url) as (worker, it):
        it.claim()
        with unknown(here, monkeypatch):
            assert_comes_again(worker.upload(job, png()))  # the row may not say yet that the offer was accepted
            until(lambda: here.job(job)["state"] == "running")
            assert_comes_again(worker.upload(job, png()))
        assert worker.upload(job, png()).is_success
        with unknown(here, monkeypatch):
            assert worker.upload(job, png()).status_code == 409  # it has ended: nobody holds it


@pytest.mark.parametrize("how", ["it says nothing", "it is gone", "it is older", "it cannot be reached"])
def test_a_replica_that_does_not_answer_costs_a_worker_nothing_but_time(
    here: House, there: House, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, taken, go_on = here.submit("image", PICTURE), threading.Event(), threading.Event()

    async def silent(*_: object) -> Response:
        taken.set()
        await run_sync(go_on.wait, PATIENCE_S)
        return Response("too late")

    with session(here, there.url) as (worker, it), ThreadPoolExecutor(1) as pool:
        it.claim()
        with monkeypatch.context() as patched, contextlib.ExitStack() as stack:
            stack.callback(go_on.set)
            if how in ("it says nothing", "it is gone"):
                patched.setattr(replicas(there), "uploaded", silent)
            if how == "it says nothing":
                patched.setattr(uploads, "ANSWER_S", 0.2)
            elif how == "it is older":
                patched.setattr(frames, "UPLOADS", "/replica/of-another-time/{worker}/{job}")
            elif how == "it cannot be reached":
                patched.setattr(uploads, "_where", lambda *_: "http://127.0.0.1:1/")
            answer = pool.submit(worker.upload, job, png())
            if how == "it is gone":
                assert taken.wait(PATIENCE_S)
                stack.enter_context(unknown(here, monkeypatch))
            assert_comes_again(answer.result(PATIENCE_S))
        until(lambda: here.job(job)["state"] == "running")
        assert worker.upload(job, png()).is_success
    assert content(here, job) == [png()]


# ---- ends on the way ----------------------------------------------------------------------------------------


def test_an_upload_that_breaks_off_leaves_the_job_with_its_worker(
    here: House, there: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, ended = here.submit("image", PICTURE), threading.Event()
    real = replicas(there).uploaded
    assert real is not None

    async def taken(*which: Any) -> Response:
        try:
            return await real(*which)
        finally:
            ended.set()

    monkeypatch.setattr(replicas(there), "uploaded", taken)
    with session(here, there.url) as (worker, it):
        it.claim()
        until(lambda: held(there, job) == "running")
        with Slow(worker, job, png()) as slow:
            slow.send(0, 80)
        assert ended.wait(PATIENCE_S)
        assert held(there, job) == "running"
        assert worker.upload(job, png()).is_success
    assert content(here, job) == [png()]


def test_an_upload_that_stalls_is_ended_here(here: House, there: House, monkeypatch: pytest.MonkeyPatch) -> None:
    job = here.submit("image", PICTURE)
    real = replicas(here)._uploads.pass_on
    with session(here, there.url) as (worker, it):
        it.claim()
        with monkeypatch.context() as patched:
            patched.setattr(replicas(here)._uploads, "pass_on", lambda peer, it: real(peer, it._replace(idle_s=0.2)))
            with Slow(worker, job, png()) as slow:
                slow.send(0, 80)
                assert slow.status()[0] == 408
        assert worker.upload(job, png()).is_success


def test_a_drained_replica_takes_the_upload_that_it_waits_for(here: House, start: Start) -> None:
    """Load balancers send nothing to it any more, so the file comes to another one, and its session ends after it."""
    old = start()
    until(lambda: replicas(old).name in [peer.name for peer in replicas(here).peers if peer.connected])
    until(lambda: any(peer.connected for peer in replicas(old).peers))
    first, second = here.submit("image", PICTURE), ""
    with session(here, old.url) as (worker, it), ThreadPoolExecutor(1) as pool:
        assert it.claim()["jobId"] == first
        until(lambda: here.job(first)["state"] == "running")
        with Slow(worker, first, png()) as slow:
            slow.send(0, 80)
            gone = pool.submit(old.call, old.coordinator.hand_over)
            until(lambda: httpx.get(f"{old.url}/healthz", timeout=PATIENCE_S).status_code == 503)
            second = here.submit("image", PICTURE)
            assert not gone.done()
            slow.send(80)
            assert slow.status()[0] == 200
        gone.result(PATIENCE_S)
        assert it.ending() == (None, 1000)
        with session(here, here.url, worker) as (_, again):
            assert again.claim()["jobId"] == second
            assert worker.upload(second, png()).is_success
    assert content(here, first) == content(here, second) == [png()]


CHILD = """
import sys
from pathlib import Path
from coordinator.replicas import door, peer
from coordinator.replicas.opening import ReplicaTable, open_doorway
from coordinator.store.postgres import PostgresStore
from coordinator.testing import running
from tests.coordinator.replicas.rig import LONG_MS
from tests.coordinator.studio_rig import FAST

url, folder = sys.argv[1], Path(sys.argv[2])
peer.OPEN_S = peer.PING_S = door.PING_S = 60.0
table = ReplicaTable(listen="127.0.0.1:0", secret_file=str(folder / "secret"))
store = lambda: PostgresStore(url, silent_ms=LONG_MS)
with running(folder / "state", studio=FAST, open_store=store, doorway=open_doorway(table)) as it:
    print(it.url, it.coordinator.replicas.name, flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def child(url: str, folder: Path) -> Iterator[tuple[subprocess.Popen[str], str, str]]:
    """A replica in a process of its own; with its base URL and its name."""
    command = [sys.executable, "-c", CHILD, url, str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            base, name = process.stdout.readline().split()
            yield process, base, name
        finally:
            process.kill()


def test_a_replica_that_is_killed_amid_an_upload_loses_no_job(apart: str, tmp_path: Path) -> None:
    from coordinator.store.postgres import PostgresStore

    (tmp_path / "secret").write_text(SECRET)
    doorway = open_doorway(ReplicaTable(listen="127.0.0.1:0", secret_file=str(tmp_path / "secret")))
    with contextlib.ExitStack() as stack:
        store = PostgresStore(apart)
        one = stack.enter_context(running(tmp_path / "state", studio=FAST, open_store=lambda: store, doorway=doorway))
        quick = msgspec.structs.replace(one.coordinator.parts.dispatcher.settings, worker_grace_s=0.1)
        one.coordinator.parts.dispatcher.settings = quick
        store.silent_ms = LONG_MS  # until the worker has tried, the other one is not believed dead
        house = stack.enter_context(opened(one))
        process, base, name = stack.enter_context(child(apart, tmp_path))
        until(lambda: name in [peer.name for peer in replicas(one).peers if peer.connected])
        jobs = [house.submit("image", PICTURE) for _ in range(2)]
        given = []
        for _ in jobs:
            worker, it = stack.enter_context(session(house, base))
            given.append((worker, it.claim()["jobId"]))
        until(lambda: all(house.job(job)["state"] == "running" for job in jobs))
        (first, cut), (second, whole) = given
        with Slow(first, cut, png()) as slow:
            slow.send(0, 80)
            process.send_signal(signal.SIGKILL)
            process.wait(PATIENCE_S)
            slow.send(80)
            status, text = slow.status()
        assert (status, b"retry-after" in text.lower()) == (503, True)
        assert_comes_again(second.upload(whole, png()))
        assert {house.job(job)["state"] for job in jobs} == {"running"}
        store.silent_ms = SILENT_MS
        it = stack.enter_context(first.session())
        for _ in jobs:
            job = it.claim()["jobId"]
            assert second.upload(job, png()).status_code == 409  # it is another worker's now
            assert first.upload(job, png()).is_success
        for job in jobs:
            assert content(house, job) == [png()]
            assert house.job(job)["tries"] == 2
