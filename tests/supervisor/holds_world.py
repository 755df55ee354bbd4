"""A machine for tests of automatic holds: fake readers, a list of holds in memory, a clock that the test moves."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import trio

from supervisor.intake.holds import Hold, Holds, Mode, Source
from supervisor.intake.observed import Disk, Network, Power, Presence
from supervisor.machine.load import Ours
from supervisor.machine.readings import GpuProcess, GpuReading
from supervisor.settings import HoldsTable
from supervisor.watch_holds import Readers, WatchHolds

GIB = 2**30
NOON = 1_795_262_400.0  # 2026-11-21 12:00 UTC, a Saturday


class Clock:
    def __init__(self) -> None:
        self.ahead = NOON - trio.current_time()

    def __call__(self) -> float:
        return trio.current_time() + self.ahead


class Kept:
    """A list of holds in memory; `story` is what was put and lifted, and when."""

    def __init__(self, clock: Clock, *items: Hold) -> None:
        self._clock, self._holds, self._start = clock, Holds(items), trio.current_time()
        self.story: list[tuple[float, str, Source]] = []
        self.puts: list[Hold] = []
        self._changed = trio.Event()

    def holds(self) -> Holds:
        return self._holds.at(self._clock())

    def put(
        self,
        source: Source,
        reason: str = "",
        *,
        for_s: float | None = None,
        mode: Mode = Mode.STOP,
        gpu: str = "",
    ) -> Hold:
        now = self._clock()
        until = None if for_s is None else now + for_s
        hold = Hold(source=source, reason=reason, since=now, until=until, mode=mode, gpu=gpu)
        self._holds = self.holds().put(hold)
        self.puts.append(hold)
        self._note("put", source)
        return hold

    def lift(self, source: Source, *, gpu: str = "") -> bool:
        before = self.holds()
        self._holds = before.lift(source, gpu=gpu)
        self._note("lift", source)
        return self._holds != before

    async def until(self, *sources: Source) -> None:
        """Wait until there are holds of exactly these. Raises trio.TooSlowError; for tests on the real clock."""
        with trio.fail_after(30):
            while {hold.source for hold in self.holds().items} != set(sources):
                await self._changed.wait()

    def _note(self, what: str, source: Source) -> None:
        self._changed.set()
        self._changed = trio.Event()
        self.story.append((round(trio.current_time() - self._start), what, source))


class Gpus:
    def __init__(self) -> None:
        self.found: dict[str, GpuReading] = {}
        self.no_gpu = False

    @property
    def available(self) -> bool:
        return bool(self.found)

    def readings(self) -> dict[str, GpuReading]:
        return self.found

    def show(self, used: float, *, ours: float = 0, uuid: str = "GPU-1", listed: bool = True, **more: Any) -> None:
        processes = (GpuProcess(pid=7, bytes=int(ours * GIB)),) if listed else ()
        reading = GpuReading(uuid=uuid, memory_used_bytes=int(used * GIB), processes=processes, **more)
        self.found = {**self.found, uuid: reading}


class World:
    """What the readers see; the test changes it."""

    def __init__(self, table: HoldsTable, *kept: Hold) -> None:
        self.presence: Any = Presence()
        self.power: Any = Power()
        self.network: Any = Network()
        self.disk: Any = Disk(folder="/state", free_bytes=100 * GIB)
        self.applications: Any = ()
        self.asked: set[str] = set()
        self.hangs: set[str] = set()
        self.closed = False
        self.gpus = Gpus()
        self.ours = Ours(pids=frozenset({7}))
        self.clock = Clock()
        self.keeper = Kept(self.clock, *kept)
        readers = Readers(
            presence=self._reader("presence"),
            power=self._reader("power"),
            network=self._reader("network"),
            disk=self._reader("disk"),
            applications=self._reader("applications"),
            close=self._close,
        )
        self.watch = WatchHolds(table, self.keeper, readers, self.gpus, lambda: self.ours, self.clock)

    def _close(self) -> None:
        self.closed = True

    def _reader(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def read(*_arguments: object) -> Any:
            self.asked.add(name)
            if name in self.hangs:
                await trio.sleep_forever()
            await trio.lowlevel.checkpoint()
            return getattr(self, name)

        return read

    def reason(self, gpu: str = "") -> str:
        return self.keeper.holds().reason(gpu=gpu)
