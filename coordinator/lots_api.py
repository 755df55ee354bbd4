"""/v1/jobs/batch: many jobs in one call, how far they are, and their end."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator.bodies import JSON_WITH_FILES_BYTES, read_json
from coordinator.errors import Json
from coordinator.jobs_api import check_inputs, to_ask, to_job
from coordinator.records import JobRecord, LotRecord, Submission
from coordinator.services import caller, services, submission
from coordinator.uploads import BlobSink, store_data_url, uploads
from protocol.faults import Fault, FaultError, refuse

MAX_JOBS = 1000
STATES = ("queued", "running", "succeeded", "failed", "cancelled")


async def create(request: Request) -> Response:
    """Submit all jobs that can be, in one transaction: 200, with an answer per line.

    A line is what POST /v1/jobs takes, without `wait` and `stream`. Either all lines that are right are stored when
    the answer comes, or none is: who gets no answer sends the same lines with the same idempotency keys again.
    """
    parts = services(request)
    body = await read_json(request, JSON_WITH_FILES_BYTES)
    lines = body.pop("jobs", None)
    if body:
        name = min(body)
        raise refuse("invalid_parameter", f"{name[:100]}: Unknown field; the body holds `jobs` only.", name[:100])
    if not isinstance(lines, list) or not 1 <= len(lines) <= MAX_JOBS:
        raise refuse("invalid_parameter", f"jobs: Expected 1 to {MAX_JOBS} jobs.", "jobs")
    async with uploads(parts) as blobs:
        asked = [await _line(request, line, blobs) for line in lines]
        lot, answers = await parts.dispatcher.lots.submit(caller(request).tenant, asked)
        await parts.dispatcher.drop_unused(_left_over(asked, answers, lot))
    return Json({**to_lot(lot), "jobs": [to_line(number, answer) for number, answer in enumerate(answers)]})


async def _line(request: Request, line: Any, blobs: BlobSink) -> Submission | Fault:
    """One line as a submission, or why it is none."""
    try:
        if not isinstance(line, dict):
            raise refuse("invalid_parameter", "Expected an object.")
        for name in ("wait", "stream"):
            if line.get(name):
                raise refuse("invalid_parameter", f"{name}: A batch waits for none of its jobs; leave it out.", name)
        ask = to_ask(line)
        check_inputs(ask, set())
        inputs = [await store_data_url(data, name, f"inputs.{name}", blobs) for name, data in ask.inputs.items()]
        # The header speaks of the whole call; a line has its key in itself.
        more = {"idempotency_key": "", **ask.more}
        return submission(request, ask.kind, ask.model, ask.params, inputs=tuple(inputs), **more)
    except FaultError as error:
        return error.fault


def _left_over(asked: list[Submission | Fault], answers: list[JobRecord | Fault], lot: LotRecord) -> Iterator[str]:
    """Inputs of lines that made no job."""
    for line, answer in zip(asked, answers, strict=True):
        if isinstance(line, Submission) and (isinstance(answer, Fault) or answer.lot != lot.id):
            yield from (file.blob for file in line.inputs)


async def get(request: Request) -> Response:
    """How far the jobs of a batch are."""
    name = request.path_params["id"]
    return Json(to_lot(_found(name, await services(request).dispatcher.lots.get(name, caller(request).tenant))))


async def cancel(request: Request) -> Response:
    """Cancel all that have not ended; how they stand afterwards."""
    name = request.path_params["id"]
    lots, tenant = services(request).dispatcher.lots, caller(request).tenant
    return Json(to_lot(_found(name, await lots.cancel(name, tenant, "cancelled with its batch"))))


# Before those of single jobs: `batch` would be the id of one.
ROUTES = [
    Route("/v1/jobs/batch", create, methods=["POST"]),
    Route("/v1/jobs/batch/{id}", get, methods=["GET"]),
    Route("/v1/jobs/batch/{id}/cancel", cancel, methods=["POST"]),
]


def _found(name: str, lot: LotRecord | None) -> LotRecord:
    if lot is None:
        raise refuse("not_found", f"There is no batch of jobs {name[:100]!r}.", "id")
    return lot


def to_lot(lot: LotRecord) -> dict[str, Any]:
    """A batch as JSON; a line whose idempotency key was known counts where its job was first submitted."""
    return {
        "id": lot.id,
        "object": "job.batch",
        "created_ms": lot.created_ms,
        "total": lot.total,
        "refused": lot.refused,
        "counts": {state: lot.counts.get(state, 0) for state in STATES},
    }


def to_line(number: int, answer: JobRecord | Fault) -> dict[str, Any]:
    """What became of one line."""
    if isinstance(answer, Fault):
        return {"index": number, "error": answer.openai_error()["error"]}
    return {"index": number, **to_job(answer)}
