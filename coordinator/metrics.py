"""GET /metrics in Prometheus' text format, and the counting of HTTP requests behind it.

The route needs a client or admin key like every other: model names and traffic are nobody else's business.
Prometheus sends one with `authorization: {credentials_file: …}`.
"""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import anyio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.services import services

if TYPE_CHECKING:
    from coordinator.attempts import Counters

PREFIX = "bulkhead_coordinator"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class HttpCounters:
    """Requests by route, method and status; how many are being answered now."""

    def __init__(self) -> None:
        self.answered: Counter[tuple[str, str, int]] = Counter()
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.in_flight = 0
        self._idle = anyio.Event()
        self._idle.set()

    def begin(self) -> None:
        """A request came in."""
        self.in_flight += 1
        if self.in_flight == 1:
            self._idle = anyio.Event()

    def end(self, route: str, method: str, status: int, seconds: float) -> None:
        """A request was answered (status 499: its client left first)."""
        self.answered[route, method, status] += 1
        self.seconds[route] += seconds
        self.in_flight -= 1
        if self.in_flight == 0:
            self._idle.set()

    @contextmanager
    def not_waited_for(self) -> Iterator[None]:
        """A request that is counted, and that the end of the coordinator does not wait for: it would never end."""
        self.in_flight -= 1
        if self.in_flight == 0:
            self._idle.set()
        try:
            yield
        finally:
            self.begin()

    async def wait_idle(self) -> None:
        """Return when no request is being answered."""
        await self._idle.wait()


class CountRequests:
    """ASGI layer around the router."""

    def __init__(self, app: ASGIApp, counters: HttpCounters) -> None:
        self._app = app
        self._counters = counters

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = 499
        began = time.monotonic()

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self._counters.begin()
        try:
            await self._app(scope, receive, noted)
        finally:
            route = getattr(scope.get("route"), "path", "unknown")
            self._counters.end(route, scope["method"], status, time.monotonic() - began)


async def metrics(request: Request) -> Response:
    """All numbers."""
    parts = services(request)
    lines = [
        *_http_lines(parts.http),
        *_job_lines(parts.dispatcher.counters),
        *_family("jobs_waiting", "gauge", "Jobs in the queue."),
        sample("jobs_waiting", parts.dispatcher.waiting),
        *_worker_lines(
            (worker.id, worker.accepting, worker.running, worker.slots, worker.protocol)
            for worker in parts.dispatcher.workers()
        ),
        *_sandbox_lines(parts.dispatcher.sandboxes()),
        *_family("model_slots", "gauge", "Concurrent jobs of a model over all workers."),
        *(sample("model_slots", model.slots, {"model": model.name}) for model in parts.dispatcher.models()),
        *_family("start_time_seconds", "gauge", "Start of the coordinator, seconds since the epoch."),
        sample("start_time_seconds", parts.started_s),
    ]
    return Response("\n".join(lines) + "\n", media_type=CONTENT_TYPE)


ROUTES = [Route("/metrics", metrics, methods=["GET"])]


def sample(name: str, value: float, labels: Mapping[str, str] | None = None) -> str:
    """One line; label values are escaped as the format asks."""
    inner = ",".join(f'{key}="{_escape(text)}"' for key, text in (labels or {}).items())
    return f"{PREFIX}_{name}{{{inner}}} {value}" if inner else f"{PREFIX}_{name} {value}"


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _family(name: str, kind: str, text: str) -> list[str]:
    return [f"# HELP {PREFIX}_{name} {text}", f"# TYPE {PREFIX}_{name} {kind}"]


def _http_lines(counters: HttpCounters) -> Iterator[str]:
    yield from _family("http_requests_total", "counter", "Answered requests; 499 is a client that left.")
    for (route, method, status), count in sorted(counters.answered.items()):
        yield sample("http_requests_total", count, {"route": route, "method": method, "status": str(status)})
    yield from _family("http_request_seconds_total", "counter", "Time spent answering, streams included.")
    for route, seconds in sorted(counters.seconds.items()):
        yield sample("http_request_seconds_total", round(seconds, 6), {"route": route})
    yield from _family("http_requests_in_flight", "gauge", "Requests being answered now.")
    yield sample("http_requests_in_flight", counters.in_flight)


def _job_lines(counters: Counters) -> Iterator[str]:
    yield from _family("jobs_submitted_total", "counter", "Jobs that were queued.")
    for (kind, model), count in sorted(counters.submitted.items()):
        yield sample("jobs_submitted_total", count, {"kind": kind, "model": model})
    yield from _family("jobs_total", "counter", "Jobs that ended, by terminal state.")
    for (kind, model, outcome), count in sorted(counters.jobs.items()):
        yield sample("jobs_total", count, {"kind": kind, "model": model, "outcome": outcome})
    yield from _family("job_faults_total", "counter", "Jobs that ended with a fault, by its code.")
    for (kind, model, code), count in sorted(counters.faults.items()):
        yield sample("job_faults_total", count, {"kind": kind, "model": model, "code": code})
    yield from _family("usage_total", "counter", "What jobs used: tokens, seconds of audio, images, …")
    for (model, what), total in sorted(counters.usage.items()):
        yield sample("usage_total", total, {"model": model, "what": what})
    yield from _family("declines_total", "counter", "Offers that workers declined, by code.")
    for code, count in sorted(counters.declines.items()):
        yield sample("declines_total", count, {"code": code})
    yield from _family("events_total", "counter", "What else happened between coordinator and workers.")
    for event, count in sorted(counters.events.items()):
        yield sample("events_total", count, {"event": event})


def _sandbox_lines(sandboxes: Iterable[tuple[str, str, Mapping[str, str]]]) -> Iterator[str]:
    yield from _family("model_sandbox", "gauge", "Verdict on a layer of the sandbox around a model's engine; always 1.")
    for worker, model, verdicts in sorted(sandboxes, key=lambda row: row[:2]):
        for layer, verdict in sorted(verdicts.items()):
            labels = {"worker": worker, "model": model, "layer": layer, "verdict": verdict}
            yield sample("model_sandbox", 1, labels)


def _worker_lines(workers: Iterable[tuple[str, bool, int, int, str]]) -> Iterator[str]:
    rows = sorted(workers)
    for name, text, column in (
        ("worker_accepting", "Whether a connected worker takes jobs.", 1),
        ("worker_running", "Jobs that a worker runs now.", 2),
        ("worker_slots", "Concurrent jobs that a worker could run.", 3),
    ):
        yield from _family(name, "gauge", text)
        for row in rows:
            yield sample(name, int(row[column]), {"worker": row[0], "protocol": row[4]})
    yield from _family("workers", "gauge", "Connected workers.")
    yield sample("workers", len(rows))
