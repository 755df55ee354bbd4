"""Large outputs over connections that break: the worker's transfer against the coordinator's real blob routes."""

from __future__ import annotations

import hashlib
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio
import uvicorn
from starlette.applications import Starlette

from coordinator.blobs.folder import FolderBlobs
from coordinator.blobs.routes import blob_routes
from protocol.engine_wire import OutputFile
from protocol.faults import FaultError
from supervisor.link.reconnect import Backoff
from supervisor.link.session import Address
from supervisor.link.transfer import Transfer

CONTENT = os.urandom(7 * 2**20 + 123)
FILE = OutputFile("clip.mp4", "video/mp4", len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def blobs(tmp_path: Path) -> FolderBlobs:
    return FolderBlobs(tmp_path / "blobs")


@pytest.fixture
def port(blobs: FolderBlobs) -> Iterator[int]:
    """A coordinator that does nothing but take files."""
    server = uvicorn.Server(uvicorn.Config(Starlette(routes=blob_routes(blobs)), port=0, log_level="error"))
    thread = threading.Thread(target=server.run)
    thread.start()
    until = time.monotonic() + 20
    while not server.started:
        assert time.monotonic() < until
        time.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    thread.join()


class Cutter:
    """A way to the coordinator that breaks after so many bytes, once for each number in `cuts`."""

    def __init__(self, port: int, cuts: list[int]) -> None:
        self.port, self.cuts = port, cuts
        self.carried = 0

    async def serve(self, *, task_status: trio.TaskStatus[int]) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        task_status.started(listeners[0].socket.getsockname()[1])
        await trio.serve_listeners(self._connected, listeners)

    async def _connected(self, near: trio.SocketStream) -> None:
        async with near, await trio.open_tcp_stream("127.0.0.1", self.port) as far, trio.open_nursery() as nursery:
            nursery.start_soon(self._there, near, far, nursery.cancel_scope)
            while True:
                try:
                    data = await far.receive_some(65536)
                    if not data:
                        break
                    await near.send_all(data)
                except (trio.BrokenResourceError, trio.ClosedResourceError):
                    break
            nursery.cancel_scope.cancel()

    async def _there(self, near: trio.SocketStream, far: trio.SocketStream, scope: trio.CancelScope) -> None:
        here = 0
        while data := await near.receive_some(65536):
            here += len(data)
            self.carried += len(data)
            if self.cuts and here > self.cuts[0] > 0:
                self.cuts.pop(0)
                scope.cancel()
                return
            try:
                await far.send_all(data)
            except trio.BrokenResourceError:
                break
        scope.cancel()


async def upload(port: int, blobs: FolderBlobs, source: object) -> None:
    address = Address(url=f"ws://127.0.0.1:{port}", token="t0ken")
    async with Transfer(address, backoff=lambda: Backoff(0.01, 0.05)) as transfer:
        await transfer.upload(blobs.upload_template("job_1", 1, 60), FILE, source)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["file", "memory"])
async def test_an_upload_goes_on_where_the_connection_broke(port, blobs, tmp_path, nursery, kind):
    path = tmp_path / "clip.mp4"
    path.write_bytes(CONTENT)
    cutter = Cutter(port, [3 * 2**20, 2 * 2**20 + 5])
    way = await nursery.start(cutter.serve)
    source = (lambda: os.open(path, os.O_RDONLY)) if kind == "file" else CONTENT
    with trio.fail_after(60):
        await upload(way, blobs, source)
    key = await trio.to_thread.run_sync(lambda: next((tmp_path / "blobs" / "out" / "job_1" / "1").iterdir()))
    assert key.read_bytes() == CONTENT
    assert cutter.cuts == []
    # What was on its way when it broke is sent again, a MiB or a few; the whole would be twelve MiB.
    assert cutter.carried < len(CONTENT) + 4 * 2**20
    assert list((tmp_path / "blobs" / "parts").iterdir()) == []


async def test_a_file_that_changed_while_the_connection_was_broken_is_refused(port, blobs, tmp_path, nursery):
    path = tmp_path / "clip.mp4"
    path.write_bytes(CONTENT)
    opened = []

    def source() -> int:
        if opened:
            with path.open("r+b") as file:  # an engine that still writes
                file.write(b"another beginning")
        opened.append(True)
        return os.open(path, os.O_RDONLY)

    cutter = Cutter(port, [3 * 2**20])
    way = await nursery.start(cutter.serve)
    with trio.fail_after(60), pytest.raises(FaultError) as caught:
        await upload(way, blobs, source)
    assert caught.value.fault.code == "engine_protocol"
    assert not (tmp_path / "blobs" / "out" / "job_1" / "1").exists()
