"""`/v1/worker`: one WebSocket per worker, subprotocol `bulkhead.v1`.

Every message is judged by `LinkSession` before it means anything. A message without an envelope, or one that is
illegal now, ends the session (4002); one whose body is unreadable fails only its attempt. Three tasks per session:
the reader (which also acts), the writer, and one that gathers chunk acknowledgements. Nothing here decides about
jobs: that is `Attempts`.

Run the server with `UVICORN_OPTIONS`: no permessage-deflate (it costs about 100 KB per connection), and messages
no larger than the link allows.
"""

from __future__ import annotations

import inspect
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

import anyio
import msgspec
from starlette.websockets import WebSocket, WebSocketDisconnect

from coordinator import worker_lines
from coordinator.announced import MOST_FETCHES, MOST_GPUS, why_refused
from coordinator.attempts import Attempts
from coordinator.dispatch import Dispatcher
from coordinator.doors import Doors
from coordinator.errors import fault_response
from coordinator.fleet import Key, Worker
from coordinator.logs import trouble
from coordinator.plain import MESSAGE_CHARS, why_not_plain
from coordinator.records import WorkerScope
from coordinator.store import StoreError
from coordinator.worker_lines import ODD_LINES, Line, Pace
from protocol import link_wire as wire
from protocol.faults import Fault, FaultError
from protocol.ids import is_safe_id
from protocol.link_session import Attempt, LinkProtocolError, LinkSession, Role, Session
from protocol.revision import LINK_SUBPROTOCOL, LINK_WIRE, Span, agree

log = logging.getLogger(__name__)

UVICORN_OPTIONS: dict[str, Any] = {"ws_max_size": wire.MAX_MESSAGE_BYTES, "ws_per_message_deflate": False}

MAX_QUEUED_MESSAGES = 4096
MAX_HELD = 4096  # attempts named in one hello
MAX_ATTEMPT = 2**31
CLOSE_INTERNAL = 1011
_CLOSE_CODES = {
    "auth_failed": wire.CLOSE_AUTH,
    "protocol_violation": wire.CLOSE_PROTOCOL,
    "duplicate_worker": wire.CLOSE_DUPLICATE,
    "worker_deleted": wire.CLOSE_DELETED,
    "bad_revision": wire.CLOSE_REVISION,
}

Authenticate = Callable[[str], "WorkerScope | Awaitable[WorkerScope | None] | None"]


class GatewaySettings(msgspec.Struct, frozen=True, kw_only=True):
    """Tunables.

    Attributes:
        heartbeat_ms: how often a worker sends one; silence for `missed` of them ends the session.
        hello_s: how long the first message may take.
        chunk_ack_s: chunk acknowledgements are gathered for this long.
        close_s: how long the farewell may take.
        queued_bytes: a worker that lets more pile up than this does not read; one offer may have 4 MiB.
    """

    heartbeat_ms: int = 5000
    missed: int = 3
    hello_s: float = 10.0
    chunk_ack_s: float = 0.02
    close_s: float = 2.0
    queued_bytes: int = 64 * 2**20

    @property
    def silence_s(self) -> float:
        """Silence after which a worker counts as gone."""
        return self.heartbeat_ms * self.missed / 1000


class _End(Exception):
    """The session ends with this error; `code` is one of `link_wire.Error`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def worker_endpoint(
    dispatcher: Dispatcher,
    authenticate: Authenticate,
    settings: GatewaySettings | None = None,
    doors: Doors | None = None,
) -> Callable[[WebSocket], Awaitable[None]]:
    """Return the endpoint for `WebSocketRoute("/v1/worker", …)`.

    Args:
        dispatcher: gets what workers say.
        authenticate: bearer token -> what it allows; None refuses. May be a coroutine function.
        settings: tunables.
        doors: closes sessions whose key is revoked.
    """
    options, closed_doors = settings or GatewaySettings(), doors or Doors(lambda _name: True)

    async def endpoint(websocket: WebSocket) -> None:
        try:
            scope = await _authenticated(websocket, authenticate)
        except FaultError as error:
            await deny(websocket, error.fault)
            return
        if dispatcher.handing_over:
            await deny(websocket, Fault("overloaded", "This replica is being drained; ask another one."))
        elif scope is None:
            await deny(websocket, Fault("unauthorized", "The worker token is missing or not good."))
        elif LINK_SUBPROTOCOL not in websocket.scope.get("subprotocols", ()):
            await deny(websocket, Fault("invalid_request", f"Ask for the WebSocket subprotocol {LINK_SUBPROTOCOL}."))
        else:
            await websocket.accept(subprotocol=LINK_SUBPROTOCOL)
            session = WorkerSession(websocket, dispatcher, scope, options)
            with closed_doors.hold(scope.key_id, lambda: session.close("auth_failed", "The token was revoked.")):
                await session.run()

    return endpoint


async def _authenticated(websocket: WebSocket, authenticate: Authenticate) -> WorkerScope | None:
    kind, _, token = websocket.headers.get("authorization", "").partition(" ")
    if kind.lower() != "bearer" or not token.strip():
        return None
    answer = authenticate(token.strip())
    return await answer if inspect.isawaitable(answer) else answer


async def deny(websocket: WebSocket, fault: Fault) -> None:
    """Refuse the upgrade: an HTTP response where the server can, else a close code."""
    if "websocket.http.response" in websocket.scope.get("extensions", {}):
        await websocket.send_denial_response(fault_response(fault))
    else:
        await websocket.close(wire.CLOSE_AUTH, fault.message)


class WorkerSession:
    """One connected span with one worker; the `Port` of its `Worker`.

    Cancellation: what the worker holds is orphaned, the connection is closed.
    """

    def __init__(
        self, websocket: WebSocket, dispatcher: Dispatcher, scope: WorkerScope, settings: GatewaySettings
    ) -> None:
        self._websocket, self._scope, self._settings = websocket, scope, settings
        self._grace_s = dispatcher.settings.worker_grace_s
        self._attempts: Attempts = dispatcher.attempts
        self._link = LinkSession(Role.COORDINATOR)
        self._outbox_in, self._outbox = anyio.create_memory_object_stream[bytes](MAX_QUEUED_MESSAGES)
        self._queued_bytes = 0
        self._tasks: anyio.CancelScope | None = None
        self._worker: Worker | None = None
        self._ending: tuple[str, str] | None = None
        self._gone = False
        self._spoiled: set[Key] = set()
        self._refused: set[Key] = set()  # settled at hello; what the worker had sent before it knew means nothing
        self._acks: dict[Key, int] = {}
        self._acks_due = anyio.Event()
        self._odd = Pace(*ODD_LINES)

    # ---- Port ----------------------------------------------------------------------------------------------

    def send(self, body: wire.Body, job: str = "", attempt: int = 0) -> None:
        """Queue a message. Does nothing once the session is over."""
        if self._ending is not None or self._gone:
            return
        self._link.sending(body, job, attempt)
        data = wire.encode(body, job, attempt)
        try:
            if self._queued_bytes > self._settings.queued_bytes:
                raise anyio.WouldBlock
            self._outbox_in.send_nowait(data)
            self._queued_bytes += len(data)
        except anyio.WouldBlock:
            self.close("internal_error", "The worker does not read its messages.")

    def close(self, code: str, message: str) -> None:
        """Say `error` and end the session. The first reason counts."""
        if self._ending is None:
            self._ending = (code, message)
        if self._tasks is not None:
            self._tasks.cancel()

    # ---- the session ---------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the session to its end; whatever ends it, the worker's attempts are orphaned and it is closed."""
        try:
            async with anyio.create_task_group() as tasks:
                self._tasks = tasks.cancel_scope
                if self._ending is not None:  # its token was revoked before it had begun
                    tasks.cancel_scope.cancel()
                tasks.start_soon(self._write)
                tasks.start_soon(self._write_chunk_acks)
                await self._read()
                tasks.cancel_scope.cancel()
        finally:
            if self._worker is not None:
                self._attempts.leave(self._worker, self._grace_s)
            self._outbox_in.close()
            self._outbox.close()
            with anyio.move_on_after(self._settings.close_s, shield=True):
                await self._farewell()

    async def _read(self) -> None:
        try:
            await self._hello()
            while True:
                with anyio.fail_after(self._settings.silence_s):
                    data = await self._receive()
                await self._take(data)
        except (WebSocketDisconnect, anyio.BrokenResourceError):
            self._gone = True
        except TimeoutError:
            self._ending = ("internal_error", f"Nothing was heard for {self._settings.silence_s:g} s.")
        except _End as end:
            self._ending = (end.code, str(end))
        except (StoreError, FaultError, OSError) as error:
            # Nothing was acknowledged, so the worker says it all again after it has reconnected.
            trouble(log, error, f"Session of worker {self._name} ended by trouble of ours")
            self._ending = ("internal_error", str(error))

    async def _receive(self) -> bytes:
        message = await self._websocket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code") or 1005)
        data = message.get("bytes")
        if not isinstance(data, bytes):
            raise _End("protocol_violation", "Expected binary messages only.")
        return data

    async def _hello(self) -> None:
        try:
            with anyio.fail_after(self._settings.hello_s):
                data = await self._receive()
        except TimeoutError:
            raise _End("protocol_violation", f"No hello within {self._settings.hello_s:g} s.") from None
        try:
            body = wire.decode_body(wire.decode_envelope(data), wire.UP)
            self._link.received(body)
        except (wire.EnvelopeError, wire.BodyError, LinkProtocolError) as error:
            raise _End("protocol_violation", str(error)) from None
        assert isinstance(body, wire.Hello)  # nothing else is legal first
        revision = self._check(body)
        async with self._attempts.joining:
            worker, follow_up = await self._attempts.join(self, body, self._grace_s)
            self._worker = worker
            session = secrets.token_hex(8)
            worker.revision, worker.key_id = revision, self._scope.key_id
            self.send(wire.Welcome(session=session, revision=revision, heartbeat_ms=self._settings.heartbeat_ms))
            for message, job, attempt in follow_up:
                self.send(message, job, attempt)
                if isinstance(message, wire.Ack):
                    self._refused.add((job, attempt))
            self._attempts.open(worker)
        log.info("Worker %s connected (session %s, %d held)", worker.id, session, len(body.held))

    def _check(self, hello: wire.Hello) -> int:
        """Return the common revision. Raises _End."""
        if not is_safe_id(hello.worker):
            raise _End("protocol_violation", "The worker id has characters that an id must not have.")
        if self._scope.worker and self._scope.worker != hello.worker:
            raise _End("auth_failed", f"This token belongs to the worker {self._scope.worker}.")
        if why := why_refused(hello.capabilities):
            raise _End("protocol_violation", why)
        if len(hello.held) > MAX_HELD or any(not 1 <= held.attempt < MAX_ATTEMPT for held in hello.held):
            raise _End("protocol_violation", f"At most {MAX_HELD} attempts can be held.")
        revision = agree(LINK_WIRE, Span(hello.low, hello.high))
        if revision is None:
            raise _End(
                "bad_revision",
                f"This coordinator speaks link revisions {LINK_WIRE.low} to {LINK_WIRE.high}, the worker "
                f"{hello.low} to {hello.high}; update the older side.",
            )
        return revision

    @property
    def _name(self) -> str:
        return self._worker.id if self._worker else "(before hello)"

    # ---- messages ------------------------------------------------------------------------------------------

    async def _take(self, data: bytes) -> None:
        """Judge one message and act on it. Raises _End."""
        try:
            envelope = wire.decode_envelope(data)
        except wire.EnvelopeError as error:
            raise _End("protocol_violation", str(error)) from None
        key = (envelope.job, envelope.attempt)
        if envelope.attempt >= MAX_ATTEMPT:
            raise _End("protocol_violation", "The attempt number is out of range.")
        try:
            body = wire.decode_body(envelope, wire.UP)
        except wire.BodyError as error:
            await self._unreadable(envelope, str(error))
            return
        if why := why_not_plain(body):
            await self._unreadable(envelope, f"{envelope.t}: {why}")
            if isinstance(body, wire.OrderDone):  # who asked would wait for hours
                self._act(wire.OrderDone(id=body.id, ok=False, message=f"The worker's answer cannot be shown: {why}"))
            return
        if key in self._refused or (key in self._spoiled and not isinstance(body, wire.Complete | wire.Fail)):
            return
        try:
            self._judge(body, key)
        except LinkProtocolError as error:
            raise _End("protocol_violation", str(error)) from None
        if not self._act(body):
            await self._act_on_attempt(body, key)

    def _judge(self, body: wire.Body, key: Key) -> None:
        if key in self._spoiled and isinstance(body, wire.Complete):
            # Its `started` may be what we could not read; the end is legal all the same.
            body = wire.Fail(fault=Fault("engine_protocol", "unreadable"))
        self._link.received(body, *key)

    async def _act_on_attempt(self, body: wire.Body, key: Key) -> None:
        worker, attempts = self._worker, self._attempts
        assert worker is not None
        if key not in worker.attempts:
            if self._link.attempt(*key) is Attempt.ENDED:  # taken over by a newer session of this worker
                self.send(wire.Ack(verdict="fenced"), *key)
            return
        match body:
            case wire.Accept():
                await attempts.accept(worker, key)
            case wire.Decline():
                await attempts.decline(worker, key, body)
            case wire.Started():
                attempts.started(worker, key)
            case wire.Chunk():
                if not await attempts.chunk(worker, key, body):
                    raise _End("protocol_violation", f"Chunks before {body.seq} of {key[0]}#{key[1]} are missing.")
                self._acknowledge_chunk(key, body.seq)
            case wire.Progress():
                attempts.progress(worker, key, body)
            case wire.Complete():
                self._settle(key)
                await attempts.complete(worker, key, body)
            case wire.Fail():
                self._settle(key)
                await attempts.fail(worker, key, body)

    def _settle(self, key: Key) -> None:
        """The attempt is over: nothing but its acknowledgement follows."""
        self._acks.pop(key, None)
        self._spoiled.discard(key)

    def _act(self, body: wire.Body) -> bool:
        """Act on what speaks of the session as a whole; False for what speaks of an attempt."""
        worker = self._worker
        assert worker is not None
        match body:
            case wire.Heartbeat():
                worker.gpus, worker.fetches = body.gpus[:MOST_GPUS], body.fetches[:MOST_FETCHES]
                self.send(wire.HeartbeatAck(n=body.n))
            case wire.OrderDone():
                if waits := worker.orders.pop(body.id, None):
                    waits(body)
            case wire.Announce():
                if why := why_refused(body.capabilities):
                    raise _End("protocol_violation", why)
                self._attempts.announce(worker, body.capabilities)
            case wire.Draining():
                self._attempts.drain(worker)
            case wire.LogBatch():
                lines = (Line(line.ts, line.level, line.message, line.job) for line in body.lines)
                ear = self._attempts.ears.of(worker.id)
                worker_lines.tell(worker.id, lines, body.dropped, kept=self._attempts.kept, ear=ear)
            case _:
                return False
        return True

    async def _unreadable(self, envelope: wire.Envelope, error: str) -> None:
        """Stage two failed: the attempt that the envelope names fails, the session goes on."""
        worker, key = self._worker, (envelope.job, envelope.attempt)
        assert worker is not None
        if self._odd.take(1):
            log.warning("Worker %s sent a message that cannot be read: %s", worker.id, error[:MESSAGE_CHARS])
        self._attempts.counters.events["unreadable"] += 1
        if key not in worker.attempts:
            return
        if self._link.attempt(*key) is Attempt.OFFERED:
            if envelope.t == "decline":
                return await self._act_on_attempt(self._stand_in(wire.Decline(code="busy", reason=error), key), key)
            self._stand_in(wire.Accept(), key)  # whatever it was, the worker has taken the offer
        self._spoiled.add(key)
        fault = Fault("engine_protocol", f"The worker sent a message about this job that cannot be read: {error}")
        await self._attempts.spoil(worker, key, fault)
        if envelope.t in ("complete", "fail") and key in worker.attempts:
            # The worker waits for the acknowledgement of its end.
            await self._act_on_attempt(self._stand_in(wire.Fail(fault=fault), key), key)
        return None

    def _stand_in(self, body: wire.Body, key: Key) -> wire.Body:
        """Let the session take the step that the unreadable message was."""
        self._link.received(body, *key)
        return body

    # ---- writing -------------------------------------------------------------------------------------------

    async def _write(self) -> None:
        try:
            async for data in self._outbox:
                await self._websocket.send_bytes(data)
                self._queued_bytes -= len(data)
        except (WebSocketDisconnect, RuntimeError, OSError):
            self._gone = True  # the reader learns it, too; this only ends a session whose peer reads no more
            self.close("internal_error", "The connection is gone.")

    def _acknowledge_chunk(self, key: Key, seq: int) -> None:
        self._acks[key] = seq
        self._acks_due.set()

    async def _write_chunk_acks(self) -> None:
        """One acknowledgement per attempt for all chunks of the last moments."""
        while True:
            await self._acks_due.wait()
            await anyio.sleep(self._settings.chunk_ack_s)
            self._acks_due = anyio.Event()
            acks, self._acks = self._acks, {}
            for (job, attempt), seq in acks.items():
                if self._link.attempt(job, attempt) is not None:
                    self.send(wire.ChunkAck(seq=seq), job, attempt)

    async def _farewell(self) -> None:
        code, message = self._ending or ("", "")
        try:
            if code and not self._gone:
                log.warning("Session of worker %s ends: %s (%s)", self._name, message, code)
                if self._link.state is not Session.CLOSED:
                    await self._websocket.send_bytes(wire.encode(wire.Error(code=code, message=message)))
                await self._websocket.close(_CLOSE_CODES.get(code, CLOSE_INTERNAL), code)
            elif not self._gone:
                await self._websocket.close(1001)
        except (WebSocketDisconnect, RuntimeError, OSError):
            pass  # it was closed under us, which is what we wanted
