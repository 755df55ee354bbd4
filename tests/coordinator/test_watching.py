"""What somebody who follows a job sees of it."""

from __future__ import annotations

import anyio
import pytest

from coordinator.bus import LocalBus
from coordinator.records import JobChunk, JobEnded, JobEvent, JobNudge, JobRecord, JobStarted
from coordinator.store.base import StoreAway
from coordinator.watching import events_of
from protocol.faults import Fault, FaultError

RUNNING = JobRecord(
    id="job_1", kind="llm", model="m", state="running", tenant="t", attempt=1, created_ms=1, params=b"", stream=True
)
DONE = JobRecord(
    id="job_1", kind="llm", model="m", state="succeeded", tenant="t", attempt=1, created_ms=1, params=b"", stream=True
)


def chunk(seq: int) -> JobChunk:
    return JobChunk(seq, b"")


async def followed(*events: JobEvent, rows: tuple[JobRecord, ...] = (), repair_s: float = 60.0) -> list[JobEvent]:
    bus, left = LocalBus(), list(rows)

    async def row() -> JobRecord:
        return left.pop(0)

    with bus.subscribe("job_1") as subscription, anyio.fail_after(60):
        for event in events:
            bus.publish("job_1", event)
        return [event async for event in events_of(RUNNING, subscription, row, repair_s, lambda: None)]


async def test_what_comes_twice_is_seen_once_and_a_gap_is_seen() -> None:
    end = JobEnded(DONE, 4)
    seen = await followed(JobStarted(), chunk(0), chunk(1), chunk(0), chunk(1), chunk(3), end)
    assert seen == [JobStarted(), chunk(0), chunk(1), chunk(3), end]


async def test_a_nudge_is_believed_only_with_the_row() -> None:
    seen = await followed(chunk(0), JobNudge(1), chunk(1), JobNudge(2), rows=(RUNNING, DONE))
    assert seen == [chunk(0), chunk(1), JobEnded(DONE, 2)]


async def test_silence_is_repaired_from_the_row() -> None:
    assert await followed(rows=(RUNNING, DONE), repair_s=0.01) == [JobEnded(DONE, -1)]


@pytest.mark.parametrize("nudges", [0, 1])
async def test_a_store_that_is_away_ends_nobodys_stream(nudges: int) -> None:
    bus, left = LocalBus(), [None, None, RUNNING, DONE]

    async def row() -> JobRecord:
        if (found := left.pop(0)) is None:
            raise StoreAway(Fault("overloaded", "The database is away."))
        return found

    with bus.subscribe("job_1") as subscription, anyio.fail_after(60):
        for _ in range(nudges):
            bus.publish("job_1", JobNudge(3))
        events = events_of(RUNNING, subscription, row, 0.01, lambda: None)
        assert [event async for event in events] == [JobEnded(DONE, -1)]


async def test_a_stream_that_was_not_read_says_so() -> None:
    bus, lags = LocalBus(max_events=1), list[int]()

    async def row() -> JobRecord:
        return RUNNING

    with bus.subscribe("job_1") as subscription:
        for seq in range(3):
            bus.publish("job_1", chunk(seq))
        events = events_of(RUNNING, subscription, row, 60.0, lambda: lags.append(1))
        with pytest.raises(FaultError, match="too slowly"):
            await anext(events)
    assert lags == [1]
