"""Routes that only look."""

from __future__ import annotations

from supervisor.control.exchange import API, Handler, Request, Response, reply
from supervisor.control.metrics import metrics
from supervisor.control.surface import Surface

_TEXT = "text/plain; version=0.0.4; charset=utf-8"


def _health(_request: Request, surface: Surface) -> Response:
    seen = surface.snapshot()
    return reply({"ok": True, "state": seen.state, "version": seen.version, "pid": seen.pid, "api": API})


def _status(_request: Request, surface: Surface) -> Response:
    return reply(surface.snapshot())


def _engines(_request: Request, surface: Surface) -> Response:
    return reply({"engines": surface.snapshot().models})


def _gpus(_request: Request, surface: Surface) -> Response:
    seen = surface.snapshot()
    return reply({"gpus": seen.gpus, "reason": seen.gpu_reason})


def _incidents(_request: Request, surface: Surface) -> Response:
    return reply({"incidents": surface.snapshot().incidents})


def _metrics(_request: Request, surface: Surface) -> Response:
    return Response(200, metrics(surface.snapshot(), surface.more_metrics()).encode(), _TEXT)


LOOK: dict[str, dict[str, Handler]] = {
    "/v1/health": {"GET": _health},
    "/v1/status": {"GET": _status},
    "/v1/engines": {"GET": _engines},
    "/v1/gpus": {"GET": _gpus},
    "/v1/incidents": {"GET": _incidents},
    "/v1/metrics": {"GET": _metrics},
}
