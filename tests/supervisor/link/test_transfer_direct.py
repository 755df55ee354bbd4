"""Outputs that go past the coordinator: the worker's transfer, the coordinator's real routes, and a real S3 server."""

from __future__ import annotations

import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import TYPE_CHECKING

import httpx
import pytest
import trio
import uvicorn
from anyio import to_thread
from starlette.applications import Starlette

from coordinator.blobs.base import Blobs
from coordinator.blobs.opening import BlobsConfig, open_blobs
from coordinator.blobs.routes import blob_routes
from protocol.engine_wire import OutputFile
from protocol.faults import FaultError
from protocol.link_wire import FileRef
from supervisor.link.reconnect import Backoff
from supervisor.link.session import Address
from supervisor.link.transfer import Transfer

pytest.importorskip("obstore", reason="the extra s3 is not installed")
pytest.importorskip("moto", reason="moto, the S3 server of these tests, is not installed")

if TYPE_CHECKING:
    from tests.coordinator.s3_rig import S3Rig

CONTENT = os.urandom(2 * 2**20 + 123)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FILE = OutputFile("a clip?.mp4", "video/mp4", len(CONTENT), SHA256)


@pytest.fixture(scope="module")
def rig() -> Iterator[S3Rig]:
    from tests.coordinator.s3_rig import s3_server

    with s3_server() as rig:
        yield rig


@pytest.fixture
def blobs(rig: S3Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Blobs:
    from tests.coordinator.s3_rig import ID, SECRET

    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ID)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    rig.seen.clear()
    return open_blobs(BlobsConfig(url=f"s3://files/{tmp_path.name}", endpoint=rig.endpoint), tmp_path / "state")


@pytest.fixture
def port(blobs: Blobs) -> Iterator[int]:
    """A coordinator that does nothing but take files."""
    with answering(Starlette(routes=blob_routes(blobs))) as port:
        yield port


@contextlib.contextmanager
def answering(app: Starlette) -> Iterator[int]:
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    until = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < until
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()


def transfer(port: int, patience_s: float = 30.0) -> Transfer:
    address = Address(url=f"ws://127.0.0.1:{port}", token="t0ken")
    return Transfer(address, backoff=lambda: Backoff(0.01, 0.05), upload_patience_s=patience_s)


def puts(rig: S3Rig, folder: str) -> int:
    return sum(line.startswith("PUT ") and f"/{folder}/" in line for line in rig.seen)


async def test_a_large_output_goes_past_the_coordinator_and_a_small_one_through_it(port, blobs, rig, tmp_path):
    small = OutputFile("small", "text/plain", 3, hashlib.sha256(b"abc").hexdigest())
    path = tmp_path / "clip"
    path.write_bytes(CONTENT)
    with trio.fail_after(60):
        async with transfer(port) as way:
            template = blobs.upload_template("job_1", 1, 60)
            await way.upload(template, FILE, lambda: os.open(path, os.O_RDONLY))
            assert puts(rig, "up") == 1
            await way.upload(template, small, b"abc")
            assert puts(rig, "up") == 1
            for file in (FILE, small):
                key = await blobs.find_output("job_1", 1, file.name, file.size, file.sha256)
                assert key is not None
                ref = FileRef(name="in", url=blobs.url(key, 60), size=file.size, sha256=file.sha256, mime="")
                got = tmp_path / "got"
                await way.fetch(ref, lambda: os.open(got, os.O_CREAT | os.O_TRUNC | os.O_WRONLY))  # noqa: B023
                assert got.stat().st_size == file.size


async def test_an_upload_that_broke_is_sent_anew_and_then_through_the_coordinator(port, blobs, rig, monkeypatch):
    """What cannot be gone on with begins anew; a worker that does not reach the store still delivers."""
    away = "http://127.0.0.1:1"
    monkeypatch.setattr(blobs, "_presigned", lambda *_args: away + "/x")
    with trio.fail_after(60):
        async with transfer(port) as way:
            await way.upload(blobs.upload_template("job_1", 1, 60), FILE, CONTENT)
    assert puts(rig, "up") == 0
    assert await blobs.find_output("job_1", 1, FILE.name, FILE.size, FILE.sha256)


async def test_a_coordinator_that_knows_no_places_takes_the_output_itself(blobs, rig):
    routes = [route for route in blob_routes(blobs) if not str(getattr(route, "path", "")).endswith("/place")]
    assert len(routes) == len(blob_routes(blobs)) - 1
    with trio.fail_after(60), answering(Starlette(routes=routes)) as port:
        async with transfer(port) as way:
            await way.upload(blobs.upload_template("job_1", 1, 60), FILE, CONTENT)
    assert await blobs.find_output("job_1", 1, FILE.name, FILE.size, FILE.sha256)


@pytest.mark.parametrize("status", [400, 403, 404, 405, 411, 412, 413, 501])
async def test_what_the_store_refuses_goes_through_the_coordinator(port, blobs, monkeypatch, status):
    class Store(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()

        def log_message(self, *_words: object) -> None:
            """Quiet."""

    with HTTPServer(("127.0.0.1", 0), Store) as store:
        monkeypatch.setattr(blobs, "_presigned", lambda *_args: f"http://127.0.0.1:{store.server_port}/x")
        thread = threading.Thread(target=store.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            with trio.fail_after(60):
                async with transfer(port) as way:
                    await way.upload(blobs.upload_template("job_1", 1, 60), FILE, CONTENT)
        finally:
            store.shutdown()
            thread.join()
    assert await blobs.find_output("job_1", 1, FILE.name, FILE.size, FILE.sha256)


async def test_a_place_that_is_no_address_is_left_for_the_coordinator(port, blobs, monkeypatch):
    monkeypatch.setattr(blobs, "_presigned", lambda *_args: "http://[bad/x")
    with trio.fail_after(60):
        async with transfer(port) as way:
            await way.upload(blobs.upload_template("job_1", 1, 60), FILE, CONTENT)
    assert await blobs.find_output("job_1", 1, FILE.name, FILE.size, FILE.sha256)


async def test_what_was_spoilt_on_its_way_is_sent_again(port, blobs, rig, monkeypatch):
    tries = []
    claim = blobs.claim

    async def spoilt(job, attempt, name, size, sha256, bounds):
        if not tries:
            url = await blobs.place(job, attempt, name, sha256)
            await to_thread.run_sync(lambda: httpx.put(url, content=b"x" * size))
        tries.append(name)
        return await claim(job, attempt, name, size, sha256, bounds)

    monkeypatch.setattr(blobs, "claim", spoilt)
    with trio.fail_after(60):
        async with transfer(port) as way:
            await way.upload(blobs.upload_template("job_1", 1, 60), FILE, CONTENT)
    assert (len(tries), puts(rig, "up")) == (2, 3)
    key = await blobs.find_output("job_1", 1, FILE.name, FILE.size, FILE.sha256)
    assert await blobs.read(key, len(CONTENT)) == CONTENT


async def test_a_file_of_another_digest_is_not_taken(port, blobs, rig):
    other = OutputFile("clip.mp4", "video/mp4", len(CONTENT), "0" * 64)
    url = await blobs.place("job_1", 1, other.name, other.sha256)
    assert (await trio.to_thread.run_sync(lambda: httpx.put(url, content=CONTENT))).status_code == 200
    path, _, query = blobs.upload_template("job_1", 1, 60).replace("{name}", other.name).partition("?")
    headers = {"x-content-sha256": other.sha256, "x-placed-bytes": str(other.size)}
    answer = await trio.to_thread.run_sync(lambda: httpx.put(f"http://127.0.0.1:{port}{path}?{query}", headers=headers))
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "upload_failed")
    assert await blobs.find_output("job_1", 1, other.name, other.size, other.sha256) is None
    unsigned = await trio.to_thread.run_sync(lambda: httpx.get(f"http://127.0.0.1:{port}{path}/place"))
    assert unsigned.status_code == 403


async def test_a_place_in_the_clear_is_refused_by_who_speaks_tls(port, blobs, monkeypatch):
    async with transfer(port) as way:
        monkeypatch.setattr(way, "_target", lambda _url: (f"https://127.0.0.1:{port}/x", {}))

        async def ask(_request):
            answer = httpx.Response(200, json={"url": "http://elsewhere/x"})
            return answer, answer.content

        monkeypatch.setattr(way, "ask", ask)
        with pytest.raises(FaultError, match="no URL of its kind"):
            await way._place("/v1/blobs/j/1/{name}?direct=1", FILE)
