"""Tries suspect and quarantined GPUs until they are fit again: the active half of `gpu_health`."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable

import psutil  # type: ignore[import-untyped]
import trio

from supervisor.machine.gpu import try_gpu
from supervisor.machine.gpu_health import GpuHealth

log = logging.getLogger(__name__)

LOOK_S = 5.0  # between looks at processes that cannot be killed

Try = Callable[[str], Awaitable[tuple[str, int]]]


def still_there(pids: Iterable[int]) -> set[int]:
    """Those of these processes that have not ended; a zombie has."""
    found = set()
    for pid in pids:
        try:
            if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
                found.add(pid)
        except psutil.NoSuchProcess:
            continue
    return found


class GpuTrials:
    """One task that runs the trials that are due, one at a time.

    Args:
        attempt: `gpu.try_gpu`, or a fake; (uuid) -> (why it failed or "", pid that got stuck or 0).
    """

    def __init__(self, health: GpuHealth, attempt: Try = try_gpu) -> None:
        self._health, self._attempt = health, attempt
        self._bell = trio.Event()

    def wake(self) -> None:
        """Something changed: look again. Give it to `GpuHealth` as `on_change`."""
        self._bell.set()

    async def run(self) -> None:
        """Try what is due until cancelled. Cancellation: a trial's child is ended and reaped."""
        while True:
            self._bell = trio.Event()
            stuck = self._health.stuck()
            if gone := stuck - still_there(stuck):
                self._health.note_gone(gone)
            for uuid in self._health.due():
                error, pid = await self._attempt(uuid)
                log.warning("trial of GPU %s: %s", uuid, error or "passed")
                self._health.tried(uuid, error, pid)
            patience = self._health.next_due() - trio.current_time()
            if self._health.stuck():
                patience = min(patience, LOOK_S)
            with trio.move_on_after(max(0.0, patience)):
                await self._bell.wait()
