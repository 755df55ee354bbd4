"""What a dashboard needs of a store: every tenant's jobs in pages, what waits for what, and browsers' sessions."""

from __future__ import annotations

from typing import Protocol

import msgspec

from coordinator.records import JobRecord


class QueueLoad(msgspec.Struct, frozen=True, kw_only=True):
    """One kind of one model.

    Attributes:
        running: jobs that a worker has, or has been offered.
        oldest_ms: when the oldest that waits was made; 0 when none waits.
    """

    kind: str
    model: str
    waiting: int = 0
    running: int = 0
    oldest_ms: int = 0


class JobFilter(msgspec.Struct, frozen=True, kw_only=True):
    """Which jobs are wanted; an empty field takes all. `state` is one of `JobState`."""

    state: str = ""
    model: str = ""
    tenant: str = ""
    worker: str = ""


class Watch(Protocol):
    """The part of a store that a dashboard asks. A session is known by hashes alone, as keys are."""

    def jobs_of_all(self, wanted: JobFilter, limit: int, before: str = "") -> list[JobRecord]:
        """Newest first, those that are older than the job `before`, without params and result."""

    def load(self) -> list[QueueLoad]:
        """What waits and runs now, over all tenants."""

    def add_session(self, hashed: bytes, key: bytes, keep_ms: int) -> None:
        """Open a session of the key whose secret has the hash `key`; those whose time has passed are forgotten."""

    def session(self, hashed: bytes) -> bytes | None:
        """The hash of the key of a session whose time has not passed."""

    def end_session(self, hashed: bytes) -> None:
        """Forget a session."""
