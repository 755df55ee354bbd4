"""One try after the other to move a file over HTTP, and what its failures mean; every dialect's delivery is made of it.

Delivery is tried apart from computing: one bad answer of a proxy must not cost a job its GPU time.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Awaitable, Callable, Collection
from typing import TYPE_CHECKING, TypeVar

import trio

from protocol.faults import Fault, FaultError, refuse
from supervisor.link.reconnect import Backoff
from supervisor.link.web import Web, is_packed

if TYPE_CHECKING:
    import httpx

PIECE_BYTES = 2**20
AGAIN = (408, 425, 429)  # besides what a server says of its own failures

_Value = TypeVar("_Value")
# Told of bytes as they move, those of tries that failed too: a link is paid for by what went over it.
Moved = Callable[[int], None]


def nobody(_count: int) -> None:
    """Counts nothing."""


class Transient(Exception):
    """Worth another try."""


async def persist(
    web: Web, once: Callable[[], Awaitable[_Value]], code: str, backoff: Backoff, patience_s: float
) -> _Value:
    """Do it once more, with pauses, for as long as its troubles may pass.

    Args:
        web: whose client `once` uses.
        code: of the fault when the address is none.

    Raises:
        Transient: the last trouble, when the next try would be later than `patience_s` from now.
        FaultError: from `once`; worker_disk_full, worker_failed for an OSError of it; `code`.

    Cancellation: at any moment.
    """
    await web.client()  # imports httpx in a thread, so that the line below costs nothing
    import httpx

    until = trio.current_time() + patience_s
    while True:
        try:
            return await once()
        except Transient as error:
            last = error
        except (httpx.RequestError, httpx.StreamError) as error:
            last = Transient(f"{type(error).__name__}: {error}")
        except (httpx.InvalidURL, ValueError) as error:
            raise refuse(code, f"The address of a file is none: {error}.") from None
        except OSError as error:
            raise unusable(error) from None
        pause_s = backoff.pause_s()
        if trio.current_time() + pause_s >= until:
            raise last
        await trio.sleep(pause_s)


async def outlast(once: Callable[[], Awaitable[None]], present_since: Callable[[], float], patience_s: float) -> None:
    """Do it once more whenever its patience ran out while the other side was away: nobody was there to take it.

    Args:
        once: tries for `patience_s`, and raises FaultError then, or at once for what cannot pass.
        present_since: since when the other side is there, in trio time; inf while it is not.

    Raises:
        FaultError: from `once`.

    Cancellation: at any moment.
    """
    while True:
        begun = trio.current_time()
        try:
            return await once()
        except FaultError:
            ran_out = trio.current_time() - begun >= patience_s / 2  # the last pause is not begun any more
            if not ran_out or present_since() <= begun:
                raise


def patience(most_s: float, until: float | None) -> float:
    """Seconds to try for: at most this long, and not past `until` in trio time."""
    return most_s if until is None else max(0.0, min(most_s, until - trio.current_time()))


def unusable(error: OSError) -> FaultError:
    """What an error of a file here means to the job."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return refuse("worker_disk_full", f"The worker's disk is full: {error.strerror}.")
    return refuse("worker_failed", f"A file of the job cannot be used: {error}.")


def judge(status: int, code: str, sentence: str, again: Collection[int] = AGAIN) -> None:
    """Accept a status below 300. Raises Transient, FaultError."""
    if status < 300:
        return
    if status >= 500 or status in again:
        raise Transient(f"HTTP {status}")
    # Too large will be too large for every worker: running the job again would only cost its GPU time again.
    retryable = False if status == 413 else None
    raise FaultError(Fault(code, f"{sentence}: HTTP {status}.", retryable=retryable))


async def pour(
    response: httpx.Response, fd: int, most_bytes: int, moved: Moved, seen: Callable[[bytes], object]
) -> int:
    """Write the body of a response to `fd`, which is closed; returns its size.

    Args:
        most_bytes: the rest is left when it is longer; what is returned then is more than this.
        seen: called with each piece.

    Raises:
        OSError: it cannot be written.
        httpx.HTTPError: the connection broke.
        Transient: it is compressed.
    """
    if is_packed(response):
        os.close(fd)
        raise Transient("it came compressed, though nobody asked for that")
    size, trouble = 0, None
    async with trio.wrap_file(os.fdopen(fd, "wb")) as out:
        # httpx iterates by generators within generators, which only end well from inside: so no `break`, no error
        # and no cancellation may happen between two pieces.
        with trio.CancelScope() as enough:
            async for piece in response.aiter_raw(PIECE_BYTES):
                size += len(piece)
                moved(len(piece))
                seen(piece)
                if size <= most_bytes and trouble is None:
                    with trio.CancelScope(shield=True):
                        try:
                            await out.write(piece)
                        except OSError as error:
                            trouble = error
                if trouble or size > most_bytes:
                    enough.cancel()
    if trouble:
        raise trouble
    return size
