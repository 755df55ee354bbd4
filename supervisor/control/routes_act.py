"""Routes that order something, and the two that take their time. Carried out by `Requests`, never here.

Every order leaves one line in the log: who (uid and pid of the peer, as the kernel told them), what, and how it went.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

import msgspec

from protocol.framing import UNDECODABLE
from supervisor.control import asked
from supervisor.control.exchange import (
    KEEP_ALIVE,
    Answer,
    Handler,
    Refused,
    Request,
    Response,
    Stream,
    body,
    event,
    query,
    reply,
)
from supervisor.control.peer import PEER
from supervisor.control.surface import Surface
from supervisor.observe.redact import safe

log = logging.getLogger(__name__)

GZIP_TAR = "application/gzip"
MOST_TOLD = 300  # characters of an order's body in the log


# ---- holds


def _pause(request: Request, surface: Surface) -> Response:
    order: asked.Pause = body(request, asked.Pause)
    surface.requests.pause(order.reason, for_s=order.for_s, free_vram=order.free_vram, kind=order.kind, gpu=order.gpu)
    return reply(surface.snapshot())


def _resume(request: Request, surface: Surface) -> Response:
    order: asked.Resume = body(request, asked.Resume)
    lifted = surface.requests.resume(kind=order.kind, gpu=order.gpu)
    return reply({"lifted": lifted, "status": surface.snapshot()})


def _put_hold(request: Request, surface: Surface) -> Response:
    hold = surface.requests.put_hold(body(request, asked.PutHold))
    return reply({"hold": hold, "status": surface.snapshot()})


def _lift_hold(request: Request, surface: Surface) -> Response:
    scope: asked.LiftHold = query(request, asked.LiftHold)
    lifted = surface.requests.lift_hold(request.params["source"], kind=scope.kind, gpu=scope.gpu)
    return reply({"lifted": lifted, "status": surface.snapshot()})


def _cordon(request: Request, surface: Surface) -> Response:
    hold = surface.requests.cordon(request.params["uuid"], body(request, asked.Cordon))
    return reply({"hold": hold, "status": surface.snapshot()})


def _uncordon(request: Request, surface: Surface) -> Response:
    body(request, asked.Nothing)
    lifted = surface.requests.uncordon(request.params["uuid"])
    return reply({"lifted": lifted, "status": surface.snapshot()})


# ---- the supervisor's life


def _drain(request: Request, surface: Surface) -> Response:
    order: asked.Drain = body(request, asked.Drain)
    surface.requests.drain(order.reason or "the operator asked for it", restart=order.restart)
    return reply(surface.snapshot())


def _shutdown(request: Request, surface: Surface) -> Response:
    order: asked.Shutdown = body(request, asked.Shutdown)
    surface.requests.shutdown(order.reason or "the operator asked for it")
    return reply(surface.snapshot())


async def _reload(request: Request, surface: Surface) -> Response:
    body(request, asked.Nothing)
    return reply(await surface.requests.reload())


async def _register(request: Request, surface: Surface) -> Response:
    return reply(await surface.requests.register(body(request, asked.Register)))


def _log_level(request: Request, surface: Surface) -> Response:
    order: asked.LogLevel = body(request, asked.LogLevel)
    surface.requests.log_level(order.level, order.for_s)
    return reply({"level": order.level, "for_s": order.for_s})


# ---- models and jobs


def _load(request: Request, surface: Surface) -> Response:
    body(request, asked.Nothing)
    return _done(surface, surface.requests.load(request.params["name"]))


def _unload(request: Request, surface: Surface) -> Response:
    order: asked.Unload = body(request, asked.Unload)
    return _done(surface, surface.requests.unload(request.params["model"], order.reason))


def _restart(request: Request, surface: Surface) -> Response:
    order: asked.Restart = body(request, asked.Restart)
    return _done(surface, surface.requests.restart(request.params["model"], order.reason, now=order.now))


def _done(surface: Surface, sentence: str) -> Response:
    return reply({"message": sentence, "status": surface.snapshot()})


def _pull(request: Request, surface: Surface) -> Stream:
    """Server-sent events named as `models pull --json` names them: plan, progress, note; the last is done or failed."""
    events = surface.requests.pull(body(request, asked.Pull))
    return Stream(_pieces(events))


async def _pieces(events: AsyncIterator[Mapping[str, Any] | None]) -> AsyncIterator[bytes]:
    try:
        async for found in events:
            if found is None:
                yield KEEP_ALIVE
            else:
                yield event(str(found["t"]), {name: value for name, value in found.items() if name != "t"})
    finally:
        if (close := getattr(events, "aclose", None)) is not None:
            await close()  # waits for nothing: who looks on holds nothing


async def _remove(request: Request, surface: Surface) -> Response:
    return _done(surface, await surface.requests.remove(body(request, asked.Remove)))


def _cancel(request: Request, surface: Surface) -> Response:
    order: asked.CancelJob = body(request, asked.CancelJob)
    count = surface.requests.cancel_job(request.params["id"], order.reason)
    return reply({"cancelled": count, "job": request.params["id"]})


# ---- what takes its time


async def _diagnostics(_request: Request, surface: Surface) -> Response:
    if surface.diagnostics is None:
        raise Refused(503, "This supervisor makes no bundle; ask `supervisor diagnostics` without it.")
    name = f"bulkhead-diagnostics-{surface.snapshot().worker or 'worker'}.tar.gz"
    data = await surface.diagnostics()
    return Response(200, data, GZIP_TAR, {"content-disposition": f'attachment; filename="{name}"'})


async def _doctor(_request: Request, surface: Surface) -> Response:
    if surface.doctor is None:
        raise Refused(503, "This supervisor does not examine itself; ask `supervisor doctor` without it.")
    return reply(await surface.doctor())


# ---- the log of orders


def _noted(handler: Handler) -> Callable[[Request, Any], Awaitable[Answer]]:
    """The same, with a line in the log."""

    async def noted(request: Request, surface: Surface) -> Answer:
        try:
            found = handler(request, surface)
            answer = await found if inspect.isawaitable(found) else found
        except Refused as refusal:
            log.info("order of %s refused: %s: %s", PEER.get(), _what(request), refusal)
            raise
        log.info("order of %s: %s", PEER.get(), _what(request))
        return answer

    return noted


def _what(request: Request) -> str:
    """The order in words, without secrets."""
    words = f"{request.method} {request.target[:MOST_TOLD]}"
    if not request.body:
        return words
    try:
        told = safe(msgspec.json.decode(request.body))
    except UNDECODABLE:
        return f"{words} with a body that is no JSON"
    return f"{words} {str(told)[:MOST_TOLD]}"


_ORDERS: dict[str, dict[str, Handler]] = {
    "/v1/pause": {"POST": _pause},
    "/v1/resume": {"POST": _resume},
    "/v1/holds": {"POST": _put_hold},
    "/v1/holds/{source}": {"DELETE": _lift_hold},
    "/v1/drain": {"POST": _drain},
    "/v1/shutdown": {"POST": _shutdown},
    "/v1/reload": {"POST": _reload},
    "/v1/register": {"POST": _register},
    "/v1/log-level": {"POST": _log_level},
    "/v1/engines/{model}/restart": {"POST": _restart},
    "/v1/engines/{model}/unload": {"POST": _unload},
    "/v1/models/{name}/load": {"POST": _load},
    "/v1/models/pull": {"POST": _pull},
    "/v1/models/remove": {"POST": _remove},
    "/v1/gpus/{uuid}/cordon": {"POST": _cordon},
    "/v1/gpus/{uuid}/uncordon": {"POST": _uncordon},
    "/v1/jobs/{id}/cancel": {"POST": _cancel},
}

ACT: dict[str, dict[str, Handler]] = {
    **{path: {method: _noted(handler) for method, handler in rows.items()} for path, rows in _ORDERS.items()},
    "/v1/diagnostics": {"GET": _diagnostics},
    "/v1/doctor": {"GET": _doctor},
}
