"""/v1/workers/enrol: how a native worker gets a key of its own.

With a one-time token: POST /v1/workers/enrol exchanges it for the key. The answer is the only time that the key is
shown: when it is lost on its way, another token is needed, and the key that nobody has can be revoked.

Without one: POST …/requests asks to be admitted, an admin decides, and GET …/requests/ID tells the worker, which proves
by a secret that the request is its own. Each question of an approved worker makes a new key and ends the one before, so
an answer that was lost costs nothing.

The routes are open, within a rate per address, and judge for themselves.
"""

from __future__ import annotations

from functools import partial
from typing import Annotated

import anyio
import msgspec
from anyio.to_thread import run_sync
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator.access import bearer
from coordinator.enrolments import Enrolments
from coordinator.errors import Json
from coordinator.registrations import Registrations, TooManyPending
from coordinator.studio.routes import RATE_S, THREADS, Rate
from coordinator.workers_api import body_of
from protocol.faults import refuse
from protocol.ids import is_safe_id

ASKED = 20  # per address and minute; a rack behind one address enrols within a few minutes


class _Ask(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    worker: str
    secret_sha256: Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]
    machine: Annotated[str, Meta(max_length=200)] = ""
    user: Annotated[str, Meta(max_length=200)] = ""
    version: Annotated[str, Meta(max_length=200)] = ""


class _Enrol(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    worker: Annotated[str, Meta(max_length=200)] = ""


def enrol_routes(enrolments: Enrolments, registrations: Registrations, asked: int = ASKED) -> list[Route]:
    """The routes over these tokens and requests."""
    rate, threads = Rate(anyio.current_time, asked), anyio.CapacityLimiter(THREADS)

    def slowed(request: Request) -> str:
        """The caller's address. Raises FaultError(rate_limited)."""
        address = request.client.host if request.client else ""
        if pause := rate.wait(address):
            what = f"At most {asked} enrolments in {RATE_S:g} s come from one address."
            raise refuse("rate_limited", what, retry_after_s=int(pause) + 1)
        return address

    async def enrol(request: Request) -> Response:
        """Exchange."""
        address = slowed(request)
        token = bearer(request.headers.get("authorization", ""))
        if not token:
            raise refuse("unauthorized", "The enrolment token is required: send Authorization: Bearer TOKEN.")
        body = await body_of(request, _Enrol)
        # A thread that has begun is not abandoned: the key is made, so its answer should be sent.
        worker, secret = await run_sync(enrolments.use, token, body.worker, address, limiter=threads)
        return Json({"worker": worker, "token": secret}, status_code=201, headers={"cache-control": "no-store"})

    async def ask(request: Request) -> Response:
        """Note that a worker wants to be admitted."""
        address = slowed(request)
        body: _Ask = await body_of(request, _Ask)
        if not is_safe_id(body.worker):
            raise refuse("invalid_parameter", "worker: Expected the worker's id.", "worker")
        said = {"machine": body.machine, "user": body.user, "models": []}
        secret = bytes.fromhex(body.secret_sha256)
        note = partial(registrations.request, body.worker, address, secret, body.version, said, "native")
        try:
            number, created = await run_sync(note, limiter=threads)
        except TooManyPending as error:
            raise refuse("rate_limited", str(error), retry_after_s=60) from None
        return Json({"id": number, "status": "pending"}, status_code=201 if created else 200)

    async def poll(request: Request) -> Response:
        """How a request stands. A wrong secret and an unknown id look alike."""
        secret = bearer(request.headers.get("authorization", ""))
        number = request.path_params["id"]
        polled = await run_sync(registrations.poll, number, secret, limiter=threads) if secret else None
        if polled is None:
            raise refuse("not_found", "There is no such request, or the secret is another one; ask again.")
        found = {"status": polled.state, "worker": polled.worker, "token": polled.token, "reason": polled.reason}
        shown = {name: value for name, value in found.items() if value}
        return Json(shown, headers={"cache-control": "no-store"})

    return [
        Route("/v1/workers/enrol", enrol, methods=["POST"]),
        Route("/v1/workers/enrol/requests", ask, methods=["POST"]),
        Route("/v1/workers/enrol/requests/{id}", poll, methods=["GET"]),
    ]
