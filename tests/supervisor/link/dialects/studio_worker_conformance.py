"""What every worker that speaks `studio-worker-v1` has to do, played against the studio that ships for tests.

Use: a class in a test module that inherits `StudioWorkerCases` and has a fixture `start`: called with a studio it opens
a worker there; opened again in the same test it is the same worker after a kill. The worker serves one model per kind,
named `<kind>-model`, with an engine that the test plays, and its times are a fiftieth of the contract's.

What becomes of results is in studio_results_conformance.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Any, Protocol

import pytest
import trio

from supervisor.testing_studio import Job, Rules, Session, StudioServer, open_studio_server

TASKS: dict[str, dict[str, Any]] = {
    "llm": {"kind": "llm", "messages": [{"role": "user", "content": "hi"}]},
    "audio_stt": {"kind": "audio_stt", "inputUrl": "/goods/speech.wav"},
    "image": {"kind": "image", "prompt": "a red square", "ext": "png"},
    "audio_tts": {"kind": "audio_tts", "text": "hello"},
    "video": {"kind": "video", "prompt": "a red film", "seconds": 1},
}


ODD_NAMES = [
    "_V1StGXR8_Z5jdHi6B",
    "-V1StGXR8",
    "job 7",
    "game/asset/1",
    "../../etc/passwd",
    "..",
    "j\u00f6b \U0001f3a8",
    'a"; filename="b\r\nX: y\r\n\r\n',
    "%2e%2e/\x00?a=b#c\\",
    "studio-" + "0" * 32,
    "x" * 1000,
]


class RunUnderTest(Protocol):
    """A run that waits for the test."""

    kind: str

    def finish(self, content: bytes = b"file content") -> None:
        """End well."""

    def fail(self, code: str) -> None:
        """End with a fault of this code."""


class WorkerUnderTest(Protocol):
    """A worker."""

    async def next_run(self) -> RunUnderTest:
        """The next job that reached its engine."""

    def pause(self, reason: str) -> None:
        """Its owner wants no jobs; "" ends that."""

    def sits(self, here: bool | None) -> None:
        """Whether its user sits at it, who wants no jobs meanwhile; None: such a rule is not set."""

    def log(self, message: str) -> bool:
        """A warning in its log; returns whether a session was there to take it."""

    async def refused(self) -> str:
        """Wait until it has given up for good, and return its sentence."""

    async def empty(self) -> None:
        """Wait until it holds no claim."""


Start = Callable[[StudioServer], AbstractAsyncContextManager[WorkerUnderTest]]


def enqueue(server: StudioServer, kind: str, **fields: Any) -> Job:
    """A job of this kind."""
    return server.enqueue(TASKS[kind], f"{kind}-model", **fields)


async def cut(server: StudioServer, session: Session) -> None:
    """The network breaks: no close frame, in neither direction."""
    stream = session.socket._stream
    await trio.aclose_forcefully(stream)
    await server.until(lambda: server.sessions.get(session.worker) is not session, "the end of the session")


async def works(server: StudioServer, session: Session) -> None:
    """This very session still does its work."""
    seen = len(session.said("heartbeat"))
    await server.until(lambda: len(session.said("heartbeat")) > seen, "another heartbeat")
    assert server.sessions[session.worker] is session
    assert len(server.past) == 1


class StudioWorkerCases:
    """Every case is one rule of the contract, or one thing that has gone wrong somewhere."""

    @pytest.fixture
    async def server(self):
        async with open_studio_server(Rules(again_s=0.05)) as server:
            server.goods["speech.wav"] = b"RIFF"
            yield server

    # ---- registration

    async def test_it_asks_to_be_let_in_and_polls_once_after_that(self, server: StudioServer, start: Start) -> None:
        async with start(server):
            await server.until(lambda: server.requests, "a request")
            [request] = server.requests
            assert re.match(r"studio-worker/\d", server.requests[request]["userAgent"])
            await server.until(lambda: server.requests[request]["polls"] >= 2, "polls")
            server.approve(request)
            session = await server.session()
            await server.until(lambda: len(session.said("heartbeat")) >= 2, "heartbeats")
            assert session.headers["authorization"] == f"Bearer {server.workers[session.worker]}"
        assert server.minted == 1
        async with start(server):
            await server.session(1)
        assert (server.minted, len(server.requests)) == (1, 1), "a restart needs no new approval"

    async def test_a_rejected_registration_is_the_end(self, server: StudioServer, start: Start) -> None:
        async with start(server) as worker:
            await server.until(lambda: server.requests, "a request")
            server.reject(next(iter(server.requests)), "not one of ours")
            assert "not one of ours" in await worker.refused()
        polls = next(iter(server.requests.values()))["polls"]
        async with start(server) as worker:
            assert "not one of ours" in await worker.refused()
        assert next(iter(server.requests.values()))["polls"] == polls, "it does not ask again by itself"

    async def test_a_request_that_the_server_has_forgotten_is_made_again(
        self, server: StudioServer, start: Start
    ) -> None:
        async with start(server):
            await server.until(lambda: server.requests, "a request")
            first = next(iter(server.requests))
            del server.requests[first]
            await server.until(lambda: server.requests, "another request")
            server.requests[next(iter(server.requests))]["registrationSecretHash"] = "0" * 64  # now polls get 401
            server.approving = True
            await server.session()

    @pytest.mark.parametrize("status", [429, 500])
    async def test_a_server_that_takes_no_requests_now_is_asked_later(
        self, server: StudioServer, start: Start, status: int
    ) -> None:
        server.create_status, server.approving = status, True
        async with start(server):
            await trio.sleep(0.2)
            server.create_status = 0
            await server.session()

    # ---- session

    async def test_headers_then_hello_then_nothing_before_welcome(self, server: StudioServer, start: Start) -> None:
        server.approving = True
        server.welcoming = trio.Event()
        async with start(server):
            session: Session = await server.until(lambda: server.past and server.past[0], "a socket")
            assert session.socket.subprotocol == "studio-worker-v1"
            await server.until(lambda: session.frames, "hello")
            await trio.sleep(0.3)  # three heartbeats long
            assert [frame["type"] for frame in session.frames] == ["hello"]
            server.welcoming.set()
            await server.until(lambda: session.said("heartbeat"), "a heartbeat")
        hello = session.frames[0]
        assert hello["authToken"] == server.workers[session.worker]
        can = hello["capabilities"]
        assert set(can["taskKinds"]) == set(TASKS)
        assert can["supportedModelsPerKind"] == {kind: [f"{kind}-model"] for kind in TASKS}
        assert can["autoEnabled"] is True
        assert "currentJobId" not in session.said("heartbeat")[0], "absent, not null"

    @pytest.mark.parametrize("how", ["401", "error"])
    async def test_a_wrong_token_is_the_end(self, server: StudioServer, start: Start, how: str) -> None:
        server.approving, server.refusing = True, how
        async with start(server) as worker:
            session = await server.session()
            server.workers[session.worker] = "another"
            await session.close(1000)
            assert "401" in (sentence := await worker.refused()) or "auth_failed" in sentence or "4001" in sentence

    async def test_a_deleted_worker_is_the_end(self, server: StudioServer, start: Start) -> None:
        server.approving = True
        async with start(server) as worker:
            await server.delete((await server.session()).worker)
            assert "deleted" in await worker.refused()

    @pytest.mark.parametrize("code", [1000, 1001, 1011, 4002])
    async def test_other_ends_are_none(self, server: StudioServer, start: Start, code: int) -> None:
        server.approving = True
        async with start(server):
            await (await server.session()).close(code, "internal_error", "x")
            await server.session(1)

    async def test_a_silent_eof_is_none(self, server: StudioServer, start: Start) -> None:
        server.approving = True
        async with start(server):
            await cut(server, await server.session())
            await server.session(1)

    async def test_a_binary_frame_costs_the_session(self, server: StudioServer, start: Start) -> None:
        server.approving = True
        async with start(server):
            await (await server.session()).raw(b'{"type":"heartbeatAck"}')
            await server.session(1)

    async def test_pings_are_swallowed(self, server: StudioServer, start: Start) -> None:
        server.approving = True
        async with start(server):
            session = await server.session()
            with trio.fail_after(30):
                await session.socket.ping(b"x")
            await works(server, session)

    async def test_a_stalled_upgrade_is_left(self, server: StudioServer, start: Start) -> None:
        server.approving, server.stalling = True, 1
        async with start(server):
            await server.session()

    async def test_a_socket_that_is_silent_after_welcome_is_left(self, server: StudioServer, start: Start) -> None:
        server.approving = server.muted = True
        async with start(server):
            session = await server.session()
            server.muted = False
            session.muted = True  # this one for ever, the next one not
            await server.session(1)

    async def test_two_processes_with_one_id_do_not_throw_each_other_out_all_day(
        self, server: StudioServer, start: Start
    ) -> None:
        server.approving = True
        async with start(server):
            await (await server.session()).close(4003, "", "duplicate worker")
            await trio.sleep(0.5)  # ten times longer than after any other end
            assert len(server.past) == 1, "it stays away for a while"
            await server.session(1)  # and comes back

    async def test_what_cannot_be_read_costs_nothing_but_a_line(self, server: StudioServer, start: Start) -> None:
        server.approving = True
        async with start(server):
            session = await server.session()
            for text in ('{"type":"ofTomorrow"}', "no json", "[]", '{"type":5}', '{"type":"offer"}', '{"no":"type"}'):
                await session.raw(text)
            await session.send("offer", claim={"model": "nobody's"})
            await works(server, session)

    async def test_the_log_goes_on_over_a_dropped_socket(self, server: StudioServer, start: Start) -> None:
        server.approving = True
        async with start(server) as worker:
            session = await server.session()
            await server.until(lambda: worker.log("one"), "the worker has seen its welcome")
            await server.until(lambda: [line for line in server.logs if line["message"] == "one"], "the line")
            await cut(server, session)
            await server.session(1)
            await server.until(lambda: worker.log("two"), "a session for it")
            await server.until(lambda: [line for line in server.logs if line["message"] == "two"], "the line")
        [entry] = [line for line in server.logs if line["message"] == "one"]
        assert (entry["level"], entry["category"]) == ("warn", "x")
        assert "2 lines" in server.logs[0]["message"], "what was lost is told"

    # ---- jobs

    @pytest.mark.parametrize("kind", ["llm", "audio_stt"])
    async def test_results_without_files(self, server: StudioServer, start: Start, kind: str) -> None:
        server.approving = True
        async with start(server) as worker:
            job = enqueue(server, kind)
            session = await server.session()
            run = await worker.next_run()
            await server.until(lambda: session.said("accept"), "accept, while the engine works")
            run.finish()
            await server.ended(job)
            await worker.empty()
        if kind == "llm":
            assert job.result["object"] == "chat.completion"
            assert job.result["model"] == "llm-model"
            assert job.result["choices"][0]["message"] == {"role": "assistant", "content": "hello"}
            assert job.result["choices"][0]["finish_reason"] == "stop"
            assert job.result["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
            assert job.result["elapsed_ms"] == 7
            assert "hi" in job.fields["prompt"]
        else:
            assert {"text": "said", "language": "en", "duration": 1.5}.items() <= job.result.items()
        assert (job.state, job.ends) == ("done", 1)
        assert not session.said("readyForMore")

    @pytest.mark.parametrize(
        ("kind", "name", "mime"),
        [("image", "png", "image/png"), ("audio_tts", "wav", "audio/wav"), ("video", "mp4", "video/mp4")],
    )
    async def test_results_that_are_files(
        self, server: StudioServer, start: Start, kind: str, name: str, mime: str
    ) -> None:
        server.approving = True
        async with start(server) as worker:
            jobs = [enqueue(server, kind) for _ in range(3)]
            for job in jobs:
                (await worker.next_run()).finish(b"\x00\r\n--content" * 1000)
                await server.ended(job)
            await worker.empty()
            session = await server.session()
        for job in jobs:
            assert (job.state, job.ends, job.file) == ("done", 1, b"\x00\r\n--content" * 1000)
            assert (job.filename, job.mime) == (f"{job.id}.{name}", mime)
            assert (job.fields["prompt"], job.fields["ext"]) == (TASKS[kind].get("prompt", "hello"), name)
        assert not session.said("completeJson")
        assert not session.said("reject"), "the next offer, which overtakes the answer to the upload, is no mistake"
        assert not session.said("readyForMore")

    async def test_a_failure_is_told_with_whether_another_try_can_help(
        self, server: StudioServer, start: Start
    ) -> None:
        server.approving = True
        async with start(server) as worker:
            job = enqueue(server, "llm")
            (await worker.next_run()).fail("out_of_memory")
            (await worker.next_run()).fail("context_length_exceeded")
            await server.ended(job)
            await worker.empty()
            session = await server.session()
        assert [frame["retryable"] for frame in session.said("fail")] == [True, False]
        assert (job.state, job.ends) == ("failed", 1)

    async def test_one_job_at_a_time(self, server: StudioServer, start: Start) -> None:
        server.approving = True
        async with start(server) as worker:
            job = enqueue(server, "llm")
            run = await worker.next_run()
            session = await server.session()
            await server.until(
                lambda: any(beat.get("currentJobId") == job.id for beat in session.said("heartbeat")), "its id"
            )
            await session.send("offer", claim={**job.claim, "jobId": "second"})
            await server.until(lambda: session.said("reject"), "a rejection")
            assert session.said("reject")[0] == {
                "type": "reject",
                "jobId": "second",
                "reason": "worker already has an in-flight job",
                "code": "busy",
            }
            run.finish()
            await server.ended(job)

    async def test_a_paused_worker_says_so(self, server: StudioServer, start: Start) -> None:
        server.approving = True
        async with start(server) as worker:
            session = await server.session()
            worker.pause("the operator paused it")
            await server.until(lambda: session.capabilities["autoEnabled"] is False, "the news")
            claim = enqueue(server, "llm").claim
            await session.send("offer", claim={**claim, "jobId": "all-the-same"})
            await server.until(lambda: session.said("reject"), "a rejection")
            assert session.said("reject")[0]["code"] == "paused"
            worker.pause("")
            (await worker.next_run()).finish()

    @pytest.mark.parametrize(
        ("change", "word"),
        [
            ({"task": None}, "task"),
            ({"modelSource": None}, "modelSource"),
            ({"task": {"kind": "of-tomorrow"}}, "of-tomorrow"),
            ({"task": {"kind": "llm"}}, "messages"),
            (
                {"task": {"kind": "llm", "messages": [{"role": "user", "content": "x"}], "temperature": 9}},
                "temperature",
            ),
            ({"task": {"kind": "image", "prompt": "x", "refImageUrl": "https://x/y"}}, "refImageUrl"),
            ({"task": {"kind": "image", "prompt": "x", "initImageUrl": "file:///etc/passwd"}}, "initImageUrl"),
            ({"modelSource": {"engine": "of-tomorrow", "files": [], "cliDefaults": {}}}, "of-tomorrow"),
            ({"model": "nobody's"}, "nobody's"),
            ({"jobId": "x" * 1001}, "jobId"),
        ],
    )
    async def test_a_claim_that_cannot_be_taken_costs_that_job_alone(
        self, server: StudioServer, start: Start, change: dict[str, Any], word: str
    ) -> None:
        server.approving, server.offering = True, False
        async with start(server) as worker:
            session = await server.session()
            claim = {**enqueue(server, "llm").claim, **change}
            await session.send("offer", claim={key: value for key, value in claim.items() if value is not None})
            session.offered = server.jobs.setdefault(claim["jobId"], Job(id=claim["jobId"], claim=claim, kind="llm"))
            await server.until(lambda: session.said("reject"), "a rejection")
            assert word in session.said("reject")[0]["reason"]
            assert "code" not in session.said("reject")[0]
            server.offering = True
            enqueue(server, "llm", job="the-next")
            (await worker.next_run()).finish()  # and works on
            assert len(server.past) == 1

    @pytest.mark.parametrize("name", ODD_NAMES, ids=range(len(ODD_NAMES)))
    async def test_a_job_may_be_called_anything(self, server: StudioServer, start: Start, name: str) -> None:
        """What the server calls a job is its own affair; it hears that very word, and it is no path of ours."""
        server.approving = True
        async with start(server) as worker:
            session = await server.session()
            for number, kind in enumerate(("llm", "image"), 1):
                job = enqueue(server, kind, job=name)
                run = await worker.next_run()
                told = [{"type": "accept", "jobId": name}] * number
                await server.until(lambda told=told: session.said("accept") == told, "accept")
                seen = len(session.said("heartbeat"))
                beats = await server.until(lambda seen=seen: session.said("heartbeat")[seen + 1 :], "another heartbeat")
                assert beats[0]["currentJobId"] == name
                run.finish()
                await server.ended(job)
                await worker.empty()
                assert (job.state, job.ends, job.attempts) == ("done", 1, 0)
            enqueue(server, "llm", job=name)
            (await worker.next_run()).fail("context_length_exceeded")
            await server.until(lambda: session.said("fail"), "a failure of it")
            await works(server, session)

    async def test_nothing_is_done_while_its_user_is_there(self, server: StudioServer, start: Start) -> None:
        server.approving = True
        async with start(server) as worker:
            session = await server.session()
            assert session.capabilities["onlyWhenIdle"] is False
            assert "userPresence" not in session.capabilities
            worker.sits(True)
            await server.until(lambda: session.capabilities.get("userPresence") == "active", "the user")
            assert session.capabilities["onlyWhenIdle"] is True
            job = enqueue(server, "llm")
            session.offered, job.state, job.worker = job, "claimed", session.worker
            await session.send("offer", claim=job.claim)  # as a server does that has not heard of it yet
            await server.until(lambda: session.said("reject"), "a rejection")
            assert session.said("reject")[0]["code"] == "paused"
            assert "in use" in session.said("reject")[0]["reason"]
            worker.sits(False)
            await server.until(lambda: session.capabilities.get("userPresence") == "idle", "nobody")
            (await worker.next_run()).finish()
            await server.ended(job)
            assert (job.state, job.attempts) == ("done", 0)
