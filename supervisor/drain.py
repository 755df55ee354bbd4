"""The end of this life: who asked for it and why, and how long what runs still has."""

from __future__ import annotations

import time
from collections.abc import Callable

import trio


class Drain:
    """Asked for once; later reasons change nothing.

    Args:
        patience_s: how long running jobs have, when it is asked for.

    Attributes:
        asked: set by `ask`.
        reason: "" before.
        until: when patience ends, in seconds since the epoch; None before.
        restart: the end asks to be started again.
        hurried: cancelled when the owner wants no more patience.
        on_ask: called once.
    """

    def __init__(self, patience_s: Callable[[], float]) -> None:
        self._patience_s = patience_s
        self.asked = trio.Event()
        self.reason = ""
        self.until: float | None = None
        self.restart = False
        self.hurried = trio.CancelScope()
        self.on_ask: Callable[[], None] = lambda: None

    def ask(self, reason: str, restart: bool = False) -> None:
        """Begin it."""
        if self.asked.is_set():
            return
        self.reason, self.restart = reason, restart
        self.until = time.time() + self._patience_s()
        self.asked.set()
        self.on_ask()

    @property
    def ending(self) -> bool | None:
        """None before it, else whether it ends in a new start."""
        return self.restart if self.asked.is_set() else None
