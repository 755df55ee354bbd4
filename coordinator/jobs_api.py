"""/v1/jobs: any kind of job, submitted now and fetched later. Its jobs outlive their clients."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import datetime
from typing import Any
from urllib.parse import quote

import anyio
import msgspec
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from coordinator import deliveries
from coordinator.answers import job_headers, result_of, succeeded, while_connected
from coordinator.bodies import (
    JSON_WITH_FILES_BYTES,
    FieldTable,
    decode_object,
    flag,
    model_name,
    page_size,
    read_json,
    work_params,
)
from coordinator.counting import Counters
from coordinator.errors import Json
from coordinator.files import file_response
from coordinator.media import UNKNOWN
from coordinator.records import (
    TERMINAL,
    AttemptRecord,
    JobChunk,
    JobEnded,
    JobEvent,
    JobProgress,
    JobRecord,
    StoredInput,
    Submission,
)
from coordinator.services import Services, caller, idempotency_key, services, submission
from coordinator.streams import DONE, EventWriter, progress_fields, sse
from coordinator.uploads import is_multipart, read_form, store_data_url, uploads
from protocol.faults import FaultError, refuse
from protocol.ids import is_safe_id
from protocol.work import INPUTS, Kind, is_free_kind, is_kind

MAX_INPUTS = 16
MAX_LABELS = 32
MAX_LABEL_CHARS = 200
MAX_DEADLINE_MS = 7 * 86_400_000
MAX_PRIORITY = 100
MAX_WAIT_S = 3600.0
MAX_VRAM_GB = 10_000.0
MAX_AHEAD_S = 366 * 86_400
LIST_LIMIT = 20
MAX_LIST_LIMIT = 100
STATES = ("queued", "running", *sorted(TERMINAL))

FIELDS = FieldTable(
    passed=frozenset({"idempotency_key", "priority", "deadline_ms", "labels", "vram_gb_estimate", "run_after"}),
    handled=frozenset({"kind", "model", "params", "inputs", "stream", "wait", "wait_for_worker"}),
)


# ---- submit -------------------------------------------------------------------------------------------------


class Ask(msgspec.Struct, frozen=True):
    """A checked job request, before its inputs are in the blobs."""

    kind: str
    model: str
    params: Any
    inputs: dict[str, Any]
    stream: bool
    wait_s: float
    more: dict[str, Any]


async def create(request: Request) -> Response:
    """Submit; with `wait` the answer comes when the job ended, or when that many seconds passed."""
    parts = services(request)
    inputs: tuple[StoredInput, ...]
    async with uploads(parts) as blobs:
        if is_multipart(request):
            form = await read_form(request, blobs, None)
            text = form.fields.pop("job", [""])
            if form.fields:
                name = min(form.fields)
                raise refuse("invalid_parameter", f"{name}: Unknown field; the form holds `job` and files.", name)
            ask = to_ask(decode_object(text[0].encode(), "job"))
            inputs = tuple(form.files.values())
        else:
            ask = to_ask(await read_json(request, JSON_WITH_FILES_BYTES))
            inputs = ()
        check_inputs(ask, {item.name for item in inputs})
        for name, data in ask.inputs.items():
            inputs += (await store_data_url(data, name, f"inputs.{name}", blobs),)
        job = submission(request, ask.kind, ask.model, ask.params, inputs=inputs, stream=ask.stream, **ask.more)
        record = await _submit(request, parts, job, ask.wait_s)
    deliveries.note_fault(record)
    return Json(to_job(record), status_code=200 if record.ended else 202, headers=job_headers(record))


def to_ask(body: dict[str, Any]) -> Ask:
    """Check a job request. Raises FaultError naming the field."""
    more, handled = FIELDS.pick(body)
    kind = handled.get("kind")
    if not isinstance(kind, str) or not is_kind(kind):
        raise refuse("invalid_parameter", "kind: Expected one of the task kinds, or x-….", "kind")
    model = model_name(handled)
    params = work_params(kind, _object(handled, "params"), prefix="params.")
    inputs = _object(handled, "inputs")
    wait_s = _number(handled, "wait", 0, MAX_WAIT_S) if handled.get("wait") is not True else MAX_WAIT_S
    checked: dict[str, Any] = {"wait_for_worker": flag(handled, "wait_for_worker")}
    if "idempotency_key" in more:
        checked["idempotency_key"] = idempotency_key(more["idempotency_key"])
    if "priority" in more:
        checked["priority"] = int(_number(more, "priority", -MAX_PRIORITY, MAX_PRIORITY, whole=True))
    if "deadline_ms" in more:
        checked["deadline_ms"] = int(_number(more, "deadline_ms", 1, MAX_DEADLINE_MS, whole=True))
    if "vram_gb_estimate" in more:
        checked["vram_gb_estimate"] = _number(more, "vram_gb_estimate", 0, MAX_VRAM_GB)
    if "labels" in more:
        checked["labels"] = _labels(more["labels"])
    if "run_after" in more:
        checked["run_after_ms"] = _instant(more["run_after"])
    return Ask(kind, model, params, inputs, flag(handled, "stream"), wait_s, checked)


def check_inputs(ask: Ask, given: set[str]) -> None:
    """Refuse inputs that the kind does not take, or does not get. Raises FaultError(invalid_parameter)."""
    names = list(ask.inputs)
    every = given | set(names)
    if len(every) < len(given) + len(names):
        raise refuse("invalid_parameter", "inputs: An input came twice.", "inputs")
    if len(every) > MAX_INPUTS:
        raise refuse("invalid_parameter", f"inputs: At most {MAX_INPUTS} inputs.", "inputs")
    known = INPUTS.get(ask.kind, {})
    free = is_free_kind(ask.kind) or ask.kind == Kind.COMMAND
    for name in sorted(every):
        if not is_safe_id(name) or not (free or name in known):
            field = f"inputs.{name[:100]}"
            raise refuse("invalid_parameter", f"{field}: A job of kind {ask.kind} takes no such input.", field)
    for name, required in known.items():
        if required and name not in every:
            raise refuse("invalid_parameter", f"inputs.{name}: The input is required.", f"inputs.{name}")


def _object(values: dict[str, Any], name: str) -> dict[str, Any]:
    value = values.get(name, {})
    if not isinstance(value, dict):
        raise refuse("invalid_parameter", f"{name}: Expected an object.", name)
    return value


def _number(values: dict[str, Any], name: str, low: float, high: float, whole: bool = False) -> float:
    value = values.get(name, 0)
    right = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
    if not right or not low <= value <= high:
        words = "a whole number" if whole else "a number"
        raise refuse("invalid_parameter", f"{name}: Expected {words} from {low:g} to {high:g}.", name)
    return value  # type: ignore[no-any-return]


def _labels(value: Any) -> dict[str, str]:
    good = isinstance(value, dict) and len(value) <= MAX_LABELS
    if not good or not all(
        isinstance(text, str) and len(text) <= MAX_LABEL_CHARS and len(name) <= MAX_LABEL_CHARS
        for name, text in value.items()
    ):
        message = f"labels: Expected at most {MAX_LABELS} texts of at most {MAX_LABEL_CHARS} characters."
        raise refuse("invalid_parameter", message, "labels")
    return value  # type: ignore[no-any-return]


def _instant(value: Any) -> int:
    """`run_after` in milliseconds since the epoch: a date with its zone, or that number itself."""
    ms = -1.0
    if isinstance(value, str):
        with suppress(ValueError, OverflowError):
            date = datetime.fromisoformat(value)
            ms = date.timestamp() * 1000 if date.tzinfo is not None else ms
    elif isinstance(value, int) and not isinstance(value, bool):
        ms = value
    if not 0 <= ms <= (time.time() + MAX_AHEAD_S) * 1000:
        message = (
            "run_after: Expected a date with its time zone, such as 2026-11-22T06:00:00Z, or milliseconds since 1970"
        )
        raise refuse("invalid_parameter", f"{message}; at most {MAX_AHEAD_S // 86_400} days from now.", "run_after")
    return int(ms)


async def _submit(request: Request, parts: Services, job: Submission, wait_s: float) -> JobRecord:
    """Submit, and wait when asked. A client that leaves while it waits does not end the job."""
    if not wait_s:
        return await parts.dispatcher.submit(job)

    async def work() -> JobRecord:
        async with parts.dispatcher.submit_and_watch(job) as (record, events):
            with anyio.move_on_after(wait_s):
                async for event in events:
                    if isinstance(event, JobEnded):
                        return event.record
        return await parts.dispatcher.get(record.id, job.tenant) or record

    return await while_connected(request.receive, work)


# ---- look ---------------------------------------------------------------------------------------------------


async def get_job(request: Request) -> Response:
    """One job, with its attempts."""
    record = await _find(request)
    deliveries.note_fault(record)
    attempts = await services(request).dispatcher.attempts_of(record)
    return Json({**to_job(record), "attempts": [to_attempt(one) for one in attempts]})


async def list_jobs(request: Request) -> Response:
    """The tenant's newest jobs; `limit`, `state` and `dead` as query parameters.

    With `dead=1` those that failed without their caller's doing: what an owner looks at, mends, and tries again.
    """
    query = request.query_params
    limit = page_size(query, LIST_LIMIT, MAX_LIST_LIMIT)
    state = query.get("state")
    if state is not None and state not in STATES:
        raise refuse("invalid_parameter", f"state: Expected one of {', '.join(STATES)}.", "state")
    dead = query.get("dead", "0")
    if dead not in ("0", "1"):
        raise refuse("invalid_parameter", "dead: Expected 0 or 1.", "dead")
    records = await services(request).dispatcher.list(caller(request).tenant, limit, state, dead == "1")
    return Json({"object": "list", "data": [to_job(record) for record in records]})


async def get_result(request: Request) -> Response:
    """The result of a succeeded job as JSON (bytes in base64); a failed one answers with its fault."""
    record = await _find(request)
    if not record.ended:
        raise refuse("conflict", f"The job has no result yet: it is {record.state}.")
    if not record.files:  # with files it is delivered when they are
        deliveries.note_job(record)
    return Json(result_of(succeeded(record)), headers=job_headers(record))


async def get_file(request: Request) -> Response:
    """One output file."""
    record = await _find(request)
    name = request.path_params["name"]
    for file in record.files:
        if file.name == name:
            return await file_response(request, file, safe_mime(file.mime), file.name)
    raise refuse("not_found", f"The job has no file {name!r}.", "name")


async def cancel(request: Request) -> Response:
    """Cancel; a job that has ended stays as it is."""
    found = await _find(request)
    by = "its owner" if found.tenant == caller(request).tenant else "an administrator"
    record = await services(request).dispatcher.cancel(found.id, found.tenant, f"cancelled by {by}")
    if record is None:
        raise _unknown(found.id)
    return Json(to_job(record))


async def retry(request: Request) -> Response:
    """Put a failed job back into the queue with all its tries; what became of the earlier ones is kept."""
    name = request.path_params["id"]
    record = await services(request).dispatcher.retry(name, owner(request))
    if record is None:
        raise _unknown(name)
    return Json(to_job(record), status_code=202, headers=job_headers(record))


async def events(request: Request) -> Response:
    """What happens to the job from now on, as named server-sent events; the last one is `ended`."""
    return JobEvents(services(request), await _find(request))


ROUTES = [
    Route("/v1/jobs", create, methods=["POST"]),
    Route("/v1/jobs", list_jobs, methods=["GET"]),
    Route("/v1/jobs/{id}", get_job, methods=["GET"]),
    Route("/v1/jobs/{id}/result", get_result, methods=["GET"]),
    Route("/v1/jobs/{id}/files/{name}", get_file, methods=["GET"]),
    Route("/v1/jobs/{id}/events", events, methods=["GET"]),
    Route("/v1/jobs/{id}/cancel", cancel, methods=["POST"]),
    Route("/v1/jobs/{id}/retry", retry, methods=["POST"]),
]


def owner(request: Request) -> str | None:
    """Whose jobs this key may touch by their ids: its tenant's, or with an admin key everybody's (None)."""
    key = caller(request)
    return None if key.scope == "admin" else key.tenant


async def _find(request: Request) -> JobRecord:
    name = request.path_params["id"]
    record = await services(request).dispatcher.get(name, owner(request))
    if record is None:
        raise _unknown(name)
    return record


def _unknown(name: str) -> FaultError:
    return refuse("not_found", f"There is no job {name[:100]!r}.", "id")


def safe_mime(mime: str) -> str:
    """A worker's word for a type, when it looks like one."""
    return mime if re.fullmatch(r"[a-z0-9.+-]{1,40}/[a-z0-9.+-]{1,80}", mime) else UNKNOWN


def to_job(record: JobRecord) -> dict[str, Any]:
    """A job as JSON, without its parameters and its result."""
    return {
        "id": record.id,
        "object": "job",
        "kind": record.kind,
        "model": record.model,
        "state": record.state,
        "attempt": record.attempt,
        "tries": record.tries,
        "worker": record.worker,
        "priority": record.priority,
        "labels": record.labels,
        "vram_gb_estimate": record.vram_gb_estimate,
        "run_after_ms": record.run_after_ms or None,
        "deadline_at_ms": record.deadline_at_ms or None,
        "batch": record.lot or None,
        "dead": record.dead,
        "created_ms": record.created_ms,
        "started_ms": record.started_ms,
        "finished_ms": record.finished_ms,
        "usage": record.usage,
        "fault": record.fault,
        "files": [
            {
                "name": file.name,
                "mime": file.mime,
                "size": file.size,
                "sha256": file.sha256,
                "url": f"/v1/jobs/{record.id}/files/{quote(file.name, safe='')}",
            }
            for file in record.files
        ],
    }


def to_attempt(attempt: AttemptRecord) -> dict[str, Any]:
    """An attempt as JSON."""
    return {
        "number": attempt.n,
        "worker": attempt.worker,
        "began_ms": attempt.began_ms,
        "ended_ms": attempt.ended_ms,
        "outcome": attempt.outcome,
        "fault": attempt.fault,
    }


class JobEvents(Response):
    """Streams the events of one job. The job does not care whether anybody listens."""

    def __init__(self, parts: Services, record: JobRecord) -> None:
        self._parts = parts
        self._record = record
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve; the headers go out at once."""
        writer = EventWriter(send, job_headers(self._record), self._parts.limits.comment_s)

        async def work() -> None:
            async with self._parts.dispatcher.watch(self._record.id) as source:
                await writer.write(sse(to_job(self._record), "job"))
                async with anyio.create_task_group() as group:
                    group.start_soon(writer.comment_forever)
                    last = await _relay(source, writer, self._parts.dispatcher.counters)
                    group.cancel_scope.cancel()
            await writer.write(last)
            await writer.close()

        with suppress(ClientDisconnect):
            await while_connected(receive, work)


async def _relay(source: AsyncIterator[JobEvent], writer: EventWriter, counters: Counters) -> bytes:
    """Write all events but the last thing to say, which is returned."""
    try:
        async for event in source:
            if isinstance(event, JobEnded):
                deliveries.note_fault(event.record)
                return sse(to_job(event.record), "ended") + DONE
            await writer.write(to_event(event))
            if isinstance(event, JobChunk):
                counters.written(event.at)
    except FaultError as error:
        return sse(error.fault.openai_error(), "error")
    return sse(refuse("internal", "The job's events ended without its end.").fault.openai_error(), "error")


def to_event(event: JobEvent) -> bytes:
    """One event before the end."""
    if isinstance(event, JobChunk):
        return sse({"seq": event.seq, "data": msgspec.msgpack.decode(event.data)}, "chunk")
    if isinstance(event, JobProgress):
        return sse(progress_fields(event), "progress")
    return sse({}, "started")
