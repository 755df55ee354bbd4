"""A studio for tests: registration, sessions, jobs and uploads as an existing server has them, on loopback.

Rules are those of an existing installation, strictly: what such a server would close a session for, this one does. It
ships with the package because our own coordinator's studio side has to pass the suite that it passes. What a test wants
to go wrong is set on `StudioServer` before it happens.
"""

from __future__ import annotations

import collections
import contextlib
import datetime
import itertools
import ssl
import urllib.parse
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import trio
from trio_websocket import ConnectionClosed, WebSocketConnection, WebSocketRequest, wrap_server_stream

from supervisor.testing_studio_approvals import Approvals
from supervisor.testing_studio_http import Exchange, Replayed, answer, form, head
from supervisor.testing_studio_jobs import Job as Job
from supervisor.testing_studio_jobs import Rules as Rules

SUBPROTOCOL = "studio-worker-v1"
PREFIX = "/graphics/api"
JSON_KINDS = ("llm", "audio_stt")


class Session:
    """One worker's connection."""

    def __init__(self, worker: str, socket: WebSocketConnection, headers: dict[str, str]) -> None:
        self.worker, self.socket, self.headers = worker, socket, headers
        self.capabilities: dict[str, Any] = {}
        self.frames: list[dict[str, Any]] = []
        self.welcomed = False
        self.offered: Job | None = None  # offered or accepted
        self.accepted = False
        self.muted = False  # gets no answers to its heartbeats
        self.beat_at = trio.current_time()

    async def send(self, type_: str, **fields: Any) -> None:
        """One frame."""
        await self.raw(msgspec.json.encode({"type": type_, **fields}).decode())

    async def raw(self, message: str | bytes) -> None:
        """Anything; nothing when the worker has gone."""
        with contextlib.suppress(ConnectionClosed):
            await self.socket.send_message(message)

    async def close(self, code: int, error: str = "", message: str = "") -> None:
        """End it, after an `error` frame when one is named."""
        if error:
            await self.send("error", code=error, message=message)
        with contextlib.suppress(ConnectionClosed), trio.move_on_after(1):
            await self.socket.aclose(code, message or None)

    def said(self, type_: str) -> list[dict[str, Any]]:
        """The frames of this type that came."""
        return [frame for frame in self.frames if frame.get("type") == type_]


class _Violation(Exception):
    pass


class StudioServer(Approvals):
    """See the module.

    Attributes:
        sessions: worker id -> its session, the earliest first.
        past: every session that ever was.
        uploads: statuses with which the next uploads are answered, instead of judging them; 0 breaks the connection,
            and a negative one is told without its sign after the upload was taken all the same.
        swallowed: type of frame -> how many of the next ones are lost, as if they had never come.
        refusing: how a wrong token is told: "401", or "error" after the upgrade.
        muted: heartbeats are not answered.
        stalling: that many upgrades are not answered.
        conflicts: uploads that came without their claim.
        welcoming: set when hellos are answered.
        lenient: a result is taken from any session of the worker that had its job last.
        server_time: what `welcome` says, when it is not the truth.
        offering: what is queued is offered.
    """

    def __init__(self, rules: Rules | None = None) -> None:
        self.rules = rules or Rules()
        super().__init__(self.rules.requests)
        self.url = ""
        self.jobs: dict[str, Job] = {}
        self.sessions: dict[str, Session] = {}
        self.past: list[Session] = []
        self.logs: list[dict[str, Any]] = []
        self.goods: dict[str, bytes] = {}
        self.muted = self.lenient = False
        self.stalling = self.conflicts = 0
        self.welcoming = trio.Event()
        self.welcoming.set()
        self.uploads: collections.deque[int] = collections.deque()
        self.swallowed: collections.Counter[str] = collections.Counter()
        self.refusing = "401"
        self.server_time = ""
        self.offering = True
        self._numbers = itertools.count(1)
        self._news = trio.Event()

    # ---- what a test does

    async def until(self, true: Any, what: str, patience_s: float = 30.0) -> Any:
        """Wait until `true()` is; returns its value. AssertionError after `patience_s`."""
        with trio.move_on_after(patience_s):
            while not (value := true()):
                with trio.move_on_after(0.1):
                    await self._news.wait()
            return value
        raise AssertionError(f"not within {patience_s:g} s: {what}")

    async def session(self, number: int = 0) -> Session:
        """The session of this number, once it was welcomed."""
        found: Session = await self.until(
            lambda: len(self.past) > number and self.past[number].welcomed and self.past[number], f"session {number}"
        )
        return found

    def enqueue(self, task: dict[str, Any], model: str = "m", **fields: Any) -> Job:
        """A job, offered to whoever can do it."""
        name = fields.pop("job", f"job-{next(self._numbers)}")
        claim = {
            "jobId": name,
            "gameId": "game",
            "assetName": "asset",
            "model": model,
            "vramGbEstimate": fields.get("vramGbEstimate", 0),
            "task": task,
            "modelSource": {"engine": "synthetic", "files": [], "cliDefaults": {}},
            **fields,
        }
        job = Job(id=name, claim=claim, kind=str(task.get("kind")), vram_gb=float(claim["vramGbEstimate"]))
        job.refused_by, job.reasons, job.fields = set(), [], {}
        self.jobs[name] = job
        self.tell()
        return job

    async def ended(self, job: Job) -> Job:
        """Wait for the end of a job."""
        await self.until(lambda: job.state in ("done", "failed"), f"the end of {job.id}, which is {job.state}")
        return job

    def admit(self, worker: str = "w-1", token: str = "t0ken") -> tuple[str, str]:
        """A worker that was approved long ago."""
        self.workers[worker] = token
        return worker, token

    async def delete(self, worker: str) -> None:
        """The owner removes a worker."""
        self.workers.pop(worker, None)
        if session := self.sessions.get(worker):
            await session.close(4004, "worker_deleted", "deleted")

    def tell(self) -> None:
        """Something changed."""
        self._news.set()
        self._news = trio.Event()

    # ---- the socket

    async def connect(self, request: WebSocketRequest, worker: str, headers: dict[str, str]) -> None:
        """One session, to its end. A client may leave at any moment of it."""
        if self.stalling:
            self.stalling -= 1
            await trio.sleep_forever()
        with contextlib.suppress(ConnectionClosed):
            await self._admit(request, worker, headers)

    async def _admit(self, request: WebSocketRequest, worker: str, headers: dict[str, str]) -> None:
        token = headers.get("authorization", "").removeprefix("Bearer ")
        wrong = not token or self.workers.get(worker) != token
        if wrong and self.refusing == "401":
            await request.reject(401, body=b"no entry")
            return
        if SUBPROTOCOL not in request.proposed_subprotocols:
            await request.reject(400, body=b"studio-worker-v1 is wanted")
            return
        session = Session(worker, await request.accept(subprotocol=SUBPROTOCOL), headers)
        if wrong:
            await session.close(4001, "auth_failed", "wrong token")
            return
        if older := self.sessions.pop(worker, None):
            self._release(older)
            await older.close(4003, "", "duplicate worker")
        self.sessions[worker] = session
        self.past.append(session)
        self.tell()
        try:
            await self._talk(session)
        except _Violation as violation:
            await session.close(4002, "protocol_violation", str(violation))
        finally:
            if self.sessions.get(worker) is session:
                del self.sessions[worker]
            self._release(session)
            self.tell()

    async def _talk(self, session: Session) -> None:
        while True:
            message = await session.socket.get_message()
            try:
                frame = msgspec.json.decode(message)
                type_ = frame["type"]
            except (msgspec.MsgspecError, KeyError, TypeError):
                raise _Violation("not a frame") from None
            session.frames.append(frame)
            if not session.welcomed and type_ != "hello":
                raise _Violation("session not authenticated")
            if self.swallowed[type_]:
                self.swallowed[type_] -= 1
            else:
                await self._hear(session, type_, frame)
            self.tell()

    async def _hear(self, session: Session, type_: str, frame: dict[str, Any]) -> None:
        match type_:
            case "hello":
                if frame.get("authToken") != self.workers.get(session.worker):
                    await session.close(4001, "auth_failed", "wrong token")
                    return
                session.capabilities = frame["capabilities"]
                await self.welcoming.wait()
                told = self.server_time or datetime.datetime.now(datetime.UTC).isoformat()
                await session.send("welcome", workerId=session.worker, serverTime=told)
                session.welcomed = True
            case "heartbeat":
                session.capabilities, session.beat_at = frame["capabilities"], trio.current_time()
                if not self.muted and not session.muted:
                    await session.send("heartbeatAck")
            case "logBatch":
                self.logs += frame["entries"]
            case "accept":
                self._held(session, frame, accepted=False)
                session.accepted = True
            case "reject":
                self._rejected(session, frame)
            case "completeJson":
                job = self._late(session, frame) or self._held(session, frame)
                if job.kind not in JSON_KINDS:
                    raise _Violation(f"{job.kind} is no kind of JSON results")
                job.result = frame["result"]
                job.fields = {"prompt": frame.get("prompt", "")}
                self._end(session, job, "done")
                await session.send("completeAck", jobId=job.id)
            case "fail":
                self._failed(session, self._held(session, frame), frame)
                await session.send("failAck", jobId=frame["jobId"])
            case _:
                raise _Violation(f"unknown frame {type_!r}")

    def _held(self, session: Session, frame: dict[str, Any], accepted: bool = True) -> Job:
        job = session.offered
        if job is None or job.id != frame.get("jobId") or session.accepted != accepted:
            raise _Violation(f"{frame.get('type')} of {frame.get('jobId')}, which this session does not hold")
        return job

    def _late(self, session: Session, frame: dict[str, Any]) -> Job | None:
        """A lenient server takes a result although its claim ended with an earlier session."""
        job = self.jobs.get(frame.get("jobId", ""))
        late = self.lenient and job is not None and job.state == "queued" and job.attempts > 0
        return job if late and session.offered is None else None

    def _rejected(self, session: Session, frame: dict[str, Any]) -> None:
        job = self._held(session, frame, accepted=False)
        job.reasons.append(frame["reason"])
        session.offered = None
        job.state, job.worker = "queued", ""
        if frame.get("code") in ("busy", "paused"):
            job.not_before = trio.current_time() + self.rules.again_s
        else:
            job.refused_by.add(session.worker)

    def _failed(self, session: Session, job: Job, frame: dict[str, Any]) -> None:
        job.error = frame["error"]
        job.attempts += 1
        if frame["retryable"] and job.attempts < self.rules.attempts:
            job.state, job.worker = "queued", ""
            session.offered, session.accepted = None, False
        else:
            self._end(session, job, "failed")

    def _end(self, session: Session | None, job: Job, state: str) -> None:
        job.state = state
        job.ends += 1
        if session is not None:
            session.offered, session.accepted = None, False

    def _release(self, session: Session) -> None:
        """The socket is gone, and with it the claim."""
        job, session.offered = session.offered, None
        if job is not None and job.state == "claimed":
            if session.accepted:
                job.attempts += 1
            job.worker, job.state = "", "queued"
            if job.attempts >= self.rules.attempts:
                self._end(None, job, "failed")

    # ---- offers

    async def push(self) -> None:
        """Offer what is queued to whoever can do it, for ever."""
        while True:
            news = self._news
            for job in list(self.jobs.values()):
                if self.offering and job.state == "queued" and job.not_before <= trio.current_time():
                    await self._offer(job)
            with trio.move_on_after(0.05):
                await news.wait()

    async def _offer(self, job: Job) -> None:
        for session in list(self.sessions.values()):
            if not self._fits(session, job):
                continue
            session.offered, session.accepted = job, False
            job.state, job.worker = "claimed", session.worker
            await session.send("offer", claim=job.claim)
            return

    def _fits(self, session: Session, job: Job) -> bool:
        can = session.capabilities
        return (
            session.welcomed
            and session.offered is None
            and session.worker not in job.refused_by
            and bool(can.get("autoEnabled"))
            and job.kind in can.get("taskKinds", [])
            and float(can.get("vramThresholdGb", 0)) >= job.vram_gb
            and (not can.get("onlyWhenIdle") or can.get("userPresence") == "idle")
        )

    async def sweep(self) -> None:
        """Close sessions whose heart has stopped, for ever."""
        while True:
            await trio.sleep(self.rules.sweep_s)
            for session in list(self.sessions.values()):
                if trio.current_time() - session.beat_at > self.rules.dead_s:
                    await session.close(1000, "", "no heartbeat")

    # ---- HTTP

    def exchange(self, asked: Exchange) -> tuple[int, Any]:
        """Answer a request."""
        parts = [urllib.parse.unquote(part) for part in asked.path.partition("?")[0].strip("/").split("/")]
        match (asked.method, parts):
            case ("POST", [*_, "workers", "register-request"]):
                return self.create(asked)
            case ("GET", [*_, "workers", "register-requests", request]):
                return self.poll(request, asked.bearer)
            case ("POST", [*_, "workers", worker, "jobs", job, "complete"]):
                return self._complete(asked, worker, job)
            case ("GET", ["goods", name]) if name in self.goods:
                return 200, self.goods[name]
        return 404, {"error": "not found"}

    def _complete(self, asked: Exchange, worker: str, name: str) -> tuple[int, Any]:
        status = self.uploads.popleft() if self.uploads else 200
        if not (200 <= status < 300 or status < 0):
            self.tell()
            return status, {"error": "as the test wants it"}
        if self.workers.get(worker) != asked.bearer:
            return 401, {"error": "wrong token"}
        job = self.jobs.get(name)
        if job is None:
            return 404, {"error": "unknown job"}
        if job.state != "claimed" or job.worker != worker:
            self.conflicts += 1
            self.tell()
            return 409, {"error": "not claimed by this worker"}
        fields, files = form(asked.headers.get("content-type", ""), asked.body)
        if "image" not in files or job.kind in JSON_KINDS:
            return 400, {"error": "the file belongs into the field image"}
        job.filename, job.mime, job.file = files["image"]
        job.fields = fields
        self._end(self.sessions.get(worker), job, "done")
        self.tell()
        return abs(status), {"ok": status > 0}


@contextlib.asynccontextmanager
async def open_studio_server(
    rules: Rules | None = None, port: int = 0, tls: ssl.SSLContext | None = None
) -> AsyncIterator[StudioServer]:
    """A studio on loopback, over TLS where there is a context for it."""
    server = StudioServer(rules)

    async def serve(plain: trio.SocketStream) -> None:
        secure = trio.SSLStream(plain, tls, server_side=True, https_compatible=True) if tls is not None else plain
        with contextlib.suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async with secure as stream:
                await _serve(server, stream)

    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
        server.url = f"http{'s' if tls is not None else ''}://127.0.0.1:{listeners[0].socket.getsockname()[1]}"
        nursery.start_soon(trio.serve_listeners, serve, listeners)
        nursery.start_soon(server.push)
        nursery.start_soon(server.sweep)
        yield server
        nursery.cancel_scope.cancel()


async def _serve(server: StudioServer, stream: trio.abc.Stream) -> None:
    while found := await head(stream):
        raw, asked = found
        if asked.headers.get("upgrade", "").lower() != "websocket":
            if not await answer(stream, asked, server.exchange):
                return
            continue
        parts = asked.path.strip("/").split("/")
        async with trio.open_nursery() as nursery:
            request = await wrap_server_stream(nursery, Replayed(stream, raw), max_message_size=2**25)
            await server.connect(request, parts[-2], asked.headers)
            nursery.cancel_scope.cancel()
        return
