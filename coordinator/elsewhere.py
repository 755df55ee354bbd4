"""What a coordinator wants of the other replicas, where there are any."""

from __future__ import annotations

from typing import NamedTuple, Protocol

from coordinator.fleet import Key


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
    """The other replicas. No method waits, and none that tells is sure: the rows tell them later, too."""

    def stop(self, gateway: str, key: Key, reason: str) -> None:
        """A replica holds an attempt that its row went on without."""

    def joined(self, worker: str) -> None:
        """A worker has connected here."""

    def reach(self) -> Reach | None:
        """How they are reached; None where there can be none."""


class Nobody:
    """There are no other replicas."""

    def stop(self, gateway: str, key: Key, reason: str) -> None:
        """Nothing to do."""

    def joined(self, worker: str) -> None:
        """Nothing to do."""

    def reach(self) -> Reach | None:
        """There can be none."""
        return None
