"""The dashboard's own routes: its files, the login, and the feed. What it orders goes to the admin's JSON routes.

GET /                     the page; its files are beside it under /dashboard/
POST /dashboard/login     {"key": …} -> {"page": …, "expires_s": …} and a cookie; see `sessions`
POST /dashboard/logout    ends the session
GET /dashboard/feed       server-sent events; see `feed`
"""

from __future__ import annotations

import logging
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Annotated

import anyio
import msgspec
from msgspec import Meta
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from coordinator.answers import while_connected
from coordinator.bodies import read_json
from coordinator.dashboard.files import HEADERS, LOGIN, PREFIX, file, files
from coordinator.dashboard.sessions import (
    PAGE_HEADER,
    SESSION_S,
    FailedLogins,
    check_same_origin,
    cookie_name,
    cookie_of,
    is_secure,
    set_cookie,
)
from coordinator.errors import Json
from coordinator.services import caller, services
from protocol.faults import FaultError, refuse

if TYPE_CHECKING:
    from coordinator.dashboard.feed import Feed
    from coordinator.dashboard.sessions import Sessions

log = logging.getLogger(__name__)

LOGOUT = f"{PREFIX}logout"
FEED = f"{PREFIX}feed"
LOGIN_BYTES = 4096
BEAT_S = 15.0  # a comment in so long a silence, so that no proxy hangs up and a page knows that it is connected


class _Login(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    key: Annotated[str, Meta(min_length=1, max_length=200)]


class Dashboard:
    """The routes over their parts; the feed runs with the application."""

    def __init__(self, sessions: Sessions, feed: Feed, beat_s: float = BEAT_S) -> None:
        self.sessions, self.feed, self.beat_s = sessions, feed, beat_s
        self.failed = FailedLogins()

    def routes(self) -> list[BaseRoute]:
        """For the application."""
        return [
            *(Route(path, file, methods=["GET"]) for path in files()),
            Route(LOGIN, self.login, methods=["POST"]),
            Route(LOGOUT, self.logout, methods=["POST"]),
            Route(FEED, self.follow, methods=["GET"]),
        ]

    async def login(self, request: Request) -> Response:
        """Swap an admin key for a session."""
        check_same_origin(request.headers, "POST")
        if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
            raise refuse("unsupported_media_type", "Expected a body of type application/json.")
        address = request.client.host if request.client else ""
        self.failed.check(address)
        body = await read_json(request, LOGIN_BYTES)
        try:
            opened = await self.sessions.open(msgspec.convert(body, _Login).key.strip())
        except msgspec.ValidationError as error:
            raise refuse("invalid_parameter", f"The body is wrong: {error}.") from None
        except FaultError:
            self.failed.note(address)
            log.warning("A login at the dashboard from %s failed", address)
            raise
        log.info("The key %s opened the dashboard from %s", opened.key.prefix, address)
        secure = is_secure(request.scope)
        answer = Json({"page": opened.page, "expires_s": SESSION_S}, headers={**HEADERS, "cache-control": "no-store"})
        answer.headers["set-cookie"] = set_cookie(cookie_name(request.headers, secure), opened.cookie, secure)
        return answer

    async def logout(self, request: Request) -> Response:
        """End the session; without one nothing is to be ended."""
        secure = is_secure(request.scope)
        await self.sessions.end(cookie_of(request.headers, secure), request.headers.get(PAGE_HEADER, ""))
        answer = Json({}, headers={**HEADERS, "cache-control": "no-store"})
        answer.headers["set-cookie"] = set_cookie(cookie_name(request.headers, secure), "", secure)
        return answer

    async def follow(self, request: Request) -> Response:
        """The feed, for an admin."""
        if caller(request).scope != "admin":
            raise refuse(
                "forbidden", "The feed needs an admin key; make one with: coordinator keys create --scope admin"
            )
        return _Stream(self, request)


class _Stream(Response):
    """One watcher's connection. It ends with its key, its session, and the coordinator."""

    def __init__(self, dashboard: Dashboard, request: Request) -> None:
        self._dashboard, self._request = dashboard, request
        self.background = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve; raises FaultError as long as nothing was sent."""
        http = services(self._request).http

        async def work() -> None:
            with http.not_waited_for():
                await self._send(scope, send)

        with suppress(ClientDisconnect):
            await while_connected(receive, work)

    async def _send(self, scope: Scope, send: Send) -> None:
        started, spoke = False, anyio.current_time()
        headers = {"content-type": "text/event-stream", "cache-control": "no-store", "x-accel-buffering": "no"}
        raw = [(name.encode(), value.encode()) for name, value in {**HEADERS, **headers}.items()]
        last = self._request.headers.get("last-event-id") or self._request.query_params.get("last", "")
        async with aclosing(self._dashboard.feed.follow(last)) as pieces:  # type: ignore[type-var]
            async for piece in pieces:
                now = anyio.current_time()
                beat = now >= spoke + self._dashboard.beat_s
                if beat and not await self._admitted(scope):
                    break
                if not started:
                    await send({"type": "http.response.start", "status": 200, "headers": raw})
                    started, beat = True, True
                data = piece or (b": alive\n\n" if beat else b"")
                if data:
                    await send({"type": "http.response.body", "body": data, "more_body": True})
                    spoke = now
        if not started:
            raise refuse("overloaded", "The coordinator is stopping; open the dashboard again later.", retry_after_s=5)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _admitted(self, scope: Scope) -> bool:
        """Whether the session that opened this is open still. Of a key's end the access layer tells at once."""
        if not scope["state"].get("session"):
            return True
        return await self._dashboard.sessions.admit(scope) is not None
