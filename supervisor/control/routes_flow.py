"""Routes that go on: events and the log, from where the reader was, for as long as it reads."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Annotated, Literal

import msgspec
import trio
from msgspec import Meta

from supervisor.control.exchange import KEEP_ALIVE, Answer, Handler, Refused, Request, Stream, query, reply
from supervisor.control.follow import BOOT, Cursor, cursor, numbered, or_quiet, wanted
from supervisor.control.surface import Surface
from supervisor.observe.ring import SIZE, Entry, Ring

# A line a millisecond must not cost a search of the whole ring each.
REST_S = 0.1
BATCH = 200  # lines in one piece of a stream, which a slow client must take in time


class _Since(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    since: str = ""


class _Logs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    since: str = ""
    level: Literal["", "debug", "info", "warning", "error", "critical"] = ""
    q: Annotated[str, Meta(max_length=200)] = ""
    job: Annotated[str, Meta(max_length=200)] = ""
    limit: Annotated[int, Meta(ge=1, le=SIZE)] | None = None
    follow: Literal[0, 1] = 0


class _Dropped(msgspec.Struct, frozen=True):
    """Lines that a reader cannot have any more; `lines` is None when they are of an earlier life."""

    lines: int | None
    oldest: int


def _events(request: Request, surface: Surface) -> Answer:
    since = wanted(request, query(request, _Since).since)
    events = surface.events
    if events is None:
        raise Refused(503, "This supervisor keeps no events.")
    start = cursor(since, events.last, events.boot) if since else Cursor(events.last)
    return Stream(events.stream(start, hello=not since))


def _logs(request: Request, surface: Surface) -> Answer:
    asked = query(request, _Logs)
    ring = surface.lines
    if ring is None:
        raise Refused(503, "This supervisor keeps no log.")
    since, last = wanted(request, asked.since), ring.last
    start = cursor(since, last, BOOT) if since else None
    if asked.follow:
        return Stream(follow(ring, asked, start, last))
    dropped = _dropped(ring, start)
    found = _found(ring, asked, start.after if start else 0, last)
    return reply({"boot": BOOT, "last": last, "dropped": dropped, "lines": _latest(found, asked.limit)})


async def follow(ring: Ring, asked: _Logs, start: Cursor | None, last: int) -> AsyncIterator[bytes]:
    """The pieces of a stream of log lines: "line" for each, and "dropped" for those that went before it was read.

    Args:
        start: where the reader goes on. One that does not say so gets the latest `limit` lines first, or none; its
            first event, "hello", has the id from which it could go on.
        last: number of the latest line when the reader asked.
    """
    after = start.after if start else 0 if asked.limit else last
    found = _latest(_found(ring, asked, after, last), asked.limit)
    if start is None:
        yield numbered("hello", {"boot": BOOT, "oldest": ring.oldest}, found[0].seq - 1 if found else last, BOOT)
    dropped = _dropped(ring, start)
    while True:
        if dropped:
            yield numbered("dropped", dropped, dropped.oldest - 1, BOOT)
        for batch in range(0, len(found), BATCH):
            yield b"".join(numbered("line", entry, entry.seq, BOOT) for entry in found[batch : batch + BATCH])
        while not await or_quiet(ring.wait_after(last)):
            yield KEEP_ALIVE
        await trio.sleep(REST_S)
        here, last = Cursor(last), ring.last
        dropped = _dropped(ring, here)
        found = _found(ring, asked, here.after, last)


def _found(ring: Ring, asked: _Logs, after: int, last: int) -> list[Entry]:
    """Lines up to `last`: what comes meanwhile, from other threads, is for the next time."""
    entries = ring.since(after, level=asked.level, query=asked.q, job=asked.job)
    return [entry for entry in entries if entry.seq <= last]


def _latest(entries: list[Entry], limit: int | None) -> list[Entry]:
    return entries if limit is None else entries[max(0, len(entries) - limit) :]


def _dropped(ring: Ring, start: Cursor | None) -> _Dropped | None:
    """What there was after `start` and is not kept any more."""
    oldest = ring.oldest
    if start is None or (not start.lost and start.after + 1 >= oldest):
        return None
    return _Dropped(None if start.lost else oldest - 1 - start.after, oldest)


FLOW: dict[str, dict[str, Handler]] = {
    "/v1/events": {"GET": _events},
    "/v1/logs": {"GET": _logs},
}
