"""Samples are shared, kept for a while, and never wait for a store that hangs."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, cast

import anyio
import pytest

from coordinator import vitals
from coordinator.store import Store, StoreError
from coordinator.store.vitals import StoreVitals
from coordinator.vitals import Sample, Vitals

FINE = StoreVitals(waiting=(), batches={}, usage_pending=0, gauges={})


class FakeStore:
    """Counts how often it is asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.begun = threading.Event()
        self.wait: threading.Event | None = None
        self.away = False

    def vitals(self) -> StoreVitals:
        self.asked += 1
        self.begun.set()
        if self.wait is not None:
            self.wait.wait(60)
        if self.away:
            raise StoreError("Away.")
        return FINE


def over(store: FakeStore, folder: Path, **options: Any) -> Vitals:
    return Vitals(cast("Store", store), folder, **options)


async def test_those_who_ask_at_once_share_one_look(tmp_path: Path) -> None:
    store = FakeStore()
    them = over(store, tmp_path, fresh_s=3600.0)
    found: list[Sample] = []

    async def ask() -> None:
        found.append(await them.sampled())

    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(ask)
    assert store.asked == 1
    assert len(found) == 3
    assert all(one.store is FINE for one in found)
    assert found[0].disk_free_bytes


async def test_a_store_that_is_away_is_told(tmp_path: Path) -> None:
    store = FakeStore()
    store.away = True
    sample = await over(store, tmp_path / "nowhere").sampled()
    assert sample.store is None
    assert sample.disk_free_bytes is None


async def test_a_store_that_hangs_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vitals, "PATIENCE_S", 0.05)
    store = FakeStore()
    store.wait = threading.Event()
    them = over(store, tmp_path, fresh_s=0.0)
    try:
        assert (await them.sampled()).store is None
        assert (await them.sampled()).store is None
        assert await anyio.to_thread.run_sync(store.begun.wait, 60)  # its thread may begin later than the patience ends
        assert store.asked == 1
    finally:
        store.wait.set()
