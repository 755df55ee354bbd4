"""Routes that only look: the snapshot and its parts, jobs, and what goes on (routes_flow.py, routes_config.py)."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from supervisor.control.exchange import API, Handler, Refused, Request, Response, query, reply
from supervisor.control.jobs_seen import KEPT
from supervisor.control.metrics import metrics
from supervisor.control.routes_config import CONFIG
from supervisor.control.routes_flow import FLOW
from supervisor.control.surface import Surface
from supervisor.host.work import ModelSpec

_TEXT = "text/plain; version=0.0.4; charset=utf-8"
PartT = TypeVar("PartT")


class _Jobs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    state: Literal["", "waiting", "running", "ended", "succeeded", "failed", "cancelled"] = ""
    model: str = ""
    kind: str = ""
    limit: Annotated[int, Meta(ge=1, le=2 * KEPT)] = 100


def _health(_request: Request, surface: Surface) -> Response:
    seen = surface.snapshot()
    return reply({"ok": True, "state": seen.state, "version": seen.version, "pid": seen.pid, "api": API})


def _status(_request: Request, surface: Surface) -> Response:
    return reply(surface.snapshot())


def _engines(_request: Request, surface: Surface) -> Response:
    return reply({"engines": surface.snapshot().models})


def _models(_request: Request, surface: Surface) -> Response:
    """What is served, as it was configured, and how it goes."""
    seen = {model.name: model for model in surface.snapshot().models}
    models = []
    for spec in surface.specs():
        one = seen.get(spec.name)
        now = {"state": one.state, "reason": one.reason, "waits": one.waits, "held": one.held} if one else {}
        models.append({**_configured(spec), **now})
    return reply({"models": models})


def _configured(spec: ModelSpec) -> dict[str, Any]:
    model = spec.model
    return {
        "name": spec.name,
        "engine": spec.engine.name,
        "kinds": model.kinds,
        "files": model.files,
        "backend": model.backend,
        "device": model.device,
        "gpus": model.devices,
        "keep_alive_s": spec.keep_alive_s,
        "vram_bytes": spec.vram_bytes,
        "revision": model.revision,
    }


def _gpus(_request: Request, surface: Surface) -> Response:
    seen = surface.snapshot()
    return reply({"gpus": seen.gpus, "reason": seen.gpu_reason})


def _holds(_request: Request, surface: Surface) -> Response:
    seen = surface.snapshot()
    told = {"holds": seen.holds, "sights": seen.sights, "coming": seen.coming}
    return reply({**told, "state": seen.state, "why": seen.why})


def _incidents(_request: Request, surface: Surface) -> Response:
    return reply({"incidents": surface.snapshot().incidents})


def _metrics(_request: Request, surface: Surface) -> Response:
    return Response(200, metrics(surface.snapshot(), surface.more_metrics()).encode(), _TEXT)


def _jobs(request: Request, surface: Surface) -> Response:
    asked = query(request, _Jobs)
    book = kept(surface.jobs, "jobs")
    found = book.all(state=asked.state, model=asked.model, kind=asked.kind, limit=asked.limit)
    return reply({"jobs": found, "counts": book.counts()})


def _job(request: Request, surface: Surface) -> Response:
    job = request.params["id"]
    if not (found := kept(surface.jobs, "jobs").attempts(job)):
        raise Refused(404, f"No job {job[:100]!r} is among those that are open or of the last {KEPT} that ended.")
    return reply({"job": job, "attempts": found})


def _log_level(_request: Request, surface: Surface) -> Response:
    return reply({"level": kept(surface.log_level, "log")()})


def kept(part: PartT | None, name: str) -> PartT:
    """A part of the surface that not every supervisor has.

    Raises:
        Refused: this one does not.
    """
    if part is None:
        raise Refused(503, f"This supervisor keeps no {name}.")
    return part


LOOK: dict[str, dict[str, Handler]] = {
    "/v1/health": {"GET": _health},
    "/v1/status": {"GET": _status},
    "/v1/jobs": {"GET": _jobs},
    "/v1/jobs/{id}": {"GET": _job},
    "/v1/models": {"GET": _models},
    "/v1/engines": {"GET": _engines},
    "/v1/gpus": {"GET": _gpus},
    "/v1/holds": {"GET": _holds},
    "/v1/incidents": {"GET": _incidents},
    "/v1/metrics": {"GET": _metrics},
    "/v1/log-level": {"GET": _log_level},
    **FLOW,
    **CONFIG,
}
