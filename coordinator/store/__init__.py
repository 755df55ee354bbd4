"""Where jobs live: the interface (`base`) and its implementations, one module per database."""

from __future__ import annotations

from coordinator.store.base import Store, StoreBusy, StoreError, StoreTooNew
from coordinator.store.sqlite import SqliteStore

__all__ = ["SqliteStore", "Store", "StoreBusy", "StoreError", "StoreTooNew"]
