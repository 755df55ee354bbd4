"""What a store forgets when it is told to, and what is left: see `sql_forget`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import msgspec

from protocol.faults import Fault

WORDS = "Its words were deleted with the job's content, as this tenant keeps none."


class Forgotten(msgspec.Struct, frozen=True):
    """A job without content from now on, and the input blobs that belonged to it alone."""

    job: str
    blobs: tuple[str, ...]


def bare(fault: Fault) -> Fault:
    """A fault without what it may quote: its sentence, and its evidence."""
    return Fault(fault.code, WORDS, fault.field, fault.retryable)


class Forgets(Protocol):
    """The part of a store that forgets; each function is one transaction."""

    def forget(self, jobs: Sequence[str]) -> list[Forgotten]:
        """Take the content out of those of these jobs that have ended and belong to no open batch. One that was
        forgotten before is left out."""

    def forgettable(self, jobs: Sequence[str]) -> list[str]:
        """Those of these jobs that `forget` would change."""

    def unforgotten(self, tenants: Sequence[str], ended_ms: int, before_ms: int, limit: int = 500) -> list[str]:
        """Jobs of these tenants that ended between the two instants and still have their content, oldest first."""

    def left_behind(self, tenants: Sequence[str], ended_ms: int, limit: int = 500) -> list[str]:
        """Jobs of these tenants that were cancelled after `ended_ms`, because their clients were gone or otherwise,
        while a connection was to bring the answer: there is nothing to deliver, to nobody. Oldest first."""

    def batch_jobs(self, batch_id: str, tenant: str) -> list[str]:
        """The jobs that a batch has made and that still have their content."""

    def forget_batch(self, batch_id: str) -> bool:
        """Take the words out of the errors of a batch that has ended; whether there were any."""

    def settle(self) -> bool:
        """Take what was deleted out of the store's own journal, where it has one in a file; False: not yet."""
