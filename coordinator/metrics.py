"""GET /metrics in Prometheus' text format, and the counting of HTTP requests behind it.

The route needs a client or admin key like every other: model names and traffic are nobody else's business.
Prometheus sends one with `authorization: {credentials_file: …}`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import anyio
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.counting import Counters, Histogram, Tally
from coordinator.logs import access_log
from coordinator.services import services

if TYPE_CHECKING:
    from coordinator.elsewhere import Reach
    from coordinator.vitals import Sample

PREFIX = "bulkhead_coordinator"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
MOST_WORKERS = 1000  # with series of their own; all of them are counted by state


class HttpCounters:
    """Requests by route, method and status; how many are being answered now."""

    def __init__(self) -> None:
        self.answered: Tally[tuple[str, str, int]] = Tally()
        self.seconds: defaultdict[str, Histogram] = defaultdict(Histogram)  # by route; there are no more than we have
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
        self.answered[route, method if method in METHODS else "other", status] += 1
        self.seconds[route].observe(seconds)
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
            seconds = time.monotonic() - began
            self._counters.end(route, scope["method"], status, seconds)
            if not access_log.disabled:
                _say(scope, route, status, seconds)


def _say(scope: Scope, route: str, status: int, seconds: float) -> None:
    """A line of the access log: the route's template, no path, no query, no header."""
    key = scope.get("state", {}).get("key")
    about = {"request": scope.get("state", {}).get("request_id", ""), "status": status, "seconds": round(seconds, 4)}
    about |= {"tenant": key.tenant, "key": key.prefix} if key is not None else {}
    access_log.info("%s %s", scope["method"], route, extra=about)


async def metrics(request: Request) -> Response:
    """All numbers."""
    parts = services(request)
    sample_ = await parts.vitals.sampled() if parts.vitals is not None else None
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
        *_store_lines(parts.dispatcher.store_timings),
        *_replica_lines(parts.dispatcher.attempts.elsewhere.reach()),
        *_vital_lines(sample_),
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
    yield from _family("http_request_duration_seconds", "histogram", "From a request to the end of its answer.")
    for route, histogram in sorted(counters.seconds.items()):
        yield from _buckets("http_request_duration_seconds", histogram, {"route": route})
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
    yield from _family("stream_lag_seconds", "histogram", "From a worker's token here to its write to the client.")
    yield from _buckets("stream_lag_seconds", counters.stream_lag, {})
    yield from _family("events_total", "counter", "What else happened between coordinator and workers.")
    for event, count in sorted(counters.events.items()):
        yield sample("events_total", count, {"event": event})


def _sandbox_lines(sandboxes: Iterable[tuple[str, str, Mapping[str, str]]]) -> Iterator[str]:
    yield from _family("model_sandbox", "gauge", "Verdict on a layer of the sandbox around a model's engine; always 1.")
    for worker, model, verdicts in sorted(sandboxes, key=lambda row: row[:2])[:MOST_WORKERS]:
        for layer, verdict in sorted(verdicts.items()):
            labels = {"worker": worker, "model": model, "layer": layer, "verdict": verdict}
            yield sample("model_sandbox", 1, labels)


def _buckets(name: str, histogram: Histogram, labels: Mapping[str, str]) -> Iterator[str]:
    for bound, count in histogram.buckets():
        yield sample(f"{name}_bucket", count, {**labels, "le": bound})
    yield sample(f"{name}_sum", round(histogram.total, 6), labels)
    yield sample(f"{name}_count", histogram.count, labels)


def _store_lines(timings: Mapping[str, Histogram]) -> Iterator[str]:
    yield from _family("store_call_duration_seconds", "histogram", "Calls of the dispatcher into its store.")
    for call, histogram in sorted(timings.items()):
        yield from _buckets("store_call_duration_seconds", histogram, {"call": call})


def _database_lines(gauges: Mapping[str, float]) -> Iterator[str]:
    """Those that this database has."""
    for name, text in (
        ("store_oldest_transaction_seconds", "How long the oldest transaction of the database has been open."),
        ("store_idle_in_transaction_seconds", "How long the longest idle session has held one open."),
        ("store_connections", "Sessions of the database, ours and others'."),
        ("store_dead_rows", "Dead rows of the jobs, which slow claims down until they are vacuumed."),
        ("store_live_rows", "Rows of the jobs, as the database estimates them."),
        ("store_bytes", "Size of the jobs on disk."),
        ("store_log_bytes", "Size of the write-ahead log beside the file."),
        ("store_replicas", "Coordinators whose beat is heard."),
        ("store_pool_connections", "Connections of this coordinator's pool."),
        ("store_pool_free", "Those of them that are free."),
        ("store_pool_waiting", "Calls that wait for a connection."),
    ):
        if (value := gauges.get(name.removeprefix("store_"))) is not None:
            yield from _family(name, "gauge", text)
            yield sample(name, value)


def _replica_lines(reach: Reach | None) -> Iterator[str]:
    """Where this coordinator is one of several; how many beat by the database is `store_replicas`."""
    if reach is None:
        return
    yield from _family("peers", "gauge", "Other replicas that live, by the database.")
    yield sample("peers", reach.known)
    yield from _family("peers_connected", "gauge", "Those of them that this one reaches: tokens go there as they come.")
    yield sample("peers_connected", reach.connected)
    yield from _family("peer_frames_dropped_total", "counter", "Frames for other replicas that found no place.")
    yield sample("peer_frames_dropped_total", reach.dropped)


def _vital_lines(seen: Sample | None) -> Iterator[str]:
    """What `coordinator doctor` looks at, as gauges; see `coordinator.vitals` for what they cost."""
    if seen is None:
        return
    yield from _family("store_up", "gauge", "Whether the store answers.")
    yield sample("store_up", int(seen.store is not None))
    yield from _family("vitals_duration_seconds", "gauge", "How long the last look at store and disk took.")
    yield sample("vitals_duration_seconds", round(seen.took_s, 6))
    if seen.disk_free_bytes is not None:
        yield from _family("state_disk_free_bytes", "gauge", "Room on the disk of the state folder.")
        yield sample("state_disk_free_bytes", seen.disk_free_bytes)
    if seen.store is None:
        return
    yield from _family("queue_jobs", "gauge", "Jobs that wait, by kind and model; the longest queues.")
    rows = [({"kind": one.kind, "model": one.model}, one) for one in seen.store.waiting]
    yield from (sample("queue_jobs", one.jobs, labels) for labels, one in rows)
    yield from _family("queue_oldest_seconds", "gauge", "How long the oldest of them has been due.")
    yield from (sample("queue_oldest_seconds", one.oldest_s, labels) for labels, one in rows)
    yield from _family("batches_open", "gauge", "Batches that have not ended, by state.")
    yield from (sample("batches_open", count, {"state": state}) for state, count in sorted(seen.store.batches.items()))
    yield from _family("usage_pending_rows", "gauge", "Counted usage that is not added up yet.")
    yield sample("usage_pending_rows", seen.store.usage_pending)
    yield from _database_lines(seen.store.gauges)


def _worker_lines(workers: Iterable[tuple[str, bool, int, int, str]]) -> Iterator[str]:
    rows = sorted(workers)
    for name, text, column in (
        ("worker_accepting", "Whether a connected worker takes jobs.", 1),
        ("worker_running", "Jobs that a worker runs now.", 2),
        ("worker_slots", "Concurrent jobs that a worker could run.", 3),
    ):
        yield from _family(name, "gauge", text)
        for row in rows[:MOST_WORKERS]:
            yield sample(name, int(row[column]), {"worker": row[0], "protocol": row[4]})
    states = dict.fromkeys(("idle", "busy", "full", "held"), 0)
    for _, accepting, running, slots, _ in rows:
        states["held" if not accepting else "idle" if not running else "busy" if running < slots else "full"] += 1
    yield from _family("worker_states", "gauge", "Connected workers by state; held: paused, draining or on hold.")
    for state, count in states.items():
        yield sample("worker_states", count, {"state": state})
    yield from _family("workers", "gauge", "Connected workers.")
    yield sample("workers", len(rows))
