"""Fakes that ship with the package: a host without engines, and a coordinator that says what a test tells it to.

`FakeHost` is deterministic and needs no clock, so it works under trio's MockClock. `FakeCoordinator` speaks the
real link over a real WebSocket on loopback, judged by the same session table as the real one.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, TypeVar

import msgspec
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, WebSocketRequest, serve_websocket

from protocol import link_wire as wire
from protocol.engine_wire import OutputFile
from protocol.faults import Fault
from protocol.link_session import LinkSession, Role
from protocol.revision import LINK_SUBPROTOCOL
from supervisor.host import work

PATIENCE_S = 60.0
_Body = TypeVar("_Body", bound=wire.Body)


class FakeRun:
    """One run at the fake host; the test plays the engine."""

    def __init__(self, request: work.RunRequest, on_event: work.OnEvent) -> None:
        self.request = request
        self.cancelled = False
        self._on_event = on_event
        self._seq = itertools.count()
        self._end: work.RunEnd | None = None
        self._ended = trio.Event()

    def start(self) -> None:
        """Validation passed."""
        self._on_event(work.Started())

    def chunk(self, data: object) -> None:
        """Stream a piece."""
        self._on_event(work.Chunk(next(self._seq), msgspec.msgpack.encode(data)))

    def progress(self, n: int, text: str = "") -> None:
        """Show progress."""
        self._on_event(work.Progress(n, text=text))

    def done(self, body: object, files: Sequence[OutputFile] = (), **usage: float) -> None:
        """End well."""
        self.end(work.Done(body=msgspec.msgpack.encode(body), files=tuple(files), usage=usage))

    def fail(self, code: str, message: str = "It failed.") -> None:
        """End badly."""
        self.end(work.Failed(fault=Fault(code, message)))

    def end(self, end: work.RunEnd) -> None:
        """End; the first end counts."""
        if self._end is None:
            self._end = end
            self._ended.set()

    async def _wait(self) -> work.RunEnd:
        await self._ended.wait()
        assert self._end is not None
        return self._end


class FakeHost:
    """Stands in for `supervisor.host.host.Host`: every run waits for the test to play it.

    Attributes:
        heeds_cancel: whether a cancel ends the run at once, as a good engine does.
        statuses: what `snapshot` returns; `change` sets it and tells.
    """

    def __init__(self, statuses: Sequence[work.InstanceStatus] = ()) -> None:
        self.heeds_cancel = True
        self.statuses = list(statuses)
        self.on_change: Callable[[], None] | None = None
        self.preloaded: list[str] = []
        self.stopped_with: float | None = None
        self._running: dict[str, FakeRun] = {}
        self._arrivals_in, self._arrivals = trio.open_memory_channel[FakeRun](1000)

    async def run(self, request: work.RunRequest, on_event: work.OnEvent) -> work.RunEnd:
        """See `Host.run`."""
        run = FakeRun(request, on_event)
        self._running[request.label] = run
        self._arrivals_in.send_nowait(run)
        try:
            return await run._wait()
        except trio.Cancelled:
            run.cancelled = True
            raise
        finally:
            del self._running[request.label]

    async def next_run(self) -> FakeRun:
        """The next run that was asked for."""
        with trio.fail_after(PATIENCE_S):
            return await self._arrivals.receive()

    def cancel(self, label: str) -> None:
        """See `Host.cancel`."""
        if run := self._running.get(label):
            run.cancelled = True
            if self.heeds_cancel:
                run.fail("cancelled", "The job was cancelled.")

    def preload(self, model: str, *, ordered: bool = False) -> None:
        """See `Host.preload`."""
        self.preloaded.append(model)

    def snapshot(self) -> list[work.InstanceStatus]:
        """See `Host.snapshot`."""
        return list(self.statuses)

    def change(self, *statuses: work.InstanceStatus) -> None:
        """Set the snapshot and tell."""
        self.statuses = list(statuses)
        if self.on_change is not None:
            self.on_change()

    async def stop(self, grace_s: float) -> None:
        """See `Host.stop`."""
        await trio.lowlevel.checkpoint()
        self.stopped_with = grace_s


class FakePeer:
    """One session at the fake coordinator."""

    def __init__(self, socket: WebSocketConnection, headers: dict[str, str]) -> None:
        self.headers = headers
        self.hello: wire.Hello
        self.socket = socket
        self.session = LinkSession(Role.COORDINATOR)
        self.announced: wire.Capabilities | None = None
        self.heartbeats = 0
        self.answers_heartbeats = True
        self.gone = trio.Event()

    async def send(self, body: wire.Body, job: str = "", attempt: int = 0) -> None:
        """Send a legal message."""
        self.session.sending(body, job, attempt)
        await self.socket.send_message(wire.encode(body, job, attempt))

    async def send_raw(self, data: bytes | str) -> None:
        """Send anything."""
        await self.socket.send_message(data)

    async def welcome(self, heartbeat_ms: int = 5000) -> FakePeer:
        """Receive hello, answer welcome."""
        self.hello = await self.expect(wire.Hello)
        await self.send(wire.Welcome(session="s", revision=self.hello.high, heartbeat_ms=heartbeat_ms))
        return self

    async def offer(self, job: str, attempt: int, kind: str, model: str, params: object, **fields: Any) -> None:
        """Offer a job."""
        raw = msgspec.Raw(msgspec.msgpack.encode(params))
        await self.send(wire.Offer(kind=kind, model=model, params=raw, **fields), job, attempt)

    async def receive(self) -> tuple[wire.Body, str, int]:
        """The next message; heartbeats are answered and counted, announcements noted."""
        with trio.fail_after(PATIENCE_S):
            while True:
                data = await self.socket.get_message()
                assert isinstance(data, bytes)
                envelope = wire.decode_envelope(data)
                body = wire.decode_body(envelope, wire.UP)
                self.session.received(body, envelope.job, envelope.attempt)
                if isinstance(body, wire.Heartbeat):
                    self.heartbeats += 1
                    if self.answers_heartbeats:
                        await self.send(wire.HeartbeatAck(n=body.n))
                elif isinstance(body, wire.Announce):
                    self.announced = body.capabilities
                    return body, "", 0
                else:
                    return body, envelope.job, envelope.attempt

    async def expect(self, type_: type[_Body]) -> _Body:
        """The next message, which has to be of `type_`; announcements are passed over unless asked for."""
        while True:
            body, _, _ = await self.receive()
            if isinstance(body, type_):
                return body
            if not isinstance(body, wire.Announce):
                raise AssertionError(f"expected {type_.__name__}, got {body}")

    async def close(self, code: int = 1000, reason: str = "") -> None:
        """End the session."""
        await self.socket.aclose(code, reason)


class FakeCoordinator:
    """A WebSocket server that hands each connection to the test. Made by `open_coordinator`."""

    def __init__(self) -> None:
        self.url = ""
        self.reject_with = 0  # HTTP status for upgrades
        self.subprotocol: str | None = LINK_SUBPROTOCOL
        self._peers_in, self._peers = trio.open_memory_channel[FakePeer](100)

    async def connection(self) -> FakePeer:
        """The next connection, before its hello was read."""
        with trio.fail_after(PATIENCE_S):
            return await self._peers.receive()

    async def session(self, heartbeat_ms: int = 5000) -> FakePeer:
        """The next connection, welcomed."""
        peer = await self.connection()
        return await peer.welcome(heartbeat_ms)

    async def _serve(self, request: WebSocketRequest) -> None:
        with contextlib.suppress(ConnectionClosed):
            if self.reject_with:
                await request.reject(self.reject_with, body=b"no entry")
                return
            if self.subprotocol is not None and self.subprotocol not in request.proposed_subprotocols:
                # A stranger, as comes by where a port had another owner a moment ago.
                await request.reject(400, body=f"{self.subprotocol} is wanted".encode())
                return
            headers = {name.decode().lower(): value.decode() for name, value in request.headers}
            peer = FakePeer(await request.accept(subprotocol=self.subprotocol), headers)
            self._peers_in.send_nowait(peer)
            await peer.gone.wait()


@contextlib.asynccontextmanager
async def open_coordinator() -> AsyncIterator[FakeCoordinator]:
    """Serve a `FakeCoordinator` on a free port of loopback."""
    coordinator = FakeCoordinator()
    async with trio.open_nursery() as nursery:
        server = await nursery.start(serve_websocket, coordinator._serve, "127.0.0.1", 0, None)
        coordinator.url = f"ws://127.0.0.1:{server.port}"
        yield coordinator
        nursery.cancel_scope.cancel()
