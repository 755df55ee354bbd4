"""What an admin may see and do beyond one tenant: every job, every key, and putting a worker out.

The dashboard asks by these routes, and so may a script with an admin key. What there is already is not here again:
jobs are cancelled and tried again by their ids under /v1/jobs, workers and registrations have `workers_api` and
`registrations_api`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import msgspec
from anyio.to_thread import run_sync
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator.bodies import page_size
from coordinator.dashboard.view import attempt_row, job_row
from coordinator.errors import Json
from coordinator.jobs_api import STATES
from coordinator.kept_lines import MOST_LINES, merged
from coordinator.keys import Key, KeyRefusal
from coordinator.records import JobRecord
from coordinator.services import services
from coordinator.store.watch import JobFilter
from coordinator.workers_api import actor, admin
from protocol.faults import FaultError, refuse

JOBS = 50
MOST_JOBS = 200
LINES = 200
MAX_TEXT = 200
_FILTERS = ("state", "model", "tenant", "worker")


async def list_jobs(request: Request) -> Response:
    """Jobs of all tenants, newest first; `state`, `model`, `tenant`, `worker`, `limit`, and `before` (a job's id)."""
    admin(request)
    asked = request.query_params
    if unknown := [name for name in asked if name not in (*_FILTERS, "limit", "before")]:
        raise refuse("invalid_parameter", f"{unknown[0][:50]}: Expected one of {', '.join(_FILTERS)}, limit, before.")
    limit = page_size(asked, JOBS, MOST_JOBS)
    wanted = JobFilter(**{name: asked.get(name, "")[:MAX_TEXT] for name in _FILTERS})
    if wanted.state and wanted.state not in STATES:
        raise refuse("invalid_parameter", f"state: Expected one of {', '.join(STATES)}.", "state")
    found = await services(request).look.jobs(wanted, limit + 1, asked.get("before", "")[:MAX_TEXT])
    rows = [job_row(record) for record in found[:limit]]
    return Json({"object": "list", "data": rows, "more": len(found) > limit})


async def get_job(request: Request) -> Response:
    """One job with its attempts, without what it was asked and what it answered."""
    record = await _job(request)
    attempts = await services(request).dispatcher.attempts_of(record)
    return Json({**job_row(record), "attempts": [attempt_row(attempt) for attempt in attempts]})


async def job_logs(request: Request) -> Response:
    """What workers' logs said of a job lately, the oldest line first; `worker`, and `limit`: the latest so many.

    Every replica keeps in memory what its workers told. `since_ms`: of what was told before, lines may be missing;
    `lost`: lines, of whatever job, that a worker lost on their way; `not_asked`: replicas that did not answer.
    """
    record, asked = await _job(request), request.query_params
    if unknown := [name for name in asked if name not in ("worker", "limit")]:
        raise refuse("invalid_parameter", f"{unknown[0][:50]}: Expected worker or limit.")
    limit, worker = page_size(asked, LINES, MOST_LINES), asked.get("worker", "")[:MAX_TEXT]
    attempts = services(request).dispatcher.attempts
    elsewhere, silent = await attempts.elsewhere.lines(record.id, worker, limit)
    found = msgspec.to_builtins(merged([attempts.kept.of(record.id, worker, limit), *elsewhere], limit))
    about = {"object": "list", "job": record.id, "created_ms": record.created_ms, "not_asked": silent}
    return Json({**about, "data": found.pop("lines"), **found})


async def list_keys(request: Request) -> Response:
    """All keys without their secrets, oldest first, revoked ones included."""
    admin(request)
    keys = services(request).keys
    found = await run_sync(lambda: list(keys.list()))
    return Json({"object": "list", "data": [_key(key) for key in found]})


async def revoke_key(request: Request) -> Response:
    """End a key, and what is open with it."""
    admin(request)
    return Json(_key(await _revoke(request, request.path_params["prefix"])))


async def revoke_worker(request: Request) -> Response:
    """Put a connected worker out: its key ends, or its registration; and so does its session.

    Every worker that came with the same key is put out as well.
    """
    admin(request)
    parts, name = services(request), request.path_params["id"]
    worker = parts.dispatcher.attempts.fleet.all_workers().get(name)
    if worker is None:
        raise refuse("not_found", f"No worker {name[:100]!r} is connected; GET /v1/workers lists those that are.")
    if worker.protocol == "studio":
        for one in await run_sync(lambda: list(parts.registrations.list("approved"))):
            if one.worker == name:
                await run_sync(partial(parts.registrations.reject, one.id, "put out by an admin", by=actor(request)))
                return Json({"worker": name, "said": "revoke", "message": f"{name} was put out."})
        raise refuse("not_found", f"{name[:100]} has no registration; GET /v1/registrations lists them.")
    key_id = worker.key_id if worker.view is None else worker.view.key_id
    if not key_id:
        raise refuse("unsupported", f"Which key {name[:100]} came with is not known; GET /v1/keys lists them.")
    key = await _revoke(request, key_id)
    return Json({"worker": name, "said": "revoke", "message": f"{name} was put out; its key {key.prefix}… ended."})


ROUTES = [
    Route("/v1/admin/jobs", list_jobs, methods=["GET"]),
    Route("/v1/admin/jobs/{id}", get_job, methods=["GET"]),
    Route("/v1/admin/jobs/{id}/logs", job_logs, methods=["GET"]),
    Route("/v1/keys", list_keys, methods=["GET"]),
    Route("/v1/keys/{prefix}/revoke", revoke_key, methods=["POST"]),
    Route("/v1/workers/{id}/revoke", revoke_worker, methods=["POST"]),
]


async def _job(request: Request) -> JobRecord:
    """The job of the path, for an admin. Raises FaultError."""
    admin(request)
    name = request.path_params["id"]
    record = await services(request).look.job(name)
    if record is None:
        raise _unknown(name)
    return record


def _unknown(name: str) -> FaultError:
    return refuse("not_found", f"There is no job {name[:100]!r}; GET /v1/admin/jobs lists those that are kept.", "id")


async def _revoke(request: Request, prefix: str) -> Key:
    try:
        return await run_sync(partial(services(request).keys.revoke, prefix, by=actor(request)))
    except KeyRefusal as error:
        raise refuse("not_found", str(error), "prefix") from None


def _key(key: Key) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(key)
    return found
