"""Who may come in: every HTTP route needs a key, except the few that are listed here."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

import anyio
import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from coordinator.dashboard.files import LOGIN, files
from coordinator.errors import fault_response
from coordinator.limits import RateLimited, counted
from coordinator.records import WorkerScope
from protocol.faults import Fault, FaultError, refuse

if TYPE_CHECKING:
    from coordinator.dashboard.sessions import Sessions
    from coordinator.doors import Doors
    from coordinator.keys import Key, Keys
    from coordinator.limits import Rates
    from coordinator.tenants import Tenants

# Open to everybody: health says nothing secret, blob URLs carry a signature of their own.
OPEN_PATHS = frozenset({"/healthz"})
# Workers that have no key yet: each of these routes judges a token or a secret of its own, or only notes a request.
OPEN_ENROL = re.compile(r"/v1/workers/enrol(?:/requests(?:/[^/]+)?)?")
OPEN_PREFIXES = ("/v1/blobs/",)
# The dashboard's files hold no secret; its login judges the key that is typed there.
OPEN_DASHBOARD = frozenset({*files(), LOGIN})
# Studio workers have no key of ours: each of these routes judges a secret, a token or a signature of its own. Their
# base URL may have a path before it.
OPEN_STUDIO = re.compile(
    r"(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*){0,8}/graphics/api/"
    r"(?:blobs/.+|workers/(?:register-request|register-requests/[^/]+|[^/]+/jobs/[^/]+/complete))"
)
CLIENT_SCOPES = frozenset({"client", "admin"})


class Access:
    """Judges keys, and counts what they do."""

    def __init__(
        self, keys: Keys, tenants: Tenants, rates: Rates, doors: Doors, sessions: Sessions | None = None
    ) -> None:
        self.keys, self.tenants, self.rates, self.doors, self.sessions = keys, tenants, rates, doors, sessions

    async def judge(self, scope: Scope) -> Key:
        """The key of a request. Raises FaultError."""
        secret = bearer(Headers(scope=scope).get("authorization", ""))
        if not secret:
            if self.sessions is not None and (opened := await self.sessions.admit(scope)) is not None:
                return opened
            raise refuse("unauthorized", "An API key is required: send the header Authorization: Bearer KEY.")
        key = await self.keys.look_up(secret)
        if key is None:
            raise refuse("unauthorized", "The API key is unknown or was revoked.")
        if key.scope not in CLIENT_SCOPES:
            raise refuse("forbidden", f"A key of scope {key.scope} does not open this route; use a client key.")
        return key

    def count(self, scope: Scope, key: Key) -> Mapping[str, str]:
        """Count a request; what its answer's headers say about the limits. Raises RateLimited."""
        if not counted(scope["method"], scope["path"]):
            return {}
        spent = self.rates.take(key, self.tenants.get(key.tenant))
        return spent.headers() if spent else {}


class AccessLayer:
    """ASGI layer that puts the caller's `Key` into `scope["state"]["key"]`, or refuses; counts what it may do.

    A request whose key is revoked on its way ends: with 401 where its answer has not begun, an event stream with an
    error event, any other answer by the end of the connection.

    WebSockets pass: the worker gateway judges its own tokens with `worker_scope`.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        path = scope.get("path", "")
        if scope["type"] != "http" or is_open(path):
            await self._app(scope, receive, send)
            return
        try:
            key = await self._access.judge(scope)
            headers = self._access.count(scope, key)
        except FaultError as error:
            response = fault_response(error.fault)
            response.headers.update(error.headers if isinstance(error, RateLimited) else {})
            await response(scope, receive, send)
            return
        scope.setdefault("state", {})["key"] = key
        answer = _Answer(send, headers)
        with anyio.CancelScope() as asked, self._access.doors.hold(key.prefix, asked.cancel):
            await self._app(scope, receive, answer.send)
        if asked.cancelled_caught:
            await answer.break_off(scope, receive)


class _Answer:
    """What a request is answered with, so that it can be ended before its end."""

    def __init__(self, send: Send, headers: Mapping[str, str]) -> None:
        self._send, self._headers = send, headers
        self._begun = self._ended = self._events = False

    async def send(self, message: Message) -> None:
        """Pass one message on."""
        if message["type"] == "http.response.start":
            self._begun = True
            answered = MutableHeaders(scope=message)
            answered.update(self._headers)
            self._events = answered.get("content-type", "").startswith("text/event-stream")
        elif message["type"] == "http.response.body" and not message.get("more_body"):
            self._ended = True
        await self._send(message)

    async def break_off(self, scope: Scope, receive: Receive) -> None:
        """End it because its key is good no more."""
        fault = Fault("unauthorized", "The API key was revoked.")
        if not self._begun:
            await fault_response(fault)(scope, receive, self._send)
        elif self._events and not self._ended:
            # The event before may be cut in two: an empty line ends it.
            body = b"\n\ndata: " + msgspec.json.encode(fault.openai_error()) + b"\n\n"
            await self._send({"type": "http.response.body", "body": body, "more_body": False})


def is_open(path: str) -> bool:
    """Whether a route needs no key of ours."""
    if path in OPEN_PATHS or path in OPEN_DASHBOARD or path.startswith(OPEN_PREFIXES):
        return True
    return OPEN_ENROL.fullmatch(path) is not None or OPEN_STUDIO.fullmatch(path) is not None


def bearer(header: str) -> str:
    """The token of an Authorization header, or "" when it is not a bearer token."""
    scheme, _, token = header.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


async def worker_scope(keys: Keys, token: str) -> WorkerScope | None:
    """What a worker token allows, or None when it is no live worker token. Raises FaultError(overloaded)."""
    key = await keys.look_up(token)
    if key is None or key.scope != "worker":
        return None
    return WorkerScope(key.worker, key.prefix)
