"""The one feed of the dashboard: a snapshot, then what has changed, built once for all who watch.

Theory of operation. As long as somebody watches, the coordinator is looked at every `tick_s`, and what differs from
the last look becomes one numbered event of bytes that every watcher is sent as it is. A watcher that was away for a
moment goes on behind the last number that it has seen; one that was away for longer, or comes from another replica,
gets the whole picture anew. A slow reader therefore costs nothing but its own delay.

    event: snapshot    {"now_ms": …, "all": {SECTION: {ID: ROW}}}
    event: change      {"now_ms": …, "set": {SECTION: {ID: ROW}}, "gone": {SECTION: [ID]}}
"""

from __future__ import annotations

import logging
import re
import secrets
import time
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio
import msgspec

from coordinator.dashboard.view import Rows
from coordinator.store import StoreError
from protocol.faults import FaultError, refuse

log = logging.getLogger(__name__)

Picture = dict[str, Rows]
TICK_S = 0.5
MOST_SHARE = 0.05  # of the event loop that looks may take: with thousands of workers they are rarer
KEPT = 240  # events, so two minutes of a lively fleet
KEPT_BYTES = 4 * 2**20
MOST_WATCHERS = 100
_ID = re.compile(r"([0-9a-f]{8})-([0-9]{1,15})", re.ASCII)


def difference(old: Picture, new: Picture) -> dict[str, Any]:
    """What makes `new` of `old`; empty when nothing does."""
    put: dict[str, Rows] = {}
    gone: dict[str, list[str]] = {}
    for section in {**old, **new}:
        before, rows = old.get(section, {}), new.get(section, {})
        if changed := {name: row for name, row in rows.items() if before.get(name) != row}:
            put[section] = changed
        if left := [name for name in before if name not in rows]:
            gone[section] = left
    return {"set": put, "gone": gone} if put or gone else {}


class Feed:
    """See the module. Everything is called on the event loop.

    Args:
        look: takes the whole picture, all of it JSON.
        tick_s: pause between two looks.
    """

    def __init__(self, look: Callable[[], Awaitable[Picture]], tick_s: float = TICK_S) -> None:
        self._look, self.tick_s = look, tick_s
        self._life = secrets.token_hex(4)  # numbers of another life, or replica, mean nothing here
        self._picture: Picture | None = None
        self._number = 0
        self._events: deque[tuple[int, bytes]] = deque()
        self._bytes = 0
        self._snapshot: tuple[int, bytes] = (-1, b"")
        self._looks = 0
        self._turn = anyio.Event()  # a look is over
        self._wanted = anyio.Event()
        self._ended = False
        self.watchers = 0
        self.built = 0  # pictures; tests count them

    async def run(self) -> None:
        """Look as long as somebody watches, until cancelled."""
        while not self._ended:
            await self._wanted.wait()
            began, spent = anyio.current_time(), time.thread_time()
            await self._look_once()
            spent = time.thread_time() - spent
            await anyio.sleep_until(began + max(self.tick_s, spent / MOST_SHARE))

    def end(self) -> None:
        """End every watcher's stream, now and later: the coordinator is going."""
        self._ended = True
        self._over()

    async def follow(self, last: str = "") -> AsyncIterator[bytes]:
        """What a watcher is sent, from behind the event `last` on; b"" whenever a tick brought nothing.

        Raises:
            FaultError: overloaded: too many watch already.
        """
        with self._watching():
            seen = self._looks
            await self._next_look(seen)
            at = self._number_of(last)
            while not self._ended:
                seen = self._looks
                piece, at = self._since(at)
                yield piece
                if self._looks == seen:
                    await self._next_look(seen)

    @contextmanager
    def _watching(self) -> Iterator[None]:
        if self.watchers >= MOST_WATCHERS:
            message = f"{MOST_WATCHERS} dashboards are open here already; close one, or ask GET /v1/workers instead."
            raise refuse("overloaded", message, retry_after_s=15)
        self.watchers += 1
        self._wanted.set()
        try:
            yield
        finally:
            self.watchers -= 1
            if not self.watchers:
                self._wanted = anyio.Event()

    async def _next_look(self, seen: int) -> None:
        while self._looks == seen and not self._ended:
            await self._turn.wait()

    async def _look_once(self) -> None:
        try:
            picture = await self._look()
        except (StoreError, FaultError, OSError) as error:
            log.warning("The dashboard could not look: %s", error)
            picture = dict(self._picture or {})
            picture["trouble"] = {"": {"message": "The store does not answer; what is shown may be old."}}
        self.built += 1
        if self._picture is None:
            self._number += 1
        elif change := difference(self._picture, picture):
            self._number += 1
            self._keep(self._event("change", change))
        self._picture = picture
        self._looks += 1
        self._over()

    def _over(self) -> None:
        self._turn.set()
        self._turn = anyio.Event()

    def _keep(self, event: bytes) -> None:
        self._events.append((self._number, event))
        self._bytes += len(event)
        while len(self._events) > KEPT or self._bytes > KEPT_BYTES:
            self._bytes -= len(self._events.popleft()[1])

    def _event(self, name: str, data: dict[str, Any]) -> bytes:
        body = msgspec.json.encode({"now_ms": int(time.time() * 1000), **data})
        return b"id: %s-%d\nevent: %s\ndata: %s\n\n" % (self._life.encode(), self._number, name.encode(), body)

    def _number_of(self, last: str) -> int:
        """The number of an event of ours, or -1."""
        found = _ID.fullmatch(last)
        return int(found[2]) if found and found[1] == self._life else -1

    def _since(self, at: int) -> tuple[bytes, int]:
        """The bytes that bring a watcher from the event `at` to now, and where it is then."""
        if at == self._number:
            return b"", at
        behind = [event for number, event in self._events if number > at]
        if at >= 0 and at <= self._number and len(behind) == self._number - at:
            return b"".join(behind), self._number
        if self._snapshot[0] != self._number:
            self._snapshot = (self._number, self._event("snapshot", {"all": self._picture}))
        return self._snapshot[1], self._number
