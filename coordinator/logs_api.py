"""/v1/log: an admin turns the log up, or the access log on, while the coordinator runs."""

from __future__ import annotations

import asyncio
from typing import Annotated

import msgspec
from msgspec import Meta
from starlette.datastructures import State
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator.errors import Json
from coordinator.logs import Level, access_log, level_now, set_level
from coordinator.workers_api import admin, body_of


class _Change(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    level: Level | None = None
    for_s: Annotated[float, Meta(gt=0, le=86_400)] | None = None
    access: bool | None = None


async def show(request: Request) -> Response:
    """The level in force, and whether every request is told."""
    admin(request)
    return Json({"level": level_now(), "access": not access_log.disabled})


async def change(request: Request) -> Response:
    """Change them; a level `for_s` seconds goes back by itself. What was said last counts."""
    admin(request)
    asked = await body_of(request, _Change)
    if asked.access is not None:
        access_log.disabled = not asked.access
    if asked.level is not None:
        _set(request.app.state, asked.level, asked.for_s)
    return await show(request)


def _set(state: State, level: str, for_s: float | None) -> None:
    passing: tuple[asyncio.TimerHandle, str] | None = getattr(state, "log_passing", None)
    lasting = passing[1] if passing is not None else level_now()
    if passing is not None:
        passing[0].cancel()
    set_level(level)
    state.log_passing = None
    if for_s is not None:
        state.log_passing = (asyncio.get_running_loop().call_later(for_s, _back, state, lasting), lasting)


def _back(state: State, level: str) -> None:
    state.log_passing = None
    set_level(level)


ROUTES = [Route("/v1/log", show, methods=["GET"]), Route("/v1/log", change, methods=["PUT"])]
