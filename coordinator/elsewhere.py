"""What a coordinator wants of the other replicas, where there are any."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from coordinator.fleet import Key
from coordinator.kept_lines import Lines


class Reach(NamedTuple):
    """How the other replicas are reached.

    Attributes:
        known: those that live, by the database.
        connected: those of them that are told of tokens as they come.
        dropped: frames that found no place on their way, since the start of this one.
    """

    known: int
    connected: int
    dropped: int


class Elsewhere(Protocol):
    """The other replicas. No method that tells waits, and none is sure: the rows tell them later, too."""

    def stop(self, gateway: str, key: Key, reason: str) -> None:
        """A replica holds an attempt that its row went on without."""

    def joined(self, worker: str) -> None:
        """A worker has connected here."""

    def reach(self) -> Reach | None:
        """How they are reached; None where there can be none."""

    async def lines(self, job: str, worker: str, limit: int) -> tuple[list[Lines], list[str]]:
        """What workers' logs said of a job there, and the names of those that did not answer in time."""


class Nobody:
    """There are no other replicas."""

    def stop(self, gateway: str, key: Key, reason: str) -> None:
        """Nothing to do."""

    def joined(self, worker: str) -> None:
        """Nothing to do."""

    def reach(self) -> Reach | None:
        """There can be none."""
        return None

    async def lines(self, job: str, worker: str, limit: int) -> tuple[list[Lines], list[str]]:
        """Nobody to ask."""
        return [], []
