"""The coordinator as one ASGI application: parts wired together, routes, layers, lifetime.

RequestIds ► CountRequests ► Starlette(Access ► routes)
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import anyio
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route, WebSocketRoute
from starlette.types import ASGIApp

from coordinator import admin_api, jobs_api, logs_api, lots_api, metrics, registrations_api, workers_api
from coordinator.access import Access, AccessLayer, worker_scope
from coordinator.batches import Batches
from coordinator.blobs.base import Blobs
from coordinator.blobs.folder import FolderBlobs
from coordinator.blobs.opening import BLOB_FOLDER
from coordinator.blobs.routes import blob_routes
from coordinator.dashboard.feed import Feed
from coordinator.dashboard.look import Look
from coordinator.dashboard.routes import Dashboard
from coordinator.dashboard.sessions import Sessions
from coordinator.deliveries import Deliveries
from coordinator.deploy import api as deployments_api
from coordinator.deploy.deployer import Deployer
from coordinator.dispatch import Dispatcher
from coordinator.dispatch_settings import DispatchSettings
from coordinator.doors import Doors
from coordinator.enrol_api import enrol_routes
from coordinator.enrolments import Enrolments
from coordinator.errors import EXCEPTION_HANDLERS, Json, RequestIds
from coordinator.gateway import worker_endpoint
from coordinator.kept_files import KeptFiles
from coordinator.keys import Keys
from coordinator.limits import Rates
from coordinator.metrics import CountRequests, HttpCounters
from coordinator.openai.routes import ROUTES as OPENAI_ROUTES
from coordinator.privacy import Privacy, PrivacySettings
from coordinator.progress import ProgressBoard
from coordinator.records import WorkerScope
from coordinator.register import FILE_NAME, Register, SqliteRegister
from coordinator.register.known import Known
from coordinator.registrations import Registrations
from coordinator.replicas.replicas import Directory, Replicas
from coordinator.services import Limits, Services, services
from coordinator.store import SqliteStore, StoreError
from coordinator.store.opening import STORE_FILE
from coordinator.store.threads import StoreThreads
from coordinator.studio.claims import Sources
from coordinator.studio.routes import Studio
from coordinator.studio.session import StudioSettings
from coordinator.tenants import Tenants
from coordinator.terms import terms
from coordinator.usage import api as usage_api
from coordinator.vitals import Vitals
from protocol.faults import Fault, FaultError

if TYPE_CHECKING:
    from coordinator.replicas.opening import Doorway
    from coordinator.store import Store

log = logging.getLogger(__name__)

LAST_WORDS_S = 1.0  # how long requests that are being cancelled may still talk to the dispatcher


class Coordinator:
    """All parts of one coordinator over one state folder, and its application.

    Attributes:
        app: the ASGI application; its lifespan runs the dispatcher.
        parts: what the routes use.
        state: the folder.
        on_death: called once when the dispatcher fails; the server then ends.
    """

    def __init__(
        self,
        state: Path,
        limits: Limits | None = None,
        studio_models: Sources | None = None,
        studio: StudioSettings | None = None,
        open_store: Callable[[], Store] | None = None,
        open_register: Callable[[], Register] | None = None,
        open_blobs: Callable[[], Blobs] | None = None,
        undelivered_s: float = PrivacySettings().undelivered_s,
        doorway: Doorway | None = None,
        settings: DispatchSettings | None = None,
    ) -> None:
        """Open everything.

        Args:
            state: the folder of everything that outlives a run.
            limits: tunables of the HTTP half.
            studio_models: where studio workers get their models' files, by model name.
            studio: tunables of sessions with studio workers.
            open_store: opens the store that is used; without it, a SQLite file in the folder.
            open_register: opens the register of keys, likewise.
            open_blobs: opens the store of files; without it, a folder in the folder.
            undelivered_s: see `PrivacySettings`.
            doorway: where the other replicas over the same database reach this one; without it, it is alone.
            settings: tunables of the dispatcher.

        Raises:
            StoreError, OSError.
        """
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        self.state = state
        self.on_death: Callable[[], None] = lambda: None
        self._dispatching: anyio.CancelScope | None = None
        self._store: Store = open_store() if open_store is not None else SqliteStore(state / STORE_FILE)
        _leave_unattended(self._store)
        try:
            register = open_register() if open_register is not None else SqliteRegister(state / FILE_NAME)
            self._known = Known(register)
            self._known.refresh()
            blobs = open_blobs() if open_blobs is not None else FolderBlobs(state / BLOB_FOLDER)
        except BaseException:
            self._store.close()
            raise
        self.replicas = _replicas(self._store, doorway)
        self.keys = Keys(self._known)
        self._doors = Doors(self.keys.lives)
        sessions = Sessions(self._store, self.keys)
        self.parts = self._parts(blobs, limits or Limits(), sessions, settings)
        self.feed = Feed(self.parts.look)
        self.dashboard = Dashboard(sessions, self.feed)
        self.privacy = self._privacy(undelivered_s)
        workers = self._worker_routes(studio_models, studio)
        self.app = Deliveries(build_app(self.parts, workers, self._lifetime), self.privacy.delivered)

    def _parts(self, blobs: Blobs, limits: Limits, sessions: Sessions, settings: DispatchSettings | None) -> Services:
        """What the routes use, over the open store and register."""
        dispatcher = Dispatcher(self._store, blobs, self.replicas, settings)
        if self.replicas is not None:
            self.replicas.attach(dispatcher.attempts)
        tenants, look = Tenants(self._known), Look(self._store)
        dispatcher.terms = terms(self._known, tenants)
        files = KeptFiles(self._store, blobs)
        rates = Rates(time.monotonic, lambda: self._known.replicas)
        parts = Services(
            dispatcher,
            blobs,
            self.keys,
            HttpCounters(),
            ProgressBoard(dispatcher),
            limits,
            Registrations(self._known),
            files,
            Batches(self._store, dispatcher, blobs, files),
            tenants,
            Access(self.keys, tenants, rates, self._doors, sessions),
            look,
        )
        look.parts = parts
        parts.vitals = Vitals(self._store, self.state)
        parts.deployer = _deployer(dispatcher, self._store)
        return parts

    def _worker_routes(self, models: Sources | None, studio: StudioSettings | None) -> list[BaseRoute]:
        """By which workers come, in whatever protocol, and the dashboard's."""
        parts = self.parts
        doors = Doors(parts.registrations.knows)
        self._known.on_change += [self._doors.look, doors.look]
        workers = Studio(parts.dispatcher, parts.blobs, parts.registrations, models, studio, doors)
        if self.replicas is not None:
            self.replicas.uploaded = workers.take
        return [
            WebSocketRoute("/v1/worker", worker_endpoint(parts.dispatcher, self._authenticate, doors=self._doors)),
            *enrol_routes(Enrolments(self._known), parts.registrations),
            *workers.routes(),
            *self.dashboard.routes(),
        ]

    def _privacy(self, undelivered_s: float) -> Privacy:
        known, parts = self._known, self.parts
        privacy = Privacy(
            self._store,
            parts.blobs,
            parts.files,
            parts.dispatcher.attempts.kept,
            lambda: [tenant.name for tenant in known.tenants.values() if not tenant.store_content],
            PrivacySettings(undelivered_s=undelivered_s),
        )
        parts.batches.on_end = privacy.look
        return privacy

    def close(self) -> None:
        """Close the files; for a coordinator whose application never ran."""
        try:
            self._known.register.close()
        finally:
            self._store.close()

    async def hand_over(self) -> None:
        """Take no new jobs; with other replicas there, send the workers to them, with what they hold.

        Streams whose clients hang here go on: the workers' tokens come by way of their new replica.
        """
        self.parts.dispatcher.stop_accepting()
        if self.replicas is not None and self.replicas.peers:
            await self.parts.dispatcher.hand_over()

    def stop_dispatching(self) -> None:
        """End the dispatcher: requests that wait for a job are answered 503, streams end with an error event."""
        self.feed.end()
        if self._dispatching is not None:
            self._dispatching.cancel()

    async def _authenticate(self, token: str) -> WorkerScope | None:
        return await worker_scope(self.keys, token)

    @asynccontextmanager
    async def _lifetime(self, _app: Starlette) -> AsyncIterator[None]:
        parts = self.parts
        running = [self._known.watch, self._dispatch, parts.progress.run, parts.batches.run, self.privacy.run]
        running += [self.feed.run, parts.deployer.run]
        if self.replicas is not None:
            running.append(self.replicas.run)
        try:
            async with anyio.create_task_group() as group:
                for part in running:
                    group.start_soon(self._kept, part)
                yield
                with anyio.move_on_after(LAST_WORDS_S):
                    await parts.http.wait_idle()
                group.cancel_scope.cancel()
        finally:
            self.close()

    async def _kept(self, part: Callable[[], Awaitable[None]]) -> None:
        """Run a part; when it fails, the coordinator ends, because it would be something else without it."""
        try:
            await part()
        except Exception:
            log.exception("A part of the coordinator failed; the coordinator ends.")
            self.parts.alive = False
            self.on_death()

    async def _dispatch(self) -> None:
        with anyio.CancelScope() as self._dispatching:
            await self.parts.dispatcher.run()


def _deployer(dispatcher: Dispatcher, store: Store) -> Deployer:
    """Sees to deployments, and tells the dispatcher what their models are called."""
    deployer = Deployer(store, StoreThreads(), dispatcher.attempts.fleet, workers_api.give)
    dispatcher.model_of, dispatcher.name_of = deployer.model_of, deployer.name_of
    return deployer


def _replicas(store: Store, doorway: Doorway | None) -> Replicas | None:
    if doorway is None:
        return None
    if not isinstance(store, Directory):
        raise StoreError("replica: Replicas share a PostgreSQL database; this store is another one.")
    return Replicas(store, doorway)


def _leave_unattended(store: Store) -> None:
    """Jobs whose clients hung on a process that died: to run them now would be for nobody."""
    fault = Fault("cancelled", "The coordinator was restarted while the client waited.")
    try:
        left = store.leave_unattended(fault)
    except (StoreError, FaultError) as error:  # a full disk: they run for nobody, then
        log.warning("Jobs whose clients are gone stay in the queue: %s", error)
        return
    if left:
        log.info("Cancelled %d jobs whose clients are gone with the connections of an earlier life", len(left))


def build_app(
    parts: Services,
    workers: list[BaseRoute],
    lifespan: Callable[[Starlette], object] | None = None,
) -> ASGIApp:
    """The application over given parts.

    Args:
        parts: what the routes use.
        workers: routes by which workers come, in whatever protocol, and others that bring their own parts.
        lifespan: async context manager around the serving.
    """
    routes: list[BaseRoute] = [
        Route("/healthz", health, methods=["GET"]),
        *metrics.ROUTES,
        *OPENAI_ROUTES,
        *lots_api.ROUTES,
        *jobs_api.ROUTES,
        *workers_api.ROUTES,
        *deployments_api.ROUTES,
        *registrations_api.ROUTES,
        *usage_api.ROUTES,
        *logs_api.ROUTES,
        *admin_api.ROUTES,
        *blob_routes(parts.blobs, parts.dispatcher.wants_output),
        *workers,
    ]
    app = Starlette(
        routes=routes,
        exception_handlers=EXCEPTION_HANDLERS,
        middleware=[Middleware(AccessLayer, access=parts.access)],
        lifespan=lifespan,  # type: ignore[arg-type]
    )
    app.router.redirect_slashes = False
    app.state.services = parts
    return RequestIds(CountRequests(app, parts.http))


async def health(request: Request) -> Response:
    """200 while jobs are taken or drained, 503 when the dispatcher has failed, or other replicas shall be asked."""
    parts = services(request)
    if not parts.alive:
        return Json({"status": "failed"}, status_code=503)
    handing_over = parts.dispatcher.handing_over
    status = "ok" if parts.dispatcher.accepting else "draining"
    return Json({"status": status}, status_code=503 if handing_over else 200)
