"""Fakes for tests of the link: a worker that says what the test tells it to, and a coordinator to say it to.

Both are synchronous for their users. The worker speaks the real link over a real WebSocket, legal or not; only its
engine is missing. The coordinator is store, blobs, dispatcher and gateway on a free loopback port, without its HTTP
half. Needs the extra `coordinator`.

`coordinator.testing` is the other pair: there the coordinator is the whole program and the worker obeys, here the
worker may break every rule, and a test calls the dispatcher itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import socket
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar
from urllib.parse import quote

import anyio
import msgspec
import uvicorn
from anyio.abc import TaskStatus
from anyio.from_thread import BlockingPortal, start_blocking_portal
from starlette.applications import Starlette
from starlette.routing import WebSocketRoute
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect
from websockets.typing import Subprotocol

from coordinator.blobs.folder import FolderBlobs
from coordinator.blobs.routes import blob_routes
from coordinator.dispatch import Dispatcher
from coordinator.dispatch_settings import DispatchSettings
from coordinator.gateway import UVICORN_OPTIONS, GatewaySettings, worker_endpoint
from coordinator.records import JobEnded, JobEvent, JobRecord, Submission, WorkerScope
from coordinator.store import SqliteStore
from coordinator.websockets_end import EndingWebSockets
from protocol import link_wire as wire
from protocol.engine_wire import OutputFile
from protocol.faults import Fault
from protocol.link_session import LinkSession, Role
from protocol.revision import LINK_SUBPROTOCOL, LINK_WIRE

PATIENCE_S = 60.0
QUIET = GatewaySettings(missed=int(2 * PATIENCE_S / 5))  # these workers send a heartbeat only when their test does
TOKEN = "worker-token"
CHAT = wire.ModelOffer(name="chat", kinds=("llm",), engine="fake", slots=1, resident=True)
Files = tuple[OutputFile, ...]
Usage = Mapping[str, float]
T = TypeVar("T")


class Said(NamedTuple):
    """One message of the coordinator's."""

    body: Any
    job: str
    attempt: int


class Closed(Exception):
    """The coordinator closed the connection with this code."""

    def __init__(self, code: int, reason: str) -> None:
        super().__init__(f"closed with {code} {reason}")
        self.code = code


class RawWorker:
    """A worker over a real WebSocket. Every wait is bounded by `PATIENCE_S`; use it as a context manager.

    With `judge=False` it sends and takes anything, legal or not.
    """

    def __init__(self, port: int, worker: str = "w1", token: str = TOKEN, *, judge: bool = True) -> None:
        self.id, self._judge = worker, judge
        self.session = LinkSession(Role.WORKER)
        self._port = port
        self._exits = contextlib.ExitStack()
        self.socket: ClientConnection = self._exits.enter_context(
            connect(
                f"ws://127.0.0.1:{port}/v1/worker",
                subprotocols=[Subprotocol(LINK_SUBPROTOCOL)],
                additional_headers={"Authorization": f"Bearer {token}"},
                compression=None,
                max_size=wire.MAX_MESSAGE_BYTES,
                proxy=None,
                open_timeout=PATIENCE_S,
            )
        )

    def hello(self, *models: wire.ModelOffer, held: tuple[wire.Held, ...] = (), **capabilities: Any) -> wire.Welcome:
        """Greet, and return the welcome. Without models it serves `CHAT`."""
        announced = wire.Capabilities(models=models or (CHAT,), **capabilities)
        self.send(wire.Hello(worker=self.id, low=LINK_WIRE.low, high=LINK_WIRE.high, capabilities=announced, held=held))
        welcome: wire.Welcome = self.expect(wire.Welcome).body
        return welcome

    def send(self, body: wire.Body, job: str = "", attempt: int = 0) -> None:
        """Send one message."""
        if self._judge:
            self.session.sending(body, job, attempt)
        self.socket.send(wire.encode(body, job, attempt))

    def send_raw(self, tag: str, body: bytes, job: str = "", attempt: int = 0) -> None:
        """Send an envelope with any bytes as its body."""
        self.socket.send(msgspec.msgpack.encode(wire.Envelope(tag, job, attempt, msgspec.Raw(body))))

    def receive(self, timeout: float = PATIENCE_S) -> Said:
        """Next message. Raises Closed, TimeoutError."""
        try:
            data = self.socket.recv(timeout)
        except ConnectionClosed as error:
            code = error.rcvd.code if error.rcvd else 1006
            raise Closed(code, error.rcvd.reason if error.rcvd else "") from None
        assert isinstance(data, bytes)
        envelope = wire.decode_envelope(data)
        body = wire.decode_body(envelope, wire.DOWN)
        if self._judge:
            self.session.received(body, envelope.job, envelope.attempt)
        return Said(body, envelope.job, envelope.attempt)

    def expect(self, *kinds: type[wire.Body]) -> Said:
        """Next message, which must be one of these; chunk acknowledgements may come at any time."""
        while True:
            said = self.receive()
            if isinstance(said.body, kinds):
                return said
            if not isinstance(said.body, wire.ChunkAck):
                raise AssertionError(f"expected {[kind.__name__ for kind in kinds]}, got {said}")

    def expect_close(self) -> tuple[wire.Error | None, int]:
        """Read to the end; returns the last error and the close code."""
        error = None
        while True:
            try:
                said = self.receive()
            except Closed as closed:
                return error, closed.code
            if isinstance(said.body, wire.Error):
                error = said.body

    def quiet(self, seconds: float = 0.3) -> bool:
        """Whether nothing but chunk acknowledgements arrives for so long."""
        try:
            while True:
                if not isinstance(self.receive(seconds).body, wire.ChunkAck):
                    return False
        except TimeoutError:
            return True

    def take(self, *, start: bool = True) -> Said:
        """Accept the next offer, and start it."""
        offer = self.expect(wire.Offer)
        self.send(wire.Accept(), offer.job, offer.attempt)
        if start:
            self.send(wire.Started(), offer.job, offer.attempt)
        return offer

    def chunk(self, offer: Said, seq: int) -> None:
        """Stream one word, `w{seq}`."""
        data = msgspec.msgpack.encode({"delta": {"content": f"w{seq}"}})
        self.send(wire.Chunk(seq=seq, data=msgspec.Raw(data)), offer.job, offer.attempt)

    def complete(self, offer: Said, result: Any = None, files: Files = (), usage: Usage | None = None) -> wire.Ack:
        """End an attempt well and return the acknowledgement."""
        raw = msgspec.Raw(msgspec.msgpack.encode({"content": "done"} if result is None else result))
        self.send(wire.Complete(result=raw, files=files, usage=dict(usage or {})), offer.job, offer.attempt)
        ack: wire.Ack = self.expect(wire.Ack).body
        return ack

    def fail(
        self, offer: Said, code: str = "engine_crashed", *, detail: Mapping[str, Any] | None = None, **options: Any
    ) -> wire.Ack:
        """End an attempt badly and return the acknowledgement."""
        fault = Fault(code, f"It was {code}.", detail=dict(detail or {}))
        self.send(wire.Fail(fault=fault, **options), offer.job, offer.attempt)
        ack: wire.Ack = self.expect(wire.Ack).body
        return ack

    def upload(self, offer: Said, name: str, data: bytes) -> OutputFile:
        """PUT one output to the offer's URL. Raises AssertionError unless it was stored."""
        status = self.put(offer.body.upload.replace("{name}", quote(name, safe="")), data)
        assert status == 201, status
        return OutputFile(name, "application/octet-stream", len(data), hashlib.sha256(data).hexdigest())

    def put(self, url: str, data: bytes) -> int:
        """PUT; returns the status."""
        return self._http("PUT", url, data, {"X-Content-SHA256": hashlib.sha256(data).hexdigest()})[0]

    def fetch(self, url: str) -> tuple[int, bytes]:
        """GET; returns status and body."""
        return self._http("GET", url, None, {})

    def _http(self, method: str, url: str, data: bytes | None, headers: dict[str, str]) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PATIENCE_S)
        with contextlib.closing(connection):
            connection.request(method, url, data, headers)
            response = connection.getresponse()
            return response.status, response.read()

    def drop(self) -> None:
        """Lose the connection without a word."""
        with contextlib.suppress(OSError):
            self.socket.socket.shutdown(socket.SHUT_RDWR)
        self._exits.close()

    def __enter__(self) -> RawWorker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exits.close()


class Desk:
    """The coordinator's inner half, served, as a test's thread sees it."""

    def __init__(
        self, portal: BlockingPortal, store: SqliteStore, blobs: FolderBlobs, dispatcher: Dispatcher, port: int
    ) -> None:
        self.portal, self.store, self.blobs, self.dispatcher, self.port = portal, store, blobs, dispatcher, port

    def call(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        """Run a coroutine function on the coordinator's loop, for at most `PATIENCE_S`."""

        async def bounded() -> T:
            with anyio.fail_after(PATIENCE_S):
                return await function(*args)

        return self.portal.call(bounded)

    def worker(self, name: str = "w1", *models: wire.ModelOffer, **options: Any) -> RawWorker:
        """A worker that has been welcomed, and is open for offers."""
        worker = RawWorker(self.port, name)
        worker.hello(*models, **options)
        return worker

    def submit(self, **options: Any) -> JobRecord:
        """Submit a chat job, or what the options say."""
        return self.call(self.dispatcher.submit, submission(**options))

    def follow(self, **options: Any) -> tuple[JobRecord, Future[list[JobEvent]]]:
        """Submit and watch; the future has all events once the job has ended."""
        future, record = self.portal.start_task(self._collect, submission(**options))
        return record, future

    def get(self, job: str) -> JobRecord:
        """The row; it must exist."""
        record = self.store.get(job)
        assert record is not None
        return record

    def ended(self, job: str) -> JobRecord:
        """Wait for the job's end, by watching it."""

        async def end() -> JobRecord:
            async with self.dispatcher.watch(job) as events:
                async for event in events:
                    if isinstance(event, JobEnded):
                        return event.record
            raise AssertionError("the events ended without JobEnded")

        return self.call(end)

    def until(self, condition: Callable[[], object]) -> None:
        """Wait for what has no event of its own. Raises TimeoutError after `PATIENCE_S`."""
        end = time.monotonic() + PATIENCE_S
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError("it did not come true")
            time.sleep(0.01)

    async def _collect(self, wanted: Submission, *, task_status: TaskStatus[JobRecord]) -> list[JobEvent]:
        with anyio.fail_after(PATIENCE_S):
            async with self.dispatcher.submit_and_watch(wanted) as (record, events):
                task_status.started(record)
                return [event async for event in events]


def submission(**options: Any) -> Submission:
    """A chat job for the model "chat", changed by the options."""
    params = msgspec.msgpack.encode({"prompt": "Hello"})
    return Submission(**{"kind": "llm", "model": "chat", "params": params, **options})


@contextlib.contextmanager
def running_desk(
    folder: Path, dispatch: DispatchSettings | None = None, gateway: GatewaySettings | None = None
) -> Iterator[Desk]:
    """Serve store, blobs, dispatcher and gateway over the folder; the same folder again is a restart."""
    store = SqliteStore(folder / "jobs.sqlite")
    blobs = FolderBlobs(folder / "blobs")
    dispatcher = Dispatcher(store, blobs, settings=dispatch)
    routes = [
        *blob_routes(blobs, dispatcher.wants_output),
        WebSocketRoute("/v1/worker", worker_endpoint(dispatcher, _authenticate, gateway or QUIET)),
    ]
    # asyncio sets TCP_NODELAY only on sockets whose protocol is named; without it every answer waits 40 ms.
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    config = uvicorn.Config(
        Starlette(routes=routes),
        ws=EndingWebSockets,
        lifespan="off",
        log_config=None,
        timeout_graceful_shutdown=1,
        **UVICORN_OPTIONS,
    )
    try:
        with start_blocking_portal("asyncio") as portal:
            server = uvicorn.Server(config)
            future = portal.start_task_soon(_serve, server, dispatcher, listener)
            try:
                yield Desk(portal, store, blobs, dispatcher, listener.getsockname()[1])
            finally:
                server.should_exit = True
                future.result(PATIENCE_S)
    finally:
        listener.close()
        store.close()


async def _serve(server: uvicorn.Server, dispatcher: Dispatcher, listener: socket.socket) -> None:
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(dispatcher.run)
        await server.serve(sockets=[listener])
        tasks.cancel_scope.cancel()


def _authenticate(token: str) -> WorkerScope | None:
    if token.startswith("pinned:"):
        return WorkerScope(token.removeprefix("pinned:"))
    return WorkerScope() if token == TOKEN else None


async def pieces(data: bytes, size: int = 2**16) -> AsyncIterator[bytes]:
    """Bytes as a stream."""
    for start in range(0, len(data), size):
        yield data[start : start + size]
