"""How failures reach an HTTP client: always OpenAI's error shape, always with a request id.

Everything that goes wrong is a `Fault` first; this module alone turns faults into responses.
"""

from __future__ import annotations

import logging
import secrets
from typing import Any

import anyio
import msgspec
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.logs import REQUEST
from protocol.faults import Fault, FaultError

log = logging.getLogger(__name__)

RETRY_AFTER_S = 5  # what a client is told to wait when the fault says nothing else
LONGEST_RETRY_AFTER_S = 86_400
REQUEST_ID = "x-request-id"
JOB_ID = "x-bulkhead-job"

# Starlette's own refusals (routing, body of the wrong type) by status.
_HTTP_CODES = {
    400: "invalid_request",
    401: "unauthorized",
    403: "forbidden",
    404: "not_found",
    405: "invalid_request",
    413: "payload_too_large",
    415: "unsupported_media_type",
}
_encode = msgspec.json.Encoder().encode


class Json(Response):
    """A JSON response encoded by msgspec: structs as they are, NaN as null, bytes as base64."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """Encode."""
        return _encode(content)


def fault_response(fault: Fault, status: int | None = None) -> Json:
    """Return the response for a fault; 429 and retryable 503 say when to come again.

    Official clients try again after every 409, 429 and 5xx; `x-should-retry` tells them when that cannot help.
    """
    status = fault.http_status if status is None else status
    headers = {}
    if status in (429, 503) and fault.may_retry:
        headers["retry-after"] = str(_whole_seconds(fault.detail.get("retry_after_s")))
    if status in (409, 429) or status >= 500:
        headers["x-should-retry"] = "true" if fault.may_retry else "false"
    if status == 401:
        headers["www-authenticate"] = "Bearer"
    return Json(fault.openai_error(), status_code=status, headers=headers)


def _whole_seconds(told: object) -> int:
    """What a fault says of when to come again; it may be a worker's."""
    if isinstance(told, int | float) and 0 <= told <= LONGEST_RETRY_AFTER_S:
        return int(told)
    return RETRY_AFTER_S


async def on_fault(request: Request, error: Exception) -> Response:
    """A fault that a route raised before its response began; its job, where there was one, has the evidence."""
    assert isinstance(error, FaultError)
    response = fault_response(error.fault)
    if job := request.scope.get("state", {}).get("job"):
        response.headers[JOB_ID] = job
    return response


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Routing refusals: unknown path, wrong method."""
    assert isinstance(error, HTTPException)
    code = _HTTP_CODES.get(error.status_code, "internal" if error.status_code >= 500 else "invalid_request")
    message = error.detail
    if error.status_code == 404:
        message = f"There is no route {request.method} {request.url.path}."
    elif error.status_code == 405:
        message = f"{request.url.path} does not take {request.method}."
    response = fault_response(Fault(code, message), error.status_code)
    response.headers.update(error.headers or {})
    return response


async def on_disconnect(_request: Request, _error: Exception) -> Response:
    """The client went away: nobody reads this, it only ends the request."""
    return Response(status_code=499)


async def on_crash(_request: Request, _error: Exception) -> Response:
    """A bug of ours. The traceback goes to the log, not to the client."""
    return fault_response(Fault("internal", "The coordinator failed; its log has the request id."))


EXCEPTION_HANDLERS: Any = {
    FaultError: on_fault,
    HTTPException: on_http_exception,
    ClientDisconnect: on_disconnect,
    Exception: on_crash,
}


class RequestIds:
    """Outermost ASGI layer: gives every HTTP response an `x-request-id` and forbids MIME guessing."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})["request_id"] = request_id
        asking = REQUEST.set(request_id)
        started = False

        async def tagged(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID] = request_id
                headers.setdefault("x-content-type-options", "nosniff")
            await send(message)

        try:
            await self._app(scope, receive, tagged)
        except anyio.get_cancelled_exc_class():
            # The server ends, and this was not done in time; uvicorn itself would answer a bare 500.
            if not started:
                with anyio.CancelScope(shield=True):
                    ending = Fault("overloaded", "The coordinator is ending; try again.")
                    await fault_response(ending)(scope, receive, tagged)
            raise
        except Exception:
            # Starlette answers 500 and raises again for the server's log; one log line with the id is enough.
            log.exception("%s %s failed (%s)", scope.get("method"), scope.get("path"), request_id)
            if not started:
                raise
        finally:
            REQUEST.reset(asking)
