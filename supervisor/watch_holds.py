"""Puts and lifts the holds that need no person: reads the machine, asks the rules, carries out what they wish.

Theory of operation. Every reader has a task of its own that asks it at its interval and keeps the last answer; a
reader that does not answer within `PATIENCE_S` costs nobody anything but itself, and what it is about is *unknown*
until it answers. Once a second the rules (intake/hold_rules.py) look at everything together. A wish that is new puts
a hold, one that is gone lifts it; the sentence of a hold is that of its beginning, and `findings` has those of now.

Holds of an earlier life are on disk. They are taken over as if they had been put here, and lifted as soon as their
rule says so (or at once, when it is switched off): a battery that was charged while the supervisor was down needs
no person to tell. `apply` takes another `[holds]` the same way: what its rules no longer want is lifted at once.

Only the worker's own load is never a reason to pause. What is ours on a GPU is left out before a rule sees it, our
own processes are no applications and no inhibitors, and there is no rule about the load of the processor, the disk
or the network, which could not be told from our own. Three rules look at states that our work may bring about, and
mean them all the same, because it is the machine that they spare and not somebody's use of it: a GPU that the
hardware itself slows down for heat or power (its own clocks and caps under full load do not count), the temperature
that the owner named, and a disk that is nearly full.

All methods belong to the trio thread.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, ParamSpec, Protocol, TypeVar

import trio

from supervisor.intake import hold_rules
from supervisor.intake.hold_rules import Failures, Latch, Scope, Wish
from supervisor.intake.holds import Coming, Hold, Holds, Mode, Sight, Source
from supervisor.intake.observed import Disk, Network, Observed, Person, Power, Presence, Quiet, Unknown
from supervisor.machine import load
from supervisor.machine.load import Ours
from supervisor.machine.network import network_reader
from supervisor.machine.power import power_reader
from supervisor.machine.presence import presence_reader
from supervisor.machine.readings import GpuReading
from supervisor.machine.schedule import Schedule, schedule_reader
from supervisor.settings import HoldsTable

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")

LOOK_S = 1.0
# How often each is read. Presence is what a person waits for; the others change slowly or cost more.
PRESENCE_S = 1.0
POWER_S = 2.0
APPLICATIONS_S = 2.0
DISK_S = 5.0
NETWORK_S = 15.0
# A reader that is silent for longer is not believed any more.
PATIENCE_S = 10.0

AUTOMATIC = (
    Source.SCHEDULE,
    Source.PRESENCE,
    Source.BATTERY,
    Source.THERMAL,
    Source.FOREIGN_VRAM,
    Source.APPLICATION,
    Source.DISK,
    Source.NETWORK,
)


class Keeper(Protocol):
    """Who keeps the list of holds (`supervisor.pausing.Pausing`)."""

    def holds(self) -> Holds:
        """Those in force."""

    def put(
        self, source: Source, reason: str = "", *, for_s: float | None = None, mode: Mode = Mode.STOP, gpu: str = ""
    ) -> Hold:
        """Hold from now on; replaces an earlier hold of this source and scope."""

    def lift(self, source: Source, *, gpu: str = "") -> bool:
        """Lift the hold of this source and scope; False when there was none."""


class Gpus(Protocol):
    """What is asked of the GPU telemetry (`supervisor.machine.telemetry.GpuWatch`)."""

    @property
    def available(self) -> bool:
        """Whether there is a GPU and its state is known."""

    @property
    def no_gpu(self) -> bool:
        """Whether it is known that there is none."""

    def readings(self) -> Mapping[str, GpuReading]:
        """The latest of each GPU."""


class Readers(NamedTuple):
    """Who reads what. `close` is called when nobody reads any more."""

    presence: Callable[[], Awaitable[Presence | Unknown]]
    power: Callable[[], Awaitable[Power | Unknown]]
    network: Callable[[], Awaitable[Network | Unknown]]
    disk: Callable[[], Awaitable[Disk | Unknown]]
    applications: Callable[[Sequence[str], frozenset[int]], Awaitable[tuple[str, ...] | Unknown]]
    close: Callable[[], None] = lambda: None


def system_readers(state: Path) -> Readers:
    """Those of this system. `state`: the folder whose disk must not become full."""
    presence, network = presence_reader(), network_reader()

    def close() -> None:
        presence.close()
        network.close()

    return Readers(
        presence=presence.read,
        power=threaded(power_reader()),
        network=network.read,
        disk=threaded(functools.partial(load.free_space, state)),
        applications=threaded(load.running),
        close=close,
    )


def threaded(read: Callable[P, T]) -> Callable[P, Awaitable[T]]:
    """The same in a thread, one at a time: one that is stuck (a network disk) is left alone, and no second joins it.

    Cancellation: the thread is left to itself.
    """
    limiter = trio.CapacityLimiter(1)

    async def read_in_thread(*args: P.args, **named: P.kwargs) -> T:
        call = functools.partial(read, *args, **named)
        return await trio.to_thread.run_sync(call, abandon_on_cancel=True, limiter=limiter)

    return read_in_thread


class WatchHolds:
    """See the module.

    Args:
        table: `[holds]`.
        ours: what is ours on this machine at this moment.
        now: wall clock, in seconds since the epoch.
    """

    def __init__(
        self,
        table: HoldsTable,
        keeper: Keeper,
        readers: Readers,
        gpus: Gpus,
        ours: Callable[[], Ours],
        now: Callable[[], float] = time.time,
    ) -> None:
        self._table, self._keeper, self._readers, self._gpus, self._ours = table, keeper, readers, gpus, ours
        self._now = now
        self._seen: dict[str, object] = {}
        self._findings: dict[Scope, str] = {}
        self._failures = Failures()
        found = [(hold.source, hold.gpu) for hold in keeper.holds().items if hold.source in AUTOMATIC]
        self._latches: dict[Scope, Latch] = {scope: Latch(held=True) for scope in found}
        self._schedule: Schedule | Unknown | None = None
        self._applied = trio.Event()
        self.apply(table)

    def apply(self, table: HoldsTable) -> None:
        """Go on with another `[holds]`: its rules are asked at once, with what has been read so far.

        Holds whose rule it no longer has are lifted, those whose mode or end it changes are changed.
        """
        if table.applications.names != self._table.applications.names:
            self._seen.pop("applications", None)  # that was an answer to another question
        self._table = table
        self._applied.set()  # readers and rules look again
        self._applied = trio.Event()
        self._schedule = schedule_reader(table.schedule.quiet, table.schedule.time_zone)
        if isinstance(self._schedule, Unknown):
            log.error("[holds.schedule]: %s; there are no quiet hours until it is mended", self._schedule.reason)

    def findings(self) -> Mapping[Scope, str]:
        """What each rule sees now, with its numbers, whether it holds or not."""
        return self._findings

    def unknown(self) -> dict[Source, str]:
        """What is asked for and cannot be told, with the reason: shown to the owner."""
        asked = {
            Source.PRESENCE: ("presence", self._table.presence.mode),
            Source.BATTERY: ("power", self._table.battery.mode),
            Source.NETWORK: ("network", self._table.network.mode),
            Source.DISK: ("disk", self._table.disk.mode),
            Source.APPLICATION: ("applications", self._table.applications.mode),
        }
        found = {
            source: seen.reason
            for source, (name, mode) in asked.items()
            if mode != "off" and isinstance(seen := self._seen.get(name), Unknown)
        }
        if self._table.schedule.mode != "off" and isinstance(self._schedule, Unknown):
            found[Source.SCHEDULE] = self._schedule.reason
        return found

    def sights(self) -> tuple[Sight, ...]:
        """`findings` and `unknown` as one list for the owner, what cannot be told first."""
        unknown = self.unknown()
        blind = [Sight(source=source, text=text, unknown=True) for source, text in unknown.items()]
        seen = [
            Sight(source=source, gpu=gpu, text=text)
            for (source, gpu), text in self._findings.items()
            if source not in unknown
        ]
        return (*blind, *seen)

    def person(self) -> Person:
        """What a coordinator is told of whoever sits here; nothing where the owner has not made it a rule."""
        table, seen = self._table.presence, self._last("presence", Presence)
        if table.mode == "off" or (isinstance(seen, Unknown) and table.when_unknown == "work"):
            return Person()
        if not isinstance(seen, Presence):
            return Person(first=True)
        return Person(first=True, here=hold_rules.presence(table, seen).level is hold_rules.Level.ENTER)

    def coming(self) -> tuple[Coming, ...]:
        """Holds that are known to begin: quiet hours of the coming week."""
        if self._table.schedule.mode == "off" or not isinstance(self._schedule, Schedule):
            return ()
        found = self._schedule.next(self._now())
        return () if found is None else (Coming(source=Source.SCHEDULE, text=f"quiet hours {found[1]}", at=found[0]),)

    # ---- engine failures

    def note_good(self) -> None:
        """A job was done."""
        self._failures = self._failures.good()

    def note_bad(self, what: str) -> None:
        """An instance ended badly. `what`: a phrase."""
        self._failures, wish, pause_s = self._failures.bad(self._table.engine_failures, what)
        if wish is not None:
            self._keeper.put(wish.source, wish.reason, for_s=pause_s, mode=wish.mode)

    # ---- the tasks

    async def run(self) -> None:
        """Read and act until cancelled. Cancellation: holds stay as they are; they are on disk."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep, "presence", PRESENCE_S, self._read_presence)
                nursery.start_soon(self._keep, "power", POWER_S, self._read_power)
                nursery.start_soon(self._keep, "network", NETWORK_S, self._read_network)
                nursery.start_soon(self._keep, "disk", DISK_S, self._read_disk)
                nursery.start_soon(self._keep, "applications", APPLICATIONS_S, self._read_applications)
                while True:
                    self.look()
                    await self._rest(LOOK_S)
        finally:
            self._readers.close()

    async def _keep(self, name: str, interval_s: float, read: Callable[[], Awaitable[object]]) -> None:
        """Ask one reader again and again, and keep its answer. A rule that is switched off asks nobody."""
        while True:
            with trio.move_on_after(PATIENCE_S) as patience:
                self._note(name, await read())
            if patience.cancelled_caught:
                self._note(name, Unknown(f"no answer within {PATIENCE_S:g} s"))
            await self._rest(interval_s)

    async def _rest(self, interval_s: float) -> None:
        """Until it is time again, or another `[holds]` counts."""
        with trio.move_on_after(interval_s):
            await self._applied.wait()

    def _note(self, name: str, seen: object) -> None:
        before = self._seen.get(name)
        if isinstance(seen, Unknown) and seen != before:
            log.info("%s is unknown: %s", name, seen.reason)
        self._seen[name] = seen

    async def _read_presence(self) -> Presence | Unknown | None:
        return None if self._table.presence.mode == "off" else await self._readers.presence()

    async def _read_network(self) -> Network | Unknown | None:
        return None if self._table.network.mode == "off" else await self._readers.network()

    async def _read_power(self) -> Power | Unknown | None:
        return None if self._table.battery.mode == "off" else await self._readers.power()

    async def _read_disk(self) -> Disk | Unknown | None:
        return None if self._table.disk.mode == "off" else await self._readers.disk()

    async def _read_applications(self) -> tuple[str, ...] | Unknown | None:
        table = self._table.applications
        if table.mode == "off" or not table.names:
            return None
        return await self._readers.applications(table.names, self._ours().pids)

    # ---- acting

    def look(self) -> None:
        """Ask the rules once, and put and lift what follows."""
        entries = list(hold_rules.rules(self._table, self._observed(), self._latches))
        self._findings = {entry.scope: entry.finding.text for entry in entries}
        self._latches, wishes = hold_rules.judge(self._latches, entries, trio.current_time())
        wished = {wish.scope: wish for wish in wishes}
        there = {(hold.source, hold.gpu): hold for hold in self._keeper.holds().items if hold.source in AUTOMATIC}
        for scope, wish in wished.items():
            if not self._is_there(wish, there.get(scope)):
                for_s = None if wish.until is None else max(0.0, wish.until - self._now())
                self._keeper.put(wish.source, wish.reason, for_s=for_s, mode=wish.mode, gpu=wish.gpu)
        for source, gpu in there.keys() - wished.keys():
            self._keeper.lift(source, gpu=gpu)
        if self._table.engine_failures.mode == "off":
            self._failures = Failures()
            if any(hold.source is Source.ENGINE_FAILURES for hold in self._keeper.holds().items):
                self._keeper.lift(Source.ENGINE_FAILURES)

    def _is_there(self, wish: Wish, hold: Hold | None) -> bool:
        """Whether a hold is what is wished; its numbers may be those of its beginning."""
        if hold is None or hold.mode is not wish.mode:
            return False
        if wish.until is None or hold.until is None:
            return wish.until is hold.until
        return abs(wish.until - hold.until) < LOOK_S

    def _observed(self) -> Observed:
        gpus = load.foreign(self._gpus.readings(), self._ours()) if self._gpus.available else None
        return Observed(
            presence=self._last("presence", Presence),
            power=self._last("power", Power),
            network=self._last("network", Network),
            disk=self._last("disk", Disk),
            applications=self._last("applications", tuple),
            quiet=self._quiet(),
            gpus=() if self._gpus.no_gpu else gpus,
        )

    def _last(self, name: str, type_: type[T]) -> T | Unknown | None:
        seen = self._seen.get(name)
        return seen if isinstance(seen, (type_, Unknown)) else None

    def _quiet(self) -> Quiet | Unknown | None:
        return self._schedule.at(self._now()) if isinstance(self._schedule, Schedule) else self._schedule
