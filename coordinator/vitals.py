"""Gauges that cost a look at the store or the disk: taken at most every few seconds, however often they are asked for.

A scrape never waits long for them. When the store does not answer, it is told so, and the page has everything else.
"""

from __future__ import annotations

import logging
import shutil
import time
from pathlib import Path

import anyio
import msgspec
from anyio.to_thread import run_sync

from coordinator.store import Store, StoreError
from coordinator.store.vitals import StoreVitals
from protocol.faults import FaultError

log = logging.getLogger(__name__)

FRESH_S = 5.0
PATIENCE_S = 3.0


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """How things were at one moment.

    Attributes:
        store: None while it does not answer.
        disk_free_bytes: of the state folder's disk; None where it cannot be told.
        took_s: how long the look took.
    """

    store: StoreVitals | None = None
    disk_free_bytes: int | None = None
    took_s: float = 0.0


class Vitals:
    """Takes samples; everything is called on the event loop."""

    def __init__(self, store: Store, state: Path, fresh_s: float = FRESH_S) -> None:
        self._store, self._state, self._fresh_s = store, state, fresh_s
        self._last = Sample()
        self._until = float("-inf")
        self._turn = anyio.Lock()
        self._one = anyio.CapacityLimiter(1)

    async def sampled(self) -> Sample:
        """The last sample, or a new one when that is too old. Those who ask at once share it.

        Cancellation: a look that has begun is left to its thread.
        """
        async with self._turn:
            if anyio.current_time() >= self._until:
                self._last = await self._look()
                self._until = anyio.current_time() + self._fresh_s
            return self._last

    async def _look(self) -> Sample:
        if self._one.borrowed_tokens:  # the one before still hangs: another thread would only hang beside it
            return Sample()
        sample = Sample()
        with anyio.move_on_after(PATIENCE_S):
            sample = await run_sync(self._taken, limiter=self._one, abandon_on_cancel=True)
        return sample

    def _taken(self) -> Sample:
        began = time.monotonic()
        store: StoreVitals | None = None
        try:
            store = self._store.vitals()
        except (StoreError, FaultError) as error:
            log.warning("The store does not say how it is: %s", error)
        try:
            free = shutil.disk_usage(self._state).free
        except OSError:
            free = None
        return Sample(store=store, disk_free_bytes=free, took_s=time.monotonic() - began)
