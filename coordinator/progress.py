"""The latest progress of jobs that somebody polls: `GET /v1/videos/{id}` shows a percentage.

Progress is an event, not a row: it is kept here, in memory, from the submission to the end of the job. After a
restart of the coordinator a running video shows 0 until the end.
"""

from __future__ import annotations

import anyio
from anyio.abc import TaskGroup

from coordinator.dispatch import Dispatcher
from coordinator.records import JobEnded, JobProgress
from protocol.faults import FaultError


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
