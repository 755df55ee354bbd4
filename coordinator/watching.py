"""What somebody who follows one job sees: its events from now on, repaired from its row, to its end."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable

import anyio

from coordinator.bus import BusClosed, Lagged, Subscription
from coordinator.records import JobChunk, JobEnded, JobEvent, JobNudge, JobRecord
from coordinator.store.base import StoreAway
from protocol.faults import refuse


async def events_of(
    record: JobRecord,
    subscription: Subscription,
    row: Callable[[], Awaitable[JobRecord]],
    repair_s: float,
    lagged: Callable[[], None],
) -> AsyncIterator[JobEvent]:
    """Events until `JobEnded`. Only `receive` waits, so nothing needs finalising when it is dropped.

    Args:
        record: the row after the subscription was made.
        subscription: to the job.
        row: reads the row.
        repair_s: after so long a silence the row is read; while the store is away, at the next one.
        lagged: called when events were lost because they were not read.

    Raises:
        FaultError: overloaded, when parts of a stream are lost, or the coordinator stops; what `row` raises.
    """
    if record.ended:
        yield JobEnded(record)
        return
    due = 0
    while True:
        event: JobEvent | None = None
        try:
            with anyio.move_on_after(repair_s):
                event = await subscription.receive()
        except Lagged:
            lagged()
            if record.stream:
                raise refuse("overloaded", "The stream was read too slowly; parts of it are lost.") from None
        except BusClosed:
            if (last := await row()).ended:
                yield JobEnded(last)
                return
            raise refuse("overloaded", "The coordinator is stopping; ask for the job again later.") from None
        if event is None or isinstance(event, JobNudge):
            # Silence, or events were dropped: the row knows whether the end was among them.
            try:
                last = await row()
            except StoreAway:
                continue  # what runs goes on meanwhile
            event = JobEnded(last, -1 if event is None else event.chunks) if last.ended else None
        if isinstance(event, JobChunk):
            if event.seq < due:
                continue  # sent again, by way of another replica
            due = event.seq + 1
        if event is not None:
            yield event
        if isinstance(event, JobEnded):
            return
