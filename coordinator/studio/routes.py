"""The studio contract's routes, `…/graphics/api/workers/…`: registration, the socket, results that are files.

A path may stand before `/graphics/api`, because an installation's base URL may have one. Whoever comes here has none of
our keys: a request to register is open to all within a rate, the rest is judged by the worker's own secret or token.
"""

from __future__ import annotations

import ipaddress
from collections import OrderedDict, deque
from collections.abc import Callable
from typing import Annotated

import anyio
import msgspec
from anyio.to_thread import run_sync
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.websockets import WebSocket

from coordinator.access import bearer
from coordinator.blobs.base import PREFIX as BLOBS
from coordinator.blobs.base import Blobs
from coordinator.blobs.routes import download_route
from coordinator.bodies import read_json
from coordinator.dispatch import Dispatcher
from coordinator.doors import Doors
from coordinator.elsewhere import Upload
from coordinator.errors import Json, fault_response
from coordinator.gateway import deny
from coordinator.registrations import Registrations, TooManyPending
from coordinator.studio.claims import Sources
from coordinator.studio.session import Admission, StudioSession, StudioSettings
from coordinator.studio.uploads import form_bytes, receive
from coordinator.studio.wire import MAX_MODELS, SUBPROTOCOL, Capabilities
from protocol.faults import Fault, FaultError, refuse
from protocol.ids import is_safe_id

BASE = "/graphics/api"
REGISTER_BYTES = 256 * 2**10
RATE_S = 60.0
MAX_ADDRESSES = 10_000
THREADS = 4  # that strangers may keep busy with a register that is slow


class _Request(msgspec.Struct, frozen=True, rename="camel"):
    install_id: str
    registration_secret_hash: Annotated[str, Meta(pattern=r"^[0-9a-fA-F]{64}\Z")]
    capabilities: Capabilities
    user_agent: Annotated[str, Meta(max_length=500)] = ""


class Rate:
    """At most so many calls of one address within so many seconds. IPv6 addresses count by their /64."""

    def __init__(self, now: Callable[[], float], calls: int, seconds: float = RATE_S) -> None:
        self._now, self._calls, self._seconds = now, calls, seconds
        self._seen: OrderedDict[str, deque[float]] = OrderedDict()

    def wait(self, address: str) -> float:
        """Count a call; returns 0, or the seconds after which the next one is taken."""
        name, now = _network(address), self._now()
        times = self._seen.setdefault(name, deque())
        self._seen.move_to_end(name)
        while len(self._seen) > MAX_ADDRESSES:
            self._seen.popitem(last=False)
        while times and times[0] <= now - self._seconds:
            times.popleft()
        if len(times) >= self._calls:
            return times[0] + self._seconds - now
        times.append(now)
        return 0.0


def _network(address: str) -> str:
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address[:100]
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is None:
        return str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


class Studio:
    """The studio half of a coordinator: who is registered, who is connected."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        blobs: Blobs,
        registrations: Registrations,
        sources: Sources | None = None,
        settings: StudioSettings | None = None,
        doors: Doors | None = None,
    ) -> None:
        self.registrations = registrations
        self.settings = settings or StudioSettings()
        self.rate = Rate(anyio.current_time, self.settings.asked)
        self._dispatcher, self._blobs, self._sources = dispatcher, blobs, sources or {}
        self._doors = doors or Doors(lambda _worker: True)
        self._threads = anyio.CapacityLimiter(THREADS)
        self._sessions: dict[str, StudioSession] = {}

    def routes(self) -> list[BaseRoute]:
        """Every route, at the root and below any path."""
        routes: list[BaseRoute] = []
        for base in (BASE, "/{outer:path}" + BASE):
            workers = base + "/workers"
            routes += [
                Route(workers + "/register-request", self.register, methods=["POST"]),
                Route(workers + "/register-requests/{id}", self.poll, methods=["GET"]),
                WebSocketRoute(workers + "/{worker}/connect", self.connect),
                Route(workers + "/{worker}/jobs/{job}/complete", self.complete, methods=["POST"]),
                download_route(base + "/blobs/{key:path}", self._blobs),
            ]
        return routes

    # ---- registration --------------------------------------------------------------------------------------

    async def register(self, request: Request) -> Response:
        """Note that a worker wants to be admitted."""
        address = request.client.host if request.client else ""
        if pause := self.rate.wait(address):
            what = f"At most {self.settings.asked} requests to register in {RATE_S:g} s come from one address."
            raise refuse("rate_limited", what, retry_after_s=int(pause) + 1)
        asked = await _asked(request)
        said = asked.capabilities
        known = {"machine": said.machine_name[:200], "user": said.username[:200], "models": _models(said)}
        secret = bytes.fromhex(asked.registration_secret_hash)
        try:
            number, created = await run_sync(
                self.registrations.request,
                asked.install_id,
                address,
                secret,
                asked.user_agent,
                known,
                limiter=self._threads,
            )
        except TooManyPending as error:
            raise refuse("rate_limited", str(error), retry_after_s=60) from None
        return Json({"requestId": number, "status": "pending"}, status_code=201 if created else 200)

    async def poll(self, request: Request) -> Response:
        """How a request stands. A wrong secret and an unknown id look alike: the worker starts over with both."""
        secret = bearer(request.headers.get("authorization", ""))
        if not secret:
            raise refuse("unauthorized", "The registration secret is required: Authorization: Bearer SECRET.")
        polled = await run_sync(self.registrations.poll, request.path_params["id"], secret, limiter=self._threads)
        if polled is None:
            raise refuse("not_found", "There is no such registration request; ask again.")
        headers = {"cache-control": "no-store"}
        match polled.state:
            case "approved":
                body = {"status": "approved", "workerId": polled.worker, "authToken": polled.token}
            case "rejected" if polled.reason:
                body = {"status": "rejected", "reason": polled.reason}
            case _:
                body = {"status": polled.state}
        return Json(body, headers=headers)

    # ---- the socket ----------------------------------------------------------------------------------------

    async def connect(self, websocket: WebSocket) -> None:
        """One session of a worker."""
        worker = websocket.path_params["worker"]
        try:
            admitted = await self._admits(websocket, worker)
        except FaultError as error:
            await deny(websocket, error.fault)
            return
        if self._dispatcher.handing_over:
            await deny(websocket, Fault("overloaded", "This replica is being drained; ask another one."))
            return
        if not admitted:
            await deny(websocket, Fault("unauthorized", "The worker token is missing or not good."))
            return
        if SUBPROTOCOL not in websocket.scope.get("subprotocols", ()):
            await deny(websocket, Fault("invalid_request", f"Ask for the WebSocket subprotocol {SUBPROTOCOL}."))
            return
        await websocket.accept(subprotocol=SUBPROTOCOL)
        session = StudioSession(
            websocket,
            worker,
            self._dispatcher.attempts,
            Admission(
                lambda token: self.registrations.admits_now(worker, token), lambda: self.registrations.knows(worker)
            ),
            self._sources,
            _absolute(websocket),
            self.settings,
            entered=lambda: self._sessions.__setitem__(worker, session),
        )
        put_out = "The worker is not admitted any more."
        try:
            with self._doors.hold(worker, lambda: session.close("worker_deleted", put_out)):
                await session.run()
        finally:
            if self._sessions.get(worker) is session:
                del self._sessions[worker]

    async def _admits(self, connection: Request | WebSocket, worker: str) -> bool:
        token = bearer(connection.headers.get("authorization", ""))
        return bool(token) and await self.registrations.admits_now(worker, token)

    # ---- files ---------------------------------------------------------------------------------------------

    async def complete(self, request: Request) -> Response:
        """A result that is a file. Of several replicas a worker's session is at one, and its uploads come to any."""
        worker, job = request.path_params["worker"], request.path_params["job"]
        if not await self._admits(request, worker):
            return fault_response(Fault("unauthorized", "The worker token is missing or not good."))
        session = self._sessions.get(worker)
        if (session is None or session.jobs.given(job) is None) and is_safe_id(job):
            if (answer := await self._answered_elsewhere(request, worker, job)) is not None:
                return answer
        return await self.take(request, worker, job)

    async def take(self, request: Request, worker: str, job: str) -> Response:
        """A result that is a file, of an admitted worker, judged by the sessions that are here. Raises FaultError."""
        session = self._sessions.get(worker)
        if session is None or not is_safe_id(job):
            raise refuse("conflict", "The job is not claimed by this worker.", "jobId")
        return await receive(request, session.jobs, session.upload_idle_s, job, self._blobs)

    async def _answered_elsewhere(self, request: Request, worker: str, job: str) -> Response | None:
        """What the replica answers that offered the job to this worker; None when no other one has."""
        record = await self._dispatcher.get(job, None)
        if record is None:
            return None
        upload = Upload(request, worker, job, form_bytes(record.kind, self._blobs), self.settings.upload_idle_s)
        return await self._dispatcher.attempts.elsewhere.upload(record, upload)


async def _asked(request: Request) -> _Request:
    """The body of a request to register. Raises FaultError."""
    try:
        asked = msgspec.convert(await read_json(request, REGISTER_BYTES), _Request)
    except msgspec.ValidationError as error:
        raise refuse("invalid_parameter", f"The body is wrong: {error}.") from None
    if not is_safe_id(asked.install_id):
        raise refuse("invalid_parameter", "installId: Expected an id, a UUID for example.", "installId")
    return asked


def _models(said: Capabilities) -> list[str]:
    names = {*said.supported_models, *(name for some in said.supported_models_per_kind.values() for name in some)}
    return sorted(name[:200] for name in names)[: min(100, MAX_MODELS)]


def _absolute(websocket: WebSocket) -> Callable[[str], str]:
    """Makes signed URLs of ours absolute, below the base under which the worker itself has come."""
    url = websocket.url
    scheme = "https" if url.scheme == "wss" else "http"
    base = f"{scheme}://{url.netloc}{url.path.rpartition('/workers/')[0]}/blobs"
    return lambda url: base + url.removeprefix(BLOBS) if url.startswith(BLOBS) else url
