"""Events of jobs from who learns of them to who watches them.

A bus has three methods, so that a bus between replicas can take the place of this one. Publishing never waits:
a watcher that falls behind loses its subscription's buffer, is told so, and nobody else notices.
"""

from __future__ import annotations

from collections import deque
from types import TracebackType
from typing import NamedTuple, Protocol

import anyio

from coordinator.records import JobChunk, JobEvent, JobProgress

MAX_EVENTS = 4096  # a minute of a fast stream
MAX_BYTES = 16 * 2**20


class Lagged(Exception):
    """The subscriber was too slow: events were lost."""


class BusClosed(Exception):
    """The bus was closed: no event will come any more."""


class Whence(NamedTuple):
    """Where an event of a job comes from, and who waits for it: what a bus between replicas goes by.

    Attributes:
        attempt: of the job.
        origin: the replica that the job's client asked.
    """

    attempt: int = 0
    origin: str = ""


HERE = Whence()


class Subscription:
    """Events of one topic from now on; use as a context manager."""

    def __init__(self, bus: LocalBus, topic: str, max_events: int, max_bytes: int) -> None:
        self._bus, self._topic = bus, topic
        self._max_events, self._max_bytes = max_events, max_bytes
        self._events: deque[JobEvent] = deque()
        self._bytes = 0
        self._lagged = self._closed = False
        self._wake = anyio.Event()

    async def receive(self) -> JobEvent:
        """The next event.

        Raises:
            Lagged: events were lost; raised once, after that events from then on come again.
            BusClosed: the bus was closed.

        Cancellation: no event is lost.
        """
        while not self._events and not self._lagged and not self._closed:
            self._wake = anyio.Event()
            await self._wake.wait()
        if self._events and not self._lagged:
            event = self._events.popleft()
            self._bytes -= _size(event)
            return event
        if self._lagged:
            self._lagged = False
            raise Lagged
        raise BusClosed

    def put(self, event: JobEvent) -> None:
        """Queue an event; for the bus."""
        if self._lagged:
            return
        full = len(self._events) >= self._max_events or self._bytes + _size(event) > self._max_bytes
        if full and isinstance(event, JobProgress):
            return
        if full:
            self._lagged = True
            self._events.clear()
            self._bytes = 0
        else:
            self._events.append(event)
            self._bytes += _size(event)
        self._wake.set()

    def end(self) -> None:
        """The bus closes; for the bus."""
        self._closed = True
        self._wake.set()

    def __enter__(self) -> Subscription:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bus.forget(self._topic, self)


class Bus(Protocol):
    """What the coordinator needs of a bus."""

    def publish(self, topic: str, event: JobEvent, whence: Whence = HERE) -> None:
        """Hand the event to all that subscribe to the topic now. Never waits."""

    def subscribe(self, topic: str, *, everywhere: bool = False) -> Subscription:
        """Events from the moment of this call on; `everywhere`: the job may have come in at another replica."""

    def close(self) -> None:
        """End all subscriptions with BusClosed."""


class LocalBus:
    """The bus within one process. Not thread-safe: everything happens on the event loop."""

    def __init__(self, max_events: int = MAX_EVENTS, max_bytes: int = MAX_BYTES) -> None:
        self._limits = (max_events, max_bytes)
        self._topics: dict[str, list[Subscription]] = {}
        self._closed = False

    def publish(self, topic: str, event: JobEvent, whence: Whence = HERE) -> None:
        """Hand the event to all that subscribe to the topic now. Never waits."""
        for subscription in self._topics.get(topic, ()):
            subscription.put(event)

    def subscribe(self, topic: str, *, everywhere: bool = False) -> Subscription:
        """Events from the moment of this call on."""
        subscription = Subscription(self, topic, *self._limits)
        if self._closed:
            subscription.end()
        else:
            self._topics.setdefault(topic, []).append(subscription)
        return subscription

    def watched(self, topic: str) -> bool:
        """Whether anybody subscribes to the topic."""
        return topic in self._topics

    def topics(self) -> list[str]:
        """All topics that somebody subscribes to."""
        return list(self._topics)

    def forget(self, topic: str, subscription: Subscription) -> None:
        """End one subscription; for the subscription itself."""
        remaining = [other for other in self._topics.get(topic, ()) if other is not subscription]
        if remaining:
            self._topics[topic] = remaining
        else:
            self._topics.pop(topic, None)

    def close(self) -> None:
        """End all subscriptions with BusClosed."""
        self._closed = True
        for subscriptions in self._topics.values():
            for subscription in subscriptions:
                subscription.end()


def _size(event: JobEvent) -> int:
    return len(event.data) + 64 if isinstance(event, JobChunk) else 64
