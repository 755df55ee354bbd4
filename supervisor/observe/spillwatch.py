"""Measures each instance on a GPU once, soon after its load, and has `Spill` judge where its model lies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import trio

from supervisor.host.work import InstanceStatus
from supervisor.observe.spill import Spill, anonymous_bytes

EVERY_S = 5.0
# The GPUs are read once a second: after this the reading is of the loaded model.
SETTLED_S = 3.0


class SpillWatch:
    """See the module.

    Args:
        statuses: the instances, as the host's snapshot.
        pids: the processes of an instance, from its leader.
        told: model -> what the operator says that a load takes of each GPU; 0 where he does not.
        in_ram: see `anonymous_bytes`.
    """

    def __init__(
        self,
        spill: Spill,
        statuses: Callable[[], Iterable[InstanceStatus]],
        pids: Callable[[int], Iterable[int]],
        told: Mapping[str, int],
        *,
        in_ram: Callable[[Iterable[int]], int] = anonymous_bytes,
    ) -> None:
        self._spill, self._statuses, self._pids, self._told, self._in_ram = spill, statuses, pids, told, in_ram
        self._measured: dict[int, str] = {}  # leader -> model

    async def run(self) -> None:
        """Look again and again. Runs until cancelled."""
        while True:
            self.look()
            await trio.sleep(EVERY_S)

    def look(self) -> None:
        """Measure what is loaded, idle and not measured yet; forget what is gone."""
        alive = {one.pid: one for one in self._statuses() if one.pid}
        for pid in self._measured.keys() - alive.keys():
            self._spill.gone(self._measured.pop(pid))
        for pid, one in alive.items():
            idle = one.idle_s is not None and one.idle_s >= SETTLED_S
            if not idle or pid in self._measured or not one.device or one.device == "cpu" or not one.vram_bytes:
                continue
            self._measured[pid] = one.model
            in_ram = self._in_ram(self._pids(pid))
            if in_ram:  # else this system does not tell
                self._spill.measured(one.model, on_gpu=one.vram_bytes, in_ram=in_ram, told=self._told.get(one.model, 0))
