"""One session with a worker that speaks `studio-worker-v1`; the `Port` of its `Worker`, like the native one.

What the fleet and the dispatcher know stays native: an offer becomes a claim, a frame becomes a call of `Attempts`
(`StudioJobs`). What the contract has no word for (a cancel, say) is answered in the worker's stead, or dropped.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from datetime import UTC, datetime
from typing import Any, NamedTuple

import anyio
import msgspec
from starlette.websockets import WebSocket, WebSocketDisconnect

from coordinator import worker_lines
from coordinator.attempts import Attempts
from coordinator.fleet import Key, Worker
from coordinator.logs import trouble
from coordinator.store import StoreError
from coordinator.studio.claims import Sources, kinds_of
from coordinator.studio.jobs import Stranger, StudioJobs
from coordinator.studio.wire import (
    OF_A_JOB,
    UP,
    Capabilities,
    Heartbeat,
    Hello,
    LogBatch,
    NoFrame,
    Unreadable,
    announced,
    bound,
    frame,
    read_body,
    read_head,
)
from coordinator.worker_lines import ODD_LINES, Line, Pace
from protocol import link_wire as wire
from protocol.faults import FaultError
from protocol.revision import LINK_WIRE

log = logging.getLogger(__name__)

MAX_QUEUED_FRAMES = 1024
CLOSE_NORMAL = 1000  # also after an error of ours
_CLOSE_CODES = {
    "auth_failed": wire.CLOSE_AUTH,
    "protocol_violation": wire.CLOSE_PROTOCOL,
    "duplicate_worker": wire.CLOSE_DUPLICATE,
    "worker_deleted": wire.CLOSE_DELETED,
}
_GONE = (WebSocketDisconnect, anyio.BrokenResourceError)


class StudioSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Tunables, in seconds.

    Attributes:
        hello_s: how long the first frame may take.
        silence_s: a worker without a heartbeat for so long is gone; looked at every `sweep_s`.
        busy_s: pause before the next offer to a worker that rejected one as busy or paused.
        let_go_s: heartbeats without a job for so long, and without a break, end what the worker had accepted, and what
            nobody waits for any more.
        close_s: how long the farewell may take.
        upload_idle_s: an upload of which nothing comes for so long is ended.
        asked: how many requests to register one address may make within 60 s.
    """

    hello_s: float = 10.0
    silence_s: float = 30.0
    sweep_s: float = 10.0
    busy_s: float = 5.0
    let_go_s: float = 15.0
    close_s: float = 5.0
    upload_idle_s: float = 60.0
    asked: int = 10


class Admission(NamedTuple):
    """What a session asks about its worker: is this its token of now, and is it still approved."""

    admits: Callable[[str], Awaitable[bool]]
    known: Callable[[], bool]


class _End(Exception):
    """The session ends with this error."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class StudioSession:
    """See the module.

    Cancellation: what the worker holds goes back to the queue within a second, the connection is closed.

    Attributes:
        name: the worker's id.
        upload_idle_s: an upload of which nothing comes for so long is ended.
    """

    def __init__(
        self,
        websocket: WebSocket,
        name: str,
        attempts: Attempts,
        admission: Admission,
        sources: Sources,
        url: Callable[[str], str],
        settings: StudioSettings,
        entered: Callable[[], None] = lambda: None,
    ) -> None:
        """`url` makes the relative URL of an input one that the worker can fetch; `entered` follows the hello."""
        self.name = name
        self.upload_idle_s = settings.upload_idle_s
        self._entered = entered
        self._websocket, self._attempts, self._admission = websocket, attempts, admission
        self._sources, self._url, self._settings = sources, url, settings
        # Nothing on this wire says whether a worker fetches models: it is believed to, until it rejects a job of one.
        self._fetched = {name: kinds for name, source in sources.items() if (kinds := kinds_of(source))}
        self._outbox_in, self._outbox = anyio.create_memory_object_stream[str](MAX_QUEUED_FRAMES)
        self._steps_in, self._steps = anyio.create_memory_object_stream[Callable[[], Awaitable[None]]](16)
        self._tasks: anyio.CancelScope | None = None
        self._worker: Worker | None = None
        self._said = Capabilities()
        self._paused = ("", 0.0)  # by our admin: why, until when
        self._jobs: StudioJobs | None = None
        self._beat_at = 0.0
        self._odd = Pace(*ODD_LINES)
        self._ending: tuple[str, str] | None = None
        self._gone = False

    # ---- Port ----------------------------------------------------------------------------------------------

    def send(self, body: wire.Body, job: str = "", attempt: int = 0) -> None:
        """Say it in the words that there are. Once the session is over, only what became of a result is heard."""
        worker = self._worker
        if isinstance(body, wire.Ack) and self._jobs is not None:
            self._jobs.ended((job, attempt), body.verdict)
            return
        if self._ending is not None or self._gone or worker is None:
            return
        match body:
            case wire.Offer():
                self._offer(body, (job, attempt))
            case wire.Drain():
                worker.draining = True
            case wire.Pause():
                for_s = body.for_ms / 1000 if body.for_ms else float("inf")
                self._paused = (body.reason or "paused by the coordinator", anyio.current_time() + for_s)
                self._announce()
            case wire.Resume():
                self._paused, worker.draining = ("", 0.0), False
                self._announce()
            case wire.ShutdownWorker():
                worker.draining = True
                log.warning("Worker %s cannot be told to shut down; it gets no more jobs", self.name)
            case _:
                pass  # cancel and the like: the contract has no words for them

    def close(self, code: str, message: str) -> None:
        """Say `error` and end the session. The first reason counts."""
        if self._ending is None:
            self._ending = (code, message)
        if self._tasks is not None:
            self._tasks.cancel()

    def _offer(self, offer: wire.Offer, key: Key) -> None:
        try:
            self.jobs.offer(offer, key)
        except FaultError as error:
            fault = error.fault
            self._steps_in.send_nowait(lambda: self.jobs.refuse(key, fault))

    def _say(self, text: str) -> None:
        if self._ending is not None or self._gone:
            return
        try:
            self._outbox_in.send_nowait(text)
        except (anyio.WouldBlock, anyio.ClosedResourceError, anyio.BrokenResourceError):
            self.close("internal_error", "The worker does not read its frames.")

    @property
    def jobs(self) -> StudioJobs:
        """What the worker holds. Only after its hello."""
        assert self._jobs is not None
        return self._jobs

    # ---- the session ---------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Serve the session to its end; whatever ends it, what the worker held is free for others."""
        try:
            async with anyio.create_task_group() as tasks:
                self._tasks = tasks.cancel_scope
                if self._ending is not None:  # put out before it had begun
                    tasks.cancel_scope.cancel()
                tasks.start_soon(self._write)
                tasks.start_soon(self._take_steps)
                tasks.start_soon(self._sweep)
                await self._read()
                tasks.cancel_scope.cancel()
        finally:
            if self._worker is not None:
                self._attempts.leave(self._worker, 0.0)
            unsaid = self._unsaid()
            for stream in (self._outbox_in, self._outbox, self._steps_in, self._steps):
                stream.close()
            with anyio.move_on_after(self._settings.close_s, shield=True):
                await self._farewell(unsaid)

    def _unsaid(self) -> list[str]:
        """Frames that the writer has not come to; the last acknowledgement may be among them."""
        found = []
        with contextlib.suppress(anyio.WouldBlock, anyio.EndOfStream, anyio.ClosedResourceError):
            while True:
                found.append(self._outbox.receive_nowait())
        return found

    async def _read(self) -> None:
        try:
            await self._hello()
            while True:
                await self._take(await self._receive())
        except _GONE:
            self._gone = True
        except _End as end:
            self._ending = self._ending or (end.code, str(end))
        except (StoreError, FaultError, OSError) as error:
            # Nothing was acknowledged; the job goes back to the queue.
            trouble(log, error, f"Session of worker {self.name} ended by trouble of ours")
            self._ending = ("internal_error", str(error))

    async def _receive(self) -> str:
        message = await self._websocket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code") or 1005)
        text = message.get("text")
        if not isinstance(text, str):
            raise _End("protocol_violation", "Expected text frames only.")
        return text

    async def _hello(self) -> None:
        try:
            with anyio.fail_after(self._settings.hello_s):
                text = await self._receive()
        except TimeoutError:
            raise _End("protocol_violation", f"No hello within {self._settings.hello_s:g} s.") from None
        try:
            head = read_head(text)
            if head.type != "hello":
                raise _End("protocol_violation", "session not authenticated")
            hello: Hello = read_body(head, text)
        except (NoFrame, Unreadable) as error:
            raise _End("protocol_violation", str(error)) from None
        if not await self._admission.admits(hello.auth_token):
            raise _End("auth_failed", "The token is not this worker's, or not its latest.")
        self._said = hello.capabilities
        greeting = wire.Hello(
            worker=self.name,
            low=LINK_WIRE.low,
            high=LINK_WIRE.high,
            capabilities=announced(self._said, fetched=self._fetched),
        )
        async with self._attempts.joining:
            worker, _ = await self._attempts.join(self, greeting, 0.0)
            worker.protocol, worker.resumes = "studio", False
            bound(worker, self._said)
            self._worker, self._beat_at = worker, anyio.current_time()
            self._jobs = StudioJobs(
                worker,
                self._attempts,
                self._sources,
                self._url,
                self._say,
                self._refused,
                self._settings.busy_s,
            )
            now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
            self._say(frame("welcome", workerId=self.name, serverTime=now))
            self._entered()
            self._attempts.open(worker)
        log.info("Worker %s connected (studio, %s)", self.name, self._said.agent_version[:50])

    async def _sweep(self) -> None:
        """A worker that sends no heartbeat is gone, whatever else it says; one that was put out goes."""
        while True:
            await anyio.sleep(self._settings.sweep_s)
            if self._worker is None:
                continue
            if anyio.current_time() - self._beat_at > self._settings.silence_s:
                self.close("internal_error", f"No heartbeat for {self._settings.silence_s:g} s.")
            elif not self._admission.known():
                self.close("worker_deleted", "The worker is not admitted any more.")

    async def _take_steps(self) -> None:
        """What `send` cannot wait for."""
        try:
            async for step in self._steps:
                async with self.jobs.turn:
                    await step()
        except (StoreError, FaultError, OSError) as error:
            trouble(log, error, f"Session of worker {self.name} ended by trouble of ours")
            self.close("internal_error", str(error))

    # ---- frames --------------------------------------------------------------------------------------------

    async def _take(self, text: str) -> None:
        """Act on one frame. Raises _End."""
        try:
            head = read_head(text)
        except NoFrame as error:
            raise _End("protocol_violation", str(error)) from None
        if head.type == "hello":
            raise _End("protocol_violation", "hello was said before.")
        if head.type not in UP:
            # From a newer worker: to drop its session would only bring it back with the same frame.
            if self._odd.take(1):
                log.warning("Worker %s sent a frame of the unknown type %r", self.name, head.type[:50])
            return
        try:
            body = read_body(head, text)
        except Unreadable as error:
            body = error
        if head.type in OF_A_JOB:
            try:
                async with self.jobs.turn:
                    await self.jobs.take(head.type, head.job_id or "", body)
            except Stranger as error:
                raise _End("protocol_violation", str(error)) from None
        else:
            await self._take_of_session(body)

    async def _take_of_session(self, body: Any) -> None:
        match body:
            case Heartbeat():
                await self._beat(body)
            case LogBatch():
                lines = (Line(one.ts, one.level, one.message, one.job_id or "") for one in body.entries)
                ear = self._attempts.ears.of(self.name)
                worker_lines.tell(self.name, lines, kept=self._attempts.kept, ear=ear)
            case Unreadable():
                if self._odd.take(1):
                    log.warning("Worker %s sent a frame that cannot be read: %s", self.name, body)
                self._attempts.counters.events["unreadable"] += 1

    async def _beat(self, beat: Heartbeat) -> None:
        self._beat_at = anyio.current_time()
        self._say(frame("heartbeatAck"))
        if beat.capabilities != self._said or self._paused[0]:
            self._said = beat.capabilities
            self._announce()
        if beat.current_job_id is None:
            if self.jobs.idle(self._beat_at, self._settings.let_go_s):
                async with self.jobs.turn:
                    await self.jobs.let_go(self._beat_at, self._settings.let_go_s)
            self._attempts.look_again()
        else:
            self.jobs.works_on(beat.current_job_id)

    def _announce(self) -> None:
        """Its capabilities, or our own mind about it, changed. What has not is not said: it would lift a pause."""
        if anyio.current_time() >= self._paused[1]:
            self._paused = ("", 0.0)
        worker, capabilities = self._here, announced(self._said, self._paused[0], self._fetched)
        bound(worker, self._said)
        if capabilities != worker.capabilities:
            self._attempts.announce(worker, capabilities)

    def _refused(self, model: str) -> None:
        """It takes no job of this model, so it does not fetch it, either. What it has itself, it says."""
        if self._fetched.pop(model, None):
            self._announce()

    @property
    def _here(self) -> Worker:
        assert self._worker is not None
        return self._worker

    # ---- writing -------------------------------------------------------------------------------------------

    async def _write(self) -> None:
        try:
            async for text in self._outbox:
                await self._websocket.send_text(text)
        except (WebSocketDisconnect, RuntimeError, OSError):
            self._gone = True
            self.close("internal_error", "The connection is gone.")

    async def _farewell(self, unsaid: Sequence[str]) -> None:
        code, message = self._ending or ("", "")
        if self._gone:
            return
        try:
            if not code:
                for text in unsaid:
                    await self._websocket.send_text(text)
            else:
                log.warning("Session of worker %s ends: %s (%s)", self.name, message, code)
                await self._websocket.send_text(frame("error", code=code, message=message))
            await self._websocket.close(_CLOSE_CODES.get(code, CLOSE_NORMAL), code)
        except (WebSocketDisconnect, RuntimeError, OSError):
            pass  # it was closed under us, which is what we wanted
