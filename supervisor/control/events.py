"""What happened, numbered, for those who follow: a bounded ring, fed by comparing what is shown now with what was.

Theory of operation. Whoever changes something that is shown calls `look`, which costs nothing and may be called as
often as it likes. One task wakes then, takes a snapshot, and writes down what differs from the last one. Between two
looks it rests for `REST_S`, and for `SHARE` times what the last look took if that is longer: thousands of changes a
second cost a look each tenth of one. What came and went between two looks is not told, and of jobs no more than
jobs_seen.MOST_CHANGES one by one.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from typing import Any, NamedTuple

import msgspec
import trio

from supervisor.control.exchange import KEEP_ALIVE
from supervisor.control.follow import BOOT, Cursor, numbered, or_quiet
from supervisor.control.jobs_seen import Changes
from supervisor.control.snapshot import GpuView, ModelView, Snapshot

log = logging.getLogger(__name__)

SIZE = 2000
REST_S = 0.1
SHARE = 50.0  # a look may take a fiftieth of the time
PULSE_S = 1.0  # between two glances at what nobody calls `look` for
FAREWELL_S = 0.5  # for those who follow to take the last events, at the end of this life
BATCH = 100  # events in one piece of a stream, which a slow client must take in time

Told = tuple[str, dict[str, Any]]


class Event(NamedTuple):
    """One event; `body` has its data, without the number."""

    number: int
    kind: str
    body: msgspec.Raw


class Missed(NamedTuple):
    """Events that a reader cannot have any more; `events` is None when nobody knows how many."""

    events: int | None
    oldest: int


class Batch(NamedTuple):
    """What a reader gets next, and where it goes on after that."""

    missed: Missed | None
    events: list[Event]
    cursor: Cursor


class Events:
    """See the module. Lives on the trio thread.

    Args:
        snapshot: everything at this moment.
        jobs: attempts that changed since it was called last.
        watched: what is shown and changes without a call of `look`; must cost next to nothing.
        now: seconds since the epoch.
        cost: a clock, in seconds, that tells what a look took.
    """

    def __init__(
        self,
        snapshot: Callable[[], Snapshot],
        jobs: Callable[[], Changes] = Changes,
        *,
        watched: Callable[[], object] = lambda: None,
        size: int = SIZE,
        boot: str = BOOT,
        now: Callable[[], float] = time.time,
        cost: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._snapshot, self._jobs, self._watched, self._now, self._cost = snapshot, jobs, watched, now, cost
        self._ring: deque[Event] = deque(maxlen=size)
        self._last = 0
        self._added = trio.Event()
        self._woken = trio.Event()
        self._before: Snapshot | None = None
        self._over = False
        self._readers = 0
        self._left = trio.Event()
        self.boot = boot

    # ---- writing

    def look(self) -> None:
        """Something changed: look soon."""
        self._woken.set()

    def add(self, kind: str, data: Mapping[str, Any]) -> None:
        """Write one event down."""
        self._last += 1
        body = msgspec.Raw(msgspec.json.encode({"at": self._now(), **data}))
        self._ring.append(Event(self._last, kind, body))
        self._added.set()

    async def run(self) -> None:
        """Write down what changes. Runs until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._glance)
            self.look()
            while True:
                await self._woken.wait()
                self._woken = trio.Event()
                began = self._cost()
                self._compare()
                await trio.sleep(max(REST_S, SHARE * (self._cost() - began)))

    async def _glance(self) -> None:
        before = self._watched()
        while True:
            await trio.sleep(PULSE_S)
            if (now := self._watched()) != before:
                before = now
                self.look()

    def _compare(self) -> None:
        try:
            before, self._before = self._before, self._snapshot()
            told = differences(before, self._before) if before is not None else first(self._before)
            for kind, data in itertools.chain(told, _of_jobs(self._jobs())):
                self.add(kind, data)
        except Exception:  # a mistake in what is shown must not end a worker that has jobs
            log.exception("what changed could not be told")

    async def end(self, reason: str) -> None:
        """Write the last events of this life; returns when those who follow have them, or after `FAREWELL_S`.

        Cancellation: at once; those who have not taken them miss them.
        """
        self._compare()
        self.add("ended", {"reason": reason})
        self._over = True
        with trio.move_on_after(FAREWELL_S):
            while self._readers:
                self._left = trio.Event()
                await self._left.wait()

    # ---- reading

    @property
    def last(self) -> int:
        """Number of the latest event; 0 when there was none."""
        return self._last

    @property
    def oldest(self) -> int:
        """Number of the oldest one that is kept; one more than `last` when there is none."""
        return self._last - len(self._ring) + 1

    def take(self, cursor: Cursor, most: int = BATCH) -> Batch:
        """What comes after `cursor`, the oldest first, and what of it is lost."""
        missed = None
        after = cursor.after
        if cursor.lost or after + 1 < self.oldest:
            missed = Missed(None if cursor.lost else self.oldest - 1 - after, self.oldest)
            after = self.oldest - 1
        start = after + 1 - self.oldest
        found = list(itertools.islice(self._ring, start, start + most))
        return Batch(missed, found, Cursor(after + len(found)))

    async def wait_after(self, number: int) -> None:
        """Return when there is an event after `number`.

        Cancellation: nothing is lost.
        """
        while self._last <= number:
            if self._added.is_set():  # never replaced while somebody waits on it
                self._added = trio.Event()
            await self._added.wait()
        await trio.lowlevel.checkpoint()

    async def stream(self, cursor: Cursor, *, hello: bool = False) -> AsyncIterator[bytes]:
        """The pieces of an event stream, to the end of this life.

        Args:
            cursor: where the reader goes on.
            hello: begin with an event that says where that is.
        """
        self._readers += 1
        try:
            if hello:
                yield numbered("hello", {"boot": self.boot, "oldest": self.oldest}, cursor.after, self.boot)
            while True:
                missed, events, cursor = self.take(cursor)
                parts = [numbered(one.kind, one.body, one.number, self.boot) for one in events]
                if missed is not None:
                    gap = {"missed": missed.events, "oldest": missed.oldest}
                    parts.insert(0, numbered("gap", gap, missed.oldest - 1, self.boot))
                if parts:
                    yield b"".join(parts)
                elif self._over:
                    return
                elif not await or_quiet(self.wait_after(cursor.after)):
                    yield KEEP_ALIVE
        finally:
            self._readers -= 1
            self._left.set()


# ---- what differs. Pure.


def first(seen: Snapshot) -> Iterator[Told]:
    """What is told of the first snapshot of a life."""
    yield "started", {"version": seen.version, "worker": seen.worker, "pid": seen.pid}
    yield "status", _status(seen)


def differences(before: Snapshot, after: Snapshot) -> Iterator[Told]:
    """What is told when this followed that; causes before what follows from them."""
    if before.link != after.link:
        yield "link", {"connected": after.link.connected, "url": after.link.url, "reason": after.link.reason}
    holds = set(after.holds)
    for hold in before.holds:
        if hold not in holds and all(hold.key != other.key for other in holds):
            yield "hold", {"change": "lifted", **msgspec.to_builtins(hold)}
    for hold in after.holds:
        if hold not in before.holds:
            yield "hold", {"change": "put", **msgspec.to_builtins(hold)}
    yield from _of_gpus(before.gpus, after.gpus)
    yield from _of_incidents(before, after)
    yield from _of_models(before.models, after.models)
    if (then := _status(before)) != (now := _status(after)):
        yield "status", {**now, "before": then["state"]}


def _status(seen: Snapshot) -> dict[str, Any]:
    return {"state": seen.state, "why": seen.why, "draining": seen.draining}


def _of_models(before: tuple[ModelView, ...], after: tuple[ModelView, ...]) -> Iterator[Told]:
    were, are = ({model.name: model for model in models} for models in (before, after))
    for name in were.keys() - are.keys():
        yield "model", {"model": name, "before": were[name].state, "state": "gone"}
    for name, model in are.items():
        old = were.get(name)
        if old is None or (old.state, old.reason, old.waits) != (model.state, model.reason, model.waits):
            said = {"reason": model.reason, "waits": model.waits}
            yield "model", {"model": name, "before": old.state if old else "", "state": model.state, **said}


def _of_gpus(before: tuple[GpuView, ...], after: tuple[GpuView, ...]) -> Iterator[Told]:
    were, are = ({gpu.uuid: gpu for gpu in gpus} for gpus in (before, after))
    for uuid in were.keys() - are.keys():
        yield "gpu", {"gpu": uuid, "name": were[uuid].name, "change": "gone"}
    for uuid, gpu in are.items():
        old = were.get(uuid)
        if old is None or (old.fault, old.tainted) != (gpu.fault, gpu.tainted):
            change = "seen" if old is None else "faulty" if gpu.fault else "tainted" if gpu.tainted else "well"
            yield "gpu", {"gpu": uuid, "name": gpu.name, "change": change, "fault": gpu.fault, "tainted": gpu.tainted}


def _of_incidents(before: Snapshot, after: Snapshot) -> Iterator[Told]:
    """The newest stand first; a snapshot shows only so many."""
    known = set(before.incidents)
    for incident in reversed(after.incidents):
        if incident not in known:
            yield "incident", msgspec.to_builtins(incident)


def _of_jobs(changes: Changes) -> Iterator[Told]:
    for job in changes.jobs:
        yield "job", msgspec.to_builtins(job)
    if changes.more:
        yield "jobs", {"more": changes.more}
