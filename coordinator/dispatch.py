"""The dispatcher: takes submissions, gives them to workers, tells watchers how they go.

The store row is the truth; what is held in memory here only makes it fast.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import msgspec

from coordinator.records import JobEvent, JobRecord, ServedModel, Submission, WorkerView

if TYPE_CHECKING:
    from coordinator.blobs import Blobs
    from coordinator.bus import Bus
    from coordinator.store import Store


class DispatchSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Tunables, in seconds unless named otherwise."""

    worker_grace_s: float = 4.0
    startup_grace_s: float = 10.0
    retention_s: float = 86_400.0
    max_queued: int = 10_000


class Dispatcher:
    """See the module. Everything is called on the event loop; nothing here is thread-safe."""

    def __init__(
        self, store: Store, blobs: Blobs, bus: Bus | None = None, settings: DispatchSettings | None = None
    ) -> None:
        raise NotImplementedError

    async def run(self) -> None:
        """Dispatch, sweep and reconcile until cancelled."""
        raise NotImplementedError

    async def submit(self, s: Submission) -> JobRecord:
        """Queue a job; the same idempotency key returns the first job.

        Raises:
            FaultError: model_not_found, no_worker, unsupported, overloaded, payload_too_large, conflict.
        """
        raise NotImplementedError

    @asynccontextmanager
    async def submit_and_watch(self, s: Submission) -> AsyncIterator[tuple[JobRecord, AsyncIterator[JobEvent]]]:
        """Submit with the watcher registered before the row is committed, so that no event is lost.

        The events end with `JobEnded`; FaultError(overloaded) when the reader of a stream fell too far behind.
        """
        raise NotImplementedError
        yield

    @asynccontextmanager
    async def watch(self, job_id: str) -> AsyncIterator[AsyncIterator[JobEvent]]:
        """Events of a job from now on, ending with `JobEnded`; FaultError(not_found) for an unknown job."""
        raise NotImplementedError
        yield

    async def get(self, job_id: str, tenant: str) -> JobRecord | None:
        """The row, when it belongs to the tenant."""
        raise NotImplementedError

    async def list(self, tenant: str, limit: int, state: str | None = None) -> list[JobRecord]:
        """Newest first, without params and result."""
        raise NotImplementedError

    async def cancel(self, job_id: str, tenant: str, reason: str) -> JobRecord | None:
        """Cancel; returns the row as it is afterwards (unchanged when it had ended before), None when unknown."""
        raise NotImplementedError

    def models(self) -> list[ServedModel]:
        """Models of all connected workers, by name."""
        raise NotImplementedError

    def workers(self) -> list[WorkerView]:
        """All connected workers."""
        raise NotImplementedError

    def stop_accepting(self) -> None:
        """From now on `submit` answers 503; jobs that are queued or running go on."""
        raise NotImplementedError
