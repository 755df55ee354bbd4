"""GET /v1/models and /v1/models/{id}: what connected workers serve now, of what the caller may use."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator.errors import Json
from coordinator.records import ServedModel
from coordinator.services import caller, services
from protocol.faults import refuse


async def list_models(request: Request) -> Response:
    """All models."""
    parts, key = services(request), caller(request)
    allowed = [model for model in parts.dispatcher.models() if parts.tenants.may_use(key, model.name)]
    data = [to_model(model, parts.started_s) for model in allowed]
    return Json({"object": "list", "data": data})


async def get_model(request: Request) -> Response:
    """One model; names may hold slashes."""
    parts = services(request)
    name = request.path_params["name"]
    for model in parts.dispatcher.models():
        if model.name == name and parts.tenants.may_use(caller(request), name):
            return Json(to_model(model, parts.started_s))
    raise refuse("model_not_found", f"No connected worker serves a model named {name!r}.", "model")


ROUTES = [
    Route("/v1/models", list_models, methods=["GET"]),
    Route("/v1/models/{name:path}", get_model, methods=["GET"]),
]


def to_model(model: ServedModel, created_s: int) -> dict[str, Any]:
    """OpenAI's model object, with our own fields behind it; `created` is the coordinator's start."""
    return {
        "id": model.name,
        "object": "model",
        "created": created_s,
        "owned_by": "bulkhead",
        "kinds": model.kinds,
        "workers": len(model.workers),
        "slots": model.slots,
        "resident": model.resident,
        "limits": model.limits,
    }
