"""/v1/deployments: what the fleet is to serve, for an admin.

PUT    /v1/deployments/{name}   ask for a model, another revision of it, or another number or choice of workers
GET    /v1/deployments[/{name}] wanted, ready, and why not, per worker
DELETE /v1/deployments/{name}   let all workers go of it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator.bodies import read_json
from coordinator.deploy.deployer import Deployer
from coordinator.deploy.plan import due_in_s, serves
from coordinator.deploy.spec import Asked, Candidate, Deployment, Placement, checked, why_not
from coordinator.errors import Json
from coordinator.services import services
from coordinator.workers_api import admin
from protocol.faults import FaultError, refuse

MAX_BYTES = 64 * 1024
MOST_SHOWN = 200  # workers that were not chosen
MOST_LISTED = 20  # the same where all deployments are shown


async def put(request: Request) -> Response:
    """Ask for it. What the body leaves out stays as it is, when there is such a deployment already."""
    deployer, name = _deployer(request), request.path_params["name"]
    given = await read_json(request, MAX_BYTES)
    if not isinstance(given, dict):
        raise refuse("invalid_parameter", "The body must be an object with source, sha256, replicas, on.")
    made = await deployer.deploy(name, lambda known: _asked(name, given, known))
    return Json(await _shown(deployer, made), status_code=200 if made.version > 1 else 201)


async def show(request: Request) -> Response:
    """One of them."""
    deployer, name = _deployer(request), request.path_params["name"]
    found = await deployer.find(name)
    if found is None:
        raise _none(name)
    return Json(await _shown(deployer, found))


async def show_all(request: Request) -> Response:
    """All, by name."""
    deployer = _deployer(request)
    found, placements, candidates, now_ms = await deployer.state()
    mine: dict[str, list[Placement]] = {one.name: [] for one in found}
    for placement in placements:
        mine.setdefault(placement.deployment, []).append(placement)
    data = [view(one, mine[one.name], candidates, now_ms, MOST_LISTED) for one in found]
    return Json({"object": "list", "data": data})


async def delete(request: Request) -> Response:
    """No worker shall serve it any more."""
    deployer, name = _deployer(request), request.path_params["name"]
    left = await deployer.undeploy(name)
    if left is None:
        raise _none(name)
    return Json(await _shown(deployer, left), status_code=202)


def view(
    deployment: Deployment,
    placements: Sequence[Placement],
    candidates: Mapping[str, Candidate],
    now_ms: int,
    most: int = MOST_SHOWN,
) -> dict[str, Any]:
    """One deployment for people and programs, with at most `most` of the workers that were not chosen."""
    asked = deployment.asked
    mine = [one for one in placements if one.deployment == deployment.name]
    chosen = {one.worker for one in mine}
    others = [one for one in candidates.values() if one.worker not in chosen]
    not_chosen = [{"worker": one.worker, "why": why_not(asked, one) or _spare(one)} for one in others[:most]]
    return {
        "name": deployment.name,
        "source": asked.source,
        "sha256": asked.sha256,
        "file": asked.file,
        "engine": asked.engine,
        "options": asked.options,
        "on": asked.on,
        "revision": asked.revision,
        "serving": deployment.current,
        "wanted": asked.replicas,
        "ready": sum(serves(one, candidates) and one.revision == asked.revision for one in mine),
        "leaving": deployment.leaving,
        "workers": [
            {
                "worker": one.worker,
                "revision": one.revision,
                "state": one.state if one.worker in candidates and candidates[one.worker].connected else "away",
                "why": _why(one, candidates.get(one.worker), now_ms),
            }
            for one in mine
        ],
        "not_chosen": not_chosen,
        "not_chosen_total": len(others),
    }


def _why(placement: Placement, candidate: Candidate | None, now_ms: int) -> str:
    if candidate is None or not candidate.connected:
        later = "; it is to let go of it when it comes back" if placement.state == "leaving" else ""
        return f"the worker is not connected{later}"
    match placement.state:
        case "wanted":
            return "the worker has not been asked yet"
        case "fetching":
            return placement.reason or "the worker fetches, loads and proves it"
        case "leaving":
            return "the worker is to let go of it"
        case "failed":
            again = due_in_s(placement, now_ms)
            return f"{placement.reason} It is tried again in {again:.0f} s."
        case _:
            return ""


def _spare(candidate: Candidate) -> str:
    if not candidate.connected:
        return "it is not connected"
    return "it is about to leave" if candidate.draining else "others are enough"


def _asked(name: str, given: dict[str, Any], known: Deployment | None) -> Asked:
    base = {} if known is None or known.leaving else msgspec.to_builtins(known.asked)
    if "source" in given and given.get("source") != base.get("source"):
        for field in ("sha256", "file"):  # they belong to the other source
            base.pop(field, None)
    if "source" not in given and "source" not in base:
        raise refuse(
            "invalid_parameter", f"source: there is no deployment {name[:100]!r} yet; say where it lies.", "source"
        )
    if given.get("name", name) != name:
        raise refuse("invalid_parameter", "name: it is in the path already, and another one.", "name")
    try:
        return checked(msgspec.convert({**base, **given, "name": name}, Asked))
    except msgspec.ValidationError as error:
        raise refuse("invalid_parameter", f"The deployment is wrong: {error}.") from None


async def _shown(deployer: Deployer, deployment: Deployment) -> dict[str, Any]:
    found, placements, candidates, now_ms = await deployer.state()
    now = next((one for one in found if one.name == deployment.name), deployment)
    return view(now, placements, candidates, now_ms)


def _deployer(request: Request) -> Deployer:
    admin(request)
    return services(request).deployer


def _none(name: str) -> FaultError:
    return refuse("not_found", f"There is no deployment {name[:100]!r}; GET /v1/deployments lists them.")


ROUTES = [
    Route("/v1/deployments", show_all, methods=["GET"]),
    Route("/v1/deployments/{name}", show, methods=["GET"]),
    Route("/v1/deployments/{name}", put, methods=["PUT"]),
    Route("/v1/deployments/{name}", delete, methods=["DELETE"]),
]
