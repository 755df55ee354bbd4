"""When the worker steps aside by itself, and when it goes on. Pure: what was seen and the time come in, wishes go out.

Theory of operation. A rule looks at what was seen and answers with a `Level` and a sentence that has the numbers:

    ENTER    reason enough for a hold                    (battery 12 %, at or below 20 %)
    LEAVE    no reason for one                           (plugged in, 80 %)
    BETWEEN  the dead band, or nothing new is known: whatever was, stays

A latch turns levels into a hold: ENTER has to last for the rule's `enter_s`, LEAVE for its `leave_s`; in between the
clock of either starts again. So neither a reading that jumps around one number nor a plug that is pulled for a moment
makes the worker come and go.

    free ──ENTER for enter_s──► held          free ──anything else──► free
    held ──LEAVE for leave_s──► free          held ──anything else──► held

Only the worker's own load is never a reason: what the rules see of GPUs is without our own processes (observed.py),
a power cap that is met under load does not count, and our processes are not looked for among applications. What is
*unknown* holds nothing, except where the owner wants it so, and ends nothing that is worse when it is wrong: a hold
for heat, foreign memory or a full disk stays until something is known again.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import msgspec

from supervisor.intake.holds import Mode, Source
from supervisor.intake.observed import Disk, Gpu, Network, Observed, Power, Presence, Quiet, Unknown
from supervisor.intake.residency import gib
from supervisor.settings import (
    ApplicationsTable,
    BatteryTable,
    DiskTable,
    EngineFailuresTable,
    ForeignVramTable,
    HoldsTable,
    NetworkTable,
    PresenceTable,
    ScheduleTable,
    ThermalTable,
)

MODES = {"stop": Mode.STOP, "unload": Mode.UNLOAD, "abort": Mode.ABORT}
# Names as engines/telemetry/reader.py gives them. "hw-slowdown" stands for any of the hardware's reasons and
# comes with the one that matters; "sw-thermal-slowdown" and "sw-power-cap" are how a GPU under full load lives.
SLOWED = {"hw-thermal-slowdown": "is slowed down for heat", "hw-power-brake": "is slowed down for want of power"}
# The ends of holds after engine failures.
LONGEST_PAUSE_S = 86_400.0

Scope = tuple[Source, str]  # source and GPU; "" is the whole worker


class Level(enum.Enum):
    """See the module."""

    ENTER = enum.auto()
    BETWEEN = enum.auto()
    LEAVE = enum.auto()


class Finding(NamedTuple):
    """What one rule says of one moment.

    Attributes:
        text: a phrase with the numbers.
        until: when it ends by itself (seconds since the epoch), where that is known.
    """

    level: Level
    text: str
    until: float | None = None


class Patience(NamedTuple):
    """How long a level has to last, in seconds."""

    enter_s: float
    leave_s: float


AT_ONCE = Patience(0.0, 0.0)


class Latch(msgspec.Struct, frozen=True):
    """One hold to be. `since`: when what speaks against the present state began; None when nothing does."""

    held: bool = False
    since: float | None = None


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """A hold that shall be there. `until` is of the wall clock; None means as long as it is wished."""

    source: Source
    reason: str
    mode: Mode = Mode.STOP
    gpu: str = ""
    until: float | None = None

    @property
    def scope(self) -> Scope:
        """What it is the hold of."""
        return self.source, self.gpu


class Entry(NamedTuple):
    """One rule's answer with what is needed to make a wish of it."""

    scope: Scope
    mode: str
    patience: Patience
    finding: Finding


def step(latch: Latch, level: Level, now: float, patience: Patience) -> Latch:
    """The next state of a latch; the transitions are in the module's text. `now`: of a clock that is never set."""
    against = Level.LEAVE if latch.held else Level.ENTER
    if level is not against:
        return Latch(latch.held)
    since = now if latch.since is None else latch.since
    wait_s = patience.leave_s if latch.held else patience.enter_s
    return Latch(not latch.held) if now - since >= wait_s else Latch(latch.held, since)


def judge(
    latches: Mapping[Scope, Latch], entries: Iterable[Entry], now: float
) -> tuple[dict[Scope, Latch], tuple[Wish, ...]]:
    """One step of every rule.

    Args:
        latches: of the step before; what has no entry any more (a rule switched off, a GPU gone) is forgotten.

    Returns:
        The latches after it, and the holds that shall be there now.
    """
    after: dict[Scope, Latch] = {}
    wishes = []
    for scope, mode, patience, finding in entries:
        after[scope] = step(latches.get(scope, Latch()), finding.level, now, patience)
        if after[scope].held:
            source, gpu = scope
            wishes.append(Wish(source=source, gpu=gpu, reason=finding.text, mode=MODES[mode], until=finding.until))
    return after, tuple(wishes)


def rules(table: HoldsTable, seen: Observed, known: Iterable[Scope] = ()) -> Iterator[Entry]:
    """Every rule that is not switched off.

    Args:
        known: scopes with a latch; while the GPUs are unknown, theirs stay as they are.
    """
    yield from _simple(table, seen)
    for source, mode in ((Source.THERMAL, table.thermal.mode), (Source.FOREIGN_VRAM, table.foreign_vram.mode)):
        if mode == "off":
            continue
        if seen.gpus is None:
            for scope in known:
                if scope[0] is source:
                    yield Entry(scope, mode, AT_ONCE, Finding(Level.BETWEEN, "nothing is known of the GPUs just now"))
        for gpu in seen.gpus or ():
            if source is Source.THERMAL:
                patience, finding = _patience(table.thermal), thermal(table.thermal, gpu)
            else:
                patience, finding = _patience(table.foreign_vram), foreign_vram(table.foreign_vram, gpu)
            yield Entry((source, gpu.uuid), mode, patience, finding)


def _simple(table: HoldsTable, seen: Observed) -> Iterator[Entry]:
    """Those about the worker as a whole."""
    if table.schedule.mode != "off" and table.schedule.quiet:
        yield Entry((Source.SCHEDULE, ""), table.schedule.mode, AT_ONCE, schedule(table.schedule, seen.quiet))
    if table.presence.mode != "off":
        patience = Patience(table.presence.enter_s, 0.0)  # the time without input is its patience
        yield Entry((Source.PRESENCE, ""), table.presence.mode, patience, presence(table.presence, seen.presence))
    if table.battery.mode != "off":
        found = battery(table.battery, seen.power)
        yield Entry((Source.BATTERY, ""), table.battery.mode, _patience(table.battery), found)
    if table.applications.mode != "off" and table.applications.names:
        patience = Patience(0.0, table.applications.leave_s)
        found = applications(table.applications, seen.applications)
        yield Entry((Source.APPLICATION, ""), table.applications.mode, patience, found)
    if table.disk.mode != "off":
        yield Entry((Source.DISK, ""), table.disk.mode, _patience(table.disk), disk(table.disk, seen.disk))
    if table.network.mode != "off":
        found = network(table.network, seen.network)
        yield Entry((Source.NETWORK, ""), table.network.mode, _patience(table.network), found)


def _patience(table: BatteryTable | ThermalTable | ForeignVramTable | DiskTable | NetworkTable) -> Patience:
    return Patience(table.enter_s, table.leave_s)


# ---- the rules


def schedule(_table: ScheduleTable, quiet: Quiet | Unknown | None) -> Finding:
    """Quiet hours."""
    if isinstance(quiet, Unknown):
        return Finding(Level.BETWEEN, quiet.reason)
    if quiet is None:
        return Finding(Level.LEAVE, "no quiet hours now")
    return Finding(Level.ENTER, f"quiet hours {quiet.text}", quiet.until)


def presence(table: PresenceTable, seen: Presence | Unknown | None) -> Finding:
    """Somebody at the machine: input lately, or what runs without input. A locked screen means that nobody is.

    When the readers cannot tell, `when_unknown` decides, and the sentence says so.
    """
    if seen is None:
        return Finding(Level.BETWEEN, "presence has not been read yet")
    if isinstance(seen, Unknown):
        level = Level.ENTER if table.when_unknown == "hold" else Level.LEAVE
        return Finding(level, f"whether somebody is here is unknown: {seen.reason}")
    if seen.occupied:
        return Finding(Level.ENTER, " and ".join(seen.occupied))
    if seen.locked:
        return Finding(Level.LEAVE, "the screen is locked")
    if math.isinf(seen.idle_s):
        return Finding(Level.LEAVE, "nobody is logged in here")
    text = f"last input {_span(seen.idle_s)} ago; free after {_span(table.idle_s)} without"
    return Finding(Level.LEAVE if seen.idle_s >= table.idle_s else Level.ENTER, text)


def battery(table: BatteryTable, power: Power | Unknown | None) -> Finding:
    """On battery and low enough; then until it is plugged in and charged enough. The two levels do not touch."""
    if power is None:
        return Finding(Level.BETWEEN, "the battery has not been read yet")
    if isinstance(power, Unknown):
        return Finding(Level.LEAVE, f"the battery is unknown: {power.reason}")
    charge = "" if power.percent is None else f" at {power.percent:.0f} %"
    if power.on_battery:
        low = power.percent is None or power.percent <= table.below_percent
        limit = "" if table.below_percent >= 100 else f", held at {table.below_percent:g} % or less"
        return Finding(Level.ENTER if low else Level.BETWEEN, f"on battery{charge}{limit}")
    if power.percent is not None and power.percent < table.above_percent:
        return Finding(Level.BETWEEN, f"charging{charge}, goes on from {table.above_percent:g} %")
    return Finding(Level.LEAVE, f"plugged in{charge}")


def thermal(table: ThermalTable, gpu: Gpu) -> Finding:
    """The hardware slows itself down, or the owner's temperature is reached."""
    heat = "" if gpu.temperature_c is None else f"{gpu.temperature_c:.0f} °C"
    for word, phrase in SLOWED.items():
        if word in gpu.slowed:
            return Finding(Level.ENTER, " at ".join(filter(None, [phrase, heat, _watts(gpu)])))
    if not table.celsius:
        return Finding(Level.LEAVE, heat or "no slowdown")
    if gpu.temperature_c is None:
        return Finding(Level.BETWEEN, "the temperature is not told")
    leave = table.celsius - table.cooler_by
    text = f"{heat}, held from {table.celsius:g} °C until {leave:g} °C"
    if gpu.temperature_c >= table.celsius:
        return Finding(Level.ENTER, text)
    return Finding(Level.LEAVE if gpu.temperature_c <= leave else Level.BETWEEN, text)


def _watts(gpu: Gpu) -> str:
    if gpu.power_w is None:
        return ""
    return f"{gpu.power_w:.0f} W" + (f" of {gpu.power_limit_w:.0f} W" if gpu.power_limit_w else "")


def foreign_vram(table: ForeignVramTable, gpu: Gpu) -> Finding:
    """Memory that others hold on this GPU, or the time that they keep it busy."""
    if table.busy and gpu.foreign_busy is not None and gpu.foreign_busy >= table.busy:
        return Finding(Level.ENTER, f"others keep it {gpu.foreign_busy:.0%} busy, held from {table.busy:.0%}")
    if gpu.foreign_bytes is None:
        return Finding(Level.BETWEEN, "what others hold is not told")
    held = gpu.foreign_bytes
    leave_gb = min(table.leave_gb, table.enter_gb)
    text = f"others hold {gib(held)}, held from {table.enter_gb:g} GiB until {leave_gb:g} GiB"
    if held >= table.enter_gb * 2**30:
        return Finding(Level.ENTER, text)
    if held > leave_gb * 2**30:
        return Finding(Level.BETWEEN, text)
    if table.busy and gpu.foreign_busy is None:  # ours works: whether others do, too, cannot be seen
        return Finding(Level.BETWEEN, text)
    return Finding(Level.LEAVE, text)


def applications(_table: ApplicationsTable, running: tuple[str, ...] | Unknown | None) -> Finding:
    """A program on the owner's list runs."""
    if running is None:
        return Finding(Level.BETWEEN, "programs have not been looked at yet")
    if isinstance(running, Unknown):
        return Finding(Level.LEAVE, f"running programs are unknown: {running.reason}")
    if running:
        return Finding(Level.ENTER, f"{', '.join(running)} {'runs' if len(running) == 1 else 'run'}")
    return Finding(Level.LEAVE, "none of the listed programs runs")


def disk(table: DiskTable, seen: Disk | Unknown | None) -> Finding:
    """Little space where results and scratch files go."""
    if seen is None or isinstance(seen, Unknown):
        return Finding(Level.BETWEEN, "free space is not known" + (f": {seen.reason}" if seen else ""))
    enough_gb = max(table.enough_gb, table.floor_gb)
    text = f"{gib(seen.free_bytes)} free at {seen.folder}, held below {table.floor_gb:g} GiB until {enough_gb:g} GiB"
    if seen.free_bytes < table.floor_gb * 2**30:
        return Finding(Level.ENTER, text)
    return Finding(Level.LEAVE if seen.free_bytes >= enough_gb * 2**30 else Level.BETWEEN, text)


def network(table: NetworkTable, seen: Network | Unknown | None) -> Finding:
    """A connection that is paid by volume."""
    if seen is None:
        return Finding(Level.BETWEEN, "the network has not been read yet")
    if isinstance(seen, Unknown):
        return Finding(Level.LEAVE, f"whether the network is metered is unknown: {seen.reason}")
    if seen.metered and (table.guesses or not seen.guessed):
        return Finding(Level.ENTER, "the connection is metered" + (", by the system's guess" if seen.guessed else ""))
    return Finding(Level.LEAVE, "the connection is not metered")


def _span(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# ---- engine failures: events instead of readings


class Failures(msgspec.Struct, frozen=True):
    """Bad ends in a row, over all models.

    Attributes:
        count: since the last good job.
        pauses: holds since then: each is twice as long as the one before it.
    """

    count: int = 0
    pauses: int = 0

    def good(self) -> Failures:
        """After a job that was done."""
        return Failures()

    def bad(self, table: EngineFailuresTable, what: str) -> tuple[Failures, Wish | None, float]:
        """After a bad end.

        Args:
            what: a phrase about it.

        Returns:
            The state after it, the hold it asks for (None for none), and for how many seconds.
        """
        count = self.count + 1
        if table.mode == "off" or count < table.after:
            return Failures(count, self.pauses), None, 0.0
        pause_s = min(table.pause_s * 2.0 ** min(self.pauses, 32), LONGEST_PAUSE_S)
        text = f"{count} bad ends in a row, the last: {what}; tried again after {_span(pause_s)}"
        wish = Wish(source=Source.ENGINE_FAILURES, reason=text, mode=MODES[table.mode])
        return Failures(count, self.pauses + 1), wish, pause_s
