"""What every studio server has to do, as one suite that runs against any of them by HTTP and WebSocket alone.

Use: a class in a test module that inherits `StudioServerCases` and has a fixture `studio`, which yields a
`StudioUnderTest`. `tests/supervisor/link/dialects/test_testing_studio.py` does so for the studio that ships for tests.
What every worker has to do is in studio_worker_conformance.py.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import urllib.parse
import uuid
from collections.abc import AsyncIterator
from typing import Any, Protocol

import httpx
import msgspec
import trio
from trio_websocket import ConnectionClosed, ConnectionRejected, WebSocketConnection

from supervisor.link.upgrade import upgrade

PATIENCE_S = 30.0
SUBPROTOCOL = "studio-worker-v1"
CHAT = {"kind": "llm", "messages": [{"role": "user", "content": "hi"}]}
PICTURE = {"kind": "image", "prompt": "a red square", "ext": "png"}
# One pixel: a server may look at what it gets.
PNG = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR4nGNgAAAAAgABSK+kcQAAAABJRU5ErkJggg==")
BROUGHT = "brought"  # a model for chats, which the server knows the files of, and no worker has
MODELS = {"llm": ["chat"], "image": ["paint"]}
ANSWER = {
    "object": "chat.completion",
    "model": "chat",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "hello"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
    "elapsed_ms": 7,
}
CAPABILITIES: dict[str, Any] = {
    "machineName": "box",
    "username": "somebody",
    "agentVersion": "1",
    "engine": "multi",
    "vramTotalGb": 24.0,
    "vramThresholdGb": 24.0,
    "autoEnabled": True,
    "autoStart": False,
    "supportedModels": ["chat", "paint"],
    "taskKinds": ["llm", "image"],
    "supportedModelsPerKind": MODELS,
}


class JobSeen(msgspec.Struct, kw_only=True):
    """A job as the server's owner sees it. `state`: queued, claimed, done or failed."""

    state: str
    result: Any = None
    file: bytes | None = None
    error: str = ""


class StudioUnderTest(Protocol):
    """A server, and what its owner can do. `dead_s` is how long it lets a worker be silent, None when too long here."""

    url: str
    dead_s: float | None

    async def admit(self) -> tuple[str, str]:
        """A new worker: its id and token."""

    async def delete(self, worker: str) -> None:
        """Remove one."""

    async def approve(self, request: str) -> None:
        """Approve a request for registration."""

    async def reject(self, request: str, reason: str) -> None:
        """Reject one."""

    async def enqueue(self, task: dict[str, Any], model: str, vram_gb: float = 0.0) -> str:
        """A job; returns its id."""

    async def job(self, job: str) -> JobSeen:
        """What became of it."""


class RawWorker:
    """A worker's end of one socket, by hand."""

    def __init__(self, socket: WebSocketConnection, token: str) -> None:
        self.socket, self.token = socket, token

    async def send(self, type_: str, **fields: Any) -> None:
        """One frame."""
        await self.socket.send_message(msgspec.json.encode({"type": type_, **fields}).decode())

    async def receive(self) -> dict[str, Any]:
        """The next frame."""
        with trio.fail_after(PATIENCE_S):
            message = await self.socket.get_message()
        assert isinstance(message, str), "only text frames are spoken"
        return dict(msgspec.json.decode(message))

    async def expect(self, type_: str) -> dict[str, Any]:
        """The next frame, which has to be of this type; answers to heartbeats are passed over."""
        while True:
            frame = await self.receive()
            if frame["type"] == type_:
                return frame
            assert frame["type"] == "heartbeatAck", frame

    async def closed(self) -> tuple[int, list[dict[str, Any]]]:
        """The close code, and the frames before it."""
        frames = []
        try:
            while True:
                frames.append(await self.receive())
        except ConnectionClosed as end:
            return (end.reason.code if end.reason else 1006), frames

    async def greet(self, **capabilities: Any) -> dict[str, Any]:
        """hello and welcome."""
        await self.send("hello", authToken=self.token, capabilities={**CAPABILITIES, **capabilities})
        return await self.expect("welcome")

    async def beat(self, **capabilities: Any) -> None:
        """heartbeat and its answer; an offer may come before it."""
        await self.send("heartbeat", capabilities={**CAPABILITIES, **capabilities})

    async def nothing(self, for_s: float = 0.5) -> None:
        """No offer comes."""
        with trio.move_on_after(for_s):
            while True:
                frame = await self.receive()
                assert frame["type"] == "heartbeatAck", frame


class Refused(Exception):
    """The upgrade was answered with this HTTP status."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP {status}")
        self.status = status


@contextlib.asynccontextmanager
async def connected(
    studio: StudioUnderTest, worker: str, token: str, *, greet: bool = True, **capabilities: Any
) -> AsyncIterator[RawWorker]:
    """A socket of a worker. Raises Refused."""
    parts = urllib.parse.urlsplit(f"{studio.url.rstrip('/')}/graphics/api/workers/{worker}/connect")
    status = 0
    headers = [(b"Authorization", f"Bearer {token}".encode())]
    async with await trio.open_tcp_stream(parts.hostname or "", parts.port or 80) as stream:
        try:
            async with trio.open_nursery() as nursery:
                socket = await upgrade(nursery, stream, parts, SUBPROTOCOL, headers)
                assert socket is not None
                raw = RawWorker(socket, token)
                if greet:
                    await raw.greet(**capabilities)
                yield raw
                with trio.move_on_after(1):
                    await socket.aclose()
                nursery.cancel_scope.cancel()
        except* ConnectionRejected as group:
            status = _first(group).status_code
        if status:
            raise Refused(status)


def _first(group: BaseExceptionGroup[ConnectionRejected]) -> ConnectionRejected:
    error = group.exceptions[0]
    return _first(error) if isinstance(error, BaseExceptionGroup) else error


async def settled(studio: StudioUnderTest, job: str, *states: str) -> JobSeen:
    """Wait until a job is in one of these states."""
    until = trio.current_time() + PATIENCE_S
    while (seen := await studio.job(job)).state not in states:
        assert trio.current_time() < until, f"{job} is {seen.state}, not {' or '.join(states)}"
        await trio.sleep(0.02)
    return seen


async def uploaded(studio: StudioUnderTest, worker: str, token: str, job: str, content: bytes = PNG) -> int:
    """Upload a result; returns the status."""
    url = f"{studio.url}/graphics/api/workers/{worker}/jobs/{job}/complete"
    async with httpx.AsyncClient(trust_env=False) as client:
        answer = await client.post(
            url,
            headers={"Authorization": f"Bearer {token}"},
            data={"prompt": "a red square", "ext": "png"},
            files={"image": (f"{job}.png", content, "image/png")},
        )
    return answer.status_code


class StudioServerCases:
    """Every case is one rule of the contract."""

    # ---- registration

    async def test_registration_with_approval(self, studio: StudioUnderTest) -> None:
        install, secret = str(uuid.uuid4()), "5e" * 32
        body = {
            "installId": install,
            "registrationSecretHash": hashlib.sha256(secret.encode()).hexdigest(),
            "capabilities": CAPABILITIES,
            "userAgent": "studio-worker/0.4.0",
        }
        base = f"{studio.url}/graphics/api/workers"
        async with httpx.AsyncClient(trust_env=False) as client:
            created = await client.post(f"{base}/register-request", json=body)
            assert created.is_success
            request = created.json()["requestId"]
            assert created.json()["status"] == "pending"
            again = await client.post(f"{base}/register-request", json=body)
            assert again.json()["requestId"] == request, "the same installation asks for the same thing"
            poll = f"{base}/register-requests/{request}"
            mine = {"Authorization": f"Bearer {secret}"}
            assert (await client.get(poll, headers=mine)).json()["status"] == "pending"
            assert (await client.get(poll, headers={"Authorization": "Bearer wrong"})).status_code in (401, 404)
            assert (await client.get(f"{base}/register-requests/rr-none", headers=mine)).status_code in (401, 404)
            await studio.approve(request)
            first = (await client.get(poll, headers=mine)).json()
            assert first["status"] == "approved"
            async with connected(studio, first["workerId"], first["authToken"]):
                pass

    async def test_a_rejection_says_why(self, studio: StudioUnderTest) -> None:
        secret = "ab" * 32
        body = {
            "installId": str(uuid.uuid4()),
            "registrationSecretHash": hashlib.sha256(secret.encode()).hexdigest(),
            "capabilities": CAPABILITIES,
            "userAgent": "studio-worker/0.4.0",
        }
        base = f"{studio.url}/graphics/api/workers"
        async with httpx.AsyncClient(trust_env=False) as client:
            request = (await client.post(f"{base}/register-request", json=body)).json()["requestId"]
            await studio.reject(request, "not one of ours")
            poll = f"{base}/register-requests/{request}"
            answer = await client.get(poll, headers={"Authorization": f"Bearer {secret}"})
        assert answer.json() == {"status": "rejected", "reason": "not one of ours"}

    # ---- session

    async def test_hello_is_answered_with_welcome(self, studio: StudioUnderTest) -> None:
        worker, token = await studio.admit()
        async with connected(studio, worker, token, greet=False) as raw:
            assert raw.socket.subprotocol == SUBPROTOCOL
            welcome = await raw.greet()
        assert welcome["workerId"] == worker
        assert welcome["serverTime"]

    async def test_a_wrong_token_is_refused(self, studio: StudioUnderTest) -> None:
        worker, _token = await studio.admit()
        told: object = None
        try:
            async with connected(studio, worker, "wrong", greet=False) as raw:
                code, frames = await raw.closed()
                told = code, frames[-1]["code"]
        except Refused as refused:
            told = refused.status
        assert told in (401, (4001, "auth_failed"))

    async def test_a_wrong_token_in_hello_is_refused_too(self, studio: StudioUnderTest) -> None:
        worker, token = await studio.admit()
        async with connected(studio, worker, token, greet=False) as raw:
            await raw.send("hello", authToken="wrong", capabilities=CAPABILITIES)
            code, frames = await raw.closed()
        assert (code, frames[-1]["code"]) == (4001, "auth_failed")

    async def test_nothing_goes_before_hello(self, studio: StudioUnderTest) -> None:
        worker, token = await studio.admit()
        async with connected(studio, worker, token, greet=False) as raw:
            await raw.beat()
            code, frames = await raw.closed()
        assert code == 4002
        assert frames[-1]["code"] == "protocol_violation"

    async def test_a_newer_socket_closes_the_older(self, studio: StudioUnderTest) -> None:
        worker, token = await studio.admit()
        async with connected(studio, worker, token) as older, connected(studio, worker, token) as newer:
            assert (await older.closed())[0] == 4003
            await newer.beat()
            await newer.expect("heartbeatAck")

    async def test_a_deleted_worker_is_told(self, studio: StudioUnderTest) -> None:
        worker, token = await studio.admit()
        async with connected(studio, worker, token) as raw:
            await studio.delete(worker)
            assert (await raw.closed())[0] == 4004

    async def test_a_null_job_in_a_heartbeat_is_none(self, studio: StudioUnderTest) -> None:
        worker, token = await studio.admit()
        async with connected(studio, worker, token) as raw:
            await raw.send("heartbeat", capabilities=CAPABILITIES, currentJobId=None)
            await raw.expect("heartbeatAck")

    async def test_lines_of_the_log_are_taken(self, studio: StudioUnderTest) -> None:
        worker, token = await studio.admit()
        entry = {"ts": "2026-01-01T00:00:00Z", "level": "warn", "category": "ws", "message": "x"}
        async with connected(studio, worker, token) as raw:
            await raw.send("logBatch", entries=[entry, {**entry, "jobId": "j"}])
            await raw.beat()
            await raw.expect("heartbeatAck")

    async def test_a_silent_worker_is_let_go_and_its_job_with_it(self, studio: StudioUnderTest) -> None:
        if studio.dead_s is None:
            return  # told by the fixture: half a minute is too long for this run
        worker, token = await studio.admit()
        async with connected(studio, worker, token) as raw:
            job = await studio.enqueue(CHAT, "chat")
            await raw.expect("offer")
            await raw.send("accept", jobId=job)
            await raw.closed()
        assert (await settled(studio, job, "queued")).state == "queued"

    # ---- jobs

    async def test_a_chat_from_offer_to_acknowledgement(self, studio: StudioUnderTest) -> None:
        worker, token = await studio.admit()
        async with connected(studio, worker, token) as raw:
            job = await studio.enqueue(CHAT, "chat")
            claim = (await raw.expect("offer"))["claim"]
            assert claim["jobId"] == job
            assert claim["model"] == "chat"
            assert claim["task"]["kind"] == "llm"
            assert claim["task"]["messages"] == CHAT["messages"]
            assert claim["modelSource"]["engine"]
            assert isinstance(claim["vramGbEstimate"], int | float)
            assert {"gameId", "assetName"} <= set(claim)
            await raw.send("accept", jobId=job)
            await raw.send("completeJson", jobId=job, result=ANSWER, prompt="user: hi")
            assert (await raw.expect("completeAck"))["jobId"] == job
        seen = await settled(studio, job, "done")
        assert seen.result["choices"][0]["message"]["content"] == "hello"

    async def test_a_picture_is_uploaded_and_the_next_offer_follows(self, studio: StudioUnderTest) -> None:
        worker, token = await studio.admit()
        async with connected(studio, worker, token) as raw:
            job = await studio.enqueue(PICTURE, "paint")
            second = await studio.enqueue(PICTURE, "paint")
            claim = (await raw.expect("offer"))["claim"]
            assert claim["task"]["prompt"] == PICTURE["prompt"]
            await raw.send("accept", jobId=job)
            await raw.nothing(0.3)  # one at a time
            assert 200 <= await uploaded(studio, worker, token, job) < 300
            assert (await raw.expect("offer"))["claim"]["jobId"] == second
        assert (await settled(studio, job, "done")).file == PNG

    async def test_an_upload_without_the_claim_is_a_conflict(self, studio: StudioUnderTest) -> None:
        worker, token = await studio.admit()
        job = await studio.enqueue(PICTURE, "paint")
        assert await uploaded(studio, worker, token, job) == 409
        async with connected(studio, worker, token) as raw:
            await raw.expect("offer")
            await raw.send("accept", jobId=job)
            assert await uploaded(studio, worker, "wrong", job) == 401
            assert 200 <= await uploaded(studio, worker, token, job) < 300
            assert await uploaded(studio, worker, token, job) == 409, "it is done, and stays what it is"

    async def test_a_failure_is_acknowledged_and_tried_again(self, studio: StudioUnderTest) -> None:
        worker, token = await studio.admit()
        async with connected(studio, worker, token) as raw:
            job = await studio.enqueue(CHAT, "chat")
            await raw.expect("offer")
            await raw.send("accept", jobId=job)
            await raw.send("fail", jobId=job, error="out of memory", retryable=True)
            assert (await raw.expect("failAck"))["jobId"] == job
            await raw.beat()
            assert (await raw.expect("offer"))["claim"]["jobId"] == job
            await raw.send("accept", jobId=job)
            await raw.send("fail", jobId=job, error="it has no such kind", retryable=False)
            await raw.expect("failAck")
        seen = await settled(studio, job, "failed")
        assert "no such kind" in seen.error

    async def test_busy_costs_no_attempt_and_does_not_spin(self, studio: StudioUnderTest) -> None:
        worker, token = await studio.admit()
        async with connected(studio, worker, token) as raw:
            job = await studio.enqueue(CHAT, "chat")
            for _ in range(4):  # more often than a job has attempts
                assert (await raw.expect("offer"))["claim"]["jobId"] == job
                rejected_at = trio.current_time()
                await raw.send("reject", jobId=job, reason="worker already has an in-flight job", code="busy")
                await raw.beat()
            await raw.expect("offer")
            assert trio.current_time() - rejected_at > 0.05, "not at once"
            await raw.send("accept", jobId=job)
            await raw.send("completeJson", jobId=job, result=ANSWER)
            await raw.expect("completeAck")

    async def test_what_one_worker_rejects_goes_to_another(self, studio: StudioUnderTest) -> None:
        (one, token), (two, other) = await studio.admit(), await studio.admit()
        async with connected(studio, one, token) as first, connected(studio, two, other) as second:
            job = await studio.enqueue(CHAT, "chat")
            assert (await first.expect("offer"))["claim"]["jobId"] == job, "the earliest connected wins"
            await first.send("reject", jobId=job, reason="This worker has no model 'chat'.")
            assert (await second.expect("offer"))["claim"]["jobId"] == job

    async def test_what_a_session_does_not_hold_costs_it_the_session(self, studio: StudioUnderTest) -> None:
        worker, token = await studio.admit()
        for type_, fields in (
            ("accept", {}),
            ("fail", {"error": "x", "retryable": True}),
            ("completeJson", {"result": ANSWER}),
        ):
            async with connected(studio, worker, token) as raw:
                await raw.send(type_, jobId="job-nobody-knows", **fields)
                code, frames = await raw.closed()
            assert (type_, code) == (type_, 4002)
            assert frames[-1]["code"] == "protocol_violation"

    async def test_what_a_session_has_let_go_of_it_does_not_hold_any_more(self, studio: StudioUnderTest) -> None:
        """Whatever is said of it would not be stored, so it is not acknowledged."""
        for type_, fields in (
            ("accept", {}),
            ("fail", {"error": "x", "retryable": True}),
            ("completeJson", {"result": ANSWER}),
        ):
            worker, token = await studio.admit()
            async with connected(studio, worker, token) as raw:
                job = await studio.enqueue(CHAT, "chat")
                await raw.expect("offer")
                await raw.send("reject", jobId=job, reason="This worker has no model 'chat'.")
                await raw.send(type_, jobId=job, **fields)
                code, frames = await raw.closed()
            assert (type_, code, frames[-1]["code"]) == (type_, 4002, "protocol_violation")
            assert (await studio.job(job)).state != "done"

    async def test_what_is_done_cannot_fail_any_more(self, studio: StudioUnderTest) -> None:
        worker, token = await studio.admit()
        async with connected(studio, worker, token) as raw:
            job = await studio.enqueue(CHAT, "chat")
            await raw.expect("offer")
            await raw.send("accept", jobId=job)
            await raw.send("completeJson", jobId=job, result=ANSWER)
            await raw.expect("completeAck")
            await raw.send("fail", jobId=job, error="x", retryable=True)
            code, frames = await raw.closed()
        assert (code, frames[-1]["code"]) == (4002, "protocol_violation")
        assert (await studio.job(job)).state == "done"

    async def test_a_dropped_socket_gives_the_job_back(self, studio: StudioUnderTest) -> None:
        worker, token = await studio.admit()
        async with connected(studio, worker, token) as raw:
            job = await studio.enqueue(CHAT, "chat")
            await raw.expect("offer")
            await raw.send("accept", jobId=job)
        async with connected(studio, worker, token) as raw:
            assert (await raw.expect("offer"))["claim"]["jobId"] == job
            await raw.send("accept", jobId=job)
            await raw.send("completeJson", jobId=job, result=ANSWER)
            await raw.expect("completeAck")
        assert (await settled(studio, job, "done")).state == "done"

    async def test_only_what_fits_is_offered(self, studio: StudioUnderTest) -> None:
        worker, token = await studio.admit()
        async with connected(studio, worker, token, vramThresholdGb=8.0, taskKinds=["llm"]) as raw:
            await studio.enqueue(PICTURE, "paint")
            await studio.enqueue(CHAT, "chat", vram_gb=12.0)
            await raw.nothing()
            fits = await studio.enqueue(CHAT, "chat", vram_gb=8.0)
            assert (await raw.expect("offer"))["claim"]["jobId"] == fits
            await raw.send("reject", jobId=fits, reason="worker paused by operator", code="paused")

    async def test_a_worker_that_is_off_gets_nothing_until_it_says_so(self, studio: StudioUnderTest) -> None:
        worker, token = await studio.admit()
        async with connected(studio, worker, token, autoEnabled=False) as raw:
            job = await studio.enqueue(CHAT, "chat")
            await raw.nothing()
            await raw.beat(onlyWhenIdle=True, userPresence="active")
            await raw.nothing()
            await raw.beat(onlyWhenIdle=True, userPresence="idle")
            assert (await raw.expect("offer"))["claim"]["jobId"] == job

    async def test_a_model_that_its_job_brings_needs_no_worker_that_has_it(self, studio: StudioUnderTest) -> None:
        worker, token = await studio.admit()
        async with connected(studio, worker, token, supportedModels=[], supportedModelsPerKind={}) as raw:
            job = await studio.enqueue(CHAT, BROUGHT)
            assert (await raw.expect("offer"))["claim"]["jobId"] == job
            await raw.send("accept", jobId=job)
            await raw.send("completeJson", jobId=job, result=ANSWER)
            await raw.expect("completeAck")

    async def test_unknown_fields_are_ignored(self, studio: StudioUnderTest) -> None:
        worker, token = await studio.admit()
        async with connected(studio, worker, token, ofTomorrow=[1]) as raw:
            await raw.send("heartbeat", capabilities={**CAPABILITIES, "more": {}}, mood="good")
            await raw.expect("heartbeatAck")
