"""Streams: the events of jobs as server-sent events, or as the bytes of a file that is being made.

See `coordinator.answers` for how long a client waits in silence, and for what becomes of a job whose client leaves.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, aclosing, suppress
from typing import Any, NamedTuple, Protocol

import anyio
import msgspec
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from coordinator.answers import (
    LOADING,
    NO_NAMES,
    job_headers,
    loading_words,
    not_ready,
    patience_s,
    succeeded,
    watched_job,
    while_connected,
)
from coordinator.errors import fault_response
from coordinator.records import JobChunk, JobEnded, JobEvent, JobProgress, JobRecord, JobStarted, Submission
from coordinator.services import Services
from protocol.faults import Fault, FaultError, refuse


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


class Shape(NamedTuple):
    """What a stream is made of.

    Attributes:
        media_type: its content type.
        events: whether comment lines and an error event may stand in it; a stream of bytes is cut off instead.
        last: what ends it.
    """

    media_type: str
    events: bool = False
    last: bytes = b""


EVENTS = Shape("text/event-stream; charset=utf-8", events=True, last=DONE)


class EventWriter:
    """The body of one stream: headers at the first event, comment lines in every long pause of one of events."""

    def __init__(self, send: Send, headers: Mapping[str, str], comment_s: float, shape: Shape = EVENTS) -> None:
        self._shape = shape
        self._send = send
        self._headers = headers
        self._comment_s = comment_s
        self._lock = anyio.Lock()
        self._last = anyio.current_time()
        self._waits_for = "its turn"
        self._loading = anyio.Event()  # it is known what the work waits for
        self.started = False

    async def begin_after(self, seconds: float) -> Fault | None:
        """Begin when nothing was to be said for so long; from then on comment lines come.

        In a stream of bytes no comment may stand: it never begins so. The fault is what its client is told instead
        when the work is known to wait for a load.
        """
        await anyio.sleep(seconds)
        if not self._shape.events:
            await self._loading.wait()
            return None if self.started else not_ready(self._waits_for).fault
        if not self.started:
            await self._say_wait()
        return None

    async def waits(self, words: str) -> None:
        """What the work waits for, before it begins; said at once when the stream has begun and it is new."""
        new = words != self._waits_for
        self._waits_for = words
        self._loading.set()
        if new and self.started and self._shape.events:
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
                if self.started and self._shape.events:
                    await self.write(b": still working\n\n")
                else:
                    self._last = anyio.current_time()

    async def _start(self) -> None:
        if self.started:
            return
        self.started = True
        headers = {
            "content-type": self._shape.media_type,
            "cache-control": "no-store",
            "x-accel-buffering": "no",
            **self._headers,
        }
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]
        await self._send({"type": "http.response.start", "status": 200, "headers": raw})


Closing = Callable[[Sequence[JobRecord]], AsyncGenerator[bytes, None]]


class JobStream(Response):
    """Answers a request with the events of its jobs, which run side by side.

    The response begins when a job has started, so that refusals of the engine's validation are real 4xx, or when
    the client's patience is over; then comment lines tell what it waits for, or, of a stream of bytes, it is
    refused as model_loading. A fault after the beginning is one `{"error": …}` event and the stream ends without
    `[DONE]`; a stream of bytes is cut off, so that its client's HTTP library says so.
    """

    def __init__(
        self,
        parts: Services,
        jobs: Sequence[tuple[Submission, Renderer]],
        names: Mapping[str, str] = NO_NAMES,
        closing: Closing | None = None,
        shape: Shape = EVENTS,
        headers: Mapping[str, str] = NO_NAMES,
    ) -> None:
        """Prepare.

        Args:
            parts: of the coordinator.
            jobs: what to submit, each with what renders its events.
            names: the engine's field names -> the route's, for refusals.
            closing: what comes after the ends of all jobs; it gets their records in the order of `jobs`.
            shape: of the stream.
            headers: of the response, beside those that every stream has.
        """
        self._parts = parts
        self._jobs = jobs
        self._names = names
        self._closing = closing
        self._shape = shape
        self._more = headers
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve; raises FaultError as long as nothing was sent."""
        patience = patience_s(Headers(scope=scope), self._parts.limits.begin_s)

        async def work() -> None:
            async with AsyncExitStack() as stack:
                opened = [
                    await stack.enter_async_context(watched_job(self._parts, submission))
                    for submission, _ in self._jobs
                ]
                first = opened[0][0]
                headers = {**self._more, **job_headers(first)}
                writer = EventWriter(send, headers, self._parts.limits.comment_s, self._shape)
                failure = await self._outcome(first, [events for _, events in opened], writer, patience)
                if failure is not None and failure.code == LOADING and not writer.started:
                    scope["state"]["job"] = first.id
                    raise FaultError(failure)  # past `watched_job`, so that the load is not given up
                if failure is not None and not writer.started:
                    refusal = fault_response(failure)
                    refusal.headers.update(job_headers(first))
                    await refusal(scope, receive, send)
                    return
                if failure is not None and not self._shape.events:
                    return  # without an end of its body
                await writer.write(self._shape.last if failure is None else sse(failure.openai_error()))
                await writer.close()

        # The jobs were cancelled on the way out; there is nobody left to tell.
        with suppress(ClientDisconnect):
            await while_connected(receive, work)

    async def _outcome(
        self, first: JobRecord, sources: Sequence[AsyncIterator[JobEvent]], writer: EventWriter, patience: float
    ) -> Fault | None:
        """Write everything but the last word; the fault that ended it, which may be that the patience is over."""
        failure: Fault | None = None
        async with anyio.create_task_group() as group:

            async def be_patient() -> None:
                nonlocal failure
                failure = await writer.begin_after(patience)
                if failure is not None:
                    group.cancel_scope.cancel()

            group.start_soon(writer.comment_forever)
            group.start_soon(be_patient)
            failure = await self._relay_all(first, sources, writer)
            group.cancel_scope.cancel()
        return failure

    async def _relay_all(
        self, first: JobRecord, sources: Sequence[AsyncIterator[JobEvent]], writer: EventWriter
    ) -> Fault | None:
        """Write everything but the last word; returns the first job's fault that ended it."""
        records: dict[int, JobRecord] = {}
        failure: Fault | None = None
        async with anyio.create_task_group() as group:

            async def one(index: int) -> None:
                nonlocal failure
                try:
                    records[index] = await self._relay(first, self._jobs[index][1], sources[index], writer)
                except FaultError as error:
                    failure = failure or error.fault
                    group.cancel_scope.cancel()

            for index in range(len(sources)):
                group.start_soon(one, index)
        if failure is not None or self._closing is None:
            return failure
        try:
            async with aclosing(self._closing([records[index] for index in range(len(sources))])) as pieces:
                async for data in pieces:
                    await writer.write(data)
        except FaultError as error:
            return error.fault
        return None

    async def _relay(
        self, first: JobRecord, renderer: Renderer, events: AsyncIterator[JobEvent], writer: EventWriter
    ) -> JobRecord:
        """Write one job's events; returns its last row. Raises FaultError."""
        due = 0
        begun = False
        async for event in events:
            if isinstance(event, JobStarted) and not begun:
                begun = True
                await writer.write(*renderer.start(first))
            elif isinstance(event, JobProgress) and not begun:
                await writer.waits(loading_words(event))
            elif isinstance(event, JobChunk) and event.seq == due:
                due += 1
                begin = [] if begun else renderer.start(first)
                begun = True
                await writer.write(*begin, *renderer.chunk(event.data))
                self._parts.dispatcher.counters.written(event.at)
            elif isinstance(event, JobChunk):
                due = -1  # joined in the middle, or one was lost between replicas: the end brings the rest
            elif isinstance(event, JobEnded):
                record = succeeded(event.record, self._names)
                begin = [] if begun else renderer.start(first)
                await writer.write(*begin, *renderer.end(record, 0 < due == event.chunks))
                return record
        raise refuse("internal", "The job's events ended without its end.")


def progress_fields(event: JobProgress) -> dict[str, Any]:
    """A progress event as JSON."""
    return {"n": event.n, "total": event.total, "phase": event.phase, "text": event.text}
