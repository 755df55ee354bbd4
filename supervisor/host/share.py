"""A fair share of the loop for whoever works through what a pipe had ready."""

from __future__ import annotations

import time

import trio

SHARE_S = 0.002


class Share:
    """Counts how long its owner has held the loop. A pipe full of small pieces would keep everybody else waiting."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    async def give_way(self) -> None:
        """Let the others have their turn when ours has lasted `SHARE_S`; call it after each piece."""
        if time.perf_counter() - self._began > SHARE_S:
            await trio.lowlevel.checkpoint()
            self._began = time.perf_counter()
