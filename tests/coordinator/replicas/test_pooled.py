"""Replicas behind a real PgBouncer in transaction mode: no doorbell, no session of the database, and it all goes on."""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from urllib.parse import quote

import httpx
import pytest

pytest.importorskip("psycopg", reason="psycopg is not installed (extra: postgres)")

import psycopg

from coordinator.replicas.opening import ReplicaTable, open_doorway
from coordinator.store.postgres import PostgresStore
from coordinator.testing import FakeWorker, OfferedJob, running
from coordinator.testing_postgres import PostgresServer, postgres_server, why_not
from protocol import link_wire as wire
from tests.coordinator.replicas.rig import PATIENCE_S, SECRET, until

PORT = 6432  # only part of a socket's name


@pytest.fixture(scope="module")
def pooled() -> Iterator[str]:
    """URL of a database through PgBouncer."""
    program = shutil.which("pgbouncer")
    if program is None:
        pytest.skip("PgBouncer is not installed (Debian: pgbouncer)")
    if reason := why_not():
        pytest.skip(reason)
    with postgres_server() as server, bouncing(server, program) as url:
        yield url


@contextlib.contextmanager
def bouncing(server: PostgresServer, program: str) -> Iterator[str]:
    """PgBouncer before the server, on a Unix socket; it refuses to run as root."""
    folder = Path(tempfile.mkdtemp(prefix="bulkhead-bouncer-"))
    config = folder / "pgbouncer.ini"
    config.write_text(
        f"[databases]\n* = host={server.folder} user=bulkhead\n[pgbouncer]\nlisten_addr =\nlisten_port = {PORT}\n"
        f"unix_socket_dir = {folder}\nauth_type = any\npool_mode = transaction\ndefault_pool_size = 4\n"
        f"logfile = {folder}/log\npidfile = {folder}/pid\n"
    )
    who = pwd.getpwuid(server.folder.stat().st_uid)
    for path in (folder, config):
        os.chown(path, who.pw_uid, who.pw_gid)
    as_user = {"user": who.pw_uid, "group": who.pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}
    process = subprocess.Popen([program, str(config)], stderr=subprocess.DEVNULL, **as_user)  # type: ignore[call-overload]
    url = f"postgresql://bulkhead@/postgres?host={quote(str(folder), safe='')}&port={PORT}"
    try:

        def answers() -> bool:
            with contextlib.suppress(psycopg.OperationalError):
                psycopg.connect(url).close()
                return True
            return False

        until(answers)
        yield url
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def test_two_replicas_share_the_work_by_the_poll_alone(pooled: str, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text(SECRET)

    def script(job: OfferedJob) -> None:
        job.started()
        for n in range(5):
            job.chunk({"delta": {"content": f"w{n} "}})
        job.complete({"content": "w0 w1 w2 w3 w4 "})

    with ExitStack() as stack:
        here, there = (
            stack.enter_context(
                running(
                    tmp_path / "state",
                    open_store=lambda: PostgresStore(pooled, pooled=True),
                    doorway=open_doorway(ReplicaTable(listen="127.0.0.1:0", secret_file=str(secret))),
                )
            )
            for _ in range(2)
        )
        stack.enter_context(
            FakeWorker(there, (wire.ModelOffer(name="m", kinds=("llm",), engine="fake", slots=4),), script, "w1")
        )
        until(lambda: here.coordinator.parts.dispatcher.models())
        body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "stream": True}
        with httpx.Client(base_url=here.url, headers=here.headers, timeout=PATIENCE_S) as client:
            for _ in range(4):
                text = client.post("/v1/chat/completions", json=body).text
                assert text.rstrip().endswith("data: [DONE]")
                assert text.count('"content":"w') == 5
