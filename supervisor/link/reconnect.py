"""When to try the coordinator again: for ever, with growing, jittered pauses.

A laptop that slept through ten pauses must not wake as a dead worker, so there is no last try. A coordinator
that welcomes and then drops must not be hit every second, so only a session that stayed well for `stable_s`
brings the pause back to its beginning. Without jitter a restarted coordinator would meet all its workers at once.
A coordinator that is drained sends its workers to the others: that is no failure, and streams wait, so it costs little.
A machine that has slept is mostly somewhere else, or has another network: what failed before says nothing then, and
the pause is over.
"""

from __future__ import annotations

import logging
import random
from collections.abc import Awaitable, Callable

import trio

from supervisor.link.session import SessionEnd, Why
from supervisor.suspend import Clocks, SleepWatch

log = logging.getLogger(__name__)

FIRST_S = 1.0
LAST_S = 64.0
STABLE_S = 30.0
SLEEP_LOOK_S = 5.0
SENT_ON_S = 0.5  # the longest pause before another replica is asked; the workers of a drained one come spread over it
SENT_ON_AFTER_S = 5.0  # a shorter session than that is a failure, however it ended


class Backoff:
    """The one pause policy of the supervisor.

    Args:
        first_s, last_s: shortest and longest pause before jitter, which takes away up to half of it.
        stable_s: a span at least this long was well, and forgets the failures before it.
        chance: returns a number in [0, 1).
    """

    def __init__(
        self,
        first_s: float = FIRST_S,
        last_s: float = LAST_S,
        stable_s: float = STABLE_S,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._first_s, self._last_s, self._stable_s = first_s, last_s, stable_s
        self._chance = chance
        self._failures = 0

    def pause_s(self, lasted_s: float = 0.0) -> float:
        """Return the pause after a span that lasted `lasted_s`, and count it as a failure."""
        if lasted_s >= self._stable_s:
            self._failures = 0
        whole: float = min(self._last_s, self._first_s * 2.0 ** min(self._failures, 32))
        self._failures += 1
        return whole * (0.5 + 0.5 * self._chance())

    def moment_s(self) -> float:
        """The pause of one who was sent on; no failure."""
        return SENT_ON_S * self._chance()

    def forget(self) -> None:
        """What failed until now says nothing about the next try."""
        self._failures = 0


async def keep_link(
    converse: Callable[[], Awaitable[SessionEnd]], backoff: Backoff, clocks: Clocks | None = None
) -> SessionEnd:
    """Hold one session after another; return only when the coordinator refused this worker for good.

    Args:
        converse: one session, until it ends.
        backoff: the pauses between them.
        clocks: by which a sleep of the machine is noticed; the system's unless told.

    Cancellation: ends the current session, or the pause.
    """
    while True:
        end = await _conversed(converse)
        if end.final:
            return end
        sent_on = end.sent_on and end.lasted_s >= SENT_ON_AFTER_S
        pause_s = backoff.moment_s() if sent_on else backoff.pause_s(end.lasted_s)
        log.warning("%s; trying again in %.1f s", end.sentence, pause_s)
        if await _slept_during(pause_s, clocks):
            log.info("the machine slept; trying again now")
            backoff.forget()


async def _conversed(converse: Callable[[], Awaitable[SessionEnd]]) -> SessionEnd:
    """One session. A mistake of ours that a coordinator's words meet costs that session, and not the supervisor."""
    began = trio.current_time()
    try:
        return await converse()
    except Exception as error:
        log.exception("a session ended by a mistake of this program")
        sentence = f"a mistake of this program ended the session ({type(error).__name__})"
        return SessionEnd(Why.LOST, sentence, trio.current_time() - began)


async def _slept_during(pause_s: float, clocks: Clocks | None) -> bool:
    """Wait; True, and sooner, when the machine slept meanwhile."""
    slept: list[float] = []
    async with trio.open_nursery() as nursery:

        def woke(seconds: float) -> None:
            slept.append(seconds)
            nursery.cancel_scope.cancel()

        nursery.start_soon(SleepWatch(woke, clocks=clocks, interval_s=SLEEP_LOOK_S).run)
        await trio.sleep(pause_s)
        nursery.cancel_scope.cancel()
    return bool(slept)
