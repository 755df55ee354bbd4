"""/v1/workers: the connected workers, and what an admin may ask of one.

`pause`, `resume`, `drain` and `shutdown` are said and not answered: what came of them shows in the list. An `order`
(`log_level`, `probe`, `configure`) is answered by the worker; its owner decides what a coordinator may configure.
"""

from __future__ import annotations

import secrets
from typing import Annotated, Any

import anyio
import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from coordinator.bodies import read_json
from coordinator.errors import Json
from coordinator.fleet import Worker
from coordinator.records import WorkerView
from coordinator.services import Services, caller, services
from protocol import link_wire as wire
from protocol.faults import refuse
from protocol.revision import ORDERS

ORDER_S = 60.0  # a probe loads an engine
MAX_BYTES = 64 * 1024


class _Pause(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    reason: Annotated[str, Meta(max_length=200)] = ""
    for_s: Annotated[float, Meta(ge=0, le=366 * 86_400)] = 0.0


class _Reason(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    reason: Annotated[str, Meta(max_length=200)] = ""


class _Order(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    verb: Annotated[str, Meta(max_length=50)]
    arguments: dict[str, Any] = {}


async def list_workers(request: Request) -> Response:
    """Every connected worker of all replicas, by id; for an admin."""
    admin(request)
    return Json({"object": "list", "data": msgspec.to_builtins(all_workers(services(request)))})


def all_workers(parts: Services) -> list[WorkerView]:
    """Every connected worker by id, those of the other replicas as they told of them last, at most 5 s ago."""
    views = [*parts.dispatcher.workers(anyio.current_time()), *parts.dispatcher.attempts.fleet.views_elsewhere()]
    return sorted(views, key=lambda view: view.id)


async def body_of(request: Request, type_: type[Any]) -> Any:
    """The body as this struct, by its defaults when there is none. Raises FaultError."""
    data = await read_json(request, MAX_BYTES) if request.headers.get("content-length", "0") != "0" else {}
    try:
        return msgspec.convert(data, type_)
    except msgspec.ValidationError as error:
        raise refuse("invalid_parameter", f"The body is wrong: {error}.") from None


def admin(request: Request) -> None:
    """Refuse everybody else. Raises FaultError(forbidden)."""
    if caller(request).scope != "admin":
        cure = "make one with: coordinator keys create --scope admin"
        raise refuse("forbidden", f"Workers are seen and ordered about with an admin key; {cure}.")


def actor(request: Request) -> str:
    """Who does it, for the log of admin acts."""
    key = caller(request)
    return f"key {key.prefix}" + (f" ({key.name})" if key.name else "")


def _worker(request: Request) -> Worker:
    """The worker of the path, for an admin. Raises FaultError."""
    admin(request)
    name = request.path_params["id"]
    worker = services(request).dispatcher.attempts.fleet.all_workers().get(name)
    if worker is None:
        raise refuse("not_found", f"No worker {name[:100]!r} is connected; GET /v1/workers lists those that are.")
    return worker


async def pause(request: Request) -> Response:
    """No new jobs, for a while or until `resume`."""
    worker, order = _worker(request), await body_of(request, _Pause)
    worker.port.send(wire.Pause(reason=order.reason, for_ms=int(order.for_s * 1000)))
    return Json({"worker": worker.id, "said": "pause"}, status_code=202)


async def resume(request: Request) -> Response:
    """Lift the coordinator's pause and drain, and its rest after failures; holds of the worker's owner stay."""
    worker = _worker(request)
    worker.port.send(wire.Resume())
    worker.pardon()
    services(request).dispatcher.attempts.look_again()
    return Json({"worker": worker.id, "said": "resume"}, status_code=202)


async def drain(request: Request) -> Response:
    """Finish what runs, take nothing new."""
    worker = _worker(request)
    worker.port.send(wire.Drain())
    return Json({"worker": worker.id, "said": "drain"}, status_code=202)


async def shutdown(request: Request) -> Response:
    """Drain, then end the supervisor."""
    worker, order = _worker(request), await body_of(request, _Reason)
    worker.port.send(wire.ShutdownWorker(reason=order.reason))
    return Json({"worker": worker.id, "said": "shutdown"}, status_code=202)


async def order(request: Request) -> Response:
    """Give an order and wait for what became of it."""
    worker, asked = _worker(request), await body_of(request, _Order)
    done = await give(worker, asked.verb, asked.arguments)
    return Json(msgspec.to_builtins(done), status_code=200 if done.ok else 409)


async def give(worker: Worker, verb: str, arguments: dict[str, Any], patience_s: float = ORDER_S) -> wire.OrderDone:
    """Order a connected worker, and return its answer.

    Raises:
        FaultError: unsupported: it is of a version that takes no orders; no_worker: it did not answer in time.

    Cancellation: nobody waits any more; the worker carries it out all the same.
    """
    if worker.revision < ORDERS:
        why = "is too old to take orders; update it" if worker.protocol == "native" else "speaks studio, without orders"
        raise refuse("unsupported", f"The worker {worker.id} {why}.")
    number, answers = secrets.token_hex(8), list[wire.OrderDone]()
    answered = anyio.Event()

    def take(done: wire.OrderDone) -> None:
        answers.append(done)
        answered.set()

    worker.orders[number] = take
    try:
        worker.port.send(wire.Order(id=number, verb=verb, arguments=arguments))
        with anyio.move_on_after(patience_s):
            await answered.wait()
    finally:
        worker.orders.pop(number, None)
    if not answers:
        raise refuse("no_worker", f"The worker {worker.id} did not answer within {patience_s:g} s.")
    return answers[0]


ROUTES = [
    Route("/v1/workers", list_workers, methods=["GET"]),
    Route("/v1/workers/{id}/pause", pause, methods=["POST"]),
    Route("/v1/workers/{id}/resume", resume, methods=["POST"]),
    Route("/v1/workers/{id}/drain", drain, methods=["POST"]),
    Route("/v1/workers/{id}/shutdown", shutdown, methods=["POST"]),
    Route("/v1/workers/{id}/order", order, methods=["POST"]),
]
