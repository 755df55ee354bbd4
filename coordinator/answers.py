"""From a submission to an HTTP answer: wait for the end, or stream events, and cancel when the client leaves.

A job of a synchronous route lives as long as its client listens. The exception is a request that brought an
idempotency key: its client means to come back for the answer, so the job goes on without it.

Nobody waits in silence for a model that loads. After `Limits.begin_s`, or what the request's header
`x-bulkhead-begin-s` says instead, a stream begins with comment lines that tell how far the load is; a plain request
is answered 503 with Retry-After, and its job goes on waiting a little longer, so that the load is not given up.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol, TypeVar

import anyio
import msgspec
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from coordinator.bodies import in_callers_words
from coordinator.errors import JOB_ID, fault_response
from coordinator.records import JobChunk, JobEnded, JobEvent, JobProgress, JobRecord, JobStarted, Submission
from coordinator.services import Services, services
from protocol.faults import Fault, FaultError, refuse
from protocol.work import RESULTS, FreeResult

log = logging.getLogger(__name__)

NO_NAMES: Mapping[str, str] = {}
BEGIN_S = "x-bulkhead-begin-s"  # header of requests
MAX_BEGIN_S = 3600.0
LOADING = "model_loading"
LOADING_RETRY_S = 5
HOLD_S = 30.0  # a client that was told to come again in 5 s has come by then
CANCEL_S = 5.0  # bound on telling the dispatcher that nobody listens any more

T = TypeVar("T")


# ---- waiting ------------------------------------------------------------------------------------------------


async def while_connected(receive: Receive, work: Callable[[], Awaitable[T]]) -> T:
    """Run `work`, but only as long as the client is there.

    Args:
        receive: of a request whose body was read to its end.
        work: cancelled when the client leaves.

    Raises:
        ClientDisconnect: the client left; whatever `work` raises otherwise, not wrapped in a group.
    """
    outcome: list[T] = []
    failure: Exception | None = None
    async with anyio.create_task_group() as group:

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        group.start_soon(watch)
        try:
            outcome.append(await work())
        except Exception as error:
            failure = error
        group.cancel_scope.cancel()
    if failure is not None:
        raise failure
    if not outcome:
        raise ClientDisconnect
    return outcome[0]


@asynccontextmanager
async def watched_job(
    parts: Services, submission: Submission
) -> AsyncIterator[tuple[JobRecord, AsyncIterator[JobEvent]]]:
    """Submit and watch; a job that has not ended when the block is left is cancelled, shielded and bounded.

    One whose client was told that its model is loading stays until the load is over, so that somebody waits for it.
    """
    ended = False
    submission = msgspec.structs.replace(submission, attended=not submission.idempotency_key)
    async with parts.dispatcher.submit_and_watch(submission) as (record, events):

        async def noted() -> AsyncIterator[JobEvent]:
            nonlocal ended
            async for event in events:
                ended = ended or isinstance(event, JobEnded)
                yield event

        try:
            yield record, noted()
        except FaultError as error:
            if error.fault.code == LOADING and not ended:
                ended = True
                parts.progress.hold(record.id, submission.tenant, HOLD_S)
            raise
        finally:
            if not ended and not submission.idempotency_key:
                with anyio.move_on_after(CANCEL_S, shield=True):
                    await parts.dispatcher.cancel(record.id, submission.tenant, "the client disconnected")


async def finished(request: Request, submission: Submission, names: Mapping[str, str] = NO_NAMES) -> JobRecord:
    """Submit and wait for success.

    Args:
        request: whose client waits.
        submission: the job.
        names: the engine's field names -> the route's, for refusals.

    Raises:
        FaultError: the submission was refused, or the job's own fault; model_loading when its model is still being
            loaded after `patience_s`.
        ClientDisconnect: the client left; the job was cancelled.
    """
    patience = patience_s(request.headers, services(request).limits.begin_s)

    async def work() -> JobRecord:
        async with watched_job(services(request), submission) as (record, events):
            request.scope["state"]["job"] = record.id
            return await _end_of(events, patience)

    return succeeded(await while_connected(request.receive, work), names)


async def _end_of(events: AsyncIterator[JobEvent], patience: float) -> JobRecord:
    """The job's last row. Raises FaultError(model_loading) when it is known to wait for a load after `patience`."""
    record: JobRecord | None = None
    failure: FaultError | None = None
    words, started = "", False
    loading = anyio.Event()
    async with anyio.create_task_group() as group:

        async def lose_patience() -> None:
            nonlocal failure
            await anyio.sleep(patience)
            await loading.wait()
            if not started:
                failure = refuse(LOADING, f"The model is not ready yet: {words}.", retry_after_s=LOADING_RETRY_S)
                group.cancel_scope.cancel()

        group.start_soon(lose_patience)
        try:
            async for event in events:
                if isinstance(event, JobEnded):
                    record = event.record
                    break
                if not isinstance(event, JobProgress):
                    started = True
                elif not started:
                    words = loading_words(event)
                    loading.set()
        except FaultError as error:
            failure = error
        group.cancel_scope.cancel()
    if record is not None:
        return record
    raise failure or refuse("internal", "The job's events ended without its end.")


def patience_s(headers: Headers, default: float) -> float:
    """How long the client waits in silence for its work to begin. Raises FaultError(invalid_parameter)."""
    text = headers.get(BEGIN_S)
    if text is None:
        return default
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= MAX_BEGIN_S:
        raise refuse("invalid_parameter", f"{BEGIN_S}: Expected seconds from 0 to {MAX_BEGIN_S:g}.", BEGIN_S)
    return value


def loading_words(event: JobProgress) -> str:
    """Progress before the work began, as part of a sentence on one line."""
    words = event.text or (f"{event.phase} {event.n} of {event.total}" if event.total else event.phase) or "it loads"
    return " ".join(words.split()).rstrip(".")


def succeeded(record: JobRecord, names: Mapping[str, str] = NO_NAMES) -> JobRecord:
    """Return the record of a succeeded job. Raises FaultError with the job's fault, in the route's words, otherwise."""
    if record.state != "succeeded":
        raise FaultError(in_callers_words(ending_fault(record), names))
    return record


def ending_fault(record: JobRecord) -> Fault:
    """Why an ended job did not succeed."""
    if record.fault is not None:
        return record.fault
    if record.state == "cancelled":
        return Fault("cancelled", "The job was cancelled.")
    return Fault("internal", f"The job ended as {record.state} without a reason.")


def result_of(record: JobRecord) -> Any:
    """Decode the result struct of a succeeded job; results come from workers and are not trusted.

    Raises:
        FaultError: engine_protocol when it does not fit the kind.
    """
    type_ = RESULTS.get(record.kind, FreeResult)
    try:
        return msgspec.msgpack.decode(record.result or b"\xc0", type=type_)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise refuse("engine_protocol", f"The worker's result is not one of kind {record.kind}: {error}.") from None


def usage_tokens(record: JobRecord) -> dict[str, Any]:
    """OpenAI's usage object."""
    prompt, completion = (int(record.usage.get(name, 0)) for name in ("prompt_tokens", "completion_tokens"))
    usage: dict[str, Any] = {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }
    if "cached_tokens" in record.usage:
        usage["prompt_tokens_details"] = {"cached_tokens": int(record.usage["cached_tokens"])}
    return usage


def job_headers(record: JobRecord) -> dict[str, str]:
    """Headers that name the job behind an answer."""
    return {JOB_ID: record.id}


# ---- streaming ----------------------------------------------------------------------------------------------


class Renderer(Protocol):
    """Turns a job's events into server-sent events of one route. Raises FaultError on data that does not fit."""

    def start(self, record: JobRecord) -> list[bytes]:
        """Events that go out at once when the work has begun."""
        ...

    def chunk(self, data: bytes) -> list[bytes]:
        """Events of one chunk (msgpack)."""
        ...

    def end(self, record: JobRecord, complete: bool) -> list[bytes]:
        """Events of the successful end; `complete` tells whether every chunk was rendered."""
        ...


def sse(value: Any, event: str = "") -> bytes:
    """One server-sent event with JSON data."""
    head = f"event: {event}\n".encode() if event else b""
    return head + b"data: " + msgspec.json.encode(value) + b"\n\n"


DONE = b"data: [DONE]\n\n"


class EventWriter:
    """The body of one event stream: headers at the first event, comment lines in every long pause."""

    def __init__(self, send: Send, headers: Mapping[str, str], comment_s: float) -> None:
        self._send = send
        self._headers = headers
        self._comment_s = comment_s
        self._lock = anyio.Lock()
        self._last = anyio.current_time()
        self._waits_for = "its turn"
        self.started = False

    async def begin_after(self, seconds: float) -> None:
        """Begin when nothing was to be said for so long; from then on comment lines come."""
        await anyio.sleep(seconds)
        if not self.started:
            await self._say_wait()

    async def waits(self, words: str) -> None:
        """What the work waits for, before it begins; said at once when the stream has begun and it is new."""
        new = words != self._waits_for
        self._waits_for = words
        if new and self.started:
            await self._say_wait()

    async def _say_wait(self) -> None:
        await self.write(f": waiting: {self._waits_for}\n\n".encode())

    async def write(self, *events: bytes) -> None:
        """Send events at once, as one write."""
        async with self._lock:
            await self._start()
            if data := b"".join(events):
                await self._send({"type": "http.response.body", "body": data, "more_body": True})
            self._last = anyio.current_time()

    async def close(self) -> None:
        """End the body."""
        async with self._lock:
            await self._start()
            await self._send({"type": "http.response.body", "body": b"", "more_body": False})

    async def comment_forever(self) -> None:
        """Keep proxies from closing a silent stream, once it has begun."""
        while True:
            await anyio.sleep_until(self._last + self._comment_s)
            if anyio.current_time() >= self._last + self._comment_s:
                if self.started:
                    await self.write(b": still working\n\n")
                else:
                    self._last = anyio.current_time()

    async def _start(self) -> None:
        if self.started:
            return
        self.started = True
        headers = {
            "content-type": "text/event-stream; charset=utf-8",
            "cache-control": "no-store",
            "x-accel-buffering": "no",
            **self._headers,
        }
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": raw})


class JobStream(Response):
    """Answers a request with the events of a job.

    The response begins when the job has started, so that refusals of the engine's validation are real 4xx, or when
    the client's patience is over; then comment lines tell what it waits for. A fault after that is one
    `{"error": …}` event and the stream ends without `[DONE]`.
    """

    def __init__(
        self, parts: Services, submission: Submission, renderer: Renderer, names: Mapping[str, str] = NO_NAMES
    ) -> None:
        """`names`: the engine's field names -> the route's, for refusals."""
        self._parts = parts
        self._submission = submission
        self._renderer = renderer
        self._names = names
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve; raises FaultError as long as nothing was sent."""

        patience = patience_s(Headers(scope=scope), self._parts.limits.begin_s)

        async def work() -> None:
            async with watched_job(self._parts, self._submission) as (record, events):
                writer = EventWriter(send, job_headers(record), self._parts.limits.comment_s)
                async with anyio.create_task_group() as group:
                    group.start_soon(writer.comment_forever)
                    group.start_soon(writer.begin_after, patience)
                    try:
                        await self._relay(record, events, writer)
                        failure = None
                    except FaultError as error:
                        failure = error.fault
                    group.cancel_scope.cancel()
                if failure is None:
                    await writer.write(DONE)
                elif writer.started:
                    await writer.write(sse(failure.openai_error()))
                else:
                    refusal = fault_response(failure)
                    refusal.headers.update(job_headers(record))
                    await refusal(scope, receive, send)
                    return
                await writer.close()

        # The job was cancelled on the way out; there is nobody left to tell.
        with suppress(ClientDisconnect):
            await while_connected(receive, work)

    async def _relay(self, record: JobRecord, events: AsyncIterator[JobEvent], writer: EventWriter) -> None:
        due = 0
        begun = False
        async for event in events:
            if isinstance(event, JobStarted) and not begun:
                begun = True
                await writer.write(*self._renderer.start(record))
            elif isinstance(event, JobProgress) and not begun:
                await writer.waits(loading_words(event))
            elif isinstance(event, JobChunk) and event.seq == due:
                due += 1
                begin = [] if begun else self._renderer.start(record)
                begun = True
                await writer.write(*begin, *self._renderer.chunk(event.data))
            elif isinstance(event, JobChunk):
                due = -1  # joined in the middle (idempotency key used again): the end brings the rest
            elif isinstance(event, JobEnded):
                succeeded(event.record, self._names)
                begin = [] if begun else self._renderer.start(event.record)
                await writer.write(*begin, *self._renderer.end(event.record, due > 0))
                return
        raise refuse("internal", "The job's events ended without its end.")


def progress_fields(event: JobProgress) -> dict[str, Any]:
    """A progress event as JSON."""
    return {"n": event.n, "total": event.total, "phase": event.phase, "text": event.text}
