"""Routes that order something. The orders are carried out by `Requests`, which is what everybody else asks, too."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from supervisor.control.exchange import Handler, Request, Response, body, reply
from supervisor.control.surface import Surface

LONGEST_PAUSE_S = 366 * 86_400.0


class _Pause(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    for_s: Annotated[float, Meta(gt=0, le=LONGEST_PAUSE_S)] | None = None
    free_vram: bool = False
    reason: Annotated[str, Meta(max_length=200)] = ""


class _Drain(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    reason: Annotated[str, Meta(max_length=200)] = ""
    restart: bool = False


class _Nothing(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    pass


def _pause(request: Request, surface: Surface) -> Response:
    order = body(request, _Pause)
    surface.requests.pause(order.reason, for_s=order.for_s, free_vram=order.free_vram)
    return reply(surface.snapshot())


def _resume(request: Request, surface: Surface) -> Response:
    body(request, _Nothing)
    lifted = surface.requests.resume()
    return reply({"lifted": lifted, "status": surface.snapshot()})


def _drain(request: Request, surface: Surface) -> Response:
    order = body(request, _Drain)
    surface.requests.drain(order.reason or "the operator asked for it", restart=order.restart)
    return reply(surface.snapshot())


ACT: dict[str, dict[str, Handler]] = {
    "/v1/pause": {"POST": _pause},
    "/v1/resume": {"POST": _resume},
    "/v1/drain": {"POST": _drain},
}
