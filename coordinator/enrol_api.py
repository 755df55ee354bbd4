"""POST /v1/workers/enrol: a worker exchanges its enrolment token for a key of its own.

The route is open, within a rate per address; it judges the token itself. The answer is the only time that the key is
shown: when it is lost on its way, another token is needed, and the key that nobody has can be revoked.
"""

from __future__ import annotations

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
from coordinator.studio import RATE_S, Rate
from coordinator.workers_api import body_of
from protocol.faults import refuse

ASKED = 20  # per address and minute; a rack behind one address enrols within a few minutes


class _Enrol(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    worker: Annotated[str, Meta(max_length=200)] = ""


def enrol_routes(enrolments: Enrolments, asked: int = ASKED) -> list[Route]:
    """The route over these tokens."""
    rate = Rate(anyio.current_time, asked)

    async def enrol(request: Request) -> Response:
        """Exchange."""
        address = request.client.host if request.client else ""
        if pause := rate.wait(address):
            what = f"At most {asked} enrolments in {RATE_S:g} s come from one address."
            raise refuse("rate_limited", what, retry_after_s=int(pause) + 1)
        token = bearer(request.headers.get("authorization", ""))
        if not token:
            raise refuse("unauthorized", "The enrolment token is required: send Authorization: Bearer TOKEN.")
        body = await body_of(request, _Enrol)
        # A thread that has begun is not abandoned: the key is made, so its answer should be sent.
        worker, secret = await run_sync(enrolments.use, token, body.worker, address)
        return Json({"worker": worker, "token": secret}, status_code=201, headers={"cache-control": "no-store"})

    return [Route("/v1/workers/enrol", enrol, methods=["POST"])]
