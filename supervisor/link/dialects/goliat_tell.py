"""What the dashboard is told while a study runs: bounded, batched, a few times a second, never in the way of the study.

Lines go in batches with a sequence number; of what is a state (a progress bar) only the newest is told. While the
dashboard is away both wait here; lines beyond `MOST_LINES` push out the oldest, and how many were lost is told as a
line. How a study ended comes after everything that was said before it: a progress message behind it would make the
dashboard believe that the study runs again.
"""

from __future__ import annotations

import collections
import logging
from collections.abc import Awaitable, Callable

import trio

from supervisor.link.dialects.goliat_http import Trouble
from supervisor.link.dialects.goliat_wire import Message, batch, state_of, status
from supervisor.link.reconnect import Backoff

log = logging.getLogger(__name__)

EVERY_S = 0.2  # five a second: what the dashboard's authors allow
MOST_LINES = 2000
BATCH_LINES = 100
MOST_STATES = 64  # a study that makes up names for its stages must not fill our memory


class _Last:
    def __init__(self, message: Message) -> None:
        self.message = message
        self.done = trio.Event()
        self.trouble: Trouble | None = None


class Teller:
    """See the module. It outlives sessions; `run` is called in each.

    Args:
        send: tells the dashboard one message. Raises Trouble.
        utc: seconds since the epoch.
        every_s: shortest time between two messages.
    """

    def __init__(
        self,
        send: Callable[[Message], Awaitable[None]],
        *,
        utc: Callable[[], float],
        every_s: float = EVERY_S,
        backoff: Callable[[], Backoff] = Backoff,
    ) -> None:
        self._send, self._utc, self._every_s, self._backoff = send, utc, every_s, backoff
        self._lines: collections.deque[Message] = collections.deque()
        self._lost = 0
        self._batch: Message | None = None  # with its number, until the dashboard has it
        self._sequence = 0
        self._states: dict[str, Message] = {}
        self._lasts: collections.deque[_Last] = collections.deque()
        self._lines_turn = True
        self._bell = trio.Event()

    @property
    def waiting(self) -> int:
        """Lines that the dashboard does not have."""
        return len(self._lines) + (len(self._batch.get("logs", "1")) if self._batch else 0)

    def add(self, message: Message) -> None:
        """Tell this when its turn comes. Never blocks."""
        if state := state_of(message):
            if state in self._states or len(self._states) < MOST_STATES:
                self._states[state] = message
        else:
            self._lines.append(message)
            if len(self._lines) > MOST_LINES:
                self._lines.popleft()
                self._lost += 1
        self._bell.set()

    def lost(self, count: int) -> None:
        """So many lines were lost before they came here."""
        self._lost += count
        self._bell.set()

    async def last(self, message: Message) -> Trouble | None:
        """Tell this after everything that waits now; return when the dashboard has it.

        Returns:
            What it was refused with, when it was refused for good.

        Cancellation: it is not told any more, unless it is just under way.
        """
        last = _Last(message)
        self._lasts.append(last)
        self._bell.set()
        try:
            await last.done.wait()
        finally:
            if last in self._lasts:
                self._lasts.remove(last)
        return last.trouble

    async def run(self) -> None:
        """Tell what waits, until cancelled."""
        backoff = self._backoff()
        while True:
            message, gone = self._next()
            if message is None:
                self._bell = trio.Event()
                await self._bell.wait()
                continue
            try:
                await self._send(message)
            except Trouble as trouble:
                if trouble.again:
                    log.debug("kept for later: %s", trouble)
                    await trio.sleep(max(self._every_s, trouble.retry_after_s, backoff.pause_s()))
                    continue
                log.warning("a message of type %s is given up: %s", message["type"], trouble)
                gone(trouble)
            else:
                backoff = self._backoff()
                gone(None)
            await trio.sleep(self._every_s)

    def _next(self) -> tuple[Message | None, Callable[[Trouble | None], None]]:
        """What is to be told now, and what to call when that is over. Lines and states take turns."""
        self._fill()
        lines = self._batch is not None and (self._lines_turn or not self._states)
        if lines:
            return self._batch, self._batch_gone
        if self._states:
            name = next(iter(self._states))
            message = self._states[name]
            return message, lambda _trouble: self._state_gone(name, message)
        if self._lasts:
            last = self._lasts[0]
            return last.message, lambda trouble: self._last_gone(last, trouble)
        return None, lambda _trouble: None

    def _fill(self) -> None:
        if self._batch is not None or not (self._lines or self._lost):
            return
        logs = []
        if self._lost:
            logs.append(status(f"{self._lost} lines were left out here.", "warning", self._utc()))
            self._lost = 0
        while self._lines and self._lines[0]["type"] == "status" and len(logs) < BATCH_LINES:
            logs.append(self._lines.popleft())
        if not logs:  # what is no line goes alone, in its place between them
            self._batch = self._lines.popleft()
            return
        self._sequence += 1
        self._batch = batch(logs, self._sequence)

    def _batch_gone(self, _trouble: Trouble | None) -> None:
        self._batch = None
        self._lines_turn = False

    def _state_gone(self, name: str, message: Message) -> None:
        self._lines_turn = True
        if self._states.get(name) is message:  # else a newer one came meanwhile, and is told next
            del self._states[name]

    def _last_gone(self, last: _Last, trouble: Trouble | None) -> None:
        last.trouble = trouble
        last.done.set()
