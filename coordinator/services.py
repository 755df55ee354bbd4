"""What every route needs, in one place, and who is asking."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, cast

import msgspec
from starlette.requests import Request

from coordinator.keys import Key
from coordinator.records import StoredInput, Submission
from protocol.faults import refuse

if TYPE_CHECKING:
    from coordinator.access import Access
    from coordinator.batches import Batches
    from coordinator.blobs.base import Blobs
    from coordinator.dashboard.look import Look
    from coordinator.deploy.deployer import Deployer
    from coordinator.dispatch import Dispatcher
    from coordinator.kept_files import KeptFiles
    from coordinator.keys import Keys
    from coordinator.metrics import HttpCounters
    from coordinator.progress import ProgressBoard
    from coordinator.registrations import Registrations
    from coordinator.tenants import Tenants
    from coordinator.vitals import Vitals

IDEMPOTENCY_KEY = "idempotency-key"
MAX_IDEMPOTENCY_CHARS = 200
MAX_TRACEPARENT_CHARS = 55  # W3C: version, trace id, span id, flags


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """Tunables of the HTTP half, in seconds.

    Attributes:
        job_s: deadline of a job that brings none, queueing and model load included.
        begin_s: how long a client waits in silence for its work to begin; see `coordinator.answers`.
        comment_s: pause between comment lines that keep an event stream alive through proxies.
        blob_url_s: how long a signed download URL in an answer is good.
    """

    job_s: float = 3600.0
    begin_s: float = 30.0
    comment_s: float = 15.0
    blob_url_s: float = 3600.0


class Services:
    """The coordinator's parts as the routes see them."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        blobs: Blobs,
        keys: Keys,
        http: HttpCounters,
        progress: ProgressBoard,
        limits: Limits,
        registrations: Registrations,
        files: KeptFiles,
        batches: Batches,
        tenants: Tenants,
        access: Access,
        look: Look,
    ) -> None:
        self.dispatcher = dispatcher
        self.blobs = blobs
        self.keys = keys
        self.http = http
        self.progress = progress
        self.limits = limits
        self.files = files
        self.batches = batches
        self.registrations = registrations
        self.tenants = tenants
        self.access = access
        self.look = look
        self.deployer: Deployer
        self.started_s = int(time.time())
        self.alive = True
        self.vitals: Vitals | None = None


def services(request: Request) -> Services:
    """The parts behind this request."""
    return cast("Services", request.app.state.services)


def caller(request: Request) -> Key:
    """The key this request came with; the access layer has checked it."""
    return cast("Key", request.scope["state"]["key"])


def idempotency_key(text: object) -> str:
    """Check an idempotency key. Raises FaultError(invalid_parameter)."""
    if not isinstance(text, str) or len(text) > MAX_IDEMPOTENCY_CHARS or not text.isprintable():
        message = f"idempotency_key: Expected at most {MAX_IDEMPOTENCY_CHARS} printable characters."
        raise refuse("invalid_parameter", message, "idempotency_key")
    return text


def submission(
    request: Request,
    kind: str,
    model: str,
    params: Any,
    *,
    inputs: tuple[StoredInput, ...] = (),
    stream: bool = False,
    **more: Any,
) -> Submission:
    """Build the submission of a request: its key, tenant, trace and idempotency key included."""
    key = caller(request)
    settings: dict[str, Any] = {
        "deadline_ms": int(services(request).limits.job_s * 1000),
        "idempotency_key": idempotency_key(request.headers.get(IDEMPOTENCY_KEY, "")),
        "traceparent": request.headers.get("traceparent", "")[:MAX_TRACEPARENT_CHARS],
        **more,
    }
    return Submission(
        kind=kind,
        model=model,
        params=msgspec.msgpack.encode(params),
        inputs=inputs,
        stream=stream,
        tenant=key.tenant,
        key_id=key.prefix,
        **settings,
    )
