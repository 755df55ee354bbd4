"""/v1/registrations: workers that ask to be admitted, for an admin to decide."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Any

import msgspec
from anyio.to_thread import run_sync
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator.errors import Json
from coordinator.registrations import STATES, NoRegistration, Registration, RegistrationRefusal, Registrations
from coordinator.services import services
from coordinator.workers_api import actor, admin, body_of
from protocol.faults import refuse


class _Approve(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    secret_begins: Annotated[str, Meta(max_length=64, pattern="^[0-9a-f]*$")] = ""


class _Reject(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    reason: Annotated[str, Meta(max_length=500)] = ""


async def list_registrations(request: Request) -> Response:
    """All requests, or those in one state."""
    found = _registrations(request)
    state = request.query_params.get("state")
    if state is not None and state not in STATES:
        raise refuse("invalid_parameter", f"state: Expected one of {', '.join(STATES)}.", "state")
    return Json({"object": "list", "data": [_json(one) for one in await run_sync(found.list, state)]})


async def approve(request: Request) -> Response:
    """Admit a worker; with `secret_begins` only while the secret behind the request is the one that was seen."""
    found, asked = _registrations(request), await body_of(request, _Approve)
    try:
        decide = partial(found.approve, request.path_params["id"], asked.secret_begins, by=actor(request))
        return Json(_json(await run_sync(decide)))
    except NoRegistration as error:
        raise refuse("not_found", str(error)) from None
    except RegistrationRefusal as error:
        raise refuse("conflict", str(error)) from None


async def reject(request: Request) -> Response:
    """Refuse a worker, or put one out."""
    found, asked = _registrations(request), await body_of(request, _Reject)
    try:
        decide = partial(found.reject, request.path_params["id"], asked.reason, by=actor(request))
        return Json(_json(await run_sync(decide)))
    except NoRegistration as error:
        raise refuse("not_found", str(error)) from None


ROUTES = [
    Route("/v1/registrations", list_registrations, methods=["GET"]),
    Route("/v1/registrations/{id}/approve", approve, methods=["POST"]),
    Route("/v1/registrations/{id}/reject", reject, methods=["POST"]),
]


def _registrations(request: Request) -> Registrations:
    admin(request)
    return services(request).registrations


def _json(registration: Registration) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.to_builtins(registration)
    return found
