"""The latest progress of jobs that somebody polls: `GET /v1/videos/{id}` shows a percentage.

Progress is an event, not a row: it is kept here, in memory, from the submission to the end of the job. After a
restart of the coordinator a running video shows 0 until the end.
"""

from __future__ import annotations

import logging

import anyio
from anyio.abc import TaskGroup

from coordinator.dispatch import Dispatcher
from coordinator.records import JobEnded, JobProgress
from coordinator.store import StoreError
from protocol.faults import FaultError

log = logging.getLogger(__name__)

CANCEL_S = 5.0  # bound on telling the dispatcher


class ProgressBoard:
    """Follows jobs in tasks of the application's own group."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self._percent: dict[str, int] = {}
        self._group: TaskGroup | None = None

    async def run(self) -> None:
        """Serve until cancelled."""
        async with anyio.create_task_group() as group:
            self._group = group
            await anyio.sleep_forever()

    def follow(self, job: str) -> None:
        """Keep the progress of this job from now on, until it ends."""
        if self._group is not None and job not in self._percent:
            self._percent[job] = 0
            self._group.start_soon(self._follow, job)

    def hold(self, job: str, tenant: str, patience_s: float) -> None:
        """Let a job wait for its model on behalf of a client that was told to come again, then cancel it.

        It is cancelled when its work begins, when `patience_s` have passed, and when this coordinator ends.
        """
        if self._group is not None:
            self._group.start_soon(self._hold, job, tenant, patience_s)

    def percent(self, job: str) -> int:
        """0 to 99 of a job that has not ended; 0 when nothing is known."""
        return self._percent.get(job, 0)

    async def _follow(self, job: str) -> None:
        try:
            async with self._dispatcher.watch(job) as events:
                async for event in events:
                    if isinstance(event, JobEnded):
                        return
                    if isinstance(event, JobProgress) and event.total:
                        self._percent[job] = max(0, min(99, event.n * 100 // event.total))
        except FaultError:
            return  # the job is gone, or this reader fell behind: only the percentage is lost
        finally:
            self._percent.pop(job, None)

    async def _hold(self, job: str, tenant: str, patience_s: float) -> None:
        try:
            with anyio.move_on_after(patience_s):
                async with self._dispatcher.watch(job) as events:
                    async for event in events:
                        if not isinstance(event, JobProgress):
                            break
        except FaultError:
            pass
        finally:
            with anyio.move_on_after(CANCEL_S, shield=True):
                await self._cancel(job, tenant)

    async def _cancel(self, job: str, tenant: str) -> None:
        try:
            await self._dispatcher.cancel(job, tenant, "its client was told to come again when the model is loaded")
        except (StoreError, FaultError) as error:  # it runs for nobody, then
            log.warning("The job %s could not be cancelled: %s", job, error)
