"""Shipped fakes: a running coordinator on a free port, and a worker whose answers a test writes.

The coordinator is the real one (real server, store, dispatcher, gateway); only the worker is scripted. It speaks
the native link over a real WebSocket and obeys `LinkSession`, so a test cannot make it send what no worker may.
"""

from __future__ import annotations

import asyncio
import hashlib
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import httpx
import msgspec
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

from coordinator.app import Coordinator
from coordinator.server import Server, Serving, base_url, listen, uvicorn_config
from coordinator.services import Limits
from coordinator.studio.claims import Sources
from coordinator.studio.session import StudioSettings
from protocol import link_wire as wire
from protocol.engine_wire import OutputFile
from protocol.faults import Fault, FaultError
from protocol.link_session import LinkProtocolError, LinkSession, Role
from protocol.revision import LINK_SUBPROTOCOL, LINK_WIRE
from protocol.work import parse_params

START_S = 60.0
STOP_S = 60.0
BEAT_S = 2.0
TENANT = "default"
T = TypeVar("T")


class Running(msgspec.Struct, frozen=True):
    """A coordinator that serves.

    Attributes:
        url: without a trailing slash.
        key: secret of a client key of the tenant `TENANT`.
        worker_token: secret of a worker key.
        coordinator: the parts, for looking at; they belong to the server's thread.
        loop: the event loop of that thread.
    """

    url: str
    key: str
    worker_token: str
    coordinator: Coordinator
    loop: asyncio.AbstractEventLoop

    def call(self, function: Callable[..., Coroutine[Any, Any, T]], *args: Any) -> T:
        """Run a coroutine function of the parts where they live, for at most `START_S`."""
        return asyncio.run_coroutine_threadsafe(function(*args), self.loop).result(START_S)

    @property
    def headers(self) -> dict[str, str]:
        """What a client sends."""
        return {"authorization": f"Bearer {self.key}"}


@contextmanager
def running(
    state: Path,
    limits: Limits | None = None,
    studio: StudioSettings | None = None,
    studio_models: Sources | None = None,
    **options: Any,
) -> Iterator[Running]:
    """Serve a real coordinator over `state` in a thread, on a free port of 127.0.0.1; options as of `Coordinator`."""
    coordinator = Coordinator(state, limits, studio_models, studio, **options)
    client = coordinator.keys.create("client", name="test", tenant=TENANT)
    token = coordinator.keys.create("worker", name="test")
    listener = listen("127.0.0.1:0")
    server = Server(uvicorn_config(coordinator.app, Serving()))
    started = threading.Event()
    server.on_started = started.set
    config = server.config
    loops: list[asyncio.AbstractEventLoop] = []

    def serve() -> None:
        with asyncio.Runner(loop_factory=config.get_loop_factory()) as runner:
            loops.append(runner.get_loop())
            runner.run(server.serve(sockets=[listener]))

    thread = threading.Thread(target=serve, name="coordinator", daemon=True)
    thread.start()
    try:
        if not started.wait(START_S):
            raise TimeoutError(f"the coordinator did not start within {START_S} s")
        yield Running(base_url(listener, secure=False), client, token, coordinator, loops[0])
    finally:
        server.should_exit = True
        thread.join(STOP_S)
        if thread.is_alive():
            raise TimeoutError(f"the coordinator did not stop within {STOP_S} s")


class OfferedJob:
    """One offer, in the hands of a test. Methods send what a worker would send."""

    def __init__(self, worker: FakeWorker, job: str, attempt: int, offer: wire.Offer) -> None:
        self.id = job
        self.attempt = attempt
        self.offer = offer
        self.params: Any = parse_params(offer.kind, offer.params)
        self.cancelled = threading.Event()
        self._worker = worker
        self._seq = 0
        self._files: list[OutputFile] = []

    def started(self) -> None:
        """Validation passed."""
        self._send(wire.Started())

    def chunk(self, data: Any) -> None:
        """One piece of streamed output."""
        self._send(wire.Chunk(seq=self._seq, data=msgspec.Raw(msgspec.msgpack.encode(data))))
        self._seq += 1

    def progress(self, n: int, total: int | None = None, phase: str = "", text: str = "") -> None:
        """How far it is."""
        self._send(wire.Progress(n=n, total=total, phase=phase, text=text))

    def read(self, name: str) -> bytes:
        """Fetch an input by its signed URL."""
        (file,) = [item for item in self.offer.inputs if item.name == name]
        answer = httpx.get(file.url if "://" in file.url else self._worker.url + file.url, timeout=START_S)
        answer.raise_for_status()
        return answer.content

    def upload(self, name: str, data: bytes, mime: str) -> None:
        """Leave an output; `complete` announces it."""
        url = self._worker.url + self.offer.upload.replace("{name}", quote(name, safe=""))
        digest = hashlib.sha256(data).hexdigest()
        httpx.put(url, content=data, headers={"x-content-sha256": digest}, timeout=START_S).raise_for_status()
        self._files.append(OutputFile(name, mime, len(data), digest))

    def complete(self, result: Any, usage: dict[str, float] | None = None) -> None:
        """Done."""
        body = msgspec.Raw(msgspec.msgpack.encode(result))
        self._send(wire.Complete(result=body, files=tuple(self._files), usage=usage or {}))

    def fail(self, fault: Fault) -> None:
        """Failed."""
        self._send(wire.Fail(fault=fault, streamed=self._seq > 0))

    def _send(self, body: wire.Body) -> None:
        self._worker.send(body, self.id, self.attempt)


Script = Callable[[OfferedJob], None]


class FakeWorker:
    """A worker whose engine is `script`, called once per offer in a thread of its own.

    `announced` is more of its capabilities. A script that raises FaultError fails its job with that fault.

    Use as a context manager; offers come after the coordinator said welcome.
    """

    def __init__(
        self,
        running: Running,
        models: tuple[wire.ModelOffer, ...],
        script: Script,
        name: str = "fake",
        **announced: Any,
    ) -> None:
        self.url = running.url
        self.script = script
        self.jobs: list[OfferedJob] = []
        self.errors: list[Exception] = []
        self._token = running.worker_token
        self._hello = wire.Hello(
            worker=name,
            low=LINK_WIRE.low,
            high=LINK_WIRE.high,
            capabilities=wire.Capabilities(models=models, **announced),
        )
        self._link = LinkSession(Role.WORKER)
        self._lock = threading.Lock()
        self._open: dict[tuple[str, int], OfferedJob] = {}
        self._threads: list[threading.Thread] = []
        self._stack = ExitStack()
        self._connection: ClientConnection | None = None

    def __enter__(self) -> FakeWorker:
        """Connect; the models are served when this returns."""
        connecting = connect(
            self.url.replace("http", "ws", 1) + "/v1/worker",
            subprotocols=[LINK_SUBPROTOCOL],  # type: ignore[list-item]
            additional_headers={"authorization": f"Bearer {self._token}"},
            compression=None,
            proxy=None,
            max_size=wire.MAX_MESSAGE_BYTES,
            open_timeout=START_S,
        )
        self._connection = self._stack.enter_context(connecting)
        self.send(self._hello)
        self._take(self._connection.recv(timeout=START_S))
        self._start(self._read)
        return self

    def __exit__(self, *_exc: object) -> None:
        """Disconnect; raises what went wrong in the worker's threads."""
        assert self._connection is not None
        self._stack.close()
        for job in self.jobs:
            job.cancelled.set()
        for thread in self._threads:
            thread.join(STOP_S)
        if self.errors:
            raise self.errors[0]

    def send(self, body: wire.Body, job: str = "", attempt: int = 0) -> None:
        """Send one message, if the session allows it now."""
        assert self._connection is not None
        with self._lock:
            self._link.sending(body, job, attempt)
            self._connection.send(wire.encode(body, job, attempt))

    def announce(self, models: tuple[wire.ModelOffer, ...]) -> None:
        """Serve other models from now on."""
        self.send(wire.Announce(capabilities=wire.Capabilities(models=models)))

    def _start(self, target: Callable[..., None], *args: object) -> None:
        thread = threading.Thread(target=target, args=args, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _read(self) -> None:
        assert self._connection is not None
        beat = 0
        with suppress(ConnectionClosed):
            while True:
                try:
                    self._take(self._connection.recv(timeout=BEAT_S))
                except TimeoutError:
                    beat += 1
                    self.send(wire.Heartbeat(n=beat))

    def _take(self, data: str | bytes) -> None:
        assert isinstance(data, bytes)
        envelope = wire.decode_envelope(data)
        body = wire.decode_body(envelope, wire.DOWN)
        key = (envelope.job, envelope.attempt)
        with self._lock:
            self._link.received(body, *key)
        if isinstance(body, wire.Offer):
            job = OfferedJob(self, *key, body)
            self.jobs.append(job)
            self._open[key] = job
            self._start(self._work, job)
        elif isinstance(body, wire.Cancel) and key in self._open:
            self._open[key].cancelled.set()

    def _work(self, job: OfferedJob) -> None:
        # The connection may end at any step, also while the end of a script is told: that is the test's doing.
        with suppress(ConnectionClosed):
            self.send(wire.Accept(), job.id, job.attempt)
            try:
                self.script(job)
            except FaultError as error:
                job.fail(error.fault)
            except ConnectionClosed:
                raise
            except Exception as error:
                self.errors.append(error)
                with suppress(LinkProtocolError):  # the script had ended the job before it failed
                    job.fail(Fault("engine_failed", f"The test's script failed: {error}"))
