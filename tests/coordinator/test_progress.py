"""The latest progress of jobs that are polled."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio
from trio.testing import wait_all_tasks_blocked

from coordinator.progress import ProgressBoard
from coordinator.records import JobEnded, JobEvent, JobProgress, JobRecord
from protocol.faults import refuse

RECORD = JobRecord(id="j", kind="video", model="m", state="succeeded", tenant="t", attempt=1, created_ms=0, params=b"")


class Watched:
    """A dispatcher of one job, whose events the test sends; no job at all without them."""

    def __init__(self, events: trio.MemoryReceiveChannel[JobEvent] | None) -> None:
        self._events = events

    @asynccontextmanager
    async def watch(self, _job: str) -> AsyncIterator[Any]:
        if self._events is None:
            raise refuse("not_found", "No such job.")
        yield self._events


async def test_percentages_from_the_submission_to_the_end() -> None:
    send, receive = trio.open_memory_channel[JobEvent](10)
    board: Any = ProgressBoard(Watched(receive))  # type: ignore[arg-type]
    async with trio.open_nursery() as nursery:
        nursery.start_soon(board.run)
        await wait_all_tasks_blocked()
        board.follow("j")
        board.follow("j")
        for event, percent in (
            (JobProgress(1, 4), 25),
            (JobProgress(2), 25),
            (JobProgress(9, 4), 99),
            (JobProgress(0, 0), 99),
        ):
            await send.send(event)
            await wait_all_tasks_blocked()
            assert board.percent("j") == percent
        await send.send(JobEnded(RECORD))
        await wait_all_tasks_blocked()
        assert board.percent("j") == 0
        nursery.cancel_scope.cancel()


async def test_a_job_that_is_gone_is_no_trouble() -> None:
    board: Any = ProgressBoard(Watched(None))  # type: ignore[arg-type]
    board.follow("before the start")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(board.run)
        await wait_all_tasks_blocked()
        board.follow("j")
        await wait_all_tasks_blocked()
        assert board.percent("j") == 0
        nursery.cancel_scope.cancel()
