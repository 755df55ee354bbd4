"""Who may come in: every HTTP route needs a key, except the few that are listed here."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from coordinator.errors import fault_response
from coordinator.records import WorkerScope
from protocol.faults import Fault

if TYPE_CHECKING:
    from coordinator.keys import Keys

# Open to everybody: health says nothing secret, blob URLs carry a signature of their own.
OPEN_PATHS = frozenset({"/healthz"})
OPEN_PREFIXES = ("/v1/blobs/",)
# Studio workers have no key of ours: each of these routes judges a secret, a token or a signature of its own. Their
# base URL may have a path before it.
OPEN_STUDIO = re.compile(
    r"(?:/[A-Za-z0-9_~-][A-Za-z0-9._~-]*){0,8}/graphics/api/"
    r"(?:blobs/.+|workers/(?:register-request|register-requests/[^/]+|[^/]+/jobs/[^/]+/complete))"
)
CLIENT_SCOPES = frozenset({"client", "admin"})


class Access:
    """ASGI layer that puts the caller's `Key` into `scope["state"]["key"]`, or refuses.

    WebSockets pass: the worker gateway judges its own tokens with `worker_scope`.
    """

    def __init__(self, app: ASGIApp, keys: Keys) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        path = scope.get("path", "")
        if scope["type"] != "http" or is_open(path):
            await self._app(scope, receive, send)
            return
        fault = self._judge(scope)
        if fault is not None:
            await fault_response(fault)(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _judge(self, scope: Scope) -> Fault | None:
        secret = bearer(Headers(scope=scope).get("authorization", ""))
        if not secret:
            return Fault("unauthorized", "An API key is required: send the header Authorization: Bearer KEY.")
        key = self._keys.find(secret)
        if key is None:
            return Fault("unauthorized", "The API key is unknown or was revoked.")
        if key.scope not in CLIENT_SCOPES:
            return Fault("forbidden", f"A key of scope {key.scope} does not open this route; use a client key.")
        scope.setdefault("state", {})["key"] = key
        return None


def is_open(path: str) -> bool:
    """Whether a route needs no key of ours."""
    return path in OPEN_PATHS or path.startswith(OPEN_PREFIXES) or OPEN_STUDIO.fullmatch(path) is not None


def bearer(header: str) -> str:
    """The token of an Authorization header, or "" when it is not a bearer token."""
    scheme, _, token = header.partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def worker_scope(keys: Keys, token: str) -> WorkerScope | None:
    """What a worker token allows, or None when it is no live worker token."""
    key = keys.find(token)
    if key is None or key.scope != "worker":
        return None
    return WorkerScope(key.worker, key.prefix)
