"""One look at the coordinator: everything that the dashboard shows without asking."""

from __future__ import annotations

import importlib.metadata
import time
from typing import TYPE_CHECKING

import anyio

from coordinator.dashboard import view
from coordinator.deploy.api import view as deployment
from coordinator.records import JobRecord
from coordinator.store.threads import StoreThreads
from coordinator.store.watch import JobFilter

if TYPE_CHECKING:
    from coordinator.dashboard.feed import Picture
    from coordinator.services import Services
    from coordinator.store import Store

PENDING_S = 2.0  # between two looks at who asks to be let in
DEPLOYMENTS_S = 2.0  # between two looks at them: each asks of every worker why not
_NEWEST = JobFilter()


class Look:
    """Calling it takes the picture. The parts are handed in later, because they know this one."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._threads = StoreThreads(readers=1)
        self._workers = view.WorkerRows()
        self._pending: view.Rows = {}
        self._pending_at = float("-inf")
        self._deployments: view.Rows = {}
        self._deployments_at = float("-inf")
        self._began_ms = int(time.time() * 1000)
        self.parts: Services | None = None

    async def jobs(self, wanted: JobFilter, limit: int, before: str = "") -> list[JobRecord]:
        """Jobs of all tenants, newest first. Raises StoreError."""
        return await self._threads.read(self._store.jobs_of_all, wanted, limit, before)

    async def job(self, job_id: str) -> JobRecord | None:
        """A job of whatever tenant. Raises StoreError."""
        return await self._threads.read(self._store.get, job_id)

    async def __call__(self) -> Picture:
        """All sections by name. Raises StoreError."""
        parts = self.parts
        assert parts is not None
        fleet = parts.dispatcher.attempts.fleet
        known = fleet.all_workers()
        now = anyio.current_time()
        loads = await self._threads.read(self._store.load)
        jobs = await self.jobs(_NEWEST, view.MOST_JOBS)
        if now >= self._pending_at + PENDING_S:
            found = await self._threads.read(parts.registrations.list, "pending")
            self._pending, self._pending_at = view.pending(found), now
        if now >= self._deployments_at + DEPLOYMENTS_S:
            self._deployments = await self._threads.read(self._deployed)
            self._deployments_at = anyio.current_time()
        workers = self._workers(known.values(), now)
        return {
            "head": {"": self._head(parts, len(known), sum(load.waiting for load in loads))},
            "workers": workers,
            "queues": view.queues(loads, fleet, now),
            "deployments": self._deployments,
            "jobs": view.jobs(jobs),
            "pending": self._pending,
            "trouble": view.trouble(await parts.vitals.sampled()) if parts.vitals is not None else {},
        }

    def _deployed(self) -> view.Rows:
        """On a thread of readers."""
        found = self._store.deployments()
        if not found:
            return {}
        placements, candidates, now_ms = self._store.placements(), self._store.candidates(), self._store.now_ms()
        return view.deployments(deployment(one, placements, candidates, now_ms) for one in found)

    def _head(self, parts: Services, workers: int, waiting: int) -> view.Row:
        state = "failed" if not parts.alive else "ok" if parts.dispatcher.accepting else "draining"
        return {
            "state": state,
            "version": _version(),
            "began_ms": self._began_ms,
            "workers": workers,
            "workers_shown": min(workers, view.MOST_WORKERS),
            "waiting": waiting,
        }


def _version() -> str:
    try:
        return importlib.metadata.version("bulkhead-worker")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"
