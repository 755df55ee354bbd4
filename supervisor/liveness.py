"""Whether the supervisor makes progress, and the watchdog that is fed only when it does.

Theory of operation. A timer that pings the service manager proves that a timer runs. Here the ping is the end of a
chain: each watched part has to show life within its limit, in one of two ways. A *pulse* is beaten by a task that
comes round by itself (a loop with a bounded wait). A *probe* is asked: an async function that makes a round trip
through the part and returns; parts that may rightly sleep for hours are watched so. The trio loop itself is watched
by the fact that nothing of this runs while it is blocked.

As long as all are alive, `Liveness.run` sends WATCHDOG=1 in half the time that the service manager allows. When one
is not, it says which in the log and sends nothing, and systemd ends us with SIGABRT and starts another. Where
nobody watches (a terminal, macOS), the log still tells.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Awaitable, Callable

import trio

from supervisor.service import Service

log = logging.getLogger(__name__)

# Without a service manager that watches: as if it allowed this long.
UNWATCHED_S = 30.0
# A part that slept while the whole box was busy is not dead: no limit is shorter than this.
SHORTEST_LIMIT_S = 1.0
# `systemctl status` is for people: no more often than this.
STATUS_EVERY_S = 1.0
# Probes come round this many times within a limit, so that one slow answer costs nothing.
_ROUNDS = 3


class Pulse:
    """One watched task's sign of life. Made by `Liveness` only."""

    def __init__(self, name: str, limit_s: float) -> None:
        self.name, self.limit_s = name, limit_s
        self._latest = -math.inf
        self._from = math.inf  # watched from the first check on: before it nothing had to beat

    def beat(self) -> None:
        """The task has come round. Costs nothing; call it as often as you like."""
        self._latest = trio.current_time()

    def silent_s(self, now: float) -> float:
        """Seconds since the latest beat; since `now` of the first question when there was none."""
        if self._from == math.inf:
            self._from = now
        return now - max(self._latest, self._from)


class Liveness:
    """Watches parts of the supervisor and feeds the service manager's watchdog while all of them live.

    Args:
        service: whom to tell.
        status: the sentence for `systemctl status`, asked once a second.
    """

    def __init__(self, service: Service, status: Callable[[], str] | None = None) -> None:
        self._service = service
        self._status = status
        self._allowed_s = service.watchdog_s or UNWATCHED_S
        self._pulses: dict[str, Pulse] = {}
        self._probes: dict[str, tuple[Pulse, Callable[[], Awaitable[object]]]] = {}
        self._dead: set[str] = set()

    # ---- what is watched

    def pulse(self, name: str, limit_s: float | None = None) -> Pulse:
        """Watch a task that beats at least every `limit_s` (by default: the service manager's patience)."""
        self._pulses[name] = Pulse(name, self._limit(limit_s))
        return self._pulses[name]

    def probe(self, name: str, answers: Callable[[], Awaitable[object]], limit_s: float | None = None) -> None:
        """Watch a part that has to answer: `answers` makes a round trip through it and returns.

        It is called before `run` is, or by its first check; an exception that it raises ends `run`.
        """
        self._probes[name] = (self.pulse(name, limit_s), answers)

    def forget(self, name: str) -> None:
        """Stop watching a part that has ended in order."""
        self._pulses.pop(name, None)
        self._probes.pop(name, None)
        self._dead.discard(name)

    def _limit(self, limit_s: float | None) -> float:
        return max(self._allowed_s if limit_s is None else limit_s, SHORTEST_LIMIT_S)

    # ---- the tasks

    async def run(self) -> None:
        """Watch until cancelled. Keep it running through a drain: the service manager watches that, too."""
        async with trio.open_nursery() as nursery:
            for name in list(self._probes):
                nursery.start_soon(self._ask, name)
            if self._status is not None:
                nursery.start_soon(self._tell, self._status)
            while True:
                if not self.silent():
                    self._service.alive()
                await trio.sleep(self._allowed_s / 2)

    def silent(self) -> list[str]:
        """Names of the parts that have shown no life within their limit; changes are logged."""
        now = trio.current_time()
        dead = {name for name, pulse in self._pulses.items() if pulse.silent_s(now) > pulse.limit_s}
        for name in sorted(dead - self._dead):
            log.critical(
                "%s shows no life for %.0f s: the watchdog is not fed any more", name, self._pulses[name].silent_s(now)
            )
        for name in sorted(self._dead - dead):
            log.warning("%s shows life again", name)
        self._dead = dead
        return sorted(dead)

    async def _ask(self, name: str) -> None:
        """Ask one probe again and again; one that does not come back is never asked a second time meanwhile."""
        while name in self._probes:
            pulse, answers = self._probes[name]
            await answers()
            pulse.beat()
            await trio.sleep(pulse.limit_s / _ROUNDS)

    async def _tell(self, sentence: Callable[[], str]) -> None:
        while True:
            self._service.status(sentence())
            await trio.sleep(STATUS_EVERY_S)
