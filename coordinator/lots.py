"""Lots: many jobs that were submitted in one call, in one transaction."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

import anyio
import msgspec

from coordinator.records import JobRecord, LotRecord, Submission
from coordinator.store import Store
from coordinator.store.threads import StoreThreads
from protocol.faults import Fault, FaultError
from protocol.ids import RANDOM_BYTES, new_id

if TYPE_CHECKING:
    from coordinator.dispatch import Dispatcher


class Lots:
    """Called on the event loop, as the dispatcher is."""

    def __init__(self, dispatcher: Dispatcher, store: Store, threads: StoreThreads) -> None:
        self._dispatcher, self._store, self._threads = dispatcher, store, threads
        # Calls of one tenant that bring idempotency keys are written one after the other, here and in the store: they
        # wait here, where a call that waits takes no thread and no connection.
        self._turns: WeakValueDictionary[str, anyio.Lock] = WeakValueDictionary()

    async def submit(
        self, tenant: str, asked: Sequence[Submission | Fault]
    ) -> tuple[LotRecord, list[JobRecord | Fault]]:
        """Queue all that can be; the others are answered with their faults.

        A fault among what is asked is that of a line which was found wrong before. A known idempotency key answers with
        its job, as everywhere.

        Raises:
            FaultError: storage_full; then none was queued.
        """
        lot = new_id("lot", int(time.time() * 1000), os.urandom(RANDOM_BYTES))
        jobs: list[tuple[str, Submission]] = []
        answers: list[JobRecord | Fault | None] = []
        for one in asked:
            answer = await self._judge(one, lot, jobs)
            answers.append(answer)
        refused = sum(isinstance(answer, Fault) for answer in answers)
        record = LotRecord(id=lot, tenant=tenant, created_ms=0, total=len(asked), refused=refused)
        if any(job.idempotency_key for _, job in jobs):
            async with self._turns.setdefault(tenant, anyio.Lock()):
                record, stored = await self._store_all(record, jobs)
        else:
            record, stored = await self._store_all(record, jobs)
        results = iter(stored)
        return record, [_answer(next(results)) if answer is None else answer for answer in answers]

    async def _store_all(
        self, lot: LotRecord, jobs: Sequence[tuple[str, Submission]]
    ) -> tuple[LotRecord, list[tuple[JobRecord, bool] | Fault]]:
        with anyio.CancelScope(shield=True):  # rows that were made are made known
            record, stored = await self._threads.write(self._store.insert_lot, lot, jobs)
            self._dispatcher.queued([one[0] for one in stored if not isinstance(one, Fault) and one[1]])
        return record, stored

    async def _judge(
        self, one: Submission | Fault, lot: str, jobs: list[tuple[str, Submission]]
    ) -> JobRecord | Fault | None:
        """Add what can be queued to `jobs`; anything else is the answer of its line."""
        if isinstance(one, Fault):
            return one
        try:
            if one.idempotency_key and (known := await self._threads.read(self._store.by_key, one)):
                return known
            ready = self._dispatcher.ready(one, len(jobs))
        except FaultError as error:
            return error.fault
        name = new_id("job", int(time.time() * 1000), os.urandom(RANDOM_BYTES))
        jobs.append((name, msgspec.structs.replace(ready, lot=lot)))
        return None

    async def get(self, lot_id: str, tenant: str) -> LotRecord | None:
        """How far its jobs are; None when the tenant has no such lot."""
        return await self._threads.read(self._store.get_lot, lot_id, tenant)

    async def cancel(self, lot_id: str, tenant: str, reason: str) -> LotRecord | None:
        """Cancel all its jobs that have not ended; how they stand afterwards."""
        fault = Fault("cancelled", reason)
        for record in await self._threads.write(self._store.cancel_lot, lot_id, tenant, fault):
            self._dispatcher.attempts.stop(record, reason)
        return await self.get(lot_id, tenant)


def _answer(stored: tuple[JobRecord, bool] | Fault) -> JobRecord | Fault:
    return stored if isinstance(stored, Fault) else stored[0]
