"""What the readers of supervisor/machine see of the box, as data for the rules of holds. Pure.

`Unknown` is a value like any other: a reader that cannot tell says why, the rule decides what follows from not
knowing, and people are shown the reason.
"""

from __future__ import annotations

import math

import msgspec


class Unknown(msgspec.Struct, frozen=True):
    """Nothing is known. `reason` is a phrase."""

    reason: str


class Person(msgspec.Struct, frozen=True, kw_only=True):
    """What a coordinator may know of the person at this machine.

    Attributes:
        first: no work is done while somebody uses it.
        here: somebody does; None when nobody looks, or it cannot be told.
    """

    first: bool = False
    here: bool | None = None


class Presence(msgspec.Struct, frozen=True, kw_only=True):
    """Whether somebody uses this machine.

    Attributes:
        idle_s: since the last input; infinite when nobody is logged in here.
        locked: the screen is locked, so that nobody sits there.
        occupied: what uses the machine without input (a film, a game), one phrase each.
        told_by: who says so.
    """

    idle_s: float = math.inf
    locked: bool = False
    occupied: tuple[str, ...] = ()
    told_by: str = ""


class Power(msgspec.Struct, frozen=True, kw_only=True):
    """What feeds this machine. `percent`: charge of its battery, None when it has none or does not tell."""

    on_battery: bool = False
    percent: float | None = None


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """The network. `guessed`: by the system, from the kind of connection; nobody said so."""

    metered: bool = False
    guessed: bool = False


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """Where the state folder lies."""

    folder: str
    free_bytes: int


class Gpu(msgspec.Struct, frozen=True, kw_only=True):
    """One GPU without what is ours on it.

    Attributes:
        foreign_bytes: memory in use that our processes do not hold; None when it is not told.
        foreign_busy: 0 to 1, None when not told, or while one of our engines works there: whose load it is cannot
            be known then.
        slowed: why the driver lowers its clocks ("hw-thermal-slowdown", …).
    """

    uuid: str
    foreign_bytes: int | None = None
    foreign_busy: float | None = None
    temperature_c: float | None = None
    power_w: float | None = None
    power_limit_w: float | None = None
    slowed: tuple[str, ...] = ()


class Quiet(msgspec.Struct, frozen=True, kw_only=True):
    """Quiet hours now: which, and when they end (seconds since the epoch)."""

    text: str
    until: float


class Observed(msgspec.Struct, frozen=True, kw_only=True):
    """Everything at one moment. What was not asked for stays None.

    Attributes:
        applications: names of running programs that are on the owner's list.
        quiet: None outside quiet hours.
        gpus: None as long as the GPUs are unknown.
    """

    presence: Presence | Unknown | None = None
    power: Power | Unknown | None = None
    network: Network | Unknown | None = None
    disk: Disk | Unknown | None = None
    applications: tuple[str, ...] | Unknown | None = None
    quiet: Quiet | Unknown | None = None
    gpus: tuple[Gpu, ...] | None = None
